"""Grammars over llama.cpp's sampler, and JSON schemas through them: nothing aborts, and what comes out is right."""

from __future__ import annotations

import copy
import json
import logging
import math
import re
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from child import run_child

from llama_sessions import OptionError, StateError, builtin_model
from llama_sessions.gbnf import check_gbnf
from llama_sessions.json_schema import plain_schema, schema_text
from llama_sessions.llama import grammar as grammar_module
from llama_sessions.llama import schema as schema_module
from llama_sessions.llama.grammar import Grammar, Grammars
from llama_sessions.llama.model import Model
from llama_sessions.llama.schema import gbnf_of_schema
from llama_sessions.llama.vocab import LlamaVocab
from llama_sessions.types import CANDIDATE


@pytest.fixture(scope="module")
def model() -> Iterator[Model]:
    model = Model.load(builtin_model())
    yield model
    model.close()


@pytest.fixture
def vocab(model: Model) -> LlamaVocab:
    return model.vocab()


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    schema_module._grammars._values.clear()


def token(vocab: LlamaVocab, text: str) -> int:
    """The token that is exactly this text."""
    return next(t for t in range(vocab.n_tokens) if vocab.piece(t) == text.encode() and t not in vocab.control.values())


def end(vocab: LlamaVocab) -> int:
    return next(t for t in range(vocab.n_tokens) if vocab.is_eog(t))


def allowed(grammar: Grammar, vocab: LlamaVocab) -> set[bytes]:
    candidates = np.zeros(vocab.n_tokens, CANDIDATE)
    candidates["id"] = np.arange(vocab.n_tokens)
    grammar.restrict(candidates, len(candidates))
    return {vocab.piece(t) for t in np.flatnonzero(np.isfinite(candidates["logit"]))}


# -- the sampler


def test_a_grammar_follows_what_is_accepted(vocab: LlamaVocab) -> None:
    grammar = Grammar(vocab, 'root ::= "a" [bc]')
    a, b = token(vocab, "a"), token(vocab, "b")
    assert grammar.allows(a)
    assert not grammar.allows(b)
    assert {piece[:1] for piece in allowed(grammar, vocab)} == {b"a"}
    grammar.accept(a)
    assert not grammar.allows(a)
    assert allowed(grammar, vocab) == {b"b", b"c"}
    assert not grammar.allows(end(vocab))
    grammar.accept(b)
    assert grammar.allows(end(vocab))
    grammar.accept(end(vocab))
    grammar.accept(end(vocab))


def test_what_is_not_allowed_is_not_accepted_and_changes_nothing(vocab: LlamaVocab) -> None:
    grammar = Grammar(vocab, 'root ::= "a"')
    a = token(vocab, "a")
    for wrong in (token(vocab, "b"), end(vocab)):
        with pytest.raises(StateError, match=f"token {wrong} is not allowed by the grammar here"):
            grammar.accept(wrong)
    grammar.accept(a)
    for wrong in (a, token(vocab, "b")):  # after the end: llama.cpp would abort
        with pytest.raises(StateError, match="not allowed"):
            grammar.accept(wrong)
    assert grammar.allows(end(vocab))


def test_a_clone_goes_its_own_way_from_where_it_was_made(vocab: LlamaVocab) -> None:
    grammar = Grammar(vocab, 'root ::= "a" "b" | "a" "c"')
    a, b, c = (token(vocab, text) for text in "abc")
    grammar.accept(a)
    twin = grammar.clone()
    twin.accept(b)
    assert grammar.allows(b)
    assert grammar.allows(c)
    assert not twin.allows(c)
    assert twin.allows(end(vocab))
    assert not twin.clone().allows(c)


def test_only_the_first_n_candidates_are_touched_in_whatever_order(vocab: LlamaVocab) -> None:
    grammar = Grammar(vocab, 'root ::= "a"')
    a, b = token(vocab, "a"), token(vocab, "b")
    candidates = np.array([(b, 3.0, 0.5), (a, -7.0, 0.25), (b, 1.0, 0.0), (a, -math.inf, 0.0)], CANDIDATE)
    grammar.restrict(candidates, 2)
    assert candidates["logit"].tolist() == [-math.inf, -7.0, 1.0, -math.inf]
    assert candidates["id"].tolist() == [b, a, b, a]
    grammar.restrict(candidates, 0)
    grammar.restrict(candidates, 4)
    assert candidates["logit"].tolist() == [-math.inf, -7.0, -math.inf, -math.inf]


@pytest.mark.parametrize(
    ("candidates", "n", "match"),
    [
        (np.zeros(3, np.float32), 3, "contiguous array of"),
        (np.zeros(6, CANDIDATE)[::2], 3, "contiguous array of"),
        (np.zeros((2, 2), CANDIDATE), 2, "contiguous array of"),
        (np.zeros(3, CANDIDATE), 4, "the number of candidates must be from 0 to 3"),
        (np.zeros(3, CANDIDATE), -1, "the number of candidates must be from 0 to 3"),
        (np.array([(-1, 0, 0)], CANDIDATE), 1, "outside the vocabulary"),
        (np.array([(10**6, 0, 0)], CANDIDATE), 1, "outside the vocabulary"),
    ],
)
def test_bad_candidates_are_refused(vocab: LlamaVocab, candidates: Any, n: int, match: str) -> None:
    with pytest.raises(OptionError, match=match):
        Grammar(vocab, 'root ::= "a"').restrict(candidates, n)


@pytest.mark.parametrize("bad", [-1, 10**6, 2**40, "a", None, True, 1.0])
def test_a_token_outside_the_vocabulary_is_refused(vocab: LlamaVocab, bad: Any) -> None:
    grammar = Grammar(vocab, 'root ::= "a"')
    for ask in (grammar.allows, grammar.accept):
        with pytest.raises(OptionError, match="a token must be"):
            ask(bad)


def test_named_tokens_must_be_of_the_vocabulary(vocab: LlamaVocab) -> None:
    name, number = next((name, t) for name, t in vocab.control.items() if name.startswith("<") and not vocab.is_eog(t))
    grammar = Grammar(vocab, f"root ::= {name} <[{token(vocab, 'a')}]>")
    assert grammar.allows(number)
    grammar.accept(number)
    assert allowed(grammar, vocab) == {b"a"}
    with pytest.raises(OptionError, match=r"line 2, column 3: '<nope>' is no single token of this model"):
        Grammar(vocab, "root ::= (\n !<nope>)")


def test_a_grammar_that_the_check_lets_through_wrongly_is_refused_all_the_same(
    vocab: LlamaVocab, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    passed = check_gbnf('root ::= "a"')
    monkeypatch.setattr(grammar_module, "check_gbnf", lambda text: passed)
    with pytest.raises(OptionError, match=r"llama\.cpp refuses it: failed to parse grammar"):
        Grammar(vocab, "root ::= nothing")


def test_grammars_compiles_a_text_once_and_keeps_few(vocab: LlamaVocab, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    original = grammar_module._compile

    def counted(vocab: LlamaVocab, gbnf: str) -> Any:
        made.append(gbnf)
        return original(vocab, gbnf)

    monkeypatch.setattr(grammar_module, "_compile", counted)
    grammars = Grammars(vocab)
    a = token(vocab, "a")
    for _ in range(3):
        grammar = grammars.new('root ::= "a"')
        grammar.accept(a)  # no other sees it
    assert made == ['root ::= "a"']
    for i in range(100):
        grammars.new(f'root ::= "a" "{i}"')
    assert len(grammars._compiled) <= 32
    with pytest.raises(OptionError, match="must be text"):
        grammars.new(5)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="must be text"):
        grammars.new(["x"])  # type: ignore[arg-type]


def test_a_grammar_is_freed_once_and_after_its_model_too() -> None:
    printed = run_child(
        """
        import gc, resource
        from llama_sessions import StateError, builtin_model
        from llama_sessions.llama.grammar import Grammar
        from llama_sessions.llama.model import Model

        model = Model.load(builtin_model())
        vocab = model.vocab()
        grammar = Grammar(vocab, 'root ::= ("a" | "b"){0,900}')
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(3000):
            grammar.clone()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000)
        twin = grammar.clone()
        vocab.close()
        model.close()
        for ask in (lambda: grammar.allows(5), lambda: twin.accept(5), grammar.clone):
            try:
                ask()
            except StateError as e:
                print("closed" in str(e))
        del grammar, twin
        gc.collect()
        """
    )
    assert printed.split() == ["True"] * 4


def test_threads_may_have_a_grammar_each(vocab: LlamaVocab) -> None:
    grammars = Grammars(vocab)
    a, results = token(vocab, "a"), []

    def work() -> None:
        for n in range(1, 20):
            grammar = grammars.new(f'root ::= "a"{{{n}}}')
            for _ in range(n):
                grammar.accept(a)
            results.append(grammar.allows(end(vocab)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 76


def byte(vocab: LlamaVocab, value: int) -> int:
    return next(t for t in range(vocab.n_tokens) if vocab.piece(t) == bytes([value]))


def test_a_text_of_bytes_is_utf_8_at_every_step(vocab: LlamaVocab) -> None:
    grammar = Grammar(vocab, "root ::= [^x]*")
    assert not grammar.allows(byte(vocab, 0x80))
    grammar.accept(byte(vocab, 0xF0))
    assert not grammar.allows(byte(vocab, 0x80))  # an overlong form, which llama.cpp lets through
    twin = grammar.clone()
    assert not twin.allows(byte(vocab, 0x80))
    assert b"\x80" not in allowed(grammar, vocab)
    assert b"\x90" in allowed(grammar, vocab)
    for value in "\U00010000".encode()[1:]:
        grammar.accept(byte(vocab, value))
    assert grammar.allows(byte(vocab, ord("a")))
    assert not grammar.allows(byte(vocab, 0x90))
    assert twin.allows(byte(vocab, 0x90))


@pytest.mark.parametrize(
    ("data", "rest"),
    [
        (b"", b""),
        (b"a\xc3", b"\xc3"),
        ("é日😀".encode(), b""),
        (b"\xe2\x80", b"\xe2\x80"),
        (b"\xf0\x90\x80", b"\xf0\x90\x80"),
        *(
            (bad, None)
            for bad in (b"\x80\x80", b"a\xc0\x80", b"\xe0\x80", b"\xf0\x80\x80\x80", b"\xc3@", b"\xed\xa0\x80")
        ),
    ],
)
def test_what_begins_no_utf_8_is_known(data: bytes, rest: bytes | None) -> None:
    assert grammar_module._unfinished(data) == rest


def test_a_grammar_whose_readings_get_out_of_hand_allows_nothing_more(
    vocab: LlamaVocab, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    grammar = Grammar(vocab, 'root ::= "a"*')
    a = token(vocab, "a")
    grammar.accept(a)
    monkeypatch.setattr(grammar_module, "_LONGEST", -1.0)
    assert grammar.allows(a)
    with caplog.at_level(logging.WARNING, "llama_sessions"):
        grammar.accept(a)
    assert "the text has more readings with each" in caplog.text
    for one in (grammar, grammar.clone()):
        assert not one.allows(a)
        assert not one.allows(end(vocab))
        assert allowed(one, vocab) == set()
        with pytest.raises(StateError, match="not allowed"):
            one.accept(a)


# -- schemas


def test_json_of_random_schemas_parses_and_validates() -> None:
    printed = run_child(
        """
        import json, random, resource, signal
        import jsonschema
        from random_schemas import schema, text_of
        from llama_sessions import OptionError, builtin_model
        from llama_sessions.llama.grammar import Grammar, Grammars
        from llama_sessions.llama.model import Model
        from llama_sessions.llama.schema import gbnf_of_schema

        resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, 4 * 2**30))
        signal.alarm(100)
        model = Model.load(builtin_model())
        vocab = model.vocab()
        grammars = Grammars(vocab)
        n, refused, unended = 0, [], []
        for seed in range(220):
            asked = schema(seed)
            try:
                gbnf = gbnf_of_schema(asked)
            except OptionError as e:
                refused.append((seed, str(e)[:300]))
                continue
            validator = jsonschema.Draft202012Validator(asked)
            for k in range(2):
                text = text_of(grammars.new(gbnf), vocab, random.Random(seed + k))
                if text is None:
                    unended.append((seed, k))
                    continue
                try:
                    validator.validate(json.loads(text))
                except Exception as e:
                    print("seed", seed, json.dumps(asked), repr(text), str(e)[:300])
                n += 1
        print(n, refused, unended)
        """
    )
    *wrong, counts = printed.splitlines()
    assert not wrong, "\n".join(wrong[:5])
    n, rest = counts.split(" ", 1)
    assert rest.startswith("[] "), rest  # none was refused
    assert int(n) >= 430, rest


BAD = [
    ("{", "is not JSON: Expecting property name"),
    ("[]", "must be an object, not []"),
    ("false", "must be an object, not false"),
    ("null", "must be an object, not null"),
    ('{"const": NaN}', "is not JSON: Out of range float"),
    ('{"const": 1e999}', "is not JSON: Out of range float"),
    ("[" * 100_000, "nested too deep"),
    (5, "is not JSON"),
    (None, "is not JSON"),
    ({"const": math.inf}, "is not JSON: Out of range float"),
    ({"const": {1, 2}}, "is not JSON: Object of type set"),
    ({"const": b"x"}, "is not JSON: Object of type bytes"),
    ({"type": "foo"}, '#/type: "foo" is none of string'),
    ({"type": "value"}, '#/type: "value" is none of string'),
    ({"type": None}, "#/type: null is none of"),
    ({"type": []}, "#/type: an empty list: nothing meets it"),
    ({"type": ["string", "uuid"]}, '#/type: "uuid" is none of'),
    ({"properties": {"a": {"type": 5}}}, "#/properties/a/type: 5 is none of"),
    ({"properties": {"a": False}, "required": ["a"]}, "#/properties/a: false: nothing meets it"),
    ({"anyOf": [False, False]}, "#/anyOf: false in every branch: nothing meets it"),
    ({"properties": {"a": 5}}, "#/properties/a: a schema must be an object, not 5"),
    ({"properties": []}, "#/properties: must be an object"),
    ({"properties": {"*": {"type": "string"}}}, "#/properties: a property named '*'"),
    ({"type": "object", "required": "a"}, "#/required: must be a list of names"),
    ({"properties": {}, "required": ["a"], "additionalProperties": False}, "#/required: 'a' is no property"),
    ({"enum": []}, "#/enum: must be a list with something in it"),
    ({"enum": 5}, "#/enum: must be a list with something in it"),
    ({"type": "string", "enum": [1, None]}, '#/enum: no value of the type "string": nothing meets it'),
    ({"type": ["integer", "null"], "const": True}, '#/const: no value of the type ["integer", "null"]: nothing'),
    ({"anyOf": []}, "#/anyOf: must be a list with something in it"),
    ({"oneOf": {}}, "#/oneOf: must be a list with something in it"),
    ({"anyOf": [{"type": "x"}]}, '#/anyOf/0/type: "x" is none of'),
    ({"allOf": [{"type": "string"}, {"type": "string"}]}, "#/allOf/0: only objects with properties"),
    ({"type": "array", "items": {"type": "string"}, "minItems": 3, "maxItems": 2}, "#: minItems 3 is above maxItems 2"),
    ({"type": "array", "minItems": -1}, "#/minItems: must be a whole number from 0, not -1"),
    ({"type": "array", "minItems": 10**9}, "#/minItems: 1000000000 is above 2000"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "#: minLength 3 is above maxLength 2"),
    ({"type": "string", "maxLength": "5"}, '#/maxLength: must be a whole number from 0, not "5"'),
    ({"type": "string", "maxLength": 1.5}, "#/maxLength: must be a whole number"),
    ({"type": "string", "pattern": 5}, "#/pattern: must be text"),
    ({"type": "string", "pattern": "abc"}, "the pattern 'abc' cannot be converted: it must begin with ^"),
    ({"type": "string", "pattern": "^a$|^b$"}, "$ stands in the middle"),
    ({"type": "string", "pattern": "^(?=a)b$"}, "cannot be converted: Unsupported pattern syntax"),
    ({"type": "string", "pattern": "^(a$"}, "cannot be converted"),
    ({"type": "string", "pattern": "^[a$"}, "cannot be converted"),
    ({"type": "string", "pattern": "^*a$"}, "cannot be converted"),
    ({"type": "string", "pattern": "^\\s$"}, "it has the escape \\s"),
    ({"type": "string", "pattern": "^[ -~]$"}, "lets '\"' through"),
    ({"type": "string", "pattern": '^a"$'}, "lets '\"' through"),
    ({"type": "string", "pattern": '^"{2}$'}, "lets '\"' through"),
    ({"type": "string", "pattern": "^a\\\\b$"}, "lets '\\\\' through"),
    ({"type": "string", "pattern": "^a\nb$"}, "lets '\\n' through"),
    ({"type": "string", "pattern": "^" + "(" * 5000 + ")" * 5000 + "$"}, "cannot be converted"),
    ({"type": "string", "pattern": "^a{3,2}$"}, "{3,2} is out of order"),
    ({"type": "string", "pattern": "^a{3000000000}$"}, "above 2000"),
    ({"type": "string", "pattern": "^a)(b$"}, "parentheses do not match"),
    ({"type": "string", "pattern": "^a{3$"}, "it has a { without a }"),
    ({"type": "string", "pattern": "^a+*$"}, "* stands behind a quantifier"),
    ({"type": "string", "pattern": "^a{2}{3}$"}, "{ stands behind a quantifier"),
    ({"type": "string", "pattern": "^[]a]$"}, "a class that is empty, or begins with ]"),
    ({"type": "string", "pattern": "^[^]a]$"}, "a class that is empty, or begins with ]"),
    ({"$ref": "#"}, "#: the $ref leads back to itself"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "leads back to itself"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}, "may begin with itself"),
    ({"properties": {"a": {"$ref": "#/$defs/x"}}}, "#/properties/a/$ref: \"#/$defs/x\" leads nowhere"),
    ({"properties": {"a": {"$ref": "https://x.test/y"}}}, "is not within this schema"),
    ({"$ref": 5}, "#/$ref: 5 is not within this schema"),
    ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "no finite JSON meets it"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "no finite JSON meets it"),
    ({"const": "\ud800"}, "lone surrogate"),
    ({"properties": {str(i): {"type": "null"} for i in range(2000)}}, "too deep or too many optional properties"),
    ({"type": "array", "items": {"type": "null"}, "maxItems": 1500}, "llama.cpp cannot take the grammar that it makes"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "what"), BAD, ids=range(len(BAD)))
def test_a_bad_schema_is_refused_with_its_place(schema: Any, what: str) -> None:
    with pytest.raises(OptionError) as e:
        gbnf_of_schema(schema)
    assert what in str(e.value)
    assert len(str(e.value)) < 1000


def test_a_schema_nested_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {"type": "null"}
    for _ in range(300):
        schema = {"type": "array", "items": schema}
    with pytest.raises(OptionError, match="nested deeper than 100"):
        gbnf_of_schema(schema)
    circular: dict[str, Any] = {}
    circular["not"] = circular
    with pytest.raises(OptionError, match="is not JSON: Circular reference"):
        gbnf_of_schema(circular)


def test_the_users_schema_is_left_as_it_is_and_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"b": {"$ref": "#/$defs/a"}, "c": True}}}}
    before = copy.deepcopy(schema)
    first = gbnf_of_schema(schema)
    assert schema == before
    made: list[str] = []
    monkeypatch.setattr(schema_module, "plain_schema", lambda text: made.append(text))
    assert gbnf_of_schema(json.dumps(schema)) == first
    assert not made


IGNORED = [
    ({"type": "integer", "multipleOf": 3, "minimum": 1}, ["multipleOf at #", "minimum at #"]),
    ({"type": "array", "uniqueItems": True, "contains": {}}, ["uniqueItems at #", "contains at #"]),
    ({"type": "string", "pattern": "^a$", "minLength": 1}, ["minLength at #"]),
    ({"type": "string", "format": "email"}, ["format at #"]),
    ({"type": "string", "format": "date", "maxLength": 3}, ["maxLength at #"]),
    ({"type": "string", "maxLength": 5000}, ["maxLength above 2000 at #"]),
    ({"type": "string", "not": {"const": "x"}}, ["not at #"]),
    ({"type": "object", "patternProperties": {}, "minProperties": 1}, ["patternProperties at #", "minProperties at #"]),
    ({"properties": {"a/b": {"enum": [1], "minimum": 2}}}, ["minimum at #/properties/a/b"]),
    ({"anyOf": [{"type": "null"}], "properties": {}}, ["properties at #"]),
    ({"oneOf": [{"type": "null"}]}, ["oneOf at #"]),
    ({"$ref": "#/$defs/a", "minLength": 2, "$defs": {"a": {"type": "string"}}}, ["minLength at #"]),
    ({"properties": {"a": {"type": "null"}}, "additionalProperties": True}, ["additionalProperties at # (they"]),
    ({"if": {}, "then": {}, "else": {}}, ["if at #", "then at #", "else at #"]),
    ({"allOf": [{"properties": {"a": True}}, {"properties": {"a": True}}]}, ["allOf at # (two definitions of 'a'"]),
    ({"type": "array", "prefixItems": [{"type": "null"}], "minItems": 2}, ["minItems and maxItems at #"]),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "named"), IGNORED, ids=range(len(IGNORED)))
def test_what_is_not_enforced_is_named_once_in_the_log(
    schema: Any, named: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "llama_sessions"):
        gbnf_of_schema(schema)
        gbnf_of_schema(schema)
    (message,) = [record.getMessage() for record in caplog.records]
    for what in named:
        assert what in message
    assert message.count(" at #") == len(named)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["string", "null"], "maxLength": 3, "title": "x", "default": None},
        {"properties": {"a": {"type": "string", "description": "x", "examples": ["y"]}}, "additionalProperties": False},
        {"allOf": [{"$ref": "#/$defs/a"}], "default": 1, "$defs": {"a": {"enum": [1, 2]}}},
        {"type": "object"},
        {"type": "array", "minItems": 2, "maxItems": 3.0},
    ],
)
def test_what_is_enforced_is_not_named(schema: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "llama_sessions"):
        gbnf_of_schema(schema)
    assert not caplog.records


def test_an_empty_schema_is_an_object_at_the_root_and_anything_below() -> None:
    assert plain_schema("{}").root == {}
    assert gbnf_of_schema({}) == gbnf_of_schema({"title": "x"}) == gbnf_of_schema({"type": "object"})
    plain = plain_schema(schema_text({"properties": {"a": {}, "b": True, "c": {"title": "x"}}}))
    assert plain.root["properties"] == {name: {"type": "value"} for name in "abc"}


@pytest.mark.parametrize(
    ("kind", "allowed"),
    [
        ("string", ["a"]),
        ("number", [1, 2.0, 2.5]),
        ("integer", [1, 2.0]),
        ("boolean", [True]),
        ("null", [None]),
        ("array", [[1]]),
        ("object", [{}]),
        (["integer", "null"], [1, 2.0, None]),
    ],
)
def test_of_the_values_only_those_of_the_type_are_left(kind: Any, allowed: list[Any]) -> None:
    values = ["a", 1, 2.0, 2.5, True, None, [1], {}]
    root = plain_schema(schema_text({"type": kind, "enum": values})).root
    assert json.dumps(root) == json.dumps({"enum": allowed})


def test_two_definitions_of_one_name_are_not_taken_for_each_other() -> None:
    schema = {
        "properties": {"a": {"enum": ["first"]}, "b": {"$ref": "#/$defs/a"}, "c": {"$ref": "#/$defs/more/a"}},
        "$defs": {"a": {"enum": ["second"]}, "more": {"a": {"enum": ["third"]}}},
    }
    grammar = gbnf_of_schema(schema)
    assert all(word in grammar for word in ("first", "second", "third"))
    clash = {
        "properties": {"def0-": {"enum": ["first"]}, "b": {"$ref": "#/$defs/a"}},
        "$defs": {"a": {"enum": ["second"]}},
    }
    assert "second" in gbnf_of_schema(clash)


def takes(grammar: Grammar, vocab: LlamaVocab, text: str) -> bool:
    """Whether a grammar takes a text, character by character, as a whole."""
    for one in (int(t) for char in text for t in vocab.tokenize(char)):
        if not grammar.allows(one):
            return False
        grammar.accept(one)
    return grammar.allows(end(vocab))


def test_of_many_values_each_is_taken_and_nothing_else(vocab: LlamaVocab) -> None:
    odd: list[Any] = [
        None,
        True,
        1,
        10,
        1.5,
        -1,
        "",
        "a",
        "aa",
        "aab",
        "é",
        "日本",
        'say "a"',
        "a\\",
        "a\n",
        [1],
        [1, 2],
    ]
    values = [*odd, *(f"n{i}" for i in range(120)), *odd, {"a": 1}, {"a": {"b": "}"}}]
    grammars, gbnf = Grammars(vocab), gbnf_of_schema({"enum": values})
    texts = {json.dumps(value, ensure_ascii=False) for value in values}
    for text in texts:
        assert takes(grammars.new(gbnf), vocab, text)
    others = {text[:i] for text in texts for i in range(len(text))} | {text + more for text in texts for more in '01"]'}
    for text in others - texts:
        assert not takes(grammars.new(gbnf), vocab, text)


@pytest.mark.parametrize(
    ("pattern", "texts", "others"),
    [
        ("^a]$", ["a]"], ["a", "a]]"]),
        ("^}+$", ["}", "}}"], ["", "{"]),
        ("^[ab[]]$", ["a]", "[]"], ["a", "]"]),
        ("^[a-c]+?$", ["a", "abc"], ["", "abcd"]),
        ("^(ab|c)*?d??$", ["", "abcd", "d"], ["a", "dd"]),
        ("^x{2,3}?$", ["xx", "xxx"], ["", "x", "xxxx"]),
        (r"^ab\?+$", ["ab?", "ab??"], ["ab?ab?", "ab"]),
        (r"^a\]?\*{2}$", ["a**", "a]**"], ["a*a*", "**"]),
        (r"^a\€b[\€]$", ["a€b€"], ["aAbC"]),
    ],
)
def test_a_pattern_takes_what_it_matches_and_nothing_else(
    vocab: LlamaVocab, pattern: str, texts: list[str], others: list[str]
) -> None:
    """Also where the converter would look at a bracket for ever, take a lazy quantifier for an optional one, or a
    quantifier for more than what stands before it."""
    grammars, gbnf = Grammars(vocab), gbnf_of_schema({"type": "string", "pattern": pattern})
    for text in [*texts, *others]:
        assert (re.search(pattern, text) is not None) == (text in texts)
        assert takes(grammars.new(gbnf), vocab, f'"{text}"') == (text in texts)


@pytest.mark.parametrize("inner", [{"type": "null"}, {"properties": {"": {"type": "null"}}, "required": [""]}])
def test_a_property_without_a_name_is_one_like_any_other(vocab: LlamaVocab, inner: Any) -> None:
    grammars, gbnf = Grammars(vocab), gbnf_of_schema({"properties": {"": inner}, "required": [""]})
    text = "null" if inner == {"type": "null"} else '{"": null}'
    assert takes(grammars.new(gbnf), vocab, f'{{"": {text}}}')
    assert not takes(grammars.new(gbnf), vocab, text)


def test_thousands_of_definitions_are_told_apart() -> None:
    definitions = {f"d{i}": {"properties": {"v": {"enum": [i]}}} for i in range(3000)}
    schema = {"prefixItems": [{"$ref": f"#/$defs/{name}"} for name in definitions], "$defs": definitions}
    plain = plain_schema(schema_text(schema))
    names = [item["$ref"] for item in plain.root["prefixItems"]]
    assert [plain.definitions[name]["properties"]["v"]["enum"] for name in names] == [[i] for i in range(3000)]


@pytest.mark.parametrize(
    ("schema", "texts", "others"),
    [
        ({"properties": {"a": False}}, ["{}"], ['{"a": 1}']),
        ({"properties": {"a": False, "b": True}}, ["{}", '{"b": 1}'], ['{"a": 1}', '{"b": 1, "a": 1}']),
        ({"anyOf": [False, {"type": "null"}]}, ["null"], ["{}", "false"]),
        ({"oneOf": [{"type": "null"}, False, {"enum": [5]}]}, ["null", "5"], ["false"]),
    ],
)
def test_what_nothing_meets_may_stand_where_it_need_not_be_met(
    vocab: LlamaVocab, schema: Any, texts: list[str], others: list[str]
) -> None:
    grammars, gbnf = Grammars(vocab), gbnf_of_schema(schema)
    for text in [*texts, *others]:
        assert takes(grammars.new(gbnf), vocab, text) == (text in texts)


def test_there_may_be_many_thousand_values(vocab: LlamaVocab) -> None:
    values = [f"{word}-{i}" for i in range(2500) for word in ("red", "green", "blue")]
    when = {"type": "string", "format": "date-time"}  # made of a rule `date` of its own
    schema = {"properties": {"date": {"enum": values}, "when": when}, "required": ["date", "when"]}
    grammar = Grammar(vocab, gbnf_of_schema(schema))
    assert takes(grammar.clone(), vocab, '{"date": "green-2499", "when": "2024-02-03T04:05:06Z"}')
    assert not takes(grammar, vocab, '{"date": "green-2500", "when": "2024-02-03T04:05:06Z"}')


def test_required_properties_without_a_schema_are_there_all_the_same() -> None:
    plain = plain_schema('{"type": "object", "required": ["a"]}')
    assert plain.root == {"type": "object", "properties": {"a": {"type": "value"}}, "required": ["a"]}
