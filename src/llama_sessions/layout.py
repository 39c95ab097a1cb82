"""Where the messages of a prompt lie in the row that holds it, and what of both is left when some of them go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from .kv.alignment import Alignment, Ranges, without
from .types import Message, TokenArray

if TYPE_CHECKING:
    from .kv.eviction import Eviction


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens `[p0, p1)` of the prompt that are one message's, frame included. `message` None: it is none of the
    session's own (a system text, or what a hook put in), and stays."""

    message: Message | None
    role: str
    p0: int
    p1: int


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A prompt, its row, and its messages. Of `alignment.whole` the first `n_rendered` tokens are what the template
    wrote, the rest was said since."""

    alignment: Alignment
    n_rendered: int
    parts: tuple[Part, ...] = ()

    def of_copies(self, copies: Mapping[int, Message]) -> Layout:
        """The same over copies of the messages, by the ids of the originals."""
        parts = (replace(p, message=None if p.message is None else copies.get(id(p.message))) for p in self.parts)
        return replace(self, parts=tuple(parts))

    @property
    def n_head(self) -> int:
        """Tokens of the row before the first message, system text included."""
        first = next((part for part in self.parts if part.role != "system" or part.message is not None), None)
        n = len(self.alignment.tokens) if first is None else self.alignment.place(first.p0, first.p1)[0]
        while n and self.alignment.source[n - 1] < 0:  # sinks of messages that went before
            n -= 1
        return n

    @property
    def reply(self) -> tuple[int, int]:
        """The range in the row of what was said since."""
        return self.alignment.place(self.n_rendered, len(self.alignment.whole))

    def n_cut_of(self, reply: TokenArray) -> int:
        """How many tokens of `reply` the row has lost; 0 where it is not that which was said since."""
        said = self.alignment.whole[self.n_rendered :]
        p0, p1 = self.reply
        return len(said) - (p1 - p0) if np.array_equal(said, reply[: len(said)]) else 0

    def request(self, n_needed: int, n_kept: int, pinned: Set[int], replacements: Set[int] = frozenset()) -> Eviction:
        """What a strategy is to be asked. `pinned`: ids of the message dicts that stay, and their turns with them: an
        answer without its question, or the other way round, is what many templates refuse. The question of the last
        turn stays in any case. `replacements`: ids of those that stand for others; they go first, and keep nothing.
        """
        from .kv.eviction import Eviction, Piece

        # Whatever a hook put in asks nothing: behind a question it would part that from its calls.
        asks = [p.role == "user" and p.message is not None and id(p.message) not in replacements for p in self.parts]
        turns = list(accumulate(asks))
        own = [(turn, id(p.message)) for turn, p in zip(turns, self.parts, strict=True) if p.message is not None]
        latest = turns[-1] if turns else 0
        # A dict that stands there twice goes at both places or at none.
        times = Counter(message for _, message in own)
        pinned = pinned | {message for turn, message in own if turn == latest and times[message] > 1}
        kept = {turn for turn, message in own if message in pinned}
        if latest:
            kept.discard(latest)
        # The last one is what is to be answered, or to go on, whoever said it.
        last = max((i for i, part in enumerate(self.parts) if part.message is not None), default=0)
        pieces = []
        for i, part in enumerate(self.parts):
            is_kept = turns[i] in kept and id(part.message) not in replacements
            stays = part.message is None or is_kept or id(part.message) in pinned or i == last
            role = "system" if part.role == "user" and not asks[i] else part.role
            pieces.append(Piece(i, role, *self.alignment.place(part.p0, part.p1), stays))
        return Eviction(n_needed, len(self.alignment.tokens), n_kept, tuple(pieces))

    def n_tokens_of(self, messages: Sequence[Message]) -> int:
        """Tokens of the row that are these messages'."""
        wanted = {id(message) for message in messages}
        places = [self.alignment.place(p.p0, p.p1) for p in self.parts if p.message is not None]
        of = [p for p in self.parts if p.message is not None]
        return sum(i1 - i0 for part, (i0, i1) in zip(of, places, strict=True) if id(part.message) in wanted)

    def gone(self, request: Eviction, ranges: Ranges, *, whole_turns: bool) -> list[int]:
        """The numbers of the parts of which `ranges` leave nothing but sinks; a tool call with its results.

        `whole_turns`: only together with the rest of their turn, or the template may be handed an answer without its
        question.
        """
        from .kv.eviction import leaving_together

        stays = without(ranges, request.n_tokens)
        gone: list[int] = []
        for group in leaving_together(request.pieces, whole_turns=whole_turns):
            left = [p for p in group if not p.is_pinned]
            behind_sinks = [(p0, p.p1) for p in left if (p0 := max(p.p0, request.n_kept)) < p.p1]
            if behind_sinks and not any(stays[p0:p1].any() for p0, p1 in behind_sinks):
                # What has no tokens of its own beyond the sinks goes with the rest.
                gone += [p.index for p in left]
        return gone

    def without(self, ranges: Ranges, gone: Sequence[int]) -> Layout:
        """`ranges` go from the row, the parts `gone` from the prompt."""
        leaving = set(gone)
        spans = [(p.p0, p.p1) for i, p in enumerate(self.parts) if i in leaving]
        stays = without(spans, len(self.alignment.whole) + 1)
        before = [0, *stays.cumsum().tolist()]
        parts = tuple(
            replace(p, p0=before[p.p0], p1=before[p.p1]) for i, p in enumerate(self.parts) if i not in leaving
        )
        alignment = self.alignment.cut_out(ranges).shortened(spans)
        return Layout(alignment, before[self.n_rendered], parts)

    def extended(self, ranges: Ranges, n_missing: int) -> Ranges:
        """`ranges`, and the beginning of what was said since: `n_missing` tokens or a quarter of it, never all."""
        p0, p1 = self.reply
        n = min(max(n_missing, (p1 - p0) // 4), p1 - p0 - 1)
        if n_missing <= 0 or n <= 0:
            return ranges
        if ranges and ranges[-1][1] == p0:
            return (*ranges[:-1], (ranges[-1][0], p0 + n))
        return (*ranges, (p0, p0 + n))
