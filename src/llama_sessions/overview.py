"""The manager looked at from outside: counters and a printable map."""

from __future__ import annotations

from dataclasses import dataclass, field

from .evicting import Evictor
from .kv.prefix import Prefix
from .kv.slots import Slots
from .kv.snapshot import Snapshots
from .kv.store import RowStore
from .options import ManagerOptions
from .parking import Parking
from .preparing import Preparer
from .report import Stats
from .seats import Seats

_MOST_EDGES = 40  # that are shown of the cache


@dataclass(slots=True, eq=False)
class Overview:
    """Takes stock. `published` is the last stock taken: reading it never waits."""

    store: RowStore
    slots: Slots
    prefix: Prefix
    seats: Seats
    preparer: Preparer
    parking: Parking
    snapshots: Snapshots
    options: ManagerOptions
    evictor: Evictor
    _counts: tuple[int | float, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.publish()

    def publish(self) -> None:
        """Take stock now, after a change, under the manager's lock: numbers only, made readable when asked.

        Only of what a decode changes, or what cannot be counted while one is under way."""
        store = self.store
        self._counts = (
            self.prefix.n_tokens,
            store.n_used_cells(),
            store.n_unique_cells(),
            store.sequences.n_operations,
            store.n_decodes,
            store.n_tokens_decoded,
            self.preparer.n_tokens_reused,
            store.decode_seconds,
            store.sequences.seconds,
            self.preparer.seconds,
        )

    @property
    def published(self) -> Stats:
        """The last stock taken; never waits."""
        n_prefix, n_used, n_unique, n_operations, n_decodes, n_decoded, n_reused, *seconds = self._counts
        options = self.options
        return Stats(
            slots_total=self.slots.capacity,
            slots_free=self.slots.n_free,
            prefix_tokens=int(n_prefix),
            prefix_cached=n_prefix > 0,
            n_sink=options.n_sink,
            eviction=options.eviction if isinstance(options.eviction, str) else "custom",
            n_evictions=self.evictor.n_evictions,
            n_tokens_evicted=self.evictor.n_tokens,
            radix=self.snapshots.stats,
            n_sessions=len(self.seats),
            n_parked=len(self.parking),
            n_approximate=sum(not seat.row.is_exact for seat in self.seats.seats()) + self.parking.n_approximate,
            n_cells_total=self.store.caps.n_cells,
            n_cells_used=int(n_used),
            n_cells_unique=int(n_unique),
            n_native_operations=int(n_operations),
            n_decodes=int(n_decodes),
            n_tokens_decoded=int(n_decoded),
            n_tokens_reused=int(n_reused),
            decode_seconds=seconds[0],
            operation_seconds=seconds[1],
            prepare_seconds=seconds[2],
        )

    def describe(self) -> str:
        """Slots and cells, a line a row, and the cache. For any thread, without the lock."""
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
            pinned = ", pinned" if self.parking.is_pinned(session) else ""
            space = "" if seat.row.namespace is None else f", namespace {seat.row.namespace!r}"
            n = len(session.messages)
            rough = "" if seat.row.is_exact else f", approximate from token {seat.row.n_exact}"
            what = f"{seat.row.n:6d} tokens{rough}, {n} messages"
            lines.append(f"  slot {seat.row.seq_id:5d} {what}, {state}{pinned}{space}")
        if s.n_parked:
            lines.append(f"  {s.n_parked} parked")
        if s.radix.max_bytes:
            used = f"{s.radix.n_bytes / 2**20:.1f} of {s.radix.max_bytes / 2**20:.0f} MiB"
            lines.append(f"saved: {s.radix.n_tokens} tokens on {s.radix.n_nodes} edges, {used}, by {s.radix.kind}")
            shown = self._edges()
            lines += [f"  {line}" for line in shown[:_MOST_EDGES]]
            if len(shown) > _MOST_EDGES:
                lines.append(f"  and {len(shown) - _MOST_EDGES} more")
        return "\n".join(lines)

    def _edges(self) -> list[str]:
        try:
            return self.snapshots.describe()
        except RuntimeError:  # a dict that another thread changes during the walk says so
            return []
