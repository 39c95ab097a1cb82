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
from llama_sessions.window import Window

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


def a_windowed_session() -> Session:
    """Messages a to f: c is pinned, b and d are out with x in their place, e is out and nobody was told."""
    session = Session()
    for letter in "abcdef":
        session.add_user(letter)
    b, d, e = session.messages[1], session.messages[3], session.messages[4]
    stand_in = [{"role": "system", "content": "x"}]
    window = Window().without(session.messages, [b, d], reported=True, replacements=stand_in)
    session.set_window(window.without(session.messages, [e], reported=False))
    session.pin_message(2)
    return session


def test_window_and_pins_are_saved() -> None:
    session = a_windowed_session()
    saved = session.to_dict()
    assert saved["version"] == 2
    assert saved["pins"] == [2]
    assert saved["window"] == {
        "out": [1, 3, 4], "replacements": [{"role": "system", "content": "x"}], "withdrawn": [], "unreported": [4],
    }  # fmt: skip
    again = Session.from_dict(json.loads(json.dumps(saved)))
    assert [m["content"] for m in again.window] == ["a", "x", "c", "f"]
    assert [again.is_message_pinned(i) for i in range(6)] == [False, False, True, False, False, False]
    assert again.window_state.unreported == ({"role": "user", "content": "e"},)
    assert again.to_dict() == saved


def test_what_was_deleted_is_not_saved() -> None:
    session = a_windowed_session()
    del session.messages[1:]
    saved = session.to_dict()
    assert (saved["pins"], saved["window"]) == ([], {"out": [], "replacements": [], "withdrawn": [], "unreported": []})


def test_a_message_that_is_there_twice_is_out_and_pinned_twice_when_it_is_read() -> None:
    session = a_windowed_session()
    session.messages += [session.messages[4], session.messages[2]]
    again = Session.from_dict(json.loads(json.dumps(session.to_dict())))
    assert [m["content"] for m in again.window] == [m["content"] for m in session.window] == ["a", "x", "c", "f", "c"]
    assert [m["content"] for m in again.pinned_messages()] == ["c", "c"]


def test_saved_replacements_are_copies() -> None:
    session = a_windowed_session()
    saved = session.to_dict()
    again = Session.from_dict(saved)
    saved["window"]["replacements"][0]["content"] = "y"
    assert session.window[1]["content"] == again.window[1]["content"] == "x"


def test_a_session_of_version_1_is_read(load: Loader) -> None:
    saved = a_session(load()).to_dict() | {"version": 1}
    del saved["pins"], saved["window"]
    again = Session.from_dict(saved)
    assert again.window == again.messages == saved["messages"]
    assert again.pinned_messages() == []
    assert sum(reply is not None for reply in again.replies()) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pins": 7}, "'pins' must be a list, not int"),
        ({"pins": None}, "'pins' must be a list, not NoneType"),
        ({"pins": [6]}, "an index in 'pins' must be from 0 to 5, not 6"),
        ({"pins": [-1]}, "an index in 'pins' must be from 0 to 5, not -1"),
        ({"pins": [True]}, "an index in 'pins' must be an integer"),
        ({"pins": [[0]]}, "an index in 'pins' must be an integer"),
        ({"pins": [0], "messages": [], "window": {}}, "'pins' has 1 indices of messages, but there are no messages"),
        ({"window": None}, "'window' must be a dict, not NoneType"),
        ({"window": [1]}, "'window' must be a dict, not list"),
        ({"window": {"out": "1"}}, "'out' of the window must be a list, not str"),
        ({"window": {"out": [6]}}, "an index in 'out' of the window must be from 0 to 5, not 6"),
        ({"window": {"out": [1.0]}}, "an index in 'out' of the window must be an integer"),
        ({"window": {"out": [1], "unreported": {}}}, "'unreported' of the window must be a list, not dict"),
        ({"window": {"out": [1], "unreported": [9]}}, "an index in 'unreported' of the window must be from 0 to 5"),
        ({"window": {"out": [1], "unreported": [1, 3]}}, "'unreported' of the window has message 3, which is not in"),
        ({"window": {"out": [1], "replacements": "x"}}, "'replacements' of the window must be a list, not str"),
        ({"window": {"out": [1], "replacements": ["x"]}}, "replacement 0 of the window must be a dict"),
        ({"window": {"out": [1], "replacements": [{"role": "boss"}]}}, "replacement 0 of the window has the role"),
        ({"window": {"replacements": [{"role": "user", "content": ""}]}}, "1 replacements for messages that are out"),
    ],
)
def test_a_window_that_was_not_saved_by_us_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Session.from_dict(a_windowed_session().to_dict() | change)


def test_trust_and_raw_text_are_saved() -> None:
    session = Session.raw("<s>")
    session.add_assistant("</s>", trusted=True)
    again = Session.from_dict(session.to_dict())
    assert again.is_raw
    assert again.replies()[1] is not None
    assert again.replies()[1].trusted  # type: ignore[union-attr]


def nested(n: int) -> list[Any]:
    found: list[Any] = []
    for _ in range(n):
        found = [found]
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: 7, "from_dict takes what Session.to_dict gave"),
        (lambda d: {}, "from_dict takes what Session.to_dict gave"),
        (lambda d: d | {"version": 99}, "version 99; this one reads up to 2: upgrade"),
        (lambda d: d | {"version": "1"}, "must be an integer"),
        (lambda d: d | {"messages": 7}, "'messages' must be a list"),
        (lambda d: d | {"messages": [{"role": "boss", "content": ""}]}, "message 0 has the role 'boss'"),
        (lambda d: d | {"messages": nested(5000)}, "nested too deep"),
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


@pytest.mark.parametrize("call", [lambda cm, s: s.copy(), lambda cm, s: s.to_dict(), ContextManager.fork])
def test_what_is_nested_too_deep_cannot_be_copied(load: Loader, call: Any) -> None:
    cm = load()
    session = a_session(cm)
    session.messages[-1]["extra"] = nested(5000)
    with pytest.raises(OptionError, match="nested too deep"):
        call(cm, session)
    del session.messages[-1]["extra"]
    cm.prepare(cm.fork(session))


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
