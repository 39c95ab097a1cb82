"""Which tokens of a rendered prompt belong to which message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens `[p0, p1)` of message `index`, its frame (header, end token) included."""

    index: int
    p0: int
    p1: int


@dataclass(frozen=True, slots=True)
class ContentRange:
    """Tokens `[p0, p1)` of the content of message `index`, frame excluded."""

    index: int
    p0: int
    p1: int


def message_spans(
    contents: Sequence[ContentRange],
    roles: Sequence[str],
    tails: Mapping[str, Sequence[int]],
    control: Set[int],
    tokens: Sequence[int],
) -> tuple[Span, ...]:
    """Cut the prompt `tokens` into one span a message, in order.

    A message ends with the tail of its role: what the template writes after such a content (its end token, a line
    feed); for a role without one any other's will do. Where none is found the cut is before the last `control` token
    ahead of the next content. A message whose content the template did not write, or wrote behind that of a later
    message, gets an empty span. The last span ends where the reply header begins.
    """
    found = _in_one(contents)
    spans, begin = [], 0
    for i, role in enumerate(roles):
        content = found.get(i)
        following = min((c.p0 for j, c in found.items() if j > i), default=len(tokens))
        if content is None or following < content.p0:
            spans.append(Span(i, begin, begin))
            continue
        candidates = [tails[role]] if role in tails else list(tails.values())
        ends = (_end_of(tail, tokens, content.p1, following) for tail in candidates)
        end = min((e for e in ends if e is not None), default=None)
        if end is None:
            between = [p for p in range(content.p1 + 1, following) if tokens[p] in control]
            end = between[-1] if between else following if following < len(tokens) else content.p1
        spans.append(Span(i, begin, end))
        begin = end
    return tuple(_without_head(spans, found, roles, tokens))


def _without_head(
    spans: list[Span], found: Mapping[int, ContentRange], roles: Sequence[str], tokens: Sequence[int]
) -> list[Span]:
    """What the template writes before all messages (a BOS, a system text of its own) is nobody's: the first span begins
    where the frame of its message does, as far as a later message of the same role shows how long that is."""
    first = next((span for span in spans if span.p0 < span.p1), None)
    like = (
        None
        if first is None
        else next(
            (s for s in spans if s.index > first.index and s.p0 < s.p1 and roles[s.index] == roles[first.index]), None
        )
    )
    if first is None or like is None:
        return spans
    n_frame = found[like.index].p0 - like.p0
    begin = found[first.index].p0 - n_frame
    frame = list(tokens[like.p0 : like.p0 + n_frame])
    if begin > first.p0 and list(tokens[begin : begin + n_frame]) == frame:
        spans[first.index] = Span(first.index, begin, first.p1)
    return spans


def _in_one(contents: Sequence[ContentRange]) -> dict[int, ContentRange]:
    """One range a message: of a content written twice the first; parts of one (reasoning, answer) put together."""
    found: dict[int, ContentRange] = {}
    last = None
    for c in contents:
        if c.index not in found:
            found[c.index] = c
        elif c.index == last:
            found[c.index] = ContentRange(c.index, found[c.index].p0, c.p1)
        last = c.index
    return found


def _end_of(tail: Sequence[int], tokens: Sequence[int], p0: int, p1: int) -> int | None:
    """Where `tail` first ends within `[p0, p1)`; None: it is not there."""
    n, tail = len(tail), list(tail)
    return next((p + n for p in range(p0, p1 - n + 1) if list(tokens[p : p + n]) == tail), None)
