"""More sessions than slots: whose row is given up when a slot or cells are wanted, and what is remembered of it."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Collection
from dataclasses import dataclass

from .errors import NoFreeSlot, OptionError
from .kv.snapshot import Snapshots
from .kv.store import RowStore
from .seats import Seat, Seats
from .session import Session
from .types import TokenArray

logger = logging.getLogger("llama_sessions")


@dataclass(frozen=True, slots=True)
class Parked:
    """A session without a row: the (n,) int32 `tokens` that its row held, of which `n_prompt` were the last prompt."""

    tokens: TokenArray
    n_prompt: int


class Parking:
    """Parks idle sessions, the least recently used first: never one that somebody holds or whose prompt somebody is
    decoding, nor one that is pinned.

    Their KV goes into the cache before it is dropped; what the cache does not keep is decoded again when they return.
    """

    def __init__(self, store: RowStore, seats: Seats, snapshots: Snapshots, idle_after_s: float | None) -> None:
        self._store = store
        self._seats = seats
        self._snapshots = snapshots
        self._idle_after_s = idle_after_s
        self._parked: weakref.WeakKeyDictionary[Session, Parked] = weakref.WeakKeyDictionary()
        self._pinned: weakref.WeakSet[Session] = weakref.WeakSet()

    def __len__(self) -> int:
        return len(self._parked)

    def get(self, session: Session) -> Parked | None:
        """What is remembered of a parked session; None for one that is not."""
        return self._parked.get(session)

    def forget(self, session: Session) -> bool:
        """It is parked no more; whether it was."""
        return self._parked.pop(session, None) is not None

    def pin(self, session: Session, on: bool) -> None:
        """Never park a session by itself, or do so again."""
        if on:
            self._pinned.add(session)
        else:
            self._pinned.discard(session)

    def is_pinned(self, session: Session) -> bool:
        return session in self._pinned

    def park(self, session: Session, seat: Seat) -> None:
        """Save what is not saved yet, give the row up, remember its tokens."""
        self._store.reconcile(seat.row)
        self._snapshots.keep(seat.row)
        if session not in self._parked:  # else its return did not finish: what it had is known better
            tokens = seat.row.tokens.copy()
            tokens.flags.writeable = False
            self._parked[session] = Parked(tokens, seat.n_prompt)
        self._seats.leave(session, seat)

    def park_twin(self, session: Session, twin: Session) -> bool:
        """Let the branch of a parked session be parked like it; whether it was parked."""
        parked = self._parked.get(session)
        if parked is not None:
            self._parked[twin] = parked
            twin.n_past = len(parked.tokens)
        return parked is not None

    def take_seat(self, session: Session, but: Collection[Session] = ()) -> Seat:
        """A seat with an empty row; another session is parked for it if need be. NoFreeSlot where none may be."""
        try:
            return self._seats.take(session)
        except NoFreeSlot:
            if not self._park_one(but):
                raise
            return self._seats.take(session)

    def make_cells(self, n: int, but: Collection[Session] = ()) -> bool:
        """Park until `n` cells are free; whether anything was parked."""
        parked = False
        self._seats.reclaim()  # rows that an interrupt left to nobody go first
        while (free := self._store.n_free_cells()) is not None and free < n and self._park_one(but):
            parked = True
        return parked

    def n_cells_to_have(self, but: Collection[Session] = ()) -> int:
        """Cells that parking all that may be parked would free; an upper bound where rows share some."""
        return sum(seat.row.n for _, seat in self._idle(but))

    def can_park(self, but: Collection[Session] = ()) -> bool:
        return bool(self._idle(but))

    def sweep(self) -> None:
        """Park what has been idle for too long."""
        if self._idle_after_s is not None:
            latest = time.monotonic() - self._idle_after_s
            for session, seat in self._idle(()):
                if seat.last_used <= latest:
                    try:
                        self.park(session, seat)
                    except OptionError as e:  # a policy of the user's; whoever is calling did not ask for this
                        logger.warning("an idle session could not be parked: %s", e)

    def _park_one(self, but: Collection[Session]) -> bool:
        idle = self._idle(but)
        if idle:
            self.park(*min(idle, key=lambda pair: pair[1].last_used))
        return bool(idle)

    def _idle(self, but: Collection[Session]) -> list[tuple[Session, Seat]]:
        return [
            (session, seat)
            for session, seat in self._seats.items()
            if session not in but
            and session not in self._pinned
            and not self._seats.is_held(session)
            and not seat.is_begun
        ]

    def disown(self) -> None:
        """At close."""
        for session in list(self._parked):
            session.n_past = 0
        self._parked.clear()
