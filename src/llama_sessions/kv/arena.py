"""A block of host memory of fixed size, handed out in pieces of any number of bytes."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import OptionError, StateError
from ..options import checked_int

ByteArray: TypeAlias = npt.NDArray[np.uint8]


class Extent:
    """A handle to bytes `[start, start + n_bytes)` of an arena. The arena may move it: ask for its view, keep no
    address."""

    __slots__ = ("n_bytes", "start")

    def __init__(self, start: int, n_bytes: int) -> None:
        self.start = start
        self.n_bytes = n_bytes

    def __repr__(self) -> str:
        return f"<Extent [{self.start}, {self.end})>"

    @property
    def end(self) -> int:
        return self.start + self.n_bytes


class Arena:
    """At most `max_bytes` of host memory.

    Lazily touched: `np.empty` of this size is address space alone, the system adds a page when it is first written to.
    First fit, the lowest address first, so pages that were touched already are used again (a save into fresh pages
    took 12 times as long). Neighbouring free ranges are one.

    Extents begin and end at any byte, so that one can be split anywhere and free bytes are counted as they are:
    llama.cpp reads and writes them with memcpy, and numpy copes with any address. What is left of alignment's worth
    is not measurable on blobs of megabytes.

    The free list is derived from the extents. It gives bytes away before an extent gets them and takes them back after
    it lost them, so an interrupt can leak bytes, which `recover` finds, and never hand them out twice. `torn`: the
    extent whose bytes were on the move when an interrupt came; what it held is lost.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = checked_int("max_bytes", max_bytes, 1)
        self.torn: Extent | None = None
        self._buffer = self._fresh()
        self._used: set[Extent] = set()
        self._free = [(0, self.max_bytes)]  # (start, bytes), by start

    def _fresh(self) -> ByteArray:
        try:
            return np.empty(self.max_bytes, np.uint8)
        except (MemoryError, ValueError, OverflowError):
            raise OptionError(f"the system has no address space for max_bytes={self.max_bytes}; lower it") from None

    # -- asking

    @property
    def n_free(self) -> int:
        """Bytes that nobody has. O(free ranges)."""
        return sum(n for _, n in self._free)

    @property
    def n_used(self) -> int:
        return self.max_bytes - self.n_free

    @property
    def n_largest(self) -> int:
        """The largest number of bytes that can be had in one piece, without `compact`."""
        return max((n for _, n in self._free), default=0)

    @property
    def n_extents(self) -> int:
        return len(self._used)

    def n_to_move(self, n_bytes: int) -> int:
        """How many bytes `compact` would move; 0 where there is a place. StateError where fewer are free."""
        return self._cheapest_run(n_bytes)[2]

    def view(self, extent: Extent) -> ByteArray:
        """The (n_bytes,) uint8 bytes of an extent, to read and write. Valid until the next change of the arena."""
        self._check(extent)
        return self._buffer[extent.start : extent.end]

    # -- changing

    def allocate(self, n_bytes: int) -> Extent | None:
        """`n_bytes` at the lowest address that has room for them; None where no free range is large enough."""
        checked_int("n_bytes", n_bytes, 1)
        for i, (start, n) in enumerate(self._free):
            if n >= n_bytes:
                extent = Extent(start, n_bytes)
                self._free[i : i + 1] = [(start + n_bytes, n - n_bytes)] if n > n_bytes else []
                self._used.add(extent)
                return extent
        return None

    def free(self, extent: Extent) -> None:
        """Take bytes back; StateError if they were freed before, or are another arena's."""
        self._check(extent)
        self._used.remove(extent)
        self._put_back(extent.start, extent.n_bytes)

    def split(self, extent: Extent, n_bytes: int) -> tuple[Extent, Extent]:
        """An extent in two, of which the first has `n_bytes`. No copying; the first is the same handle, shortened."""
        self._check(extent)
        checked_int("n_bytes", n_bytes, 1, extent.n_bytes - 1)
        tail = Extent(extent.start + n_bytes, extent.n_bytes - n_bytes)
        extent.n_bytes = n_bytes
        self._used.add(tail)
        return extent, tail

    def rewrite(self, extent: Extent, data: ByteArray) -> None:
        """Put fewer bytes, (n,) uint8, in place of what an extent holds, and free the rest."""
        self._check(extent)
        n = checked_int("the length of data", len(data), 1, extent.n_bytes)
        self.torn = extent
        self._buffer[extent.start : extent.start + n] = data
        if n < extent.n_bytes:
            self.free(self.split(extent, n)[1])
        self.torn = None

    def compact(self, n_bytes: int) -> int:
        """Slide neighbours together until `n_bytes` are free in one piece; returns how many bytes were moved.

        Of all runs of neighbours that leave enough room the one with the fewest bytes to move is taken, and found in
        O(extents log extents). So n_free bytes can always be had, and nothing need go for the sake of a place.
        StateError where fewer are free.
        """
        first, last, between = self._cheapest_run(n_bytes)
        if not between:
            return 0
        start, end = self._free[first][0], sum(self._free[last])
        self._free[first : last + 1] = []  # nobody's until all have moved
        memory, moved, at = self._buffer.data, 0, start
        for extent in sorted((e for e in self._used if start <= e.start < end), key=lambda e: e.start):
            self.torn = extent
            memory[at : at + extent.n_bytes] = memory[extent.start : extent.end]  # memmove: they may overlap
            extent.start = at
            self.torn = None
            at = extent.end
            moved += extent.n_bytes
        self._put_back(at, end - at)
        return moved

    def recover(self, extents: Iterable[Extent]) -> None:
        """Hold these extents and no others: what is nobody's, by an interrupt, is free again."""
        used = set(extents)
        free, at = [], 0
        for extent in sorted(used, key=lambda e: e.start):
            if extent.start > at:
                free.append((at, extent.start - at))
            at = extent.end
        if at < self.max_bytes:
            free.append((at, self.max_bytes - at))
        self._used, self._free, self.torn = used, free, None

    def give_back(self) -> bool:
        """Return all pages to the system, if no extent is left; else False."""
        if not self._used:
            self._buffer = self._fresh()
        return not self._used

    # -- proof

    def problems(self) -> list[str]:
        """Everything that does not add up, a sentence each."""
        found = [] if self.torn is None else [f"{self.torn!r} is torn"]
        ranges = sorted([*((e.start, e.n_bytes, "used") for e in self._used), *((s, n, "free") for s, n in self._free)])
        at, before = 0, ""
        for start, n, kind in ranges:
            if start != at:
                found.append(f"{abs(start - at)} bytes at {min(start, at)} are {'nobody' if start > at else 'two'}'s")
            if n < 1 or start + n > self.max_bytes:
                found.append(f"a {kind} range of {n} bytes at {start} is empty or beyond {self.max_bytes}")
            if kind == before == "free":
                found.append(f"the free ranges at {start} and before it are two")
            at, before = start + n, kind
        if at != self.max_bytes:
            found.append(f"the ranges end at {at}, not at {self.max_bytes}")
        if self._free != sorted(self._free):
            found.append("the free ranges are out of order")
        return found

    def check_integrity(self) -> None:
        """StateError that names everything that does not add up. O(n), for tests."""
        found = self.problems()
        if found:
            raise StateError("the arena does not add up (please report this): " + "; ".join(found))

    # -- within

    def _check(self, extent: Extent) -> None:
        if extent not in self._used:
            raise StateError(f"{extent!r} is not in use here: it was freed, or belongs to another arena")

    def _put_back(self, start: int, n: int) -> None:
        """A range into the free list, made one with its neighbours by one assignment."""
        i = j = bisect(self._free, (start,))
        if i and sum(self._free[i - 1]) == start:
            i -= 1
            start, n = self._free[i][0], self._free[i][1] + n
        if j < len(self._free) and start + n == self._free[j][0]:
            n += self._free[j][1]
            j += 1
        self._free[i:j] = [(start, n)]

    def _cheapest_run(self, n_bytes: int) -> tuple[int, int, int]:
        """First and last of the free ranges that together hold `n_bytes` with the fewest used bytes between them, and
        how many those are."""
        checked_int("n_bytes", n_bytes, 1)
        best = None
        first = total = 0
        for last, (start, n) in enumerate(self._free):
            total += n
            while total - self._free[first][1] >= n_bytes:
                total -= self._free[first][1]
                first += 1
            between = start + n - self._free[first][0] - total
            if total >= n_bytes and (best is None or between < best[2]):
                best = (first, last, between)
        if best is None:
            raise StateError(f"{n_bytes} bytes cannot be brought together: {self.n_free} are free")
        return best
