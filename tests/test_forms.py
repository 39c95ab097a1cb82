"""Replies in the form that was asked for: grammars and JSON schemas, dead ends, and what forms go together with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from models import model_path
from oracle import oracle_for
from scripted import ids_of, script

from llama_sessions import ContextManager, Engine, OptionError, Session
from llama_sessions.generation_options import GenerationOptions
from llama_sessions.llama.grammar import Grammars
from llama_sessions.llama.sampler import Sampler

Loader = Callable[..., ContextManager]
GREEDY: dict[str, Any] = {"temperature": 0.0}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["name", "age", "ok"],
}


@pytest.mark.parametrize("model", ["llama-bpe", "llama-spm"])
@pytest.mark.parametrize("options", [GREEDY, {"seed": 3}, {"seed": 3, "top_k": 0}, {"seed": 3, "repeat_penalty": 1.3}])
def test_a_reply_is_what_the_schema_says(load: Loader, model: str, options: dict[str, Any]) -> None:
    cm = load(model)
    session = Session()
    reply = Engine(cm).chat(session, "Who?", json_schema=PERSON, max_tokens=200, **options)
    assert reply.stop_reason == "stop"
    said = json.loads(reply.text)
    assert [type(said[key]) for key in PERSON["properties"]] == [str, int, bool]  # type: ignore[attr-defined]
    assert session.messages[-1]["content"] == reply.text
    session.add_user("And?")
    cm.prepare(session)
    oracle_for(model_path(model)).assert_exact(cm.logits(session), cm.tokens(session))


def test_a_grammar_leaves_only_its_own_words(load: Loader) -> None:
    engine = Engine(load())
    words = {engine.complete("Well?", grammar='root ::= "yes" | "no"', seed=seed).text for seed in range(20)}
    assert words == {"yes", "no"}


def allowed(cm: ContextManager, logits: Any, spoken: list[int], gbnf: str) -> Any:
    """The logits with everything out of the grammar at -inf, by asking about every token."""
    grammar = cm.grammar(gbnf)
    for token in spoken:
        grammar.accept(token)
    out = np.full_like(logits, -np.inf)
    for token in range(len(logits)):
        if grammar.allows(token):
            out[token] = logits[token]
    return out


@pytest.mark.parametrize("gbnf", ["root ::= [a-z]+", 'root ::= "the " [0-9]+ " end"', "root ::= [^a-z]*"])
def test_greedy_takes_the_best_of_what_is_allowed(load: Loader, gbnf: str) -> None:
    cm = load()
    session = Session()
    cm.prepare(session) if session.add_user("Go!") else None
    oracle = oracle_for(model_path("llama-bpe"))
    reply = Engine(cm).chat(session, grammar=gbnf, max_tokens=8, **GREEDY)
    prompt = cm.tokens(session)[: reply.n_prompt]
    for i, token in enumerate(reply.tokens):
        logits = oracle.logits([*prompt, *reply.tokens[:i]])
        best = allowed(cm, logits, list(reply.tokens[:i]), gbnf)
        assert best[token] >= best.max() - 0.05  # float noise of batch splits


@pytest.mark.parametrize("top_k", [0, 3, 40])
def test_a_seed_draws_as_if_what_is_not_allowed_had_been_taken_out(load: Loader, top_k: int) -> None:
    """What is drawn at the second try follows the distribution over the allowed tokens alone."""
    cm = load()
    gbnf = "root ::= [a-e]"
    letters = [ids_of(cm, letter)[0] for letter in "abcde"]
    rng = np.random.default_rng(0)
    logits = rng.standard_normal(cm.capabilities.n_vocab).astype(np.float32)
    logits[letters] = [1.0, 2.0, 0.5, 1.5, 0.0]
    counts = dict.fromkeys(letters, 0)
    n = 3000
    options = GenerationOptions(temperature=1.0, top_k=top_k, top_p=1.0, min_p=0.0, seed=1)
    sampler, grammar = Sampler(options, len(logits)), cm.grammar(gbnf)
    grammars = Grammars(cm.vocab)
    for _ in range(n):
        token = sampler.sample(logits, grammars.new(gbnf))
        assert token is not None
        counts[token] += 1
    kept = sorted(letters, key=lambda t: -logits[t])[: top_k or None]
    weights = np.exp(logits[kept])
    expected = dict(zip(kept, weights / weights.sum(), strict=True))
    for token in letters:
        assert counts[token] / n == pytest.approx(expected.get(token, 0.0), abs=0.03)
    assert grammar.allows(letters[0])


def test_a_dead_end_ends_the_reply_as_it_stands(load: Loader) -> None:
    cm = load()
    session = Session()
    bias = {t: -math.inf for t in range(cm.vocab.n_tokens) if b"b" in cm.vocab.piece(t)}
    reply = Engine(cm).chat(session, "Go!", grammar='root ::= "a" "b" "c"', logit_bias=bias, **GREEDY)
    assert reply.stop_reason == "grammar_dead_end"
    assert reply.text == "a"
    assert session.messages[-1]["content"] == "a"
    session.add_user("And?")
    cm.prepare(session)
    oracle_for(model_path("llama-bpe")).assert_exact(cm.logits(session), cm.tokens(session))


def test_an_end_that_is_banned_is_a_dead_end_too(load: Loader) -> None:
    cm = load()
    bias = {t: -math.inf for t in range(cm.vocab.n_tokens) if cm.vocab.is_eog(t)}
    reply = Engine(cm).complete("Go!", grammar='root ::= "yes"', logit_bias=bias)
    assert (reply.stop_reason, reply.text) == ("grammar_dead_end", "yes")


def test_a_grammar_holds_from_the_end_of_the_thinking_on(load: Loader) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
    )
    cm = load(chat_template=template)
    reply = Engine(cm).chat(Session(), "Well?", grammar='root ::= "yes" | "no"', think_budget=5, seed=1)
    assert reply.text in ("yes", "no")
    assert reply.stop_reason == "stop"
    assert reply.n_generated > 5


def test_a_stop_string_and_a_limit_end_a_form_early(load: Loader) -> None:
    engine = Engine(load())
    assert engine.complete("Go!", grammar='root ::= "abcdef"', stop="cd").text == "ab"
    short = engine.complete("Go!", grammar="root ::= [a-z]{50}", max_tokens=3)
    assert (short.stop_reason, short.n_generated) == ("length", 3)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"grammar": "root ::= ("}, r"line 1, column"),
        ({"grammar": ""}, "root"),
        ({"grammar": "root ::= nowhere"}, "nowhere"),
        ({"grammar": 'root ::= "a\0"'}, "NUL"),
        ({"grammar": "root ::= " + "(" * 100_000 + '"a"' + ")" * 100_000}, "deep"),
        ({"grammar": "root ::= root"}, "recurs"),
        ({"json_schema": "{"}, "JSON"),
        ({"json_schema": {"type": "nonsense"}}, "nonsense"),
        ({"json_schema": {"enum": []}}, "enum"),
        ({"json_schema": {"$ref": "#/nowhere"}}, "nowhere"),
        ({"json_schema": {"$ref": "#"}}, "leads back to itself"),
        ({"json_schema": {"type": "array", "items": {}, "minItems": 3, "maxItems": 1}}, "minItems"),
    ],
)
def test_a_form_that_cannot_be_is_refused_before_anything_is_said(load: Loader, form: Any, message: str) -> None:
    session = Session()
    with pytest.raises(OptionError, match=message):
        Engine(load()).chat(session, "Go!", **form)
    assert session.messages == []


def test_a_recursive_schema_works(load: Loader) -> None:
    node = {
        "type": "object",
        "properties": {"v": {"enum": [1, 2]}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
        "required": ["v", "next"],
    }
    schema = {"$ref": "#/$defs/node", "$defs": {"node": node}}
    cm = load()
    ids = ids_of(cm, '{"v": 1, "next": {"v": 2, "next": null}}')
    stream = script(Engine(cm).stream(Session(), "Go!", json_schema=schema), ids)
    grammar = stream._generation._grammar
    assert grammar is not None
    for token in ids:
        assert grammar.allows(token)
        grammar.accept(token)
    assert grammar.allows(int(cm.vocab.eos))
