"""A session is what was said: a plain list of dicts, and beside it the ids that replies were sampled as."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from llama_sessions import ContextManager, OptionError, Session


def ids_of(session: Session) -> list[tuple[int, ...] | None]:
    """What is known beside each message."""
    return [None if reply is None else reply.ids for reply in session.replies()]


# -- messages


def test_messages_are_plain_openai_dicts() -> None:
    session = Session()
    session.add_user("hello")
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    session.add_assistant("hi")["tool_calls"] = [call]
    session.add_tool_result("42", tool_call_id="call_1", name="add")
    session.add("system", "be brief")
    assert session.messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi", "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "call_1", "name": "add"},
        {"role": "system", "content": "be brief"},
    ]
    assert all(type(message) is dict for message in session.messages)


def test_adding_returns_the_dict_that_is_in_the_list() -> None:
    session = Session()
    added = [session.add_user("a"), session.add_assistant("b"), session.add_tool_result("c"), session.add("user", "d")]
    assert all(one is other for one, other in zip(added, session.messages, strict=True))


def test_a_tool_result_has_only_the_fields_that_were_given() -> None:
    assert Session().add_tool_result("42") == {"role": "tool", "content": "42"}


def test_undo_takes_the_last_question_and_all_that_came_of_it() -> None:
    session = Session()
    session.add_user("first")
    session.add_assistant("one")
    session.add_user("second")
    session.add("assistant", "", tool_calls=[{"id": "a", "function": {"name": "look", "arguments": "{}"}}])
    session.add_tool_result("found", "a")
    assert session.undo() == 3
    assert [m["content"] for m in session.messages] == ["first", "one"]
    assert session.undo() == 2
    assert session.undo() == 0


def test_undo_where_no_user_spoke_takes_all() -> None:
    session = Session()
    session.add_assistant("Hello.")
    assert session.undo() == 1
    assert session.messages == []


def test_undo_touches_nothing_where_a_message_is_none() -> None:
    session = Session()
    session.add_user("first")
    session.messages.append("second")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="message 1"):
        session.undo()
    assert len(session.messages) == 2


def test_more_fields_of_a_message_are_kept() -> None:
    calls = [{"function": {"name": "f", "arguments": {}}}]
    message = Session().add("assistant", "", tool_calls=calls)
    assert message == {"role": "assistant", "content": "", "tool_calls": calls}


def test_an_assistant_may_call_tools_and_say_nothing() -> None:
    message = Session().add("assistant", None, tool_calls=[{"function": {"name": "f"}}])  # type: ignore[arg-type]
    assert message["content"] is None


@pytest.mark.parametrize(
    ("role", "content", "why"),
    [
        ("User", "x", "role 'User'; known roles: system, user, assistant, tool"),
        (None, "x", "role None"),
        (["user"], "x", "role"),
        ("user", None, "content of the message must be text"),
        ("assistant", None, "content of the message must be text"),
        ("user", 5, "not int"),
        ("user", b"x", "not bytes"),
        ("user", [{"type": "text", "text": "x"}], "not list"),
        ("user", "a\ud800", "lone surrogate at character 1"),
    ],
)
def test_what_is_no_message_is_refused_and_not_added(role: Any, content: Any, why: str) -> None:
    session = Session()
    with pytest.raises(OptionError, match=why):
        session.add(role, content)
    assert session.messages == []


@pytest.mark.parametrize("trusted", [1, 0, None, "yes"])
def test_trusted_is_true_or_false(trusted: Any) -> None:
    session = Session()
    with pytest.raises(OptionError, match="trusted"):
        session.add_assistant("x", trusted=trusted)
    assert session.messages == []


@pytest.mark.parametrize(
    ("name", "value"), [("system", 5), ("system", "\udfff"), ("namespace", 5), ("namespace", b"a")]
)
def test_system_and_namespace_are_text(name: str, value: Any) -> None:
    with pytest.raises(OptionError, match=name):
        Session(**{name: value})


@pytest.mark.parametrize("value", [5, b"a", ["a"], "\udfff"])
def test_a_namespace_stays_text_or_none(value: Any) -> None:
    session = Session(namespace="a")
    with pytest.raises(OptionError, match="namespace"):
        session.namespace = value
    assert session.namespace == "a"
    session.namespace = None
    assert session.copy().namespace is None
    session.namespace = "b"
    assert session.to_dict()["namespace"] == "b"


def test_no_system_text_differs_from_an_empty_one() -> None:
    assert (Session().system, Session("").system) == (None, "")


def test_a_new_session_has_no_row() -> None:
    session = Session()
    assert (session.n_past, session.last_prepare, session.messages) == (0, None, [])
    assert repr(session) == "<Session 0 messages, n_past=0>"


# -- reply ids


def test_reply_ids_live_beside_the_dict_and_not_in_it() -> None:
    session = Session()
    message = session.add_reply("hi", [1, 2])
    assert message == {"role": "assistant", "content": "hi"}
    assert ids_of(session) == [(1, 2)]


def test_reply_ids_follow_their_dict_wherever_it_goes() -> None:
    session = Session()
    session.add_user("a")
    first = session.add_reply("same", [1])
    second = session.add_reply("same", [2])
    session.messages[:] = [second, {"role": "user", "content": "b"}, first]
    assert ids_of(session) == [(2,), None, (1,)]


def test_an_edited_reply_loses_its_ids() -> None:
    session = Session()
    session.add_reply("hi there", [1, 2])["content"] = "hi you"
    assert ids_of(session) == [None]


def test_a_reply_that_is_edited_back_has_its_ids_again() -> None:
    session = Session()
    message = session.add_reply("hi", [1, 2])
    message["content"] = "ho"
    assert ids_of(session) == [None]
    message["content"] = "hi"
    assert ids_of(session) == [(1, 2)]


def test_a_copy_of_a_reply_finds_its_ids_by_its_text() -> None:
    session = Session()
    session.add_reply("hi", [1, 2])
    session.messages = [dict(message) for message in session.messages]
    assert ids_of(session) == [(1, 2)]


def test_only_an_assistants_message_has_reply_ids() -> None:
    session = Session()
    session.add_reply("hi", [1, 2])
    session.messages.append({"role": "user", "content": "hi"})
    session.messages[0]["role"] = "user"
    assert ids_of(session) == [None, None]


def test_replies_of_other_messages_are_those_of_the_session() -> None:
    session = Session()
    session.add_reply("hi", [1, 2])
    seen = [{"role": "system", "content": "x"}, *session.messages, "no dict", {"role": "assistant", "content": None}]
    found = session.replies(seen)  # type: ignore[arg-type]
    assert [reply and reply.ids for reply in found] == [None, (1, 2), None, None]


def test_a_deleted_reply_leaves_nothing_behind_that_grows() -> None:
    session = Session()
    for i in range(500):
        session.add_reply(f"reply {i}", [i])
        session.messages.clear()
    assert len(session._replies) < 50


def test_appended_tokens_stand_for_the_next_assistant_message() -> None:
    session = Session()
    for token in (5, 6):
        session.note_appended(token, "m")
    session.add_assistant("hi")
    session.add_assistant("ho")
    assert ids_of(session) == [(5, 6), None]


def test_appended_tokens_are_forgotten_when_the_row_is_prepared_anew() -> None:
    session = Session()
    session.note_appended(5, "m")
    session.forget_appended()
    session.add_assistant("hi")
    assert ids_of(session) == [None]


def test_a_refused_message_keeps_the_appended_tokens() -> None:
    session = Session()
    session.note_appended(5, "m")
    with pytest.raises(OptionError):
        session.add_assistant("\ud800")
    session.add_assistant("hi")
    assert ids_of(session) == [(5,)]


def test_trust_goes_with_the_dict_and_not_with_the_text() -> None:
    session = Session()
    trusted = session.add_assistant("<|im_end|>", trusted=True)
    session.add_assistant("<|im_end|>")
    session.messages.append(dict(trusted))
    found = session.replies()
    assert [reply is not None and reply.trusted for reply in found] == [True, False, False]


def test_an_edited_message_is_not_trusted_any_more() -> None:
    session = Session()
    session.add_assistant("fine", trusted=True)["content"] = "<|im_end|>"
    assert session.replies() == [None]


# -- copies


def test_a_copy_says_the_same() -> None:
    session = Session("rules", "tenant", [{"name": "f"}], {"enable_thinking": False})
    session.add_user("a")
    session.add_reply("b", [1, 2])
    twin = session.copy()
    assert (twin.system, twin.namespace, twin.tools) == ("rules", "tenant", [{"name": "f"}])
    assert twin.template_kwargs == {"enable_thinking": False}
    assert twin.messages == session.messages
    assert ids_of(twin) == [None, (1, 2)]


def test_nothing_in_a_copy_is_shared_with_the_session() -> None:
    tools = [{"function": {"name": "f", "parameters": {"a": [1]}}}]
    session = Session(tools=tools, template_kwargs={"deep": {"x": [1]}})
    session.add("assistant", "b", tool_calls=[{"function": {"arguments": {"x": 1}}}])
    twin = session.copy()
    twin.messages[0]["tool_calls"][0]["function"]["arguments"]["x"] = 2
    twin.template_kwargs["deep"]["x"].append(2)
    assert twin.tools is not None
    twin.tools[0]["function"]["parameters"]["a"].append(2)  # type: ignore[index]
    assert session.messages[0]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert session.template_kwargs == {"deep": {"x": [1]}}
    assert session.tools == [{"function": {"name": "f", "parameters": {"a": [1]}}}]


def test_reply_ids_and_trust_follow_the_dicts_of_a_copy() -> None:
    session = Session()
    session.add_reply("same", [1])
    session.add_reply("same", [2])
    session.add_assistant("x", trusted=True)
    twin = session.copy()
    assert ids_of(twin) == [(1,), (2,), ()]
    assert [reply is not None and reply.trusted for reply in twin.replies()] == [False, False, True]
    twin.messages.reverse()
    assert ids_of(twin) == [(), (2,), (1,)]
    twin.messages[1]["content"] = "other"
    assert ids_of(twin)[1] is None
    assert ids_of(session) == [(1,), (2,), ()]


def test_what_is_added_to_a_copy_is_not_in_the_session() -> None:
    session = Session()
    session.note_appended(1, "m")
    twin = session.copy()
    twin.add_assistant("b")
    assert (session.messages, ids_of(twin)) == ([], [(1,)])
    session.add_assistant("c")
    assert ids_of(session) == [(1,)]


# -- with a manager


def test_appended_ids_are_those_of_the_next_prompt_where_they_spell_the_reply(
    load: Callable[..., ContextManager],
) -> None:
    cm = load()
    session = Session()
    session.add_user("hello")
    n = cm.prepare(session)
    unusual = [int(token) for letter in "again" for token in cm.vocab.tokenize(letter)]
    assert len(unusual) > len(cm.vocab.tokenize("again"))
    for token in unusual:
        cm.append(session, token)
    session.add_assistant("again")
    cm.prepare(session)
    assert cm.tokens(session)[n : n + len(unusual)].tolist() == unusual


def test_an_edited_reply_is_tokenised_like_any_text(load: Callable[..., ContextManager]) -> None:
    cm = load()
    session, other = Session(), Session()
    for one in (session, other):
        one.add_user("hello")
    session.add_reply("again", [int(token) for letter in "again" for token in cm.vocab.tokenize(letter)])
    other.add_assistant("against")
    cm.prepare(session)
    session.messages[-1]["content"] = "against"
    cm.prepare(session)
    cm.prepare(other)
    assert np.array_equal(cm.tokens(session), cm.tokens(other))


def test_a_forked_session_keeps_the_ids_of_its_replies(load: Callable[..., ContextManager]) -> None:
    cm = load()
    session = Session()
    session.add_user("hello")
    session.add_reply("again", [int(token) for letter in "again" for token in cm.vocab.tokenize(letter)])
    session.add_user("and?")
    cm.prepare(session)
    twin = cm.fork(session)
    cm.prepare(twin)
    assert np.array_equal(cm.tokens(twin), cm.tokens(session))
    assert twin.last_prepare is not None
    assert twin.last_prepare.n_decoded == 0
