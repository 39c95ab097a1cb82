"""From a session to a `Pending`: rendered, planned, cut, shared and restored; what is left to decode is for steps."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .errors import CapacityError
from .kv.plan import Plan
from .kv.prefix import Prefix
from .kv.snapshot import Snapshots
from .kv.store import RowStore
from .parking import Parked, Parking
from .pending import Pending
from .planner import Planner
from .prompts import Conversation, Prompter, Said, said_in
from .render import Rendered
from .report import Preview, Stretch
from .seats import Seat, Seats
from .session import Session
from .types import TokenArray

if TYPE_CHECKING:
    from .kv.cache import KvMatch


@dataclass(frozen=True, slots=True)
class _Draft:
    """A plan, and the `match` in the cache that it counts on. `refused`: why there is no room for it."""

    match: KvMatch
    plan: Plan
    refused: CapacityError | None = None


class Preparer:
    """Begins prompts; everything here is called under the manager's lock."""

    def __init__(
        self,
        store: RowStore,
        seats: Seats,
        prefix: Prefix,
        prompter: Prompter,
        snapshots: Snapshots,
        parking: Parking,
    ) -> None:
        self._store = store
        self._seats = seats
        self._prefix = prefix
        self._prompter = prompter
        self._snapshots = snapshots
        self._parking = parking
        self._planner = Planner(store, seats, prefix)
        self.n_tokens_reused = 0
        self.seconds = 0.0

    def begin(self, session: Session, conversation: Conversation, holder: object | None) -> Pending:
        """Nothing is touched before the plan is whole. Then the session has a seat, and its row what is reused."""
        started = time.perf_counter()
        seat = self._seats.get(session, holder)
        rendered = self._prompter.rendered(session, conversation, None if seat is None else seat.rendered)
        wants_logits = not conversation.is_empty
        pending = self._start(session, rendered, wants_logits, said_in(session, conversation), holder, started)
        session.forget_appended()
        return pending

    def resume(
        self,
        session: Session,
        parked: Parked,
        holder: object | None,
        *,
        wants_logits: bool,
        but: Sequence[Session] = (),
    ) -> Pending:
        """Begin to bring a parked row back, token for token. It stays parked as well until all of it is there."""
        started = time.perf_counter()
        return self._start(session, Rendered(parked.tokens), wants_logits, (), holder, started, but=but, resumes=True)

    def _start(
        self,
        session: Session,
        rendered: Rendered,
        wants_logits: bool,
        said: Said,
        holder: object | None,
        started: float,
        *,
        but: Sequence[Session] = (),
        resumes: bool = False,
    ) -> Pending:
        but = (session, *but)  # who is not to be parked for it
        seat = self._true_seat(session, holder)
        tokens = rendered.tokens
        match, plan = self._planned(session, seat, tokens, wants_logits, but)
        if seat is None:
            seat = self._seats.take(session)
        n_restored = 0
        try:
            self._snapshots.hold(match)  # or a save could push out what is to be restored
            self._save_what_is_lost(session, seat, plan, said)
            seat.n_begun += 1
            seat.n_prompt, seat.rendered, seat.said = len(tokens), rendered, said
            stretches = self._store.apply(seat.row, plan)
            n_restored = self._restore(seat, plan, match, tokens, stretches)
        finally:
            self._snapshots.let_go(match, plan, n_restored)
        if not resumes:
            self._parking.forget(session)
        session.n_past = n_reused = seat.row.n
        self.n_tokens_reused += n_reused
        pending = Pending(
            session, rendered, seat, seat.n_begun, n_reused, wants_logits, stretches, started, is_return=resumes
        )
        seat.pending = weakref.ref(pending)
        pending.conclude()
        self.seconds += time.perf_counter() - started
        return pending

    def _true_seat(self, session: Session, holder: object | None) -> Seat | None:
        """The session's seat with a row that is true; the prefix is made true with it."""
        if self._prefix.row is not None:
            self._store.reconcile(self._prefix.row)
        seat = self._seats.get(session, holder)
        if seat is not None:
            seat.last_used = time.monotonic()
            self._store.reconcile(seat.row)
        return seat

    def _planned(
        self, session: Session, seat: Seat | None, tokens: TokenArray, wants_logits: bool, but: Sequence[Session]
    ) -> tuple[KvMatch, Plan]:
        """The plan, and what of the cache it counts on. Idle sessions are parked where cells or a slot are short."""
        while True:
            draft = self._draft(session, seat, tokens, wants_logits, but)
            if draft.refused is None:
                row = None if seat is None else seat.row
                if not self._parking.make_way(draft.plan, row, with_slot=seat is None, but=but):
                    return draft.match, draft.plan
            elif not self._seats.reclaim():
                raise draft.refused

    def _draft(
        self, session: Session, seat: Seat | None, tokens: TokenArray, wants_logits: bool, but: Sequence[Session]
    ) -> _Draft:
        """The best plan for which room can be made, or one for which it cannot. Asks only."""
        row = None if seat is None else seat.row
        match = self._snapshots.match(session.namespace, tokens)
        while True:
            cached = self._snapshots.cached(match)
            plan = self._planner.plan(row, session.namespace, tokens, wants_logits=wants_logits, cached=cached)
            try:
                self._parking.who_goes(plan, row, with_slot=seat is None, but=but)
                return _Draft(match, plan)
            except CapacityError as e:
                if plan.restore is None or plan.restore.p0:
                    return _Draft(match, plan, e)
                match = self._snapshots.nothing  # a whole row from the cache needs cells that sharing does not

    def _save_what_is_lost(self, session: Session, seat: Seat, plan: Plan, said: Said) -> None:
        """Before a tail is dropped: unless only the template rewrote it, which it would do again."""
        drops = plan.n_keep < seat.row.n
        moves = seat.row.namespace != session.namespace
        only_grew = said[: len(seat.said)] == seat.said
        if drops and (moves or not only_grew):
            self._snapshots.keep(seat.row)
        if moves:  # never one namespace's tokens under another's name
            self._store.cut(seat.row, 0)
            seat.row.namespace = session.namespace

    def _restore(self, seat: Seat, plan: Plan, match: KvMatch, tokens: TokenArray, stretches: list[Stretch]) -> int:
        """Bring back what the plan takes from the cache; returns how many tokens."""
        restore = plan.restore
        started = time.perf_counter()
        if restore is None:
            return 0
        n = self._snapshots.restore(seat.row, match, tokens, restore.p0, restore.p1)
        restored = time.perf_counter()
        again = plan.reshare
        n_shared = 0 if again is None else self._store.share_again(again, seat.row)
        if again is not None and n_shared:
            stretches.append(Stretch(again.name, 0, n_shared, time.perf_counter() - restored))
        n_more = seat.row.n - max(restore.p0, n_shared)
        if n and n_more > 0:
            stretches.append(Stretch("cache", seat.row.n - n_more, seat.row.n, restored - started))
        return n

    def preview(self, session: Session, conversation: Conversation) -> Preview:
        """What `begin` and its steps would do; changes nothing."""
        seat = self._seats.get(session, reading=True)
        tokens = self._prompter.rendered(session, conversation, None if seat is None else seat.rendered).tokens
        most, n = self._store.caps.n_row_max, len(tokens)
        n_free = max(0, self._store.caps.n_ctx_seq - n)
        if most is not None and n > most:
            return Preview(n_tokens=n, n_to_decode=n, fits=False, n_free=n_free)
        draft = self._draft(session, seat, tokens, not conversation.is_empty, (session,))
        return Preview(n_tokens=n, n_to_decode=draft.plan.n_decode, fits=draft.refused is None, n_free=n_free)
