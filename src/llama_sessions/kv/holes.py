"""Tokens taken out of the middle of a row, and what stands behind them moved up, or left where it is.

The positions of a shared cell are everybody's: before they move, what stands behind a hole becomes the row's own, by
way of a save and a load. That is planned before anything is touched, as it takes free cells.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import numpy.typing as npt

from ..errors import SnapshotError
from .alignment import Ranges, without
from .row import Jumps, Row, end_of
from .store import RowStore

_PIECE = 2048  # tokens that pass through the scratch at once


class Holes:
    """Evictions from the rows of one store."""

    def __init__(self, store: RowStore) -> None:
        self._store = store

    def n_to_copy(self, row: Row, holes: Ranges) -> int:
        """Tokens behind the first hole whose cells others hold too: a shift needs a new cell for each."""
        first = holes[0][0]
        stays = without(holes, row.n)[first:]
        return int((self._store.shared_cells(row, first) & stays).sum())

    def n_freed(self, row: Row, holes: Ranges) -> int:
        """Cells that the holes alone make free."""
        first = holes[0][0]
        goes = ~without(holes, row.n)[first:]
        return int((~self._store.shared_cells(row, first) & goes).sum())

    def can_shift(self, row: Row, holes: Ranges) -> bool:
        """Whether there are cells enough to shift now."""
        n_to_copy = self.n_to_copy(row, holes)
        if not n_to_copy:
            return True
        store = self._store
        free = store.n_free_cells()
        if store.sequences.scratch is None or free is None or (store.is_pending and not free):
            return False  # what is pending takes a decode, and that a cell, before anything can be copied
        return n_to_copy <= free + self.n_freed(row, holes)

    def cut_out(self, row: Row, holes: Ranges, *, shift: bool) -> bool:
        """Take sorted, disjoint, non-empty ranges of tokens out of a row; False: only what is ahead of them is left.

        `shift`: what follows moves up, else the positions keep their gap. Costs two native operations a hole, and where
        cells are shared a save and a load of them.
        """
        store, first = self._store, holes[0][0]
        stays = without(holes, row.n)
        tokens, cells, positions = row.tokens[stays], row.cells[stays], row.positions()
        ranges = [(int(positions[p0]), int(positions[p1 - 1]) + 1) for p0, p1 in holes]
        old = positions[stays][first:]
        shared = store.shared_cells(row, first)[stays[first:]] if shift else np.zeros(len(old), np.bool_)
        if shared.any() and not store.finish_pending():
            store.cut(row, first)
            return False
        jumps = row.jumps
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
        new = end_of(jumps, first) + np.arange(len(old)) if shift else old
        self._move(row, old, new)
        row.write(first, tokens[first:], cells[first:])
        row.n = len(tokens)
        row.set_jumps(_jumps_of(np.concatenate([positions[:first], new])))
        row.mark_approximate(first)
        if not store.is_as_booked(row):
            store.cut(row, 0)
            return False
        row.suspect = None
        return True

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
