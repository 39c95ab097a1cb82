"""Where the tokens of a prompt come from: a pure function from what the rows hold to what to keep, share and decode."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..types import Capabilities, MemoryKind, TokenArray
from .row import common_prefix


@dataclass(frozen=True, slots=True)
class Source:
    """A row to take tokens from. `first_pos`: its live `seq_pos_min` (0 for an empty row)."""

    name: str  # "row", "prefix" or "live"
    seq_id: int
    tokens: TokenArray
    first_pos: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """Take the cells of `[p0, p1)` from the row `seq_id`."""

    name: str
    seq_id: int
    p0: int
    p1: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Keep `[0, n_keep)` of the own row, then share, then decode from `n_reused` on to `n_tokens`."""

    n_tokens: int
    n_keep: int
    share: Share | None = None

    @property
    def n_reused(self) -> int:
        return self.n_keep if self.share is None else self.share.p1

    @property
    def n_decode(self) -> int:
        return self.n_tokens - self.n_reused


def first_seen(n: int, caps: Capabilities) -> int:
    """The first position that a token at position `n` of a window model looks at (llama.cpp's is_masked_swa)."""
    return max(0, n - caps.n_swa + 1)


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
        return source.first_pos <= first_seen(n, caps)
    return source.first_pos == 0


def make_plan(
    target: TokenArray,
    own: Source,
    others: Iterable[Source],
    caps: Capabilities,
    *,
    has_logits: bool,
    wants_logits: bool = True,
) -> Plan:
    """The plan that decodes least; the own row before others, the prefix before live rows.

    `has_logits`: the logits after the last token of the own row are still known, so an unchanged row needs no decode.
    Otherwise one token is always left to decode, if the prompt `wants_logits`.
    """
    n = len(target)
    n_own = common_prefix(own.tokens, target)
    if has_logits and n_own == n == len(own.tokens):
        return Plan(n, n)
    most = max(0, n - 1) if wants_logits else n
    n_keep = min(n_own, most)
    if not can_be_cut(own, n_keep, caps):
        n_keep = 0
    best: Share | None = None
    for source in others:
        p1 = min(common_prefix(source.tokens, target), most)
        if p1 > (n_keep if best is None else best.p1) and can_be_cut(source, p1, caps):
            best = Share(source.name, source.seq_id, 0, p1)
    if best is None:
        return Plan(n, n_keep)
    if caps.kind is MemoryKind.FULL and caps.unified:
        return Plan(n, n_keep, Share(best.name, best.seq_id, n_keep, best.p1))
    # Streams and states are shared as a whole, and a window must come from one row.
    return Plan(n, 0, best)
