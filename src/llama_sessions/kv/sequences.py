"""Native calls on sequences, counted and timed, and the scratch sequence through which parts of rows pass."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import StateError
from ..types import ByteArray, Context
from .costs import Costs


class Sequences:
    """What llama.cpp does to one sequence or between two; knows no tokens.

    `scratch`: a sequence id that no row has; it is empty between two calls. None: there is none.
    """

    def __init__(self, context: Context, scratch: int | None) -> None:
        self._context = context
        self._memory = context.memory
        self._scratch_is_dirty = False
        self.scratch = scratch
        self.costs = Costs()
        self.n_operations = 0
        self.seconds = 0.0

    def end(self, seq_id: int) -> int:
        """Positions of a sequence, from 0 to its last one."""
        last = self._memory.pos_max(seq_id)
        return 0 if last is None else last + 1

    def first(self, seq_id: int) -> int:
        """The first position that is still whole in every layer; 0 of an empty one."""
        return self._memory.pos_min(seq_id) or 0

    def remove(self, seq_id: int, p0: int, p1: int | None = None) -> bool:
        """Drop `[p0, p1)` (None: to the end); False where the memory refuses."""
        started = time.perf_counter()
        done = self._memory.seq_rm(seq_id, p0 or None, p1)
        self._note(started)
        return done

    def move(self, seq_id: int, p0: int, p1: int, delta: int) -> None:
        """Shift the positions `[p0, p1)`, for whoever else has these cells too; K follows at the next decode."""
        started = time.perf_counter()
        self._memory.seq_add(seq_id, p0, p1, delta)
        self._note(started)

    def copy(self, src: int, dst: int, p0: int | None = None, p1: int | None = None) -> None:
        """Give `dst` a share of `[p0, p1)` of `src` (None: all of it)."""
        started = time.perf_counter()
        self._memory.seq_cp(src, dst, p0, p1)
        self._note(started)

    def _note(self, started: float) -> None:
        seconds = time.perf_counter() - started
        self.n_operations += 1
        self.seconds += seconds
        self.costs.operation.add(seconds)

    def forget_counts(self) -> None:
        """Begin to count anew, with the averages that were found."""
        self.n_operations = 0
        self.seconds = 0.0

    # -- as bytes

    def size(self, seq_id: int, p0: int, p1: int) -> int:
        """Bytes that `save` writes."""
        if (p0, p1) == (0, self.end(seq_id)):
            return self._context.state_size(seq_id)
        with self.passing() as scratch:
            self.copy(seq_id, scratch, p0, p1)
            return self._context.state_size(scratch)

    def save(self, seq_id: int, p0: int, p1: int, out: ByteArray) -> None:
        """Write `[p0, p1)` into `out`; SnapshotError if llama.cpp does not. A part goes through the scratch."""
        if (p0, p1) == (0, self.end(seq_id)):
            self._context.save_state(seq_id, out)
            return
        with self.passing() as scratch:
            self.copy(seq_id, scratch, p0, p1)
            self._context.save_state(scratch, out)

    def load(self, seq_id: int, blob: ByteArray, p0: int, p1: int) -> None:
        """Put `[p0, p1)` of a blob at the end of a sequence that ends at `p0`; SnapshotError if llama.cpp does not.

        An empty sequence is made of the whole blob and trimmed, else it passes through the scratch.
        """
        if p0:
            with self.passing() as scratch:
                self._context.load_state(scratch, blob)
                self.copy(scratch, seq_id, p0, p1)
            return
        self._context.load_state(seq_id, blob)
        if self.end(seq_id) > p1:
            self.remove(seq_id, p1)

    @contextmanager
    def passing(self) -> Iterator[int]:
        """The scratch for what passes through: empty before and after, also where that is interrupted."""
        if self.scratch is None:
            raise StateError("there is no scratch sequence: the context has fewer than 3 sequences")
        self.clear_scratch()
        self._scratch_is_dirty = True
        try:
            yield self.scratch
        finally:
            self.clear_scratch()

    def clear_scratch(self) -> None:
        """Empty the scratch if an error or an interrupt left something in it."""
        if self._scratch_is_dirty and self.scratch is not None:
            self.remove(self.scratch, 0)
            self._scratch_is_dirty = False
