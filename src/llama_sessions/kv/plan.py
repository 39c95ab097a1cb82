"""Where the tokens of a prompt come from: a pure function from what is known to a plan."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from ..types import BlobKind, Capabilities, MemoryKind, TokenArray
from .costs import Costs
from .row import Jumps, common_prefix, end_of


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A row to take tokens from. `first_pos`: its live `seq_pos_min` (0 for an empty row); `jumps`: see `Row`."""

    name: str  # "row", "prefix" or "live"
    seq_id: int
    tokens: TokenArray
    first_pos: int = 0
    jumps: Jumps = ()


@dataclass(frozen=True, slots=True, eq=False)
class Cached:
    """What the cache has of the prompt: its first `n_tokens`. `has_logits`: those after the last of them, too."""

    kind: BlobKind = BlobKind.RANGE
    n_tokens: int = 0
    has_logits: bool = False


@dataclass(frozen=True, slots=True)
class Share:
    """Take the cells of `[p0, p1)` from the row `seq_id`."""

    name: str
    seq_id: int
    p0: int
    p1: int


@dataclass(frozen=True, slots=True)
class Restore:
    """Restore `[p0, p1)` from the cache."""

    p0: int
    p1: int


Cells: TypeAlias = npt.NDArray[np.int64]


class Demand(Protocol):
    """What is to be done to a row, as far as it takes cells."""

    @property
    def n_new_cells(self) -> int: ...

    @property
    def share(self) -> Share | None: ...

    def kept(self, cells: Cells) -> Cells:
        """Those of the row's cells that it still has then."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Keep `[0, n_keep)` of the own row, then share, then restore, then decode from `n_reused` on to `n_tokens`.

    A restore of a whole row brings cells of its own for everything: `reshare` says what another row has, too, and is
    shared with it once more afterwards.
    """

    n_tokens: int
    n_keep: int
    share: Share | None = None
    restore: Restore | None = None
    reshare: Share | None = None

    @property
    def n_live(self) -> int:
        """Tokens that need no new cells."""
        return self.n_keep if self.share is None else self.share.p1

    @property
    def n_reused(self) -> int:
        return self.n_live if self.restore is None else self.restore.p1

    @property
    def n_decode(self) -> int:
        return self.n_tokens - self.n_reused

    @property
    def n_new_cells(self) -> int:
        return self.n_tokens - self.n_live

    def kept(self, cells: Cells) -> Cells:
        return cells[: self.n_keep]


NOTHING = Plan(0, 0)
"""What needs no cell."""


def first_seen(n: int, caps: Capabilities) -> int:
    """The first position that a token at position `n` of a window model looks at (llama.cpp's is_masked_swa)."""
    return max(0, n - caps.n_swa + 1)


def first_needed(jumps: Jumps, n: int, caps: Capabilities) -> int:
    """The first position of a window model's row of `n` tokens that the next one looks at: where its sight begins in a
    gap, the one behind it."""
    first, before = first_seen(end_of(jumps, n), caps), 0
    for index, extra in jumps:
        if index < n and index + before <= first < index + before + extra:
            first = index + before + extra
        before += extra
    return first


def first_restored(end: int, caps: Capabilities) -> int:
    """The first position that is whole in a row up to `end` once it was saved and is back: of a window model only what
    the last token saw comes back."""
    return first_seen(end - 1, caps) if caps.kind is MemoryKind.WINDOW else 0


def can_be_cut(source: Source, n: int, caps: Capabilities) -> bool:
    """Whether the first `n` tokens of a row can be used on their own, by what its memory still holds."""
    if n == 0:
        return True
    if n > len(source.tokens):
        return False
    if caps.keeps_state:
        return n == len(source.tokens)  # a state cannot go back
    if caps.kind is MemoryKind.WINDOW:
        # A longer row may have lost the window of the next token, without any sign.
        return source.first_pos <= first_needed(source.jumps, n, caps)
    return source.first_pos == 0


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """The prompt: `tokens`; `has_logits`: those after the last token of the own row are still known, so that an
    unchanged row needs no decode; `wants_logits`: otherwise one token is always left to decode."""

    tokens: TokenArray
    has_logits: bool = False
    wants_logits: bool = True


def make_plan(
    wanted: Wanted,
    own: Source,
    others: Iterable[Source],
    caps: Capabilities,
    *,
    cached: Cached | None = None,
    costs: Costs | None = None,
) -> Plan:
    """The cheapest exact plan: the own row before others, the prefix before live rows, live KV before copies, and no
    share or restore that costs more than to decode the tokens it brings."""
    target = wanted.tokens
    costs = costs or Costs()
    n = len(target)
    n_own = common_prefix(own.tokens, target)
    if wanted.has_logits and n_own == n == len(own.tokens):
        return Plan(n, n)
    most = max(0, n - 1) if wanted.wants_logits else n
    n_keep = min(n_own, most)
    if not can_be_cut(own, n_keep, caps):
        n_keep = 0
    best: Share | None = None
    for source in others:
        p1 = min(common_prefix(source.tokens, target), most)
        if p1 > (0 if best is None else best.p1) and can_be_cut(source, p1, caps) and costs.is_worth_sharing(p1):
            best = Share(source.name, source.seq_id, 0, p1)
    if best is None or best.p1 <= n_keep or not costs.is_worth_sharing(best.p1 - n_keep):
        plan = Plan(n, n_keep)
    elif caps.kind is MemoryKind.FULL and caps.unified:
        plan = Plan(n, n_keep, Share(best.name, best.seq_id, n_keep, best.p1))
    else:  # streams and states are shared as a whole, and a window must come from one row
        plan = Plan(n, 0, best)
    return plan if cached is None else _with_cached(plan, best, cached, most, caps, costs)


def _with_cached(plan: Plan, best: Share | None, cached: Cached, most: int, caps: Capabilities, costs: Costs) -> Plan:
    """The plan, with what the cache has beyond it. `best`: the longest that another row has."""
    n, p1 = plan.n_tokens, min(cached.n_tokens, most)
    if cached.n_tokens > most and cached.kind is BlobKind.STATE:
        if cached.has_logits:
            p1 = n
        elif caps.keeps_state:
            return plan  # its last token cannot be taken off again
    is_range = cached.kind is BlobKind.RANGE
    n_more = p1 - plan.n_live
    if n_more <= 0 or not costs.is_worth_restoring(n_more, n_more if is_range else p1):
        return plan
    if is_range:
        return Plan(n, plan.n_keep, plan.share, Restore(plan.n_live, p1))
    can_reshare = caps.unified and not caps.keeps_state
    return Plan(n, 0, None, Restore(0, p1), best if can_reshare else None)
