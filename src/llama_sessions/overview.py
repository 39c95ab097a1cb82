"""The manager looked at from outside: counters and a printable map."""

from __future__ import annotations

from dataclasses import dataclass, field

from .kv.prefix import Prefix
from .kv.slots import Slots
from .kv.store import RowStore
from .options import ManagerOptions
from .report import Stats
from .seats import Seats


@dataclass(slots=True)
class Overview:
    """Takes stock. `published` is the last stock taken: reading it never waits."""

    store: RowStore
    slots: Slots
    prefix: Prefix
    seats: Seats
    options: ManagerOptions
    published: Stats = field(init=False)
    n_tokens_reused: int = 0
    prepare_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.publish()

    def publish(self) -> None:
        """Take stock now; under the manager's lock."""
        store, options = self.store, self.options
        self.published = Stats(
            slots_total=self.slots.capacity,
            slots_free=self.slots.n_free,
            prefix_tokens=self.prefix.n_tokens,
            prefix_cached=self.prefix.n_tokens > 0,
            n_sink=options.n_sink,
            eviction=options.eviction if isinstance(options.eviction, str) else "custom",
            n_sessions=len(self.seats),
            n_cells_total=store.caps.n_cells,
            n_cells_used=sum(row.n for row in store.rows.values()),
            n_cells_unique=store.n_unique_cells(),
            n_native_operations=store.n_operations,
            n_decodes=store.n_decodes,
            n_tokens_decoded=store.n_tokens_decoded,
            n_tokens_reused=self.n_tokens_reused,
            decode_seconds=store.decode_seconds,
            operation_seconds=store.operation_seconds,
            prepare_seconds=self.prepare_seconds,
        )

    def describe(self) -> str:
        """Slots and cells, then a line a row."""
        s, caps = self.published, self.store.caps
        cells = "cells, each row its own" if s.n_cells_total is None else f"of {s.n_cells_total} cells"
        lines = [
            f"{caps.model}: {caps.kind.value} memory, {s.slots_total - s.slots_free} of {s.slots_total} slots in use",
            f"{s.n_cells_unique} {cells} ({s.n_cells_used} with shared ones counted for each row)",
        ]
        if self.prefix.row is not None:
            lines.append(f"  prefix     {self.prefix.n_tokens:6d} tokens")
        for session, seat in self.seats.items():
            state = "generating" if self.seats.is_held(session) else "idle"
            space = "" if seat.row.namespace is None else f", namespace {seat.row.namespace!r}"
            n_messages = len(session.messages)
            lines.append(f"  slot {seat.row.seq_id:5d} {seat.row.n:6d} tokens, {n_messages} messages, {state}{space}")
        return "\n".join(lines)
