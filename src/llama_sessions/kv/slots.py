"""Which sequence ids can be handed out. A slot is one `seq_id`: free, used, or reserved (prefix, scratch)."""

from __future__ import annotations

from ..errors import NoFreeSlot, StateError


class Slots:
    """Sequence ids `0 .. n_seq_max`, the first `n_reserved` of them never handed out. Lowest free id first.

    There is one collection, of the ids in use: an interrupt cannot leave two that disagree.
    """

    def __init__(self, n_seq_max: int, n_reserved: int) -> None:
        self._ids = range(n_reserved, n_seq_max)
        self._used: set[int] = set()

    @property
    def capacity(self) -> int:
        """Slots for sessions, used or not."""
        return len(self._ids)

    @property
    def n_free(self) -> int:
        return len(self._ids) - len(self._used)

    def is_reserved(self, seq_id: int) -> bool:
        return 0 <= seq_id < self._ids.start

    def used(self) -> frozenset[int]:
        """The ids that are handed out."""
        return frozenset(self._used)

    def acquire(self) -> int:
        """A free id; NoFreeSlot where there is none. O(n), of at most 254."""
        seq_id = next((i for i in self._ids if i not in self._used), None)
        if seq_id is None:
            raise NoFreeSlot(self.capacity)
        self._used.add(seq_id)
        return seq_id

    def release(self, seq_id: int) -> None:
        """Take an id back; StateError if it was not handed out."""
        if seq_id not in self._used:
            raise StateError(f"slot {seq_id} is not in use: {'reserved' if self.is_reserved(seq_id) else 'free'}")
        self._used.remove(seq_id)
