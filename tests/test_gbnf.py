"""What llama.cpp takes for a grammar, and what it survives: our reader against its own."""

from __future__ import annotations

import time

import pytest
from child import run_child
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from llama_sessions import OptionError
from llama_sessions.gbnf import MAX_READINGS, MAX_WAYS, NamedToken, check_gbnf
from llama_sessions.gbnf_rules import place
from llama_sessions.gbnf_text import MAX_CHARS, MAX_ELEMENTS, MAX_NESTING, MAX_RULES

# llama.cpp's own answer in a child process: for what we accept, its compiled grammar is also walked.
CHILD = """
import os, random, resource, signal, sys
import numpy as np
import llama_cpp
from llama_sessions import OptionError, builtin_model
from llama_sessions.gbnf import check_gbnf
from llama_sessions.llama.deep_stack import on_a_deep_stack
from llama_sessions.llama.grammar import CANDIDATE, Grammar
from llama_sessions.llama.model import Model

resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
signal.alarm(100)
model = Model.load(builtin_model())
vocab = model.vocab()

def taken(text):
    # Whether llama.cpp takes it.
    with vocab.held() as handle:
        init = lambda: llama_cpp.llama_sampler_init_grammar(handle, text.encode(), b"root")
        sampler = on_a_deep_stack(init, "this test needs")
    if sampler:
        llama_cpp.llama_sampler_free(sampler)
    return bool(sampler)

def walk(grammar, rng, n):
    # Take n random allowed tokens, or as many as there are.
    cur = np.zeros(vocab.n_tokens, CANDIDATE)
    for i in range(n):
        cur["id"], cur["logit"] = np.arange(vocab.n_tokens), 0
        grammar.restrict(cur, vocab.n_tokens)
        allowed = np.flatnonzero(np.isfinite(cur["logit"]))
        if not len(allowed):
            return i
        token = int(rng.choice(allowed.tolist()))
        grammar.accept(token)
        if vocab.is_eog(token):
            return i + 1
    return n
"""


def in_child(code: str, *args: str) -> str:
    return run_child(CHILD + code, *args)


# -- places


@pytest.mark.parametrize(
    ("text", "at", "shown"),
    [
        ("abc", 0, "line 1, column 1"),
        ("abc", 3, "line 1, column 4"),
        ("a\nbc", 3, "line 2, column 2"),
        ("a\r\nb\rc", 5, "line 3, column 1"),
        ("é日\n日x", 4, "line 2, column 2"),
    ],
)
def test_a_place_is_a_line_and_a_column_in_characters(text: str, at: int, shown: str) -> None:
    assert place(text, at) == shown


BAD = [
    # text, place, what
    ("", "", "there is no rule 'root' to begin with; there is no rule at all"),
    ("x ::= \"a\"\ny ::= x", "", "there is no rule 'root' to begin with; there is x, y"),
    ('root = "a"', "line 1, column 6", "expected '::=' after the rule's name 'root', found '= \"a\"'"),
    ('root ::= "a', "line 1, column 12", "expected the '\"' that closes the '\"' of line 1, column 10, found the end"),
    ('root ::= "a\nb', "line 2, column 2", "expected the '\"'"),
    (r'root ::= "\q"', "line 1, column 11", r"expected an escape: \n \r \t"),
    (r'root ::= "\x4"', "line 1, column 11", "expected an escape"),
    (r'root ::= [\u12]', "line 1, column 11", "expected an escape"),
    ("root ::= [a", "line 1, column 12", "expected the ']' that closes the '[' of line 1, column 10"),
    ("root ::= [a-", "line 1, column 13", "expected the ']'"),
    ('root ::= ("a" | b\nb ::= "b"', "line 2, column 3", "that closes the '(' of line 1, column 10, found '::= "),
    ('root ::= "a")', "line 1, column 13", "expected an item, '|' or the end of the line, found ')'"),
    ('root ::= "a"\n | "b"', "line 2, column 2", "expected the name of a rule"),
    ("root ::= *", "line 1, column 10", "expected an item before '*'"),
    ('root ::= ""+', "line 1, column 12", "expected an item before '+'"),
    ('root ::= ( | "a" | {3} )', "line 1, column 20", "expected an item before '{'"),
    ('root ::= "a"{0}*', "line 1, column 16", "expected an item before '*'"),
    ('root ::= "a"{x}', "line 1, column 14", "expected a number of repeats, found 'x}'"),
    ('root ::= "a"{3', "line 1, column 15", "expected ',' or '}', found the end"),
    ('root ::= "a"{3,x}', "line 1, column 16", "expected '}' or a number of repeats"),
    ('root ::= "a"{3,4x', "line 1, column 17", "expected '}', found 'x'"),
    ('root ::= "a"{5,3}', "line 1, column 16", "expected at most as many repeats as at least, 5, found '3}'"),
    ('root ::= "a"{2001}', "line 1, column 14", "expected at most 2000 repeats"),
    ('root ::= "a"{1,2001}', "line 1, column 16", "expected at most 2000 repeats"),
    ('root ::= "a"{18446744073709551616}', "line 1, column 14", "expected at most 2000 repeats"),
    ('root ::= "a"{2}{1001}', "line 1, column 16", "1001 repeats of an item that counts for 2 itself"),
    ('root ::= ("a" | "b"){2}{1001}', "line 1, column 24", "1001 repeats of an item that counts for 2 itself"),
    ('root ::= ("a"? "b"?){700}', "line 1, column 21", "700 repeats of an item that counts for 3 itself"),
    ("root ::= a", "line 1, column 10", "rule 'a' is used and nowhere defined"),
    ('root ::= "a"\nb ::= root c_d', "line 2, column 13", "expected an item, '|' or the end of the line, found '_d'"),
    ("root ::= <5>x<", "line 1, column 15", "expected the '>' that closes the '<' of line 1, column 14"),
    ("root ::= <[x]>", "line 1, column 12", "expected a token id, found 'x]>'"),
    ("root ::= <[5>", "line 1, column 13", "expected ']>' after the token id"),
    ("root ::= <[4294967296]>", "line 1, column 12", "expected a token id of at most 4294967295"),
    ("root ::= !x", "line 1, column 11", "expected a token, '<name>' or '<[id]>'"),
    ('root ::= "a\0b"', "line 1, column 12", "a NUL character"),
    ("é ::= 1", "line 1, column 1", "expected the name of a rule"),
    ('root ::= root "a" | "b"', "line 1, column 1", "rule 'root' may begin with itself: root -> root"),
    ('root ::= a\na ::= b "x"\nb ::= a', "line 2, column 1", "rule 'a' may begin with itself: a -> b -> a"),
    ('root ::= a root "y" | "x"\na ::= b\nb ::= ""', "line 1, column 1", "root -> root"),
    ('root ::= ("x"? "y"*){2} root "z" | "q"', "line 1, column 1", "root -> root"),
    ('root ::= ("" | "x")*', "line 1, column 20", "what is repeated without limit may be empty"),
    ('root ::= a+\na ::= "" | "x"', "line 1, column 11", "what is repeated without limit may be empty"),
    ('root ::= "x"**', "line 1, column 14", "what is repeated without limit may be empty"),
    ('root ::= (a root)*\na ::= "x"?', "line 1, column 1:", "rule 'root' may begin with itself: root -> root"),
    ('root ::= "a" <[5]>', "line 1, column 14", "a token comes after characters"),
    ('root ::= "a" b <[5]>\nb ::= ""', "line 1, column 16", "a token comes after characters"),
    ('root ::= (a b)*\na ::= <[5]> [a-z]*\nb ::= !<[7]>?', "line 1, column 10", "a token comes after characters"),
    ('root ::= ([a-z] <[5]>? | !<[3]>)+', "line 1, column 1:", "a token comes after characters"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "where", "what"), BAD)
def test_a_bad_grammar_is_refused_with_its_place(text: str, where: str, what: str) -> None:
    with pytest.raises(OptionError) as e:
        check_gbnf(text)
    assert str(e.value).startswith(f"grammar: {where}")
    assert what in str(e.value)


GOOD = [
    'root ::= "a"',
    "root ::= ",
    "root ::= []\n",
    'root ::= | "a"',
    "  # first\r\n\troot ::= # nothing\n\n [^] \r b ::= root\r\n\r\n",
    'root ::= (\n"a"\r\n|\n # c\n "b"\n)\n',
    'root ::= "a" | \n "b"',
    'root ::=\n\n"a"',
    "root ::= [a-z-9] [-a] [a-] [a--] [\\]\\[] [^^] [^a-]",
    'root ::= "\\x41\\u00e9\\U0001F600\\n\\r\\t\\\\\\"\\[\\]\\-" "é日😀"',
    "root ::= .{2} .* .?",
    'root ::= "a"{2} "b"{2,} "c"{2,3} "d"{0,0} "e"{ 1 , 2 }',
    'root ::= ("a" "b"{ \n1\n,\n2\n})',
    'root ::= "x"{2000}',
    'root ::= "x"{0,2000} ("a" | "b"){1000}',
    'root ::= "a" root | ""',
    'root ::= a+ "z"\na ::= b? c?\nb ::= "x"\nc ::= "y"',
    'root ::= (("x"* "y"?) [0-9]?)* "z"',
    'root ::= a "x"\na ::= "b"\na ::= "c"',
    "root ::= <[5]> !<[7]>* <[99999]>",
    'root ::= !<|im_end|>* <|im_end|> "a"+',
    'root ::= a\na-b ::= a\n3 ::= a-b\na ::= 3x\n3x ::= "\\x00"',
    'root ::= "(" root ")" | "x"',
    "root ::= " + "(" * 5000 + '"a"' + ")" * 5000,
    "\n".join(["root ::= r0", *(f'r{i} ::= r{i + 1} "x"' for i in range(5000)), 'r5000 ::= "y"']),
    "root ::= " + " | ".join(f'"{i}"' for i in range(3000)),
]


def test_llama_cpp_takes_what_passes_here_and_can_be_walked() -> None:
    for text in GOOD:
        check_gbnf(text)
    printed = in_child(
        """
from test_gbnf import GOOD
for text in GOOD:
    print(walk(Grammar(vocab, text), random.Random(1), 10))
"""
    )
    assert len(printed.splitlines()) == len(GOOD)


def test_llama_cpp_refuses_what_has_a_syntax_error_here() -> None:
    texts = [
        text
        for text, _, what in BAD
        if "expected" in what and "repeats as at least" not in what and "1,2001" not in text
    ]
    assert len(texts) > 25
    printed = in_child(f"print([text for text in {texts!r} if taken(text)])")
    assert printed.strip() == "[]"


@settings(max_examples=3, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.integers(0, 10**6))
def test_our_answer_is_llama_cpps_for_random_grammars(seed: int) -> None:
    printed = in_child(
        """
from random_grammars import grammar
seed, n_accepted, n_walked = int(sys.argv[1]), 0, 0
stderr = os.dup(2)
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # llama.cpp prints each grammar that it refuses
for i in range(seed * 1000, seed * 1000 + 300):
    text = grammar(i)
    os.write(stderr, f"\\rseed {i}".encode())  # the last one is seen if the process dies
    try:
        check_gbnf(text)
    except OptionError as e:
        if ("expected" in str(e) and "repeats" not in str(e)) or "nowhere defined" in str(e):
            if taken(text):
                print("taken by llama.cpp alone:", i, repr(text), e)
        continue
    try:
        compiled = Grammar(vocab, text)
    except OptionError as e:
        if "no single token" not in str(e) or taken(text):
            print("refused by llama.cpp alone:", i, repr(text), e)
        continue
    n_accepted += 1
    for k in range(2):
        n_walked += walk(compiled.clone(), random.Random(k), 30)
print(n_accepted, n_walked)
""",
        str(seed),
    )
    *wrong, counts = printed.splitlines()
    assert not wrong
    n_accepted, n_walked = map(int, counts.split())
    assert n_accepted > 30
    assert n_walked > 500


# -- bounds


def refused(text: str, what: str) -> None:
    start = time.thread_time()  # of its own work, whatever else the machine does
    with pytest.raises(OptionError, match=what):
        check_gbnf(text)
    assert time.thread_time() - start < 5


def test_a_grammar_nested_beyond_reason_is_refused() -> None:
    refused("root ::= " + "(" * 100_000 + ")" * 100_000, f"column {10 + MAX_NESTING}: parentheses nested deeper than")


def test_a_grammar_too_large_is_refused() -> None:
    refused("root ::= " + " " * MAX_CHARS, "1000009 characters, more than 1000000")
    refused("root ::= " + '""()' * (MAX_RULES + 1), "more than 50000 rules")
    refused('root ::= "' + "x" * 1000 + '"{1000}', f"more than {MAX_ELEMENTS} characters")
    refused("root ::= [" + "a" * 1000 + "]{0,1000}", f"more than {MAX_ELEMENTS} characters")


def test_exponentially_many_ways_to_begin_are_refused() -> None:
    rules = [f'r{i} ::= r{i + 1} "x" | r{i + 1} "y"' for i in range(60)]
    refused("\n".join(["root ::= r0", *rules, 'r60 ::= "z"']), f"may begin in too many ways, more than {MAX_WAYS}")


@pytest.mark.parametrize(
    "text",
    [
        'root ::= (" " | " ")* "x"',
        'root ::= " "* " "* " "* " "* " "* "x"',
        'root ::= ([ \\t]+ | "\\n")* "x"',
        'root ::= ("a"{0,10}){0,10}',
        'root ::= "a" root "b" | "a" root "c" | ""',
        'root ::= (a? a? a? a? a? a?){5} (a? a?){5} "z"\na ::= (b? b? b?){5}\nb ::= "x"? "y"? "x"?',
        'root ::= "q" s\ns ::= (s2 | " ")* "x"\ns2 ::= " " " "',
    ],
)
def test_a_text_with_too_many_readings_is_refused(text: str) -> None:
    refused(text, f"goes on from .* in more than {MAX_READINGS} ways")


def test_what_reads_each_token_in_few_ways_is_taken_however_long_the_text() -> None:
    check_gbnf('root ::= "[" (n ("," n)*)? "]"\nn ::= [0-9] | [1-9] [0-9]*')  # 1 has two readings


def test_what_is_nested_as_deep_as_may_be_compiles_on_any_stack() -> None:
    printed = in_child(
        """
import threading
from llama_sessions.gbnf_text import MAX_NESTING, MAX_RULES
texts = [
    "root ::= " + "(" * MAX_NESTING + '"a"' + ")" * MAX_NESTING,
    "\\n".join(["root ::= r0", *(f"r{i} ::= r{i + 1}" for i in range(9000)), 'r9000 ::= "y"']),
]
threading.stack_size(256 * 1024)
for text in texts:
    thread = threading.Thread(target=lambda: print(walk(Grammar(vocab, text), random.Random(1), 5)))
    thread.start()
    thread.join()
"""
    )
    assert printed.split() == ["2", "2"]


def test_what_the_check_cannot_foresee_ends_in_seconds_and_not_never() -> None:
    printed = in_child(
        """
long = "abcdefghijklmnopqrstuvwxyzabcdefghijklmn"
text = "root ::= " + " | ".join(f'"{long}" root "{i}"' for i in range(4)) + ' | ""'
check_gbnf(text)  # each round has four times the readings of the last, and is 40 characters long
grammar = Grammar(vocab, text)
byte = {vocab.piece(t): t for t in range(vocab.n_tokens)}
n = 0
while grammar.allows(byte[long[n % 40].encode()]):
    grammar.accept(byte[long[n % 40].encode()])
    n += 1
print(n)
"""
    )
    assert 100 < int(printed) < 400


# -- the summary


def test_the_summary_names_tokens_and_says_whether_a_text_can_end() -> None:
    summary = check_gbnf('root ::= <|x|> !<|y|> <[5]>\nb ::= "a"')
    assert summary.tokens == (NamedToken("<|x|>", "line 1, column 10"), NamedToken("<|y|>", "line 1, column 17"))
    assert summary.n_rules == 2
    assert summary.ends
    assert not check_gbnf('root ::= "a" root').ends


def test_another_rule_may_be_the_first() -> None:
    check_gbnf('first ::= "a"', root="first")
    with pytest.raises(OptionError, match="no rule 'first'"):
        check_gbnf('root ::= "a"', root="first")


@pytest.mark.parametrize("text", [None, 5, b"root ::= x", ["root"]])
def test_what_is_no_text_is_refused(text: object) -> None:
    with pytest.raises(OptionError, match="the grammar must be text"):
        check_gbnf(text)  # type: ignore[arg-type]


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(OptionError, match="lone surrogate"):
        check_gbnf('root ::= "\ud800"')
