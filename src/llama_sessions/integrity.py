"""Proof of the accounting: what rows, slots and cells say against each other and against llama.cpp's positions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .errors import StateError
from .kv.prefix import Prefix
from .kv.slots import Slots
from .kv.snapshot import Snapshots
from .kv.store import RowStore
from .seats import Seat
from .types import MemoryKind


def problems(store: RowStore, slots: Slots, prefix: Prefix, seats: Sequence[Seat], snapshots: Snapshots) -> list[str]:
    """Everything that does not add up, a sentence each."""
    found = []
    seated = [seat.row.seq_id for seat in seats]
    if sorted(seated) != sorted(slots.used()):
        found.append(f"slots in use {sorted(slots.used())} are not those of the sessions {sorted(seated)}")
    expected = set(seated) | ({prefix.seq_id} if prefix.seq_id is not None else set())
    if set(store.rows) != expected:
        found.append(f"rows {sorted(store.rows)} are not those of sessions and prefix {sorted(expected)}")
    memory, caps = store.context.memory, store.caps
    for seq_id in range(caps.n_seq_max):
        row = store.rows.get(seq_id)
        n = 0 if row is None else row.n
        end, first = memory.pos_max(seq_id), memory.pos_min(seq_id)
        expected_end = row.end - 1 if row is not None and n else None
        if end != expected_end:
            ends = f"row {seq_id} has {n} tokens and should end at {expected_end}"
            found.append(f"{ends}, llama.cpp's last position is {end}")
        begin = int(row.positions()[0]) if row is not None and n else 0  # not 0 where the first tokens left a gap
        if n and caps.kind is MemoryKind.FULL and first != begin:
            found.append(f"row {seq_id} begins at position {first}, not {begin}")
        if row is not None and len(np.unique(row.cells)) != n:
            found.append(f"row {seq_id} holds a cell twice")
    counted = store.n_unique_cells()
    cells = [row.cells for row in store.rows.values() if row.n]
    unique = len(np.unique(np.concatenate(cells))) if cells else 0
    if counted != unique:
        found.append(f"{counted} cells are booked, {unique} are held")
    found += snapshots.problems()
    if caps.n_cells is not None and unique > caps.n_cells:
        found.append(f"{unique} cells are held of {caps.n_cells}")
    return found


def check(store: RowStore, slots: Slots, prefix: Prefix, seats: Sequence[Seat], snapshots: Snapshots) -> None:
    """StateError that names everything that does not add up."""
    found = problems(store, slots, prefix, seats, snapshots)
    if found:
        raise StateError("the accounting does not add up (please report this): " + "; ".join(found))
