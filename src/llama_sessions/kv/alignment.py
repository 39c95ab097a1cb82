"""How a row lies in the prompt it stands for, once tokens were taken out of its middle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..types import TokenArray
from .row import common_prefix

Ranges: TypeAlias = Sequence[tuple[int, int]]


def without(ranges: Ranges, n: int) -> npt.NDArray[np.bool_]:
    """(n,) bool: True for each index that is in none of the half-open ranges."""
    stays = np.ones(n, np.bool_)
    for p0, p1 in ranges:
        stays[p0:p1] = False
    return stays


def ranges_of(goes: npt.NDArray[np.bool_]) -> tuple[tuple[int, int], ...]:
    """The half-open ranges in which a (n,) bool array is True."""
    edges = np.flatnonzero(np.diff(goes.astype(np.int8), prepend=0, append=0)).tolist()
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def size_of(ranges: Ranges) -> int:
    """How many indices are in ranges that do not overlap."""
    return sum(p1 - p0 for p0, p1 in ranges)


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """The tokens of a row beside those of the prompt it was cut from.

    `whole`: (m,) int32, the prompt. `tokens`: (n,) int32, the row. `source`: (n,) int64, rising: where in `whole` each
    token of the row stands; -1: nowhere, it stays (an attention sink) though its message is gone from the prompt.
    What `whole` has and no `source` names was cut out of the row, and stands in the prompt still.
    """

    whole: TokenArray
    tokens: TokenArray
    source: npt.NDArray[np.int64]

    @classmethod
    def straight(cls, tokens: TokenArray) -> Alignment:
        """Of a row that is the whole prompt."""
        return cls(tokens, tokens, np.arange(len(tokens)))

    @property
    def is_straight(self) -> bool:
        return len(self.tokens) == len(self.whole) and bool((self.source == np.arange(len(self.whole))).all())

    @property
    def _order(self) -> npt.NDArray[np.int64]:
        """`source` with each -1 given the place of the token before it."""
        order: npt.NDArray[np.int64] = np.maximum.accumulate(self.source)
        return order

    def place(self, p0: int, p1: int) -> tuple[int, int]:
        """The range in the row of `[p0, p1)` of the prompt."""
        i0, i1 = np.searchsorted(self._order, [p0, p1])
        return int(i0), int(i1)

    def first(self, n: int) -> Alignment:
        """The first `n` tokens of the row."""
        return Alignment(self.whole, self.tokens[:n], self.source[:n])

    def grown(self, more: TokenArray) -> Alignment:
        """Tokens were added at the end of both."""
        source = np.arange(len(self.whole), len(self.whole) + len(more))
        whole, tokens = (np.concatenate([before, more]) for before in (self.whole, self.tokens))
        return Alignment(whole, tokens, np.concatenate([self.source, source]))

    def followed_by(self, whole: TokenArray) -> Alignment:
        """The row that a new prompt asks for: this one, as far as the prompts agree, and then what is new.

        What was cut out stays cut out only where the row goes on behind it.
        """
        order = self._order
        n = int(np.searchsorted(order, common_prefix(self.whole, whole)))
        while n and self.source[n - 1] < 0:
            n -= 1
        at = int(order[n - 1]) + 1 if n else 0
        source = np.concatenate([self.source[:n], np.arange(at, len(whole))])
        return Alignment(whole, np.concatenate([self.tokens[:n], whole[at:]]), source)

    def cut_out(self, holes: Ranges) -> Alignment:
        """Ranges of the row's tokens go; they stand in the prompt still."""
        stays = without(holes, len(self.tokens))
        return Alignment(self.whole, self.tokens[stays], self.source[stays])

    def shortened(self, gone: Ranges) -> Alignment:
        """Ranges go from the prompt; what the row still has of them stays there."""
        stays = without(gone, len(self.whole))
        moved = np.append(np.where(stays, np.cumsum(stays) - 1, -1), -1)  # the last one for those that are nowhere
        return Alignment(self.whole[stays], self.tokens, moved[self.source])
