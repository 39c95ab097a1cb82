"""From a session to a `Pending`: rendered, planned, cut and shared; what is left to decode is for steps."""

from __future__ import annotations

import time

from .errors import CapacityError
from .kv.prefix import Prefix
from .kv.slots import Slots
from .kv.store import RowStore
from .pending import Pending
from .planner import Planner
from .prompts import Conversation, Prompter
from .report import Preview
from .seats import Seat, Seats
from .session import Session


class Preparer:
    """Begins prompts; everything here is called under the manager's lock."""

    def __init__(self, store: RowStore, seats: Seats, slots: Slots, prefix: Prefix, prompter: Prompter) -> None:
        self._store = store
        self._seats = seats
        self._slots = slots
        self._prefix = prefix
        self._prompter = prompter
        self._planner = Planner(store, seats, prefix)
        self.n_tokens_reused = 0
        self.seconds = 0.0

    def begin(self, session: Session, conversation: Conversation, holder: object | None) -> Pending:
        """Nothing is touched before the plan is whole. Then the session has a seat, and its row what is reused."""
        started = time.perf_counter()
        seat = self._seats.get(session, holder)
        rendered = self._prompter.rendered(session, conversation, None if seat is None else seat.rendered)
        seat = self._true_seat(session, holder)
        wants_logits = not conversation.is_empty
        plan = self._planner.plan(seat, session.namespace, rendered.tokens, wants_logits=wants_logits)
        if seat is None:
            seat = self._seats.take(session)
        seat.n_begun += 1
        seat.n_prompt, seat.rendered = len(rendered.tokens), rendered
        stretches = self._store.apply(seat.row, plan)
        session.forget_appended()
        session.n_past = n_reused = seat.row.n
        self.n_tokens_reused += n_reused
        pending = Pending(session, rendered, seat, seat.n_begun, n_reused, wants_logits, stretches, started)
        if pending.done:
            session.last_prepare = pending.report()
        self.seconds += time.perf_counter() - started
        return pending

    def _true_seat(self, session: Session, holder: object | None) -> Seat | None:
        """The session's seat with a row that is true and of its namespace; the prefix is made true with it."""
        if self._prefix.row is not None:
            self._store.reconcile(self._prefix.row)
        seat = self._seats.get(session, holder)
        if seat is not None:
            self._store.reconcile(seat.row)
            if seat.row.namespace != session.namespace:
                self._store.cut(seat.row, 0)
                seat.row.namespace = session.namespace
        return seat

    def preview(self, session: Session, conversation: Conversation) -> Preview:
        """What `begin` and its steps would do; changes nothing."""
        seat = self._seats.get(session, reading=True)
        tokens = self._prompter.rendered(session, conversation, None if seat is None else seat.rendered).tokens
        usable = seat is not None and seat.row.suspect is None and seat.row.namespace == session.namespace
        most, n = self._store.caps.n_ctx_seq, len(tokens)
        try:
            plan = self._planner.plan(
                seat if usable else None, session.namespace, tokens, wants_logits=not conversation.is_empty
            )
            n_to_decode, fits = plan.n_decode, seat is not None or self._slots.n_free > 0
        except CapacityError as e:
            n_to_decode, fits = min(n, e.needed), False
        return Preview(n_tokens=n, n_to_decode=n_to_decode, fits=fits, n_free=max(0, most - n))
