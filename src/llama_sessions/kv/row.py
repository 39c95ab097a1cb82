"""A row: the exact token ids that one `seq_id` holds, position by position."""

from __future__ import annotations

import sys
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..types import FloatArray, TokenArray

Jumps: TypeAlias = tuple[tuple[int, int], ...]
"""Gaps in the positions of a row: from token `index` on they are `extra` further, in order of index."""

_ALL = sys.maxsize


def common_prefix(a: TokenArray, b: TokenArray) -> int:
    """Length of the longest common prefix of two int32 arrays; one vectorised compare."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n


def end_of(jumps: Jumps, n: int) -> int:
    """The position behind the first `n` tokens of a row with these gaps; a gap right behind them does not count."""
    return n + sum(extra for index, extra in jumps if index < n)


class Row:
    """Tokens and cells of one sequence.

    `cells[i]` is a number for the KV cell of position i; rows that share a cell hold the same number. New content is
    written behind `n` first and committed by setting `n`, so an interrupt in between leaves the row as it was.
    `suspect`: None, or the number of leading positions that are surely right after a change that did not finish.
    `logits`: None, a batch index (still in the context's buffer), or a (n_vocab,) float32 array.
    After an eviction `n_exact` leading tokens have the KV of a fresh prefill, and where the holes stayed open `jumps`
    says so (`offset`: how much further the position of the next token is than its index).
    """

    __slots__ = ("_arrays", "_n_exact", "jumps", "logits", "n", "namespace", "offset", "seq_id", "suspect")

    def __init__(self, seq_id: int, namespace: str | None = None) -> None:
        self.seq_id = seq_id
        self.namespace = namespace
        self.n = 0
        self.suspect: int | None = None
        self.logits: int | FloatArray | None = None
        self.jumps: Jumps = ()
        self.offset = 0
        self._n_exact = _ALL
        self._use(np.empty(256, np.int32), np.empty(256, np.int64))

    def _use(self, tokens: TokenArray, cells: npt.NDArray[np.int64]) -> None:
        # All at once, also on an interrupt. The views take single values: a token a step costs less than with numpy.
        self._arrays = tokens, cells, memoryview(tokens), memoryview(cells)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"<Row {self.seq_id}: {self.n} tokens>"

    @property
    def tokens(self) -> TokenArray:
        """(n,) int32 view."""
        return self._arrays[0][: self.n]

    @property
    def cells(self) -> npt.NDArray[np.int64]:
        """(n,) int64 view."""
        return self._arrays[1][: self.n]

    @property
    def end(self) -> int:
        """The position of the next token."""
        return self.n + self.offset

    @property
    def n_exact(self) -> int:
        """How many leading tokens have the KV of a fresh prefill."""
        return min(self.n, self._n_exact)

    @property
    def is_exact(self) -> bool:
        return self.n <= self._n_exact

    def positions(self) -> npt.NDArray[np.int64]:
        """(n,) int64: the position of each token."""
        positions = np.arange(self.n)
        for index, extra in self.jumps:
            positions[index:] += extra
        return positions

    def n_before(self, end: int) -> int:
        """How many tokens have positions below `end`."""
        return int(np.searchsorted(self.positions(), end)) if self.jumps else min(self.n, max(0, end))

    def shorten(self, n: int) -> None:
        """Only the first `n` tokens are left."""
        self.n = n
        if self.jumps or self.offset:  # an interrupt may have come between the two
            self.set_jumps(tuple(jump for jump in self.jumps if jump[0] < n))
        if n <= self._n_exact:
            self._n_exact = _ALL

    def set_jumps(self, jumps: Jumps) -> None:
        self.jumps, self.offset = jumps, sum(extra for _, extra in jumps)

    def mark_approximate(self, n_exact: int) -> None:
        """Tokens from `n_exact` on have KV that no fresh prefill would give."""
        self._n_exact = min(self._n_exact, n_exact)

    def write(self, at: int, tokens: TokenArray, cells: npt.NDArray[np.int64]) -> None:
        """Put content at positions `at ..` without committing it: `n` does not change."""
        self._grow(at, at + len(tokens))
        self._arrays[0][at : at + len(tokens)] = tokens
        self._arrays[1][at : at + len(tokens)] = cells

    def put(self, at: int, token: int, cell: int) -> None:
        """The same for one position."""
        if at >= len(self._arrays[2]):
            self._grow(at, at + 1)
        self._arrays[2][at] = token
        self._arrays[3][at] = cell

    def _grow(self, n: int, end: int) -> None:
        """Room for `end` positions; the first `n` stay."""
        tokens, cells, _, _ = self._arrays
        if end > len(tokens):
            more = max(end, 2 * len(tokens)) - n
            self._use(
                np.concatenate([tokens[:n], np.empty(more, np.int32)]),
                np.concatenate([cells[:n], np.empty(more, np.int64)]),
            )
