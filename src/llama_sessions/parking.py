"""More sessions than slots: whose row is given up when a slot or cells are wanted, and what is remembered of it."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy as np

from .errors import CapacityError, NoFreeSlot, OptionError
from .kv.plan import Cells, Demand, Plan
from .kv.row import Jumps, Row
from .kv.slots import Slots
from .kv.snapshot import Snapshots
from .kv.store import RowStore, no_cells
from .notice import Notice
from .seats import Prompt, Seat, Seats
from .session import Session
from .types import Message, TokenArray

logger = logging.getLogger("llama_sessions")


@dataclass(frozen=True, slots=True, eq=False)
class Parked:
    """A session without a row: the (n,) int32 `tokens` that its row held, and for which `prompt`.

    An approximate row, of which `n_exact` tokens and `jumps` say how, is kept as it was under the number `owner`.
    """

    tokens: TokenArray
    prompt: Prompt
    owner: int | None = None
    namespace: str | None = None
    n_exact: int = 0
    jumps: Jumps = ()

    def as_row(self, shared: Cells | tuple[()] = ()) -> Row:
        """A row like the one it was, for who only asks: no sequence has it. `shared`: cells of its first tokens that it
        will have in common with another; the others are cells that nobody has."""
        row = Row(-1, self.namespace)
        cells = -1 - np.arange(len(self.tokens))
        cells[: len(shared)] = shared
        row.write(0, self.tokens, cells)
        row.n = len(self.tokens)
        row.set_jumps(self.jumps)
        row.mark_approximate(self.n_exact)
        return row


class Parking:
    """Parks idle sessions, the least recently used first: never one that somebody holds or whose prompt somebody is
    decoding, nor one that is pinned.

    Their KV goes into the cache before it is dropped; what the cache does not keep is decoded again when they return.
    """

    def __init__(
        self, store: RowStore, seats: Seats, slots: Slots, snapshots: Snapshots, idle_after_s: float | None
    ) -> None:
        self._store = store
        self._seats = seats
        self._slots = slots
        self._snapshots = snapshots
        self._idle_after_s = idle_after_s
        self._refused = Notice()
        self._parked: weakref.WeakKeyDictionary[Session, Parked] = weakref.WeakKeyDictionary()
        self._n_parked = 0  # as many as were put in; fewer are there once one of them is gone
        self._pinned: weakref.WeakSet[Session] = weakref.WeakSet()
        self._private: set[int] = set()  # numbers of the rows that are kept as they were
        self._n_private = 0

    def __len__(self) -> int:
        return len(self._parked)

    @property
    def n_approximate(self) -> int:
        """How many of them are kept as they were, since nobody can compute that again. For any thread, without the
        lock."""
        sessions = [ref() for ref in self._parked.keyrefs()]
        parked = [self._parked.get(session) for session in sessions if session is not None]
        return sum(each is not None and each.owner is not None for each in parked)

    def get(self, session: Session) -> Parked | None:
        """What is remembered of a parked session; None for one that is not."""
        return self._parked.get(session)

    def forget(self, session: Session) -> bool:
        """It is parked no more; whether it was."""
        parked = self._parked.pop(session, None)
        if parked is not None:
            self._n_parked -= 1
            if parked.owner is not None:
                self._forget_rows()
        return parked is not None

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
        row = seat.row
        self._snapshots.keep(row)
        if session not in self._parked:  # else its return did not finish: what it had is known better
            tokens = row.tokens.copy()
            tokens.flags.writeable = False
            self._remember(session, Parked(tokens, seat.prompt, self._kept(row), row.namespace, row.n_exact, row.jumps))
        self._seats.leave(session, seat)

    def _kept(self, row: Row) -> int | None:
        """The number under which a row that nobody can compute again is kept, if it has to be and can be."""
        if row.is_exact:
            return None
        self._forget_rows()
        self._n_private += 1
        self._private.add(self._n_private)
        return self._n_private if self._snapshots.keep_private(self._n_private, row) else None

    def _remember(self, session: Session, parked: Parked) -> None:
        self._parked[session] = parked
        self._n_parked += 1

    def drain(self) -> None:
        """Forget what was kept for sessions that are gone: nobody else can use it, and it would go last."""
        if self._private and len(self._parked) != self._n_parked:
            self._forget_rows()

    def _forget_rows(self) -> None:
        """Of sessions that are gone, or have theirs again."""
        left = list(self._parked.values())
        self._n_parked = len(left)
        wanted = {parked.owner for parked in left}
        for owner in self._private - wanted:
            self._snapshots.drop_private(owner)
            self._private.discard(owner)

    def can_return(self, session: Session, parked: Parked, but: Collection[Session] = ()) -> bool:
        """Whether a session was parked with a row that nobody can compute again, and there is room for that as it was;
        asks only."""
        if (
            parked.owner is None
            or session.namespace != parked.namespace
            or not self._snapshots.has_private(parked.owner)
        ):
            return False
        try:
            self.who_goes(Plan(len(parked.tokens), 0), with_slot=True, but=but)
        except CapacityError:
            return False
        return True

    def restore(self, session: Session, parked: Parked, but: Collection[Session] = ()) -> Seat:
        """A seat whose row is as it was, or, where that is not kept, empty."""
        self.make_way(Plan(len(parked.tokens), 0), with_slot=True, but=but)
        seat = self._seats.take(session)
        if parked.owner is not None and seat.row.namespace == parked.namespace:
            self._snapshots.restore_private(parked.owner, seat.row, parked.tokens, parked.n_exact, parked.jumps)
            seat.prompt = parked.prompt
        return seat

    def park_twin(self, session: Session, twin: Session, copies: Mapping[int, Message]) -> bool:
        """Let the branch of a parked session be parked like it; whether it was parked. `copies`: its messages, by the
        ids of the originals."""
        parked = self._parked.get(session)
        if parked is not None:
            self._remember(twin, replace(parked, prompt=parked.prompt.of_copies(copies)))
            twin.n_past = len(parked.tokens)
        return parked is not None

    def who_goes(
        self, plan: Demand, row: Row | None = None, *, with_slot: bool = False, but: Collection[Session] = ()
    ) -> list[tuple[Session, Seat]]:
        """Whom to park so that there are the cells for a plan on `row`, and a slot; asks only.

        Raises NoFreeSlot or CapacityError where all that may be parked, but for the sessions `but`, are not enough.
        """
        store = self._store
        n = 1 if with_slot and not self._slots.n_free else 0
        short = store.n_short(plan, row)
        if not n and not short:
            return []
        idle = sorted(self._idle(but), key=lambda pair: pair[1].last_used)
        if n > len(idle):
            raise NoFreeSlot(self._slots.capacity)
        rows = [seat.row for _, seat in idle]
        missing = store.n_short(plan, row, rows)
        if missing:
            raise no_cells(plan.n_new_cells, plan.n_new_cells - missing, store.caps)
        while store.n_short(plan, row, rows[:n]):
            n += 1
        return idle[:n]

    def make_way(
        self, plan: Demand, row: Row | None = None, *, with_slot: bool = False, but: Collection[Session] = ()
    ) -> bool:
        """Park the least recently used for a plan; whether rows went. Raises as `who_goes`, and parks nobody then."""
        reclaimed = self._seats.reclaim()  # rows that an interrupt left to nobody go first
        going = self.who_goes(plan, row, with_slot=with_slot, but=but)
        for session, seat in going:
            self.park(session, seat)
        return reclaimed or bool(going)

    def park_one(self, but: Collection[Session] = ()) -> bool:
        """Park the least recently used; whether there was one. For when llama.cpp finds no room where we count some:
        what it lacks cannot be asked (a narrow window's cells are reused only while one row alone holds them)."""
        idle = self._idle(but)
        if idle:
            self.park(*min(idle, key=lambda pair: pair[1].last_used))
        return bool(idle)

    def sweep(self) -> None:
        """Park what has been idle for too long."""
        if self._idle_after_s is not None:
            latest = time.monotonic() - self._idle_after_s
            for session, seat in self._idle(()):
                if seat.last_used <= latest:
                    try:
                        self.park(session, seat)
                    except OptionError as e:  # a policy of the user's; whoever is calling did not ask for this
                        self._refused.say(logger, "an idle session could not be parked: %s", e)

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
            if self._seats.was_last_here(session):
                session.n_past = 0
        self._parked.clear()
