"""A session written down and read again: exact after a restart on the same model, its text alone on another."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from models import model_path
from oracle import oracle_for
from scripted import ids_of, only_text, script

from llama_sessions import ContextManager, Engine, OptionError, Session

Loader = Callable[..., ContextManager]


def a_session(cm: ContextManager) -> Session:
    """Two turns; the second reply has ids that the tokenizer would not choose."""
    engine, session = Engine(cm), Session("Rules.", "tenant", template_kwargs={"x": 1})
    engine.chat(session, "Who?", max_tokens=5, logit_bias=only_text(cm))
    list(script(engine.stream(session, "Say it."), ids_of(cm, "the", by_byte=True)))
    session.add_user("Again.")
    return session


def test_after_a_restart_the_next_prepare_is_exact_and_has_the_same_tokens(load: Loader) -> None:
    cm = load()
    session = a_session(cm)
    cm.prepare(session)
    text = json.dumps(session.to_dict())
    other = load()
    again = Session.from_dict(json.loads(text))
    other.prepare(again)
    assert other.tokens(again).tolist() == cm.tokens(session).tolist()
    spelled = ids_of(cm, "the", by_byte=True)
    row = other.tokens(again).tolist()
    assert any(row[i : i + len(spelled)] == spelled for i in range(len(row)))
    oracle_for(model_path("llama-bpe")).assert_exact(other.logits(again), other.tokens(again))
    for name in ("messages", "system", "namespace", "tools", "template_kwargs", "is_raw"):
        assert getattr(again, name) == getattr(session, name)


def test_another_model_keeps_the_text_and_drops_the_ids(load: Loader) -> None:
    saved = a_session(load()).to_dict()
    other = load("llama-bpe", model={"seed": 5})
    assert other.capabilities.fingerprint == load("llama-bpe", model={"seed": 5}).capabilities.fingerprint
    another = load("llama-spm")
    assert another.capabilities.fingerprint != other.capabilities.fingerprint
    session = Session.from_dict(saved)
    another.prepare(session)
    plain = Session(session.system, session.namespace)
    plain.messages = session.messages
    another.prepare(plain)
    assert another.tokens(session).tolist() == another.tokens(plain).tolist()
    oracle_for(model_path("llama-spm")).assert_exact(another.logits(session), another.tokens(session))


def test_another_model_of_the_same_words_drops_the_ids_all_the_same(load: Loader) -> None:
    """They spell the text there, too: only the fingerprint tells."""
    saved = a_session(load()).to_dict()
    other = load("mamba")
    session, spelled = Session.from_dict(saved), ids_of(other, "the", by_byte=True)
    assert tuple(spelled) in {tuple(reply["ids"]) for reply in saved["replies"]}
    other.prepare(session)
    row = other.tokens(session).tolist()
    assert not any(row[i : i + len(spelled)] == spelled for i in range(len(row)))
    whole = ids_of(other, "the")
    assert any(row[i : i + len(whole)] == whole for i in range(len(row)))


def test_a_reply_that_was_edited_is_saved_without_its_ids(load: Loader) -> None:
    session = a_session(load())
    session.messages[1]["content"] = "edited"
    assert [reply["message"] for reply in session.to_dict()["replies"]] == [3]


def test_what_is_saved_is_a_copy(load: Loader) -> None:
    session = a_session(load())
    saved = session.to_dict()
    again = Session.from_dict(saved)
    again.messages[0]["content"] = "x"
    saved["messages"][0]["content"] = "y"
    assert session.messages[0]["content"] == "Who?"


def test_trust_and_raw_text_are_saved() -> None:
    session = Session.raw("<s>")
    session.add_assistant("</s>", trusted=True)
    again = Session.from_dict(session.to_dict())
    assert again.is_raw
    assert again.replies()[1] is not None
    assert again.replies()[1].trusted  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: 7, "from_dict takes what Session.to_dict gave"),
        (lambda d: {}, "from_dict takes what Session.to_dict gave"),
        (lambda d: d | {"version": 99}, "version 99; this one reads up to 1: upgrade"),
        (lambda d: d | {"version": "1"}, "must be an integer"),
        (lambda d: d | {"messages": 7}, "'messages' must be a list"),
        (lambda d: d | {"messages": [{"role": "boss", "content": ""}]}, "message 0 has the role 'boss'"),
        (lambda d: d | {"system": 7}, "system must be text"),
        (lambda d: d | {"raw": 7}, "raw must be True or False"),
        (lambda d: d | {"replies": [7]}, "reply 0 must be a dict"),
        (lambda d: d | {"replies": 7}, "'replies' must be a list"),
        (lambda d: d | {"replies": None}, "'replies' must be a list"),
        (lambda d: d | {"replies": [{"message": 99}]}, "'message' of reply 0 must be from 0 to 4"),
        (lambda d: d | {"replies": [{"message": 1, "ids": 7}]}, "'ids' of reply 0 must be a list"),
        (lambda d: d | {"replies": [{"message": 1, "ids": [-1]}]}, "an id of reply 0 must be"),
        (lambda d: d | {"replies": [{"message": 1, "ids": [2**40], "model": "m"}]}, "an id of reply 0 must be"),
    ],
)
def test_what_was_not_saved_by_us_is_refused(load: Loader, change: Any, message: str) -> None:
    saved = a_session(load()).to_dict()
    with pytest.raises(OptionError, match=message):
        Session.from_dict(change(saved))


def test_ids_outside_the_vocabulary_are_harmless(load: Loader) -> None:
    cm = load()
    saved = a_session(cm).to_dict()
    saved["replies"][0]["ids"] = [2**31 - 1]
    session = Session.from_dict(saved)
    cm.prepare(session)
    oracle_for(model_path("llama-bpe")).assert_exact(cm.logits(session), cm.tokens(session))


def test_ids_of_numpy_are_saved_as_numbers(load: Loader) -> None:
    cm = load()
    session = Session()
    session.add_user("x")
    session.add_reply("the", cm.vocab.tokenize("the"), model=cm.capabilities.fingerprint)
    assert json.loads(json.dumps(session.to_dict()))["replies"][0]["ids"] == cm.vocab.tokenize("the").tolist()
