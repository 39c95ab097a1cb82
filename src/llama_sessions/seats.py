"""Which session has which row. Sessions are held weakly: one that is gone gives its slot back at the next call."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .errors import OptionError, StateError
from .kv.row import Row
from .kv.slots import Slots
from .kv.snapshot import Snapshots
from .kv.store import RowStore
from .layout import Layout
from .prompts import Conversation, Said
from .render import Rendered
from .report import Stretch
from .session import Session, check_session
from .types import FloatArray, Message

logger = logging.getLogger("llama_sessions")

# Where a session was seated last: its `n_past` is of there. While it has a row there, no other manager takes it.
_owners: weakref.WeakKeyDictionary[Session, weakref.ref[Seats]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """What a row was asked to hold last: `n_tokens`, after which single tokens come.

    `rendered` from `conversation`, of which `said` is a copy to compare with. `layout`: how the row lies in it, where
    it is not simply its beginning.
    """

    n_tokens: int = 0
    rendered: Rendered | None = None
    said: Said = ()
    conversation: Conversation | None = None
    layout: Layout | None = None

    def of_copies(self, copies: Mapping[int, Message]) -> Prompt:
        """The same for a branch of the session: `copies` are its messages, by the ids of the originals."""
        conversation, layout = self.conversation, self.layout
        if conversation is not None:
            owners = [None if owner is None else copies.get(id(owner)) for owner in conversation.owners]
            conversation = replace(conversation, owners=owners)
        return replace(self, conversation=conversation, layout=None if layout is None else layout.of_copies(copies))


@dataclass(slots=True, eq=False)
class Seat:
    """What a manager keeps for one session that has a slot: its row, and which prompt it is to hold.

    `back`: where the tokens of a row came from that was brought back as it was, until the next report tells it.
    """

    row: Row
    finalizer: Any
    n_begun: int = 0  # which `begin` is the last one; an older Pending is void
    prompt: Prompt = Prompt()
    back: tuple[Stretch, ...] = ()
    pending: weakref.ref[Any] | None = None  # the `Pending` of that prompt, while somebody has it
    last_used: float = field(default_factory=time.monotonic)
    logits: FloatArray = field(default_factory=lambda: np.empty(0, np.float32))

    @property
    def is_begun(self) -> bool:
        """Whether somebody is in the middle of decoding its prompt."""
        if self.pending is None or self.row.n >= self.prompt.n_tokens:
            return False
        pending = self.pending()
        return pending is not None and not pending.is_given_up


class Seats:
    """Sessions, their rows, and the slots behind them."""

    def __init__(self, store: RowStore, slots: Slots, snapshots: Snapshots) -> None:
        self._store = store
        self._snapshots = snapshots
        self._slots = slots
        self._seats: weakref.WeakKeyDictionary[Session, Seat] = weakref.WeakKeyDictionary()
        self._holders: weakref.WeakKeyDictionary[Session, weakref.ref[object]] = weakref.WeakKeyDictionary()
        self._turns: weakref.WeakKeyDictionary[Session, threading.RLock] = weakref.WeakKeyDictionary()
        self._holding = threading.RLock()  # of its own: whoever asks for a session does not wait for a decode
        self._left: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._seats)

    def seats(self) -> list[Seat]:
        return [seat for _, seat in self.items()]

    def items(self) -> list[tuple[Session, Seat]]:
        """Sessions that are alive, with their seats; safe to call from any thread, without the lock."""
        alive = [ref() for ref in self._seats.keyrefs()]
        pairs = [(session, self._seats.get(session)) for session in alive if session is not None]
        return [(session, seat) for session, seat in pairs if seat is not None]

    def get(self, session: Session, holder: object | None = None, *, reading: bool = False) -> Seat | None:
        """The session's seat, if it has one.

        StateError for a session of another manager, and, unless only `reading`, for one that somebody else holds.
        """
        check_session(session)
        seat = self._seats.get(session)
        if seat is None:
            owner = self._owner(session)
            if owner is not None and owner is not self and session in owner._seats:
                raise StateError("the session belongs to another manager; release it there, or fork its messages")
        if not reading and self._holder(session) not in (None, holder):
            raise StateError("the session is generating; finish or close its stream first, or wait for its ticket")
        return seat

    @staticmethod
    def _owner(session: Session) -> Seats | None:
        ref = _owners.get(session)
        return None if ref is None else ref()

    def was_last_here(self, session: Session) -> bool:
        """Whether no other manager has given the session a row since this one did."""
        return self._owner(session) in (None, self)

    def hold(self, session: Session, holder: object) -> None:
        """Only `holder` may change the session's row until `let_go`; needs no seat, and not the manager's lock."""
        with self._holding:
            self.get(session, holder)
            self._holders[session] = weakref.ref(holder)

    def let_go(self, session: Session, holder: object) -> None:
        """End a `hold`; nothing if it is not this holder's."""
        if self._holder(session) is holder:
            self._holders.pop(session, None)

    def is_held(self, session: Session) -> bool:
        return self._holder(session) is not None

    def _holder(self, session: Session) -> object | None:
        ref = self._holders.get(session)
        return None if ref is None else ref()

    def turn(self, session: Session) -> threading.RLock:
        """A lock of the session's own: whoever prepares it lets the next one wait. Call under the manager's lock."""
        turn = self._turns.get(session)
        if turn is None:
            turn = self._turns[session] = threading.RLock()
        return turn

    def take(self, session: Session) -> Seat:
        """A seat with an empty row; NoFreeSlot where all slots are in use."""
        seq_id = self._slots.acquire()
        # The finaliser may run in the middle of anything: it only leaves a note, and a note is only a hint.
        finalizer = weakref.finalize(session, self._left.append, seq_id)
        finalizer.atexit = False
        _owners[session] = weakref.ref(self)
        seat = self._seats[session] = Seat(self._store.add(seq_id, session.namespace), finalizer)
        return seat

    def leave(self, session: Session, seat: Seat) -> None:
        """Drop the row and give the slot back."""
        seat.finalizer.detach()
        del self._seats[session]
        self._free(seat.row.seq_id)

    def drain(self) -> None:
        """Give back the slots of sessions that are gone."""
        n_notes = len(self._left)
        if n_notes:
            self.reclaim()
            for _ in range(n_notes):
                self._left.popleft()

    def reclaim(self) -> bool:
        """Give back the slots that nobody sits on: of sessions that are gone, or left by an interrupt. Whether any."""
        lost = self._slots.used() - {seat.row.seq_id for seat in self.seats()}
        for seq_id in lost:
            row = self._store.rows.get(seq_id)
            if row is not None:
                try:
                    self._snapshots.keep(row)
                except OptionError as e:  # a policy of the user's; whoever is calling did not ask for this
                    logger.warning("the KV of a session that is gone could not be kept: %s", e)
            self._free(seq_id)
        return bool(lost)

    def _free(self, seq_id: int) -> None:
        row = self._store.rows.get(seq_id)
        if row is not None:
            self._store.remove(row)
        self._slots.release(seq_id)

    def disown(self) -> None:
        """At close: the sessions may go to another manager."""
        for session, seat in self.items():
            seat.finalizer.detach()
            _owners.pop(session, None)
            session.n_past = 0
        self._seats.clear()
