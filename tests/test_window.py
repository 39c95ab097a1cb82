"""The window over a session's messages: marks of dicts, beside a list that its user edits at will."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from llama_sessions import OptionError, Session
from llama_sessions.types import Message
from llama_sessions.window import Window


def messages_of(text: str) -> list[Message]:
    """One message a letter."""
    return [{"role": "user", "content": letter} for letter in text]


def session_of(text: str) -> Session:
    session = Session()
    session.messages = messages_of(text)
    return session


def said(messages: Sequence[Message]) -> str:
    return "".join(m["content"] for m in messages)


def parts(window: Window) -> tuple[str, str, str]:
    return said(window.out), said(window.replacements), said(window.unreported)


# -- Window


def test_a_new_window_shows_the_very_dicts_in_a_list_of_its_own() -> None:
    messages = messages_of("abc")
    seen = Window().seen(messages)
    assert seen is not messages
    assert [id(m) for m in seen] == [id(m) for m in messages]


def test_what_is_gone_is_not_seen_and_stands_in_the_order_of_the_list() -> None:
    messages = messages_of("abcde")
    window = Window().without(messages, [messages[3], messages[1]], reported=True)
    assert said(window.seen(messages)) == "ace"
    assert parts(window) == ("bd", "", "")


def test_one_of_two_equal_messages_goes() -> None:
    messages = messages_of("aaa")
    seen = Window().without(messages, [messages[1]], reported=True).seen(messages)
    assert [id(m) for m in seen] == [id(messages[0]), id(messages[2])]


def test_a_window_is_exchanged_and_never_changed() -> None:
    messages = messages_of("abc")
    first = Window().without(messages, messages[:1], reported=False)
    second = first.without(messages, messages[1:2], reported=True, replacements=messages_of("x"))
    assert (parts(first), parts(second)) == (("a", "", "a"), ("ab", "x", ""))
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.out = ()  # type: ignore[misc]


def test_replacements_stand_where_the_first_that_is_out_stood() -> None:
    messages = messages_of("abcde")
    window = Window().without(messages, [messages[1], messages[3]], reported=True, replacements=messages_of("xy"))
    assert said(window.seen(messages)) == "axyce"
    del messages[1]
    assert said(window.seen(messages)) == "acxye"


def test_replacements_go_with_the_last_message_they_stand_for() -> None:
    messages = messages_of("abc")
    window = Window().without(messages, messages[1:2], reported=True, replacements=messages_of("x"))
    assert said(window.seen([messages[0], messages[2]])) == "ac"


def test_replacements_of_deleted_messages_do_not_come_back_for_others() -> None:
    messages = messages_of("abc")
    window = Window().without(messages, messages[:1], reported=True, replacements=messages_of("x"))
    del messages[0]
    later = window.without(messages, messages[:1], reported=True)
    assert said(later.seen(messages)) == "c"
    assert parts(later) == ("b", "", "")


def test_new_replacements_take_the_place_of_all_earlier_ones() -> None:
    messages = messages_of("abcd")
    window = Window().without(messages, messages[:1], reported=True, replacements=messages_of("xy"))
    later = window.without(messages, messages[2:3], reported=True, replacements=messages_of("z"))
    assert said(later.seen(messages)) == "zbd"
    none = window.without(messages, messages[2:3], reported=True, replacements=[])
    assert said(none.seen(messages)) == "bd"


def test_without_an_answer_earlier_replacements_stay() -> None:
    messages = messages_of("abcd")
    window = Window().without(messages, messages[:1], reported=True, replacements=messages_of("x"))
    later = window.without(messages, messages[2:3], reported=True)
    assert said(later.seen(messages)) == "xbd"


def test_a_replacement_that_goes_is_no_longer_there() -> None:
    messages, stand_in = messages_of("abc"), messages_of("xy")
    window = Window().without(messages, messages[:1], reported=True, replacements=stand_in)
    later = window.without(messages, [stand_in[0], messages[1]], reported=False)
    assert said(later.seen(messages)) == "yc"
    assert parts(later) == ("ab", "y", "b")


def test_a_dropped_message_may_be_its_own_replacement_and_go_again() -> None:
    messages = messages_of("abc")
    window = Window().without(messages, messages[:2], reported=True, replacements=[messages[1]])
    assert said(window.seen(messages)) == "bc"
    later = window.without(messages, [messages[1]], reported=False)
    assert said(later.seen(messages)) == "c"
    assert parts(later) == ("ab", "", "")  # the hook has seen it


def test_replacements_for_nothing_are_none() -> None:
    messages = messages_of("ab")
    window = Window().without(messages, [], reported=True, replacements=messages_of("x"))
    assert said(window.seen(messages)) == "ab"
    assert window.replacements == ()


def test_what_no_hook_was_handed_is_remembered_until_one_is() -> None:
    messages = messages_of("abcd")
    window = Window().without(messages, messages[1:3], reported=False)
    assert parts(window) == ("bc", "", "bc")
    assert parts(window.without(messages, messages[:1], reported=False)) == ("abc", "", "abc")
    assert parts(window.without(messages, messages[:1], reported=True)) == ("abc", "", "bc")
    assert parts(window.without(messages, messages[2:3], reported=True)) == ("bc", "", "b")
    assert parts(window.without(messages, messages[:1], reported=True, replacements=[])) == ("abc", "", "")


def test_what_was_reported_does_not_become_unreported() -> None:
    messages = messages_of("ab")
    window = Window().without(messages, messages[:1], reported=True)
    assert parts(window.without(messages, messages[:1], reported=False)) == ("a", "", "")


def test_deleted_messages_are_not_held_for_ever() -> None:
    messages, window = messages_of("a"), Window()
    for _ in range(100):
        window = window.without(messages, messages, reported=False)
        messages = messages_of("a")
    assert len(window.out) == len(window.unreported) == 1


def test_a_dict_that_is_in_the_list_twice_counts_as_one() -> None:
    messages = messages_of("ab")
    messages = [messages[0], messages[1], messages[0]]
    window = Window().without(messages, messages[:1], reported=False, replacements=None)
    assert parts(window) == ("a", "", "a")
    assert said(window.seen(messages)) == "b"
    window = window.without(messages, [], reported=True, replacements=messages_of("x"))
    assert said(window.seen(messages)) == "xb"


def test_what_is_no_message_of_the_list_cannot_go() -> None:
    messages = messages_of("ab")
    assert Window().without(messages, copy.deepcopy(messages), reported=False) == Window()


Step = tuple[str, int, int]
KINDS = ("insert", "delete", "twice", "move", "gone", "reported", "answered")
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9)))


@settings(max_examples=300)
@given(STEPS)
def test_any_editing_and_evicting_agrees_with_a_list_of_numbers(steps: list[Step]) -> None:
    """All messages are equal, so only identity tells them apart; the model has their numbers."""
    made: list[Message] = []

    def make() -> int:
        made.append({"role": "user", "content": "the same"})
        return len(made) - 1

    numbers, out, unreported, stand_in = [make() for _ in range(4)], set[int](), set[int](), list[int]()
    withdrawn: list[int] = []
    window = Window()
    for step, a, b in steps:
        messages = [made[n] for n in numbers]
        if step == "insert":
            numbers.insert(a, make())
        elif numbers and step == "delete":
            del numbers[a % len(numbers)]
        elif numbers and step == "twice":
            numbers.insert(b, numbers[a % len(numbers)])
        elif numbers and step == "move":
            numbers.insert(b, numbers.pop(a % len(numbers)))
        elif step in {"gone", "reported", "answered"}:
            choice = numbers + stand_in
            gone = {choice[i % len(choice)] for i in range(a, a + b % 4)} if choice else set()
            answer = [make() if i % 2 else a % len(made) for i in range(b % 3)] if step == "answered" else None
            window = window.without(
                messages,
                [made[n] for n in gone],
                reported=step != "gone",
                replacements=None if answer is None else [made[n] for n in answer],
            )
            unreported = unreported | (gone - out) if step == "gone" else unreported - gone
            if answer is not None:
                stand_in, unreported, withdrawn = answer, set(), []
            elif out & set(numbers):
                withdrawn = withdrawn + [n for n in stand_in if n in gone and step == "gone"]
                stand_in = [n for n in stand_in if n not in gone]
            else:
                stand_in, withdrawn = [], []
            out, unreported = (out | gone) & set(numbers), unreported & set(numbers)
            stand_in, withdrawn = (stand_in, withdrawn) if out else ([], [])
            assert {id(m) for m in window.out} == {id(made[n]) for n in out}
            assert len(window.out) == len(out)
            assert {id(m) for m in window.unreported} == {id(made[n]) for n in unreported}
            assert [id(m) for m in window.replacements] == [id(made[n]) for n in stand_in]
            assert [id(m) for m in window.withdrawn] == [id(made[n]) for n in withdrawn]
        is_out = bool(out & set(numbers))
        assert window.is_unheard([made[n] for n in numbers]) == bool(
            unreported & set(numbers) or (withdrawn and is_out)
        )
        first = min((i for i, n in enumerate(numbers) if n in out), default=None)
        seen = [n for n in numbers if n not in out]
        if first is not None:
            seen[first:first] = stand_in  # before it nothing is out, so it has the same index there
        assert [id(m) for m in window.seen([made[n] for n in numbers])] == [id(made[n]) for n in seen]


# -- a session's window


def evicted(text: str, *indices: int, replacements: str = "", reported: bool = True) -> Session:
    """A session with a window as a manager would leave it."""
    session = session_of(text)
    gone = [session.messages[i] for i in indices]
    stand_in = messages_of(replacements) if replacements else None
    window = session.window_state.without(session.messages, gone, reported=reported, replacements=stand_in)
    session.set_window(window)
    return session


def test_the_messages_stay_whole_where_the_window_moves() -> None:
    session = evicted("abcd", 1, 2, replacements="x")
    assert (said(session.messages), said(session.window)) == ("abcd", "axd")
    session.window.clear()
    assert said(session.window) == "axd"


def test_a_window_can_be_widened_again() -> None:
    session = evicted("abcd", 1, 2, replacements="x", reported=False)
    session.reset_window()
    assert (said(session.window), session.window_state) == ("abcd", Window())


def test_edits_of_the_list_and_of_its_messages_are_seen_through_the_window() -> None:
    session = evicted("abcd", 1, 2)
    session.messages.insert(2, *messages_of("n"))
    session.messages[1]["content"] = "B"
    session.messages[0]["content"] = "A"
    assert said(session.window) == "And"
    session.messages = copy.deepcopy(session.messages)
    assert said(session.window) == "ABncd"


def test_replies_in_the_window_keep_their_ids_and_replacements_have_none() -> None:
    session = session_of("ab")
    reply = session.add_reply("c", [1, 2])
    session.add_user("d")
    stand_in: list[Message] = [{"role": "assistant", "content": "summary"}]
    session.set_window(Window().without(session.messages, session.messages[:1], reported=True, replacements=stand_in))
    assert [r and r.ids for r in session.replies(session.window)] == [None, None, (1, 2), None]
    session.set_window(session.window_state.without(session.messages, [reply], reported=True, replacements=[reply]))
    assert [r and r.ids for r in session.replies(session.window)] == [(1, 2), None, None]


def test_a_window_whose_last_message_is_out_shows_everything_again() -> None:
    session = evicted("abc", 0, 1)
    assert said(session.window) == "c"
    session.messages.pop()
    assert said(session.window) == "ab"
    assert session.window_state == Window()


# -- pins


def pins(session: Session) -> str:
    return said(session.pinned_messages())


def test_a_pin_goes_with_the_dict_and_not_with_the_index() -> None:
    session = session_of("aab")
    session.pin_message(1)
    pinned = session.messages[1]
    session.messages.insert(0, *messages_of("n"))
    assert [session.is_message_pinned(i) for i in range(4)] == [False, False, True, False]
    assert [id(m) for m in session.pinned_messages()] == [id(pinned)]
    session.messages = copy.deepcopy(session.messages)
    assert session.pinned_messages() == []


def test_pins_stand_in_the_order_of_the_list_and_each_once() -> None:
    session = session_of("abc")
    for index in (-1, 0, 2):
        session.pin_message(index)
    assert pins(session) == "ac"
    session.messages.append(session.messages[0])
    assert pins(session) == "ac"
    session.pin_message(0, on=False)
    assert pins(session) == "c"
    session.pin_message(0, on=False)
    assert pins(session) == "c"


def test_one_of_two_equal_pins_is_taken_off() -> None:
    session = session_of("aa")
    session.pin_message(0)
    session.pin_message(1)
    session.pin_message(0, on=False)
    assert [session.is_message_pinned(i) for i in range(2)] == [False, True]


def test_a_pin_brings_nothing_back_into_the_window() -> None:
    session = evicted("abc", 0)
    session.pin_message(0)
    assert (said(session.window), pins(session)) == ("bc", "a")


def test_pins_of_deleted_messages_are_not_held_for_ever() -> None:
    session = Session()
    for _ in range(100):
        session.messages = messages_of("a")
        session.pin_message(0)
    assert len(session._pinned) == 1


@pytest.mark.parametrize(
    ("text", "index", "why"),
    [
        ("abc", 3, "the index of a message must be from -3 to 2, not 3"),
        ("abc", -4, "the index of a message must be from -3 to 2, not -4"),
        ("abc", True, "the index of a message must be an integer"),
        ("abc", "0", "the index of a message must be an integer"),
        ("", 0, "there is no message 0: the session has 0 messages"),
    ],
)
def test_an_index_that_is_not_there_is_refused_with_numbers(text: str, index: Any, why: str) -> None:
    session = session_of(text)
    with pytest.raises(OptionError, match=why):
        session.pin_message(index)
    with pytest.raises(OptionError, match=why):
        session.is_message_pinned(index)
    assert session.pinned_messages() == []


def test_a_pin_is_on_or_off() -> None:
    session = session_of("a")
    with pytest.raises(OptionError, match="on must be True or False"):
        session.pin_message(0, on=1)  # type: ignore[arg-type]
    assert session.pinned_messages() == []


# -- copies


def test_a_copy_has_the_same_window_and_pins_over_its_own_dicts() -> None:
    session = evicted("abcde", 1, 2, replacements="x", reported=True)
    session.set_window(session.window_state.without(session.messages, session.messages[3:4], reported=False))
    session.pin_message(0)
    twin = session.copy()
    assert (said(twin.window), pins(twin), parts(twin.window_state)) == ("axe", "a", ("bcd", "x", "d"))
    assert all(any(m is own for own in twin.messages) for m in (*twin.window_state.out, *twin.pinned_messages()))
    for message in (*twin.messages, *twin.window_state.replacements):
        message["content"] = "changed"
    assert (said(session.messages), said(session.window)) == ("abcde", "axe")
    twin.reset_window()
    twin.pin_message(0, on=False)
    assert (said(session.window), pins(session)) == ("axe", "a")


def test_a_copy_comes_with_its_dict_for_each_message_and_replacement() -> None:
    session = evicted("abc", 0, replacements="x")
    twin, twins = session.copy_with_map()
    originals = [*session.messages, *session.window_state.replacements]
    copies = [*twin.messages, *twin.window_state.replacements]
    assert {id(m): id(copied) for m, copied in zip(originals, copies, strict=True)} == {
        key: id(copied) for key, copied in twins.items()
    }
    assert not {id(m) for m in originals} & {id(m) for m in copies}


def test_a_message_that_is_its_own_replacement_is_one_dict_in_a_copy() -> None:
    session = session_of("abc")
    kept = session.messages[1]
    session.set_window(Window().without(session.messages, session.messages[:2], reported=True, replacements=[kept]))
    twin = session.copy()
    assert twin.window_state.replacements[0] is twin.messages[1]


def test_a_window_whose_last_question_is_out_shows_everything_again() -> None:
    """A strategy of the user's own may take a question and leave its answer."""
    session = Session()
    for text in ("a", "b"):
        session.add_user(text)
        session.add_assistant(text.upper())
    session.set_window(Window().without(session.messages, session.messages[:1], reported=True))
    assert said(session.window) == "AbB"
    session.undo()
    assert said(session.window) == "aA"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda session: pickle.loads(pickle.dumps(session))])
def test_a_session_that_python_copies_knows_its_own_dicts(copied: Callable[[Session], Session]) -> None:
    """Window, pins and replies are found by the identity of dicts, and a copy has others."""
    session = evicted("abcd", 0, 1, replacements="x", reported=False)
    session.pin_message(2)
    session.add_reply("yes", [1, 2], model="m")
    twin = copied(session)
    assert said(twin.window) == "xcdyes"
    assert all(m is not n for m in twin.window for n in session.window)
    assert twin.pinned_messages()[0] is twin.messages[2]
    twin.messages[4]["content"] = "no"
    twin.messages.append({"role": "assistant", "content": "yes"})
    assert [r is not None and list(r.ids) for r in twin.replies()[-2:]] == [False, [1, 2]]
    twin.messages.pop()
    twin.messages[4]["content"] = "yes"
    (reply,) = twin.replies()[-1:]
    assert reply is not None
    assert reply.message is twin.messages[4]
    assert said(session.window) == "xcdyes"


def test_a_summary_that_went_unheard_is_copied_and_saved() -> None:
    session = evicted("abcd", 0, 1, replacements="xy")
    x, y = session.window_state.replacements
    session.set_window(session.window_state.without(session.messages, [x, session.messages[2]], reported=False))
    for each in (session, session.copy(), Session.from_dict(session.to_dict())):
        window = each.window_state
        assert said(each.window) == "yd"
        assert said(window.handed(each.messages, each.messages[3:])) == "xycd"
        assert window.is_unheard(each.messages)
        del each.messages[:3]
        assert not window.is_unheard(each.messages)
        assert said(window.handed(each.messages, each.messages)) == "d"
    with pytest.raises(OptionError, match="1 replacements for messages that are out, but none is"):
        Session.from_dict(session.to_dict() | {"window": {"withdrawn": [y]}})


def test_a_copy_leaves_behind_what_was_deleted() -> None:
    session = evicted("abc", 0, 1, reported=False)
    session.pin_message(0)
    del session.messages[0]
    twin = session.copy()
    assert (parts(twin.window_state), len(twin._pinned)) == (("b", "", "b"), 0)
