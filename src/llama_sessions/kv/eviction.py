"""Which tokens go when a conversation is too long: pure functions from what a row holds to token ranges."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TypeAlias

from ..errors import OptionError
from ..options import checked_int, function_name

TokenRange: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens `[p0, p1)` of a row that belong to one message, its frame included.

    `index`: number of the message in the prompt, a system text counted; -1 for tokens of no message. Pieces come in
    order, one a message, and may be empty; what lies between two of them belongs to no message either. `role`: "user"
    for what the session's user said; a user's message that a hook put in is a "system" one here, as it asks nothing.
    `is_pinned`: stays whole (so do a system text and what `before_encode` put in).
    """

    index: int
    role: str
    p0: int
    p1: int
    is_pinned: bool = False


@dataclass(frozen=True, slots=True)
class Eviction:
    """What a strategy is asked: at least `n_needed` (1 or more) of `n_tokens` tokens must go.

    `n_kept`: the first so many stay whatever they belong to. What also stays: pinned pieces, and the last piece whose
    role is "user" with everything behind it (if need be its earlier tool calls go afterwards, with their results).
    Fewer than `n_needed` may go, where no more can. `pieces` are the messages of the window in order (a reply under way
    is in none).

    A strategy is a pure function from this to the token ranges `[p0, p1)` that go, in any order, without overlap; what
    breaks these rules is an OptionError. A message leaves the window once none of its tokens is left, a tool call only
    together with its results. Half of it all at once, so that evictions are rare:

    >>> def half_at_once(request):
    ...     n_needed = max(request.n_needed, request.n_tokens // 2)
    ...     return STRATEGIES["message"](replace(request, n_needed=n_needed))  # or "fifo"
    """

    n_needed: int
    n_tokens: int
    n_kept: int
    pieces: tuple[Piece, ...]


Strategy: TypeAlias = Callable[[Eviction], Iterable[TokenRange]]
"""Token ranges `[p0, p1)` that go, in any order; they must not overlap."""


def by_message(request: Eviction) -> list[TokenRange]:
    """Whole turns go, oldest first, and no turn more than it takes. O(n).

    A turn is a user message with everything up to the next one, so a question goes with its answer; what stands ahead
    of the first is a turn, too. The last user turn stays. Of a turn with something pinned the rest goes, but tool
    results (which follow their call at once) and the call stay together. A message of which `n_kept` covers a part
    loses the rest; one that it covers whole counts as pinned. Tokens of no message go where those before and behind go.
    """
    return _oldest(_before_last_turn(request.pieces), request.n_needed, request.n_kept, turns)


def by_tokens(request: Eviction) -> list[TokenRange]:
    """The oldest tokens go, whatever message they belong to, past what is pinned and up to the last user turn. O(n).

    A quarter of all that can go goes at once, where that is more than is needed: a shift is dear, whatever its length.
    Tokens of no message go with their piece, or between two that go.
    """
    pieces = _before_last_turn(request.pieces)
    able = list(_ranges(((p, not p.is_pinned) for p in pieces), request.n_kept))
    n_left = max(request.n_needed, sum(p1 - p0 for p0, p1 in able) // 4)
    ranges: list[TokenRange] = []
    for p0, p1 in able:
        if not n_left:
            break
        n = min(p1 - p0, n_left)
        _add(ranges, p0, p0 + n)
        n_left -= n
    return ranges


STRATEGIES: Mapping[str, Strategy] = {"message": by_message, "fifo": by_tokens}


def plan_eviction(request: Eviction, strategy: Strategy) -> tuple[TokenRange, ...]:
    """What `strategy` says must go: sorted, not empty, adjacent ranges made one. O(n log n) in ranges and pieces.

    Raises OptionError, naming the range and the limit, for an answer that breaks what `Eviction` and `Strategy` say;
    what the strategy itself raises passes through. Whether enough goes is the caller's question.
    """
    ranges = sorted(_answer(request, strategy))
    _check_stays(request, ranges, function_name(strategy))
    merged: list[TokenRange] = []
    for p0, p1 in ranges:
        _add(merged, p0, p1)
    return tuple(merged)


def earlier_steps(request: Eviction, n_needed: int) -> list[TokenRange]:
    """Of the last user turn what can go before there is no room at all: its calls with their results, oldest first and
    no more than it takes. The question stays, and the last call, or whatever is to be answered; so does a call with
    something pinned. O(n)."""
    steps = list(units(request.pieces[_n_before_last_turn(request.pieces) + 1 :]))
    return _oldest([p for step in steps[:-1] for p in step], n_needed, request.n_kept, units)


# -- within


def _oldest(
    pieces: Iterable[Piece], n_needed: int, n_kept: int, groups: Callable[[Iterable[Piece]], Iterator[list[Piece]]]
) -> list[TokenRange]:
    """What goes of the oldest groups, and of no group more than it takes."""
    able = [p for p in pieces if p.index >= 0 or p.is_pinned]
    went = _ranges(_by_unit(able, n_kept), n_kept)
    ranges: list[TokenRange] = []
    n_gone = 0
    for group in groups(able):
        if n_gone >= n_needed:
            break
        for _, (p0, p1) in zip(group, went, strict=False):
            _add(ranges, p0, p1)
            n_gone += p1 - p0
    return ranges


def _n_before_last_turn(pieces: Sequence[Piece]) -> int:
    return next((i for i in reversed(range(len(pieces))) if pieces[i].role == "user"), len(pieces))


def _before_last_turn(pieces: Sequence[Piece]) -> Sequence[Piece]:
    return pieces[: _n_before_last_turn(pieces)]


def turns(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """A user message with everything up to the next; what stands ahead of the first is one, too."""
    return _groups(pieces, lambda _, piece: piece.role == "user")


def units(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Messages that go or stay together: a tool call with its results, any other alone.

    That an assistant's message is a call shows in the results behind it. What is of no message parts nothing.
    """
    callers = "assistant", "tool"
    return _groups(pieces, lambda first, p: p.index >= 0 and not (p.role == "tool" and first.role in callers))


def leaving_together(pieces: Sequence[Piece], *, whole_turns: bool) -> Iterator[list[Piece]]:
    """What leaves the window together: units; `whole_turns`: turns, but for the last, in which units may go."""
    n = _n_before_last_turn(pieces) if whole_turns else 0
    return chain(turns(pieces[:n]), units(pieces[n:]))


def _groups(pieces: Iterable[Piece], begins: Callable[[Piece, Piece], bool]) -> Iterator[list[Piece]]:
    """Runs of pieces; `begins(first, piece)` says whether a piece begins a run, or belongs to that of `first`."""
    group: list[Piece] = []
    for piece in pieces:
        if group and begins(group[0], piece):
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _by_unit(pieces: Iterable[Piece], n_kept: int) -> Iterator[tuple[Piece, bool]]:
    """Each piece, and whether it may go: none of its unit is pinned, or covered whole by the first `n_kept` tokens."""
    for unit in units(pieces):
        stays = any(p.index >= 0 and (p.is_pinned or p.p0 < p.p1 <= n_kept) for p in unit)
        for piece in unit:
            yield piece, not stays and piece.index >= 0


def _ranges(pieces: Iterable[tuple[Piece, bool]], n_kept: int) -> Iterator[TokenRange]:
    """A range for each piece and whether it goes: its tokens from `n_kept` on, and those between it and the one before
    if that goes, too; an empty one where it stays."""
    begin: int | None = None  # behind the piece before, if that goes
    for piece, goes in pieces:
        p0 = max(n_kept, piece.p0 if begin is None else begin)
        yield p0, max(p0, piece.p1) if goes else p0
        begin = piece.p1 if goes else None


def _add(ranges: list[TokenRange], p0: int, p1: int) -> None:
    """Append `[p0, p1)` to sorted ranges, as one with the last if that ends at `p0`; nothing if it is empty."""
    if ranges and ranges[-1][1] == p0:
        ranges[-1] = ranges[-1][0], p1
    elif p0 < p1:
        ranges.append((p0, p1))


def _answer(request: Eviction, strategy: Strategy) -> Iterator[TokenRange]:
    """The ranges that a strategy returns, but for empty ones, each checked on its own."""
    answer: object = strategy(request)
    name = function_name(strategy)
    if not isinstance(answer, Iterable):
        raise OptionError(f"the eviction strategy {name} must return ranges, an iterable of (p0, p1), not {answer!r}")
    for item in answer:
        try:
            p0, p1 = item
            p0 = checked_int("p0", p0, request.n_kept, request.n_tokens)
            p1 = checked_int("p1", p1, p0, request.n_tokens)
        except (TypeError, ValueError) as e:
            raise OptionError(
                f"the eviction strategy {name} returned {item!r}, which is no range (p0, p1) within "
                f"[{request.n_kept}, {request.n_tokens}): {e}"
            ) from None
        if p0 < p1:
            yield p0, p1


def _check_stays(request: Eviction, ranges: Sequence[TokenRange], name: str) -> None:
    """OptionError where sorted `ranges` overlap each other, or hold tokens that stay."""

    def refuse(p0: int, p1: int, limit: str) -> OptionError:
        return OptionError(f"the eviction strategy {name} returned the range [{p0}, {p1}), {limit}")

    for (a, b), (p0, p1) in pairwise(ranges):
        if p0 < b:
            raise refuse(p0, p1, f"which overlaps its own [{a}, {b}); return each token once")
    n = _n_before_last_turn(request.pieces)
    stop = request.pieces[n].p0 if n < len(request.pieces) else request.n_tokens
    pinned = [p for p in request.pieces[:n] if p.is_pinned and p.p0 < p.p1]
    ends = [p.p1 for p in pinned]
    for p0, p1 in ranges:
        if p1 > stop:
            raise refuse(p0, p1, f"which reaches into the last user turn; end at {stop}")
        at = bisect_right(ends, p0)
        if at < len(ends) and pinned[at].p0 < p1:
            piece = pinned[at]
            raise refuse(
                p0, p1, f"which holds tokens of message {piece.index}, [{piece.p0}, {piece.p1}); it is pinned: leave it"
            )
