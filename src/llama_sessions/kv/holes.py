"""Tokens taken out of the middle of a row, and what stands behind them moved up, or left where it is.

The positions of a shared cell are everybody's: before they move, what stands behind a hole becomes the row's own, by
way of a save and a load. That is planned before anything is touched, as it takes free cells.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ..errors import SnapshotError
from ..types import MemoryKind
from .alignment import Ranges, without
from .plan import Cells, Share, first_restored, first_seen
from .row import Jumps, Row, end_of
from .store import RowStore

_PIECE = 2048  # tokens that pass through the scratch at once


@dataclass(frozen=True, slots=True, eq=False)
class Cut:
    """What it takes to cut holes into a row: `n_to_copy` tokens whose cells others hold too get new ones (of which
    there are `n_new_cells`, those for more tokens behind them included), the row's own cells in `own` stay."""

    n_to_copy: int
    n_new_cells: int
    own: Cells
    share: Share | None = None

    def kept(self, cells: Cells) -> Cells:
        return self.own


class Holes:
    """Evictions from the rows of one store."""

    def __init__(self, store: RowStore) -> None:
        self._store = store

    def demand(self, row: Row, n: int, holes: Ranges, n_more: int, *, shift: bool) -> Cut:
        """The cells for `cut_out` from the row's first `n` tokens, and then for `n_more`."""
        first, cells = holes[0][0], row.cells[:n]
        stays = without(holes, n)
        if not shift:
            return Cut(0, n_more, cells[stays])
        copied = np.zeros(n, np.bool_)
        copied[first:] = self._store.shared_cells(row, first)[: n - first]
        copied &= stays
        n_to_copy = int(copied.sum())
        # One at least: without a free cell nothing can be decoded, and what is pending not be ended.
        return Cut(n_to_copy, n_to_copy + max(1, n_more), cells[stays & ~copied])

    def is_possible(self, row: Row, n: int, holes: Ranges, *, shift: bool) -> bool:
        """Whether a window's layers still hold what the next token behind the row's first `n` will look at then: other
        rows may have eaten what was out of sight, and a shift brings it into sight."""
        caps = self._store.caps
        if caps.kind is not MemoryKind.WINDOW:
            return True
        # A row that is not here now is parked.
        first = first_restored(row.end, caps) if row.seq_id < 0 else self._store.sequences.first(row.seq_id)
        old = row.positions()[:n][without(holes, n)]
        new = self._moved(row, holes, old) if shift else old
        seen = old[new >= first_seen(int(new[-1]) + 1, caps)] if len(new) else old
        return not len(seen) or first <= int(seen[0])

    def can_copy(self) -> bool:
        """Whether shared cells can be made a row's own now; decodes what is pending."""
        return self._store.sequences.scratch is not None and self._store.finish_pending()

    @staticmethod
    def _moved(row: Row, holes: Ranges, old: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The positions after a shift of what had the positions `old`."""
        first = holes[0][0]
        return np.concatenate([old[:first], end_of(row.jumps, first) + np.arange(len(old) - first)])

    def cut_out(self, row: Row, holes: Ranges, *, shift: bool) -> bool:
        """Take sorted, disjoint, non-empty ranges of tokens out of a row; False: only what is ahead of them is left.

        `shift`: what follows moves up, else the positions keep their gap. Costs two native operations a hole, and where
        cells are shared a save and a load of them.
        """
        store, first = self._store, holes[0][0]
        stays = without(holes, row.n)
        tokens, cells, positions = row.tokens[stays], row.cells[stays], row.positions()
        ranges = [(int(positions[p0]), int(positions[p1 - 1]) + 1) for p0, p1 in holes]
        left = positions[stays]
        old = left[first:]
        left = self._moved(row, holes, left) if shift else left
        new = left[first:]
        shared = store.shared_cells(row, first)[stays[first:]] if shift else np.zeros(len(old), np.bool_)
        if shared.any() and not store.finish_pending():
            store.cut(row, first)
            return False
        store.spoil(row, first)
        row.shorten(first)
        row.mark_approximate(first)
        for p0, p1 in ranges:
            store.sequences.remove(row.seq_id, p0, p1)
        try:
            self._make_own(row, old[shared])
        except SnapshotError:
            store.cut(row, first)
            return False
        if shared.any():
            cells[first:][shared] = store.new_cells(int(shared.sum()))
        self._move(row, old, new)
        return store.commit(row, first, tokens[first:], cells[first:], n_exact=first, jumps=_jumps_of(left))

    def _make_own(self, row: Row, positions: npt.NDArray[np.int64]) -> None:
        """Give the row cells of its own at these positions. SnapshotError where llama.cpp has no room."""
        context, sequences = self._store.context, self._store.sequences
        for a, b in _runs(positions):
            for p0 in range(a, b, _PIECE):
                p1 = min(b, p0 + _PIECE)
                with sequences.passing() as scratch:
                    sequences.copy(row.seq_id, scratch, p0, p1)
                    blob = np.empty(context.state_size(scratch), np.uint8)
                    context.save_state(scratch, blob)
                    sequences.remove(row.seq_id, p0, p1)
                    context.load_state(scratch, blob)
                    sequences.copy(scratch, row.seq_id, p0, p1)

    def _move(self, row: Row, old: npt.NDArray[np.int64], new: npt.NDArray[np.int64]) -> None:
        """Shift what has another position now; a run at a time, the first one first, as all move down."""
        deltas = new - old
        for a, b in _runs(np.flatnonzero(deltas)):
            borders = [a, *(a + 1 + np.flatnonzero(np.diff(deltas[a:b]))).tolist(), b]
            for i, j in pairwise(borders):
                self._store.note_shift()
                self._store.sequences.move(row.seq_id, int(old[i]), int(old[j - 1]) + 1, int(deltas[i]))


def _runs(values: npt.NDArray[np.int64]) -> list[tuple[int, int]]:
    """Half-open ranges of consecutive numbers in a rising array."""
    if not len(values):
        return []
    breaks = (np.flatnonzero(np.diff(values) != 1) + 1).tolist()
    return [(int(values[i]), int(values[j - 1]) + 1) for i, j in pairwise([0, *breaks, len(values)])]


def _jumps_of(positions: npt.NDArray[np.int64]) -> Jumps:
    """Where positions are not consecutive from 0 on."""
    steps = np.diff(positions, prepend=-1)
    at = np.flatnonzero(steps != 1)
    return tuple(zip(at.tolist(), (steps[at] - 1).tolist(), strict=True))
