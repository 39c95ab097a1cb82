"""`ContextManager`: the one place where a Session meets a Row."""

from __future__ import annotations

from dataclasses import replace

from .kv.plan import NOTHING
from .options import checked_bool, checked_int
from .prompts import said_of
from .session import Session, check_session
from .steps import Steps
from .types import Message


class ContextManager(Steps):
    """Many sessions over one llama.cpp context.

    `ContextManager(ctx, vocab)` works over a `llama_context_p` and its `llama_vocab_p` of yours: it is cleared on entry
    and never freed here. `ContextManager.load(path)` makes a context with the right settings. With n_seq_max 1 there is
    no slot for the shared system prompt (it is remembered and rendered), with 2 one session beside it.

    Calls may come from any thread and run one at a time; `stats` and `describe` never wait for a decode.
    Options: see `ManagerOptions`.
    """

    # -- rows as a whole

    def fork(self, session: Session) -> Session:
        """A branch: the same messages (deep copies) and the same row, its cells shared. Nothing is decoded.

        The branch has the parent's logits. Raises NoFreeSlot. A session without a row gives a branch without one, a
        parked one a branch that is parked.
        """
        with self._entry.gate(), self._entry.change:
            seat = self._seats.get(session, reading=True)
            twin, copies = session.copy_with_map()
            if self._parking.park_twin(session, twin, copies) or seat is None:
                return twin
            self._store.reconcile(seat.row)
            self._parking.make_way(NOTHING, with_slot=True, but=(session,))
            child = self._seats.take(twin)
            child.row.namespace = seat.row.namespace  # of the cells; the branch's own is looked at when it is prepared
            if seat.row.n and self._store.share(seat.row, child.row, 0, seat.row.n):
                if seat.row.logits is not None:
                    child.row.logits = self._store.logits(seat.row).copy()
                twin.n_past = child.row.n
                child.prompt = seat.prompt.of_copies(copies)  # half a prompt is half a prompt there, too
                twin.last_prepare = session.last_prepare
            return twin

    def release(self, session: Session) -> bool:
        """Drop the row and give the slot back; False if the session has none. Its messages stay its own.

        What the row held stays in the cache of saved KV, for whoever begins with it.
        """
        with self._entry.gate(), self._entry.change:
            seat = self._seats.get(session)
            was_parked = self._parking.forget(session)
            if seat is not None:
                self._snapshots.keep(seat.row)
                self._seats.leave(session, seat)
            session.n_past = 0
            session.forget_appended()
            return was_parked or seat is not None

    def park(self, session: Session, *, holder: object | None = None) -> bool:
        """Save the row's KV and give its slot back; False if the session has none.

        Whatever needs the row next (`prepare`, `append`, `logits`, `fork`) brings it back, into any slot, token for
        token. With `radix=False` nothing is saved, and it is decoded again. Raises StateError for a session that is
        generating.
        """
        with self._entry.gate(), self._entry.change:
            seat = self._seats.get(session, holder)
            if seat is not None:
                self._parking.park(session, seat)
            return seat is not None

    def flush(self, session: Session) -> int:
        """Save what the row holds and the cache does not yet; the row stays. Returns how many tokens were saved."""
        with self._entry.gate(), self._entry.change:
            seat = self._seats.get(session)
            return 0 if seat is None else self._snapshots.keep(seat.row)

    def pin(self, session: Session, on: bool = True) -> None:
        """Never park a session by itself; `on=False`: do so again."""
        with self._entry.gate(), self._entry.change:
            self._seats.get(session, reading=True)
            self._parking.pin(session, checked_bool("on", on))

    def is_parked(self, session: Session) -> bool:
        """Whether its row was given up, and comes back when it is needed."""
        return self._parking.get(check_session(session)) is not None

    def is_pinned(self, session: Session) -> bool:
        """Whether a session is never parked by itself."""
        return self._parking.is_pinned(check_session(session))

    def n_room(self, session: Session) -> int:
        """Tokens that the session's row can still take, by its own length. Without a lock: a hint while others work."""
        seat = self._seats.get(session, reading=True)
        n = self._store.n_room(seat.row) if seat is not None else self._store.caps.n_row_max
        return 2**31 - 1 if n is None else n

    def make_room(self, session: Session, n_needed: int, *, holder: object | None = None) -> int:
        """Take at least `n_needed` tokens out of the row, or as many as can go; returns how many went.

        What goes is chosen as `prepare` does, and after all of that the beginning of the reply that is under way. By a
        shift, else a gap, else not at all (0): with `overflow="reprefill"`, where positions end, on memory that cannot,
        or if nothing is prepared. Nothing is rendered and no `on_evict` called: the messages that go leave the
        session's window, and the next `prepare` hands them to it. What follows the hole is approximate then, and
        `session.n_past` is what is left. Nothing is decoded; what is exact is saved first, and a shift rotates K in the
        next decode. A parked session gets its row back for it. OptionError for a negative `n_needed`.
        """
        checked_int("n_needed", n_needed, 0)
        self._entry.check_may_change()
        self._seats.get(session, holder)
        n_sink = self._evictor.n_sink(session)
        with self._entry.gate(), self._entry.change:
            self._bring_back(session, holder, wants_logits=False)
            seat = self._seats.get(session, holder)
            if seat is None or not n_needed:
                return 0
            return self._preparer.make_room(session, seat, n_needed, n_sink)

    def clear_radix(self) -> None:
        """Forget saved KV, but for what one parked session alone owns."""
        with self._entry.gate(), self._entry.change:
            self._snapshots.clear()

    def hold(self, session: Session, holder: object) -> None:
        """Only `holder` may change the session's row until `let_go`. For engines and pools. Never waits."""
        self._entry.check_may_change()
        self._seats.hold(session, holder)

    def is_held(self, session: Session) -> bool:
        """Whether somebody is generating in the session."""
        return self._seats.is_held(check_session(session))

    def note_reply(self, session: Session, message: Message) -> None:
        """The row's tail is what the assistant said: whoever takes that back drops something worth keeping."""
        seat = self._seats.get(session, reading=True)
        if seat is not None:
            seat.prompt = replace(seat.prompt, said=(*seat.prompt.said, said_of(message)))

    def let_go(self, session: Session, holder: object) -> None:
        """End a `hold`. Never waits, never raises: it may be called from a finaliser."""
        self._seats.let_go(session, holder)
