"""Tokenising: equal to the plain call, and no text of anybody's can run llama.cpp out of stack.

What might kill the process runs in a child process: a regression is then a failed test, not a dead suite.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import llama_cpp
import numpy as np
import pytest
from child import run_child
from hypothesis import given, settings
from hypothesis import strategies as st
from templates import CONTROLS, SOFT, VOCABS, PlainVocab, load_vocab

from llama_sessions import OptionError
from llama_sessions.llama import vocab as vocab_module
from llama_sessions.llama.vocab import LlamaVocab

BY_HAND = ["qwen2", "llama-bpe", "gpt-2"]
RECURSIVE = ["deepseek-llm", "falcon", "deepseek-coder"]
OTHERS = ["deepseek-v3", "tekken", "gpt-4o", "bloom", "default", "exaone-moe", "jais-2"]

# What the children begin with: `load(pre)` gives our vocabulary and the oracle, `deep(f)` calls f on 512 MiB of stack.
CHILD = """
import sys, threading
import llama_cpp
import numpy as np
from models import model_path
from templates import PlainVocab
from llama_sessions.llama import deep_stack, log, vocab as module
from llama_sessions.llama.vocab import LlamaVocab

log.install()
log.capture.quiet = True
kept = []

def load(pre):
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    with log.capture:
        kept.append(llama_cpp.llama_model_load_from_file(str(model_path("vocab-only", pre=pre)).encode(), params))
    handle = llama_cpp.llama_model_get_vocab(kept[-1])
    return LlamaVocab(handle, pre), PlainVocab(handle)

def on_stack(n_bytes, work):
    out = []
    before = threading.stack_size(n_bytes)
    thread = threading.Thread(target=lambda: out.append(work()))
    thread.start()
    threading.stack_size(before)
    thread.join()
    return out[0]

def deep(work):
    return on_stack(512 * 2**20, work)

def n_bytes(ours, tokens):
    return int(np.array([len(ours.piece(t)) for t in range(ours.n_tokens)])[tokens].sum())

CLASSES = {"letter": "a", "capital": "A", "digit": "1", "dot": ".", "cjk": "\\u4e2d", "hangul": "\\ud55c", "space": " ",
           "newline": "\\n", "symbol": "$", "accent": "e\\u0301", "words": "a ", "emoji": "\\U0001f44d"}
"""


def run(code: str, *args: str) -> str:
    return run_child(CHILD + code, *args)


# -- no text kills the process


@pytest.mark.parametrize(("pres", "n"), [(BY_HAND, 100_000), (RECURSIVE, 100_000), (OTHERS, 40_000)])
def test_a_hundred_thousand_times_one_character_is_tokenised_also_on_a_small_stack(pres: list[str], n: int) -> None:
    printed = run(
        """
n = int(sys.argv[1])
for pre in sys.argv[2:]:
    ours, plain = load(pre)
    for name, char in CLASSES.items():
        print(pre, name, flush=True)  # the last line of a dead child says what killed it
        text = (char * n)[:n]
        tokens = on_stack(512 * 1024, lambda: ours.tokenize(text))
        assert n_bytes(ours, tokens) == len(text.encode())
""",
        str(n),
        *pres,
    )
    assert len(printed.splitlines()) == 12 * len(pres)


def test_a_run_longer_than_any_stack_survives_is_tokenised_in_pieces() -> None:
    # 325 bytes a character: 512 MiB end at 1.65 million. Words with one space between them are one run to exaone-moe.
    printed = run(
        """
for pre, unit, n in (("deepseek-llm", "a", 2_000_000), ("exaone-moe", "a ", 3_000_000)):
    ours, plain = load(pre)
    print(n_bytes(ours, ours.tokenize((unit * n)[:n])))
"""
    )
    assert printed == "2000000\n3000000\n"


@pytest.mark.parametrize(("pre", "n_megabytes"), [("qwen2", 10), ("falcon", 2)])
def test_megabytes_of_text_are_tokenised(pre: str, n_megabytes: int) -> None:
    printed = run(
        """
ours, plain = load(sys.argv[1])
line = "It was a bright cold day in April, and the clocks were striking thirteen.\\n"
n = int(sys.argv[2]) * 2**20 // len(line) + 1
text = line * n
tokens = on_stack(512 * 1024, lambda: ours.tokenize(text))
print(np.array_equal(tokens, np.tile(plain.tokenize(line, special=False), n)))
""",
        pre,
        str(n_megabytes),
    )
    assert printed == "True\n"


def test_the_longest_run_of_one_call_needs_a_quarter_of_the_stack_at_most() -> None:
    printed = run(
        """
deep_stack.STACK_BYTES //= 4
for pre in sys.argv[1:]:
    ours, plain = load(pre)
    for name in ("letter", "dot", "cjk", "space"):
        ours.tokenize(CLASSES[name] * module._DEEPEST)
print("done")
""",
        *RECURSIVE,
    )
    assert printed == "done\n"


def test_what_is_tokenised_on_the_callers_stack_needs_less_than_96_kib() -> None:
    printed = run(
        """
module.on_a_deep_stack = None  # a call of it would fail
for pre in sys.argv[1:]:
    ours, plain = load(pre)
    for char in CLASSES.values():
        on_stack(96 * 1024, lambda: ours.tokenize((char * module._SHALLOW)[: module._SHALLOW]))
print("done")
""",
        *RECURSIVE,
        *OTHERS,
    )
    assert printed == "done\n"


def test_a_sentencepiece_vocabulary_survives_long_runs_on_a_small_stack() -> None:
    printed = run(
        """
from templates import load_vocab
ours, plain = load_vocab("spm")
for char in CLASSES.values():
    text = (char * 10_000)[:10_000]
    tokens = on_stack(128 * 1024, lambda: ours.tokenize(text))
    assert n_bytes(ours, tokens) == len(text.encode()) + 1  # and the space before it
print("done")
"""
    )
    assert printed == "done\n"


# -- equal to the plain call


def test_long_runs_equal_the_plain_call_where_that_survives() -> None:
    printed = run(
        """
for pre in sys.argv[1:]:
    ours, plain = load(pre)
    for char in CLASSES.values():
        for n in (module._SHALLOW, 20_000):
            text = "Hello " + (char * n)[:n] + ", world"
            assert ours.tokenize(text).tolist() == deep(lambda: plain.tokenize(text, special=False)), (pre, char, n)
words = "It was a bright cold day in April. " * 6_000  # 210,000 characters, but no run is long
assert ours.tokenize(words).tolist() == deep(lambda: plain.tokenize(words, special=False))
print("done")
""",
        *RECURSIVE,
        "deepseek-v3",
        "tekken",
    )
    assert printed == "done\n"


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=60), st.sampled_from(sorted(VOCABS)), st.booleans())
def test_any_text_equals_the_plain_call(text: str, name: str, special: bool) -> None:
    ours, plain = load_vocab(name)
    if any("\ud800" <= char <= "\udfff" for char in text):
        with pytest.raises(OptionError, match="lone surrogate"):
            ours.tokenize(text)
    else:
        tokens = ours.tokenize(text, special=special)
        assert tokens.dtype == np.int32
        assert tokens.tolist() == plain.tokenize(text, special=special)


@pytest.mark.parametrize("name", sorted(VOCABS))
@pytest.mark.parametrize("text", ["", "\0", "a\0b", "\0" * 500, " ", "\n\n", "<|im_end|>", "x<|im_end|> y"])
def test_odd_text_equals_the_plain_call(name: str, text: str) -> None:
    ours, plain = load_vocab(name)
    for special in (False, True):
        assert ours.tokenize(text, special=special).tolist() == plain.tokenize(text, special=special)


def test_control_text_becomes_control_only_where_that_is_asked_for() -> None:
    ours, _ = load_vocab("bpe")
    token = ours.control["<|im_end|>"]
    assert token not in ours.tokenize("a<|im_end|>b")
    assert ours.tokenize("a<|im_end|>b", special=True).tolist().count(token) == 1


def test_a_lone_surrogate_is_refused_with_its_place() -> None:
    ours, _ = load_vocab("bpe")
    with pytest.raises(OptionError, match="lone surrogate at character 2"):
        ours.tokenize("ab\ud800")


def test_text_of_two_gibibytes_is_refused() -> None:
    class Endless(bytes):
        def __len__(self) -> int:
            return 2**31

    class Text(str):
        def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
            return Endless()

    with pytest.raises(OptionError, match="2147483648 bytes"):
        load_vocab("bpe")[0].tokenize(Text("x"))


# -- the deep stack


@pytest.fixture
def recursive() -> Iterator[LlamaVocab]:
    """A vocabulary that believes its pre-tokenizer to be a recursive one."""
    ours, _ = load_vocab("bpe")
    ours._recursive = True
    yield ours
    ours._recursive = False


def count_deep_stacks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    made: list[int] = []
    original = vocab_module.on_a_deep_stack

    def counted(work: Callable[[], object], needed_for: str) -> object:
        made.append(1)
        return original(work, needed_for)

    monkeypatch.setattr(vocab_module, "on_a_deep_stack", counted)
    return made


def test_only_long_text_of_a_recursive_pre_tokenizer_needs_a_deep_stack(
    recursive: LlamaVocab, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = count_deep_stacks(monkeypatch)
    recursive.tokenize("a" * vocab_module._SHALLOW)
    assert made == []
    recursive.tokenize("a" * (vocab_module._SHALLOW + 1))
    assert made == [1]
    recursive._recursive = False
    recursive.tokenize("a" * 5000)
    assert made == [1]


@pytest.mark.parametrize("pre", BY_HAND)
def test_pre_tokenizers_that_do_not_recurse_are_known(pre: str) -> None:
    _, plain = load_vocab("bpe")
    assert not LlamaVocab(plain.vocab, pre)._recursive


@pytest.mark.parametrize("pre", [*RECURSIVE, *OTHERS, "", "never-heard-of"])
def test_any_other_pre_tokenizer_is_taken_for_a_recursive_one(pre: str) -> None:
    _, plain = load_vocab("bpe")
    assert LlamaVocab(plain.vocab, pre)._recursive


def test_the_stack_size_of_other_threads_is_left_as_it_was(recursive: LlamaVocab) -> None:
    before = threading.stack_size(1024 * 1024)
    try:
        recursive.tokenize("a" * 5000)
        assert threading.stack_size() == 1024 * 1024
    finally:
        threading.stack_size(before)


def test_an_error_on_the_deep_stack_is_the_callers() -> None:
    def fails() -> None:
        raise KeyError("this one")

    with pytest.raises(KeyError, match="this one"):
        vocab_module.on_a_deep_stack(fails, "this test needs")


@pytest.mark.parametrize("deep", [False, True])
def test_threads_do_not_get_each_others_tokens(recursive: LlamaVocab, deep: bool) -> None:
    recursive._recursive = deep
    texts = [letter * n for letter in "abcdefgh" for n in (300, 700)]
    expected = [recursive.tokenize(text).tolist() for text in texts]

    def work(i: int) -> bool:
        return all(recursive.tokenize(texts[i]).tolist() == expected[i] for _ in range(60))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(len(texts))))


# -- what tokens are


@pytest.mark.parametrize("name", sorted(VOCABS))
def test_control_tokens_are_those_that_only_a_special_parse_finds(name: str) -> None:
    ours, plain = load_vocab(name)
    expected = {}
    for token in range(ours.n_tokens):
        text = bytes(llama_cpp.llama_vocab_get_text(plain.vocab, token)).decode()
        if plain.tokenize(text, special=True) == [token] != plain.tokenize(text, special=False):
            expected[text] = token
    assert ours.control == expected
    assert set(CONTROLS) <= set(expected)
    assert (set(SOFT) <= set(expected)) == (name == "bpe-hard-think")


@pytest.mark.parametrize("name", sorted(VOCABS))
def test_what_a_control_token_swallows_is_what_the_plain_call_loses(name: str) -> None:
    ours, plain = load_vocab(name)
    for text, token in ours.control.items():
        left = plain.tokenize(f"b \n{text}") == plain.tokenize(f"b{text}")
        right = plain.tokenize(f"{text} \nb") == plain.tokenize(f"{text}b")
        assert ours.strips(token) == (left, right), text


def test_some_vocabulary_has_control_tokens_that_swallow_white_space() -> None:
    ours, _ = load_vocab("spm-strips")
    assert ours.strips(ours.control["<|end|>"]) == (False, True)
    assert ours.strips(ours.control["<s>"]) == (False, False)
    ours, _ = load_vocab("bpe-strips")
    assert ours.strips(ours.control["<mask>"]) == (True, False)


@pytest.mark.parametrize("name", sorted(VOCABS))
def test_a_space_prefix_is_what_the_plain_call_puts_before_text(name: str) -> None:
    ours, plain = load_vocab(name)
    assert ours.adds_space_prefix == (plain.detokenize(plain.tokenize("x")) == b" x")
    assert ours.adds_space_prefix == (name in ("spm", "spm-strips"))


@pytest.mark.parametrize("name", ["bpe", "spm"])
def test_pieces_are_the_bytes_of_the_plain_call(name: str) -> None:
    ours, plain = load_vocab(name)
    for _ in range(2):  # the second time from memory
        assert [ours.piece(t) for t in range(ours.n_tokens)] == [plain.detokenize([t]) for t in range(ours.n_tokens)]


def test_a_piece_longer_than_the_buffer_comes_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = load_vocab("bpe")

    def long_piece(handle: object, token: int, buffer: object, size: int, lstrip: int, special: bool) -> int:
        if size < 300:
            return -300
        buffer.raw = b"x" * 300 + bytes(size - 300)  # type: ignore[attr-defined]
        return 300

    monkeypatch.setattr(llama_cpp, "llama_token_to_piece", long_piece)
    assert ours._piece(0) == b"x" * 300


@pytest.mark.parametrize("token", [-1, 10**6])
def test_a_token_outside_the_vocabulary_has_no_piece(token: int) -> None:
    ours, _ = load_vocab("bpe")
    with pytest.raises(OptionError, match=f"a token must be from 0 to {ours.n_tokens - 1}, not {token}"):
        ours.piece(token)


def test_generation_ends_at_the_end_tokens_of_every_family() -> None:
    for name in ("bpe", "spm"):
        ours, _ = load_vocab(name)
        ends = {text for text, token in ours.control.items() if ours.is_eog(token)}
        expected = {"<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"}
        assert ends == expected | ({"</s>", "<|endoftext|>"} if name == "spm" else set())
        assert not any(ours.is_eog(token) for token in ours.tokenize("text of any kind").tolist())


@pytest.mark.parametrize(("name", "adds"), [("bpe", False), ("bpe-bos", True), ("spm", True), ("spm-bare", False)])
def test_bos_and_eos_are_those_of_the_file(name: str, adds: bool) -> None:
    ours, plain = load_vocab(name)
    assert ours.adds_bos is adds
    texts = ("<|begin_of_text|>", "<|im_end|>") if name.startswith("bpe") else ("<s>", "</s>")
    assert ours.bos is not None
    assert ours.eos is not None
    assert (ours.text(ours.bos), ours.text(ours.eos)) == texts
    assert (plain.prompt("a")[0] == ours.bos) is adds


def test_the_oracle_is_not_our_code() -> None:
    assert not any(isinstance(value, LlamaVocab) for value in vars(PlainVocab(None)).values())
