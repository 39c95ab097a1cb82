"""Which tokens of a rendered prompt belong to which message."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    tails: Mapping[str, int],
    control_at: Sequence[int],
    n_tokens: int,
) -> tuple[Span, ...]:
    """Cut a prompt into one span a message, in order.

    `tails`: tokens that the template writes after a content of that role (its end token, a line feed); where a role is
    missing the cut is before the last control token ahead of the next content. `control_at`: sorted positions of
    control tokens. Messages whose content the template did not write get an empty span. The last span ends where the
    reply header begins.
    """
    found = {c.index: c for c in reversed(contents)}
    order = sorted(found)
    spans, begin = [], 0
    for i, role in enumerate(roles):
        if i not in found:
            spans.append(Span(i, begin, begin))
            continue
        content = found[i]
        following = next((found[j].p0 for j in order if j > i), n_tokens)
        tail = tails.get(role)
        if tail is not None and content.p1 + tail <= following:
            end = content.p1 + tail
        else:
            between = [p for p in control_at if content.p1 < p < following]
            end = between[-1] if between else following if following < n_tokens else content.p1
        spans.append(Span(i, begin, end))
        begin = end
    return tuple(spans)
