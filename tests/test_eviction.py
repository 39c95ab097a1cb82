"""What goes when a conversation is too long, against sets of single tokens; what is refused of a user's strategy."""

from __future__ import annotations

import doctest
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count, pairwise
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from llama_sessions import OptionError
from llama_sessions.kv.eviction import (
    STRATEGIES,
    Eviction,
    Piece,
    Strategy,
    by_message,
    by_tokens,
    earlier_steps,
    plan_eviction,
)
from llama_sessions.options import ManagerOptions

ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool", ".": ""}
TEN = 10


def pieces_of(text: str) -> tuple[Piece, ...]:
    """A piece of ten tokens a letter, pinned where it is a capital one; "." is one of no message, "-" a hole of ten."""
    numbers = count()
    return tuple(
        Piece(-1 if letter == "." else next(numbers), ROLES[letter.lower()], TEN * i, TEN * (i + 1), letter.isupper())
        for i, letter in enumerate(text)
        if letter != "-"
    )


def asked(text: str, n_needed: int = 1000, n_kept: int = 0) -> Eviction:
    return Eviction(n_needed, TEN * len(text), n_kept, pieces_of(text))


def gone(text: str, n_needed: int = 1000, n_kept: int = 0, strategy: Strategy = by_message) -> list[tuple[int, int]]:
    return list(plan_eviction(asked(text, n_needed, n_kept), strategy))


# -- message


def test_the_oldest_turn_goes_whole() -> None:
    assert gone("uauaua", 1) == gone("uauaua", 20) == [(0, 20)]
    assert gone("uauaua", 21) == gone("uauaua", 40) == [(0, 40)]


def test_a_turn_has_everything_up_to_the_next_user_message() -> None:
    assert gone("uatatasua", 1) == [(0, 70)]


def test_what_stands_ahead_of_the_first_user_message_is_a_turn() -> None:
    assert gone("auaua", 1) == [(0, 10)]
    assert gone("auaua", 11) == [(0, 30)]
    assert gone("aa", 1) == [(0, 20)]


@pytest.mark.parametrize("text", ["u", "ua", "uat-", "u-"])
def test_the_last_user_turn_stays_even_where_too_little_goes(text: str) -> None:
    assert gone(text) == []
    assert gone("ua" + text) == [(0, 20)]


def test_nothing_goes_of_nothing() -> None:
    assert gone("") == gone("--") == gone("", strategy=by_tokens) == gone("--", strategy=by_tokens) == []


def test_the_first_tokens_stay_whatever_they_belong_to() -> None:
    assert gone("uauau", 1, n_kept=4) == [(4, 20)]
    assert gone("uauau", 17, n_kept=4) == [(4, 40)]
    assert gone("uauau", 1, n_kept=20) == [(20, 40)]
    assert gone("uauau", 1, n_kept=45) == gone("uauau", 1, n_kept=99) == []


def test_of_a_turn_with_something_pinned_the_rest_goes() -> None:
    assert gone("uaUau") == [(0, 20), (30, 40)]
    assert gone("uAuau", 11) == [(0, 10), (20, 40)]
    assert gone("UAu") == []


@pytest.mark.parametrize("exchange", ["Attt", "aTtt", "attT", "ATTT"])
def test_a_pinned_call_keeps_all_its_results_and_a_pinned_result_its_call(exchange: str) -> None:
    assert gone(f"uat{exchange}au") == [(0, 30), (70, 80)]


def test_a_call_within_the_first_tokens_keeps_its_results() -> None:
    assert gone("uattau", n_kept=20) == [(40, 50)]
    assert gone("uattau", n_kept=19) == [(19, 50)]


def test_results_without_a_call_go_or_stay_together() -> None:
    assert gone("utTau") == [(0, 10), (30, 40)]
    assert gone("Uttau") == [(10, 40)]
    assert gone("ttau") == [(0, 30)]


def test_tokens_of_no_message_go_only_between_two_that_go() -> None:
    for hole in "-.":
        assert gone(f"{hole}u{hole}a{hole}u{hole}") == [(10, 40)]
        assert gone(f"u{hole}u{hole}u", 1) == [(0, 10)]
        assert gone(f"u{hole}u{hole}u", 11) == [(0, 30)]
        assert gone(f"a{hole}A{hole}au{hole}") == [(0, 10), (40, 50)]


def test_what_lies_between_two_that_go_counts() -> None:
    assert gone("u-auu", 30) == [(0, 30)]


def test_a_pinned_piece_of_no_message_stays_and_does_not_part_a_call_from_its_results() -> None:
    pieces = [Piece(0, "assistant", 0, 5), Piece(-1, "", 5, 7, True), Piece(1, "tool", 7, 9), Piece(2, "user", 9, 10)]
    assert plan_eviction(Eviction(9, 10, 0, tuple(pieces)), by_message) == ((0, 5), (7, 9))
    pieces[2] = Piece(1, "tool", 7, 9, True)
    assert plan_eviction(Eviction(9, 10, 0, tuple(pieces)), by_message) == ()


def test_an_empty_user_message_begins_a_turn() -> None:
    pieces = (Piece(0, "user", 0, 5), Piece(1, "user", 5, 5), Piece(2, "assistant", 5, 9))
    assert plan_eviction(Eviction(9, 9, 0, pieces), by_message) == ((0, 5),)


def test_an_empty_message_before_the_kept_tokens_end_keeps_nothing() -> None:
    pieces = (Piece(0, "assistant", 3, 3), Piece(1, "tool", 3, 9), Piece(2, "user", 9, 12))
    assert plan_eviction(Eviction(9, 12, 4, pieces), by_message) == ((4, 9),)


# -- fifo


def fifo(text: str, n_needed: int = 1000, n_kept: int = 0) -> list[tuple[int, int]]:
    return gone(text, n_needed, n_kept, by_tokens)


def test_fifo_takes_the_oldest_tokens_whatever_they_belong_to() -> None:
    assert fifo("uauau", 13) == [(0, 13)]
    assert fifo("uauau", 13, n_kept=4) == [(4, 17)]


def test_fifo_takes_a_quarter_of_what_can_go_so_that_shifts_are_rare() -> None:
    assert fifo("uauau", 1) == [(0, 10)]
    assert fifo("uauau", 1, n_kept=20) == [(20, 25)]
    assert fifo("UauAu", 1) == [(10, 15)]
    assert fifo("uauau", 11) == [(0, 11)]


def test_fifo_passes_over_what_is_pinned_and_stops_at_the_last_user_turn() -> None:
    assert fifo("uaTauat") == [(0, 20), (30, 40)]
    assert fifo("uaTauat", 25) == [(0, 20), (30, 35)]


def test_fifo_takes_tokens_of_no_message_with_their_piece_or_between_two_that_go() -> None:
    assert fifo("..-", 15) == [(0, 15)]
    assert fifo("-u-a-U-.-u-") == [(10, 40), (70, 80)]


# -- within the last turn


def test_of_the_last_turn_the_oldest_calls_go_with_their_results_and_no_more_than_it_takes() -> None:
    request = asked("uauattatat")
    assert earlier_steps(request, 1) == earlier_steps(request, 30) == [(30, 60)]
    assert earlier_steps(request, 31) == earlier_steps(request, 1000) == [(30, 80)]
    assert earlier_steps(asked("uauattAtat"), 1000) == [(30, 60)]
    assert earlier_steps(asked("uauaTtatat"), 1000) == [(60, 80)]
    assert earlier_steps(asked("u"), 1) == earlier_steps(asked("ua"), 1) == earlier_steps(asked("uatt"), 1) == []
    assert earlier_steps(asked("atat"), 1) == earlier_steps(asked(""), 1) == []


# -- a strategy of the user's own


def returning(answer: Any) -> Callable[[Eviction], Any]:
    def own(request: Eviction) -> Any:
        return answer

    return own


def test_the_strategy_that_the_docstring_of_eviction_shows_takes_half_at_once() -> None:
    (shown,) = doctest.DocTestFinder().find(Eviction, "Eviction", globs={"replace": replace, "STRATEGIES": STRATEGIES})
    assert doctest.DocTestRunner().run(shown, clear_globs=False).attempted == 1
    own = shown.globs["half_at_once"]
    assert plan_eviction(asked("uaua" * 3 + "u", 1), own) == ((0, 80),)
    assert plan_eviction(asked("uaua" * 3 + "u", 90), own) == ((0, 100),)


def test_the_options_know_each_strategy() -> None:
    assert [ManagerOptions(eviction=name).eviction for name in STRATEGIES] == ["message", "fifo"]
    with pytest.raises(OptionError, match="'message', 'fifo'"):
        ManagerOptions(eviction="lifo")


@pytest.mark.parametrize(
    "answer",
    [
        [(30, 40), (0, 10), (12, 20), (10, 12)],
        ((0, 20), [30, 40]),
        {(0, 20), (30, 40)},
        ((p, p + 10) for p in (30, 10, 0)),
        np.array([[30, 40], [0, 20]]),
        [(np.int32(0), np.uint8(20)), (np.int64(30), 40)],
        [(0, 20), (5, 5), (20, 20), (30, 40), (60, 60)],
    ],
)
def test_ranges_come_sorted_joined_and_without_empty_ones(answer: Any) -> None:
    ranges = plan_eviction(asked("uauauu"), returning(answer))
    assert ranges == ((0, 20), (30, 40))
    assert [type(p) for pair in ranges for p in pair] == [int] * 4
    assert type(ranges) is type(ranges[0]) is tuple


def test_a_strategy_is_asked_with_the_request_and_may_free_too_little() -> None:
    request, seen = asked("uauau", 30), list[Eviction]()

    def own(asked_for: Eviction) -> Iterator[tuple[int, int]]:
        seen.append(asked_for)
        yield 5, 6

    assert plan_eviction(request, own) == ((5, 6),)
    assert seen == [request]
    assert plan_eviction(request, returning([])) == ()


@pytest.mark.parametrize("error", [TypeError("no"), ValueError("no"), KeyboardInterrupt()])
@pytest.mark.parametrize("begins", [True, False])
def test_what_a_strategy_raises_passes_through(error: BaseException, begins: bool) -> None:
    def own(request: Eviction) -> Iterator[tuple[int, int]]:
        if begins:
            yield 0, 1
        raise error

    with pytest.raises(type(error)) as caught:
        plan_eviction(asked("uau"), own)
    assert caught.value is error


@pytest.mark.parametrize("answer", [None, 5, 1.5])
def test_an_answer_that_is_no_iterable_is_refused(answer: Any) -> None:
    with pytest.raises(OptionError, match=rf"strategy own must return ranges, an iterable of \(p0, p1\), not {answer}"):
        plan_eviction(asked("uau"), returning(answer))


@pytest.mark.parametrize(
    ("item", "why"),
    [
        (5, "cannot unpack"),
        ((5,), "not enough values"),
        ((5, 6, 7), "too many values"),
        (None, "cannot unpack"),
        ("56", "p0 must be an integer, not '5'"),
        ((5.0, 6), r"p0 must be an integer, not 5\.0"),
        ((True, 6), "p0 must be an integer, not True"),
        ((5, np.True_), "p1 must be an integer, not (np.)?True"),
        ((5, None), "p1 must be an integer, not None"),
        ((3, 6), "p0 must be from 4 to 50, not 3"),
        ((-1, 6), "p0 must be from 4 to 50, not -1"),
        ((51, 52), "p0 must be from 4 to 50, not 51"),
        ((45, 51), "p1 must be from 45 to 50, not 51"),
        ((6, 5), "p1 must be from 6 to 50, not 5"),
    ],
    ids=repr,
)
def test_what_is_no_range_within_the_row_is_refused(item: Any, why: str) -> None:
    with pytest.raises(OptionError, match=rf"strategy own returned .* no range \(p0, p1\) within \[4, 50\): {why}"):
        plan_eviction(asked("uauau", n_kept=4), returning([(4, 5), item]))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ([(5, 9), (20, 22), (0, 6)], r"the range \[5, 9\), which overlaps its own \[0, 6\)"),
        ([(5, 9), (5, 9)], r"the range \[5, 9\), which overlaps its own \[5, 9\)"),
        ([(0, 2), (15, 21)], r"the range \[15, 21\), which holds tokens of message 2, \[20, 30\); it is pinned"),
        ([(0, 2), (29, 35)], r"the range \[29, 35\), which holds tokens of message 2, \[20, 30\); it is pinned"),
        ([(24, 26)], r"the range \[24, 26\), which holds tokens of message 2, \[20, 30\); it is pinned"),
        ([(0, 40)], r"the range \[0, 40\), which holds tokens of message 2, \[20, 30\); it is pinned"),
        ([(35, 41)], r"the range \[35, 41\), which reaches into the last user turn; end at 40"),
        ([(69, 70)], r"the range \[69, 70\), which reaches into the last user turn; end at 40"),
    ],
)
def test_a_range_that_holds_what_stays_is_refused(answer: Any, why: str) -> None:
    with pytest.raises(OptionError, match=f"the eviction strategy own returned {why}"):
        plan_eviction(asked("uaTauA-"), returning(answer))


def test_a_range_may_touch_what_stays() -> None:
    assert plan_eviction(asked("uaTauA-"), returning([(10, 20), (30, 40)])) == ((10, 20), (30, 40))


def test_without_a_user_message_all_that_is_not_pinned_may_go() -> None:
    assert plan_eviction(asked("aA-"), returning([(20, 30), (0, 10)])) == ((0, 10), (20, 30))


# -- against sets of tokens


@st.composite
def requests(draw: st.DrawFn) -> Eviction:
    pieces: list[Piece] = []
    at = n_messages = 0
    for role in draw(st.lists(st.sampled_from(["user", "assistant", "tool", "tool", "system", ""]), max_size=12)):
        at += draw(st.sampled_from([0, 0, 0, 1, 3]))
        p1 = at + draw(st.integers(0, 6))
        pieces.append(Piece(n_messages if role else -1, role, at, p1, draw(st.sampled_from([False] * 5 + [True]))))
        n_messages += bool(role)
        at = p1
    n_tokens = at + draw(st.integers(0, 4))
    n_kept = draw(st.integers(0, n_tokens) | st.integers(0, min(4, n_tokens)))
    return Eviction(draw(st.integers(1, n_tokens + 2)), n_tokens, n_kept, tuple(pieces))


def tokens(ranges: Sequence[tuple[int, int]]) -> set[int]:
    return {p for p0, p1 in ranges for p in range(p0, p1)}


def last_turn(request: Eviction) -> int:
    """Place of the last user piece."""
    return max((i for i, p in enumerate(request.pieces) if p.role == "user"), default=len(request.pieces))


def staying(request: Eviction) -> set[int]:
    """Tokens that no strategy may take."""
    last = last_turn(request)
    kept = tokens([(0, request.n_kept), *((p.p0, p.p1) for p in request.pieces if p.is_pinned)])
    return kept | (tokens([(request.pieces[last].p0, request.n_tokens)]) if last < len(request.pieces) else set())


def with_holes(request: Eviction, going: Sequence[Piece], seen: Sequence[Piece]) -> set[int]:
    """The tokens of `going`, and those between two of them that are neighbours in `seen`."""
    holes = [(a.p1, b.p0) for a, b in pairwise(seen) if a in going and b in going]
    return tokens([*((p.p0, p.p1) for p in going), *holes]) - tokens([(0, request.n_kept)])


def exchange_of(messages: Sequence[Piece], message: Piece) -> list[Piece]:
    """A message with all those that it must not be parted from: a call and its results."""
    first = last = messages.index(message)
    while first and messages[first].role == "tool" and messages[first - 1].role in ("tool", "assistant"):
        first -= 1
    if messages[first].role in ("tool", "assistant"):
        while last + 1 < len(messages) and messages[last + 1].role == "tool":
            last += 1
    return list(messages[first : last + 1])


def after_turns(request: Eviction) -> list[set[int]]:
    """The tokens that are gone after none, one, two ... of the turns that may go."""
    pieces = request.pieces[: last_turn(request)]
    messages = [p for p in pieces if p.index >= 0]
    ends = [i for i, p in enumerate(messages) if p.role == "user" and i] + [len(messages)]
    return after(request, pieces, ends)


def after(request: Eviction, pieces: Sequence[Piece], ends: Sequence[int]) -> list[set[int]]:
    """The tokens that are gone after none of the messages in `pieces`, and after the first of them up to each end."""
    messages = [p for p in pieces if p.index >= 0]
    able = [
        p for p in messages if not any(q.is_pinned or q.p0 < q.p1 <= request.n_kept for q in exchange_of(messages, p))
    ]
    seen = [p for p in pieces if p.index >= 0 or p.is_pinned]
    return [set(), *(with_holes(request, [p for p in messages[:end] if p in able], seen) for end in ends)]


@settings(max_examples=400, deadline=None)
@given(requests(), st.sampled_from(list(STRATEGIES)))
def test_what_goes_is_sorted_and_apart_and_nothing_of_what_stays(request: Eviction, name: str) -> None:
    ranges = plan_eviction(request, STRATEGIES[name])
    assert all(p0 < p1 for p0, p1 in ranges)
    assert all(a[1] < b[0] for a, b in pairwise(ranges))
    assert tokens(ranges) <= set(range(request.n_tokens)) - staying(request)


@settings(max_examples=600, deadline=None)
@given(requests())
def test_whole_turns_go_and_no_turn_more_than_is_needed(request: Eviction) -> None:
    steps = after_turns(request)
    enough = next((step for step in steps if len(step) >= request.n_needed), steps[-1])
    assert tokens(plan_eviction(request, by_message)) == enough


@settings(max_examples=400, deadline=None)
@given(requests())
def test_a_call_and_its_results_go_or_stay_together(request: Eviction) -> None:
    went = tokens(plan_eviction(request, by_message))
    for first, second in pairwise(p for p in request.pieces if p.index >= 0):
        both_have_tokens = first.p0 < first.p1 and second.p0 < second.p1
        if second.role == "tool" and first.role in ("assistant", "tool") and both_have_tokens:
            assert went.isdisjoint(range(first.p0, first.p1)) == went.isdisjoint(range(second.p0, second.p1))


@settings(max_examples=400, deadline=None)
@given(requests())
def test_fifo_takes_the_first_of_all_tokens_that_can_go(request: Eviction) -> None:
    pieces = request.pieces[: last_turn(request)]
    able = sorted(with_holes(request, [p for p in pieces if not p.is_pinned], pieces))
    expected = able[: max(request.n_needed, len(able) // 4)]
    assert sorted(tokens(plan_eviction(request, by_tokens))) == expected


@settings(max_examples=600, deadline=None)
@given(requests())
def test_of_the_last_turn_exchanges_go_as_the_oldest_turns_do(request: Eviction) -> None:
    """As if each were a turn of its own, behind a question that is pinned and ahead of one that must stay."""
    pieces = request.pieces[last_turn(request) + 1 :]
    messages = [p for p in pieces if p.index >= 0]
    begins = [i for i, p in enumerate(messages) if exchange_of(messages, p)[0] is p]
    steps = after(request, pieces, begins[1:])
    enough = next((step for step in steps if len(step) >= request.n_needed), steps[-1])
    assert tokens(earlier_steps(request, request.n_needed)) == enough


@settings(max_examples=600, deadline=None)
@given(requests(), st.data())
def test_an_answer_is_taken_exactly_if_it_takes_nothing_that_stays(request: Eviction, data: st.DataObject) -> None:
    end = request.n_tokens + 1
    pairs = st.tuples(st.integers(max(-1, request.n_kept - 1), end), st.integers(0, 5)).map(lambda t: (t[0], sum(t)))
    answer = data.draw(st.lists(pairs, max_size=4))
    went = tokens(answer)
    within = all(request.n_kept <= p0 <= p1 <= request.n_tokens for p0, p1 in answer)
    if within and len(went) == sum(p1 - p0 for p0, p1 in answer) and went.isdisjoint(staying(request)):
        ranges = plan_eviction(request, returning(answer))
        assert tokens(ranges) == went
        assert all(a[1] < b[0] for a, b in pairwise(ranges))
    else:
        with pytest.raises(OptionError, match="the eviction strategy own returned"):
            plan_eviction(request, returning(answer))


@pytest.mark.parametrize("strategy", STRATEGIES.values())
@pytest.mark.parametrize("turn", ["ua", "uA", "uatattA"])
def test_a_very_long_conversation_is_planned_in_no_time(strategy: Strategy, turn: str) -> None:
    request = asked(turn * (30_000 // len(turn)), 10**6)
    began = time.process_time()
    assert plan_eviction(request, strategy)
    assert time.process_time() - began < 1.0  # some 0.03 s; a search of all pieces a piece takes minutes
