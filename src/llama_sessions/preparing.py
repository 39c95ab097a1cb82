"""From a session to a `Pending`: rendered, planned, cut, shared and restored; what is left to decode is for steps."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from .errors import CapacityError, SnapshotError
from .evicting import Asking, Evictor, Kept
from .kv.alignment import size_of
from .kv.holes import Cut
from .kv.plan import Plan, first_restored
from .kv.prefix import Prefix
from .kv.row import Row, common_prefix
from .kv.snapshot import Snapshots
from .kv.store import RowStore
from .layout import Layout
from .parking import Parked, Parking
from .pending import Pending
from .planner import Planner, check_length
from .prompts import Prompter, Said, said_in
from .render import Rendered
from .report import Preview, Stretch
from .seats import Prompt, Seat, Seats
from .session import Session
from .types import TokenArray

if TYPE_CHECKING:
    from .kv.cache import KvMatch


@dataclass(frozen=True, slots=True, eq=False)
class _Draft:
    """A plan, and the `match` in the cache that it counts on. `refused`: why there is no room for it."""

    match: KvMatch
    plan: Plan
    refused: CapacityError | None = None


@dataclass(frozen=True, slots=True, eq=False)
class _Wanted:
    """What a session's row is to hold. `but`: sessions that are not to be parked for it. `anew`: nothing approximate is
    to be left."""

    session: Session
    tokens: TokenArray
    has_logits: bool
    but: Sequence[Session]
    anew: bool = False
    headroom: int = 0


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
        evictor: Evictor,
    ) -> None:
        self._store = store
        self._seats = seats
        self._prefix = prefix
        self._prompter = prompter
        self._snapshots = snapshots
        self._parking = parking
        self._evictor = evictor
        self._planner = Planner(store, seats, prefix)
        self.n_tokens_reused = 0
        self.seconds = 0.0

    def begin(self, session: Session, asking: Asking, holder: object | None) -> Pending | Asking:
        """Nothing is touched before the plan is whole. Then the session has a seat, and its row what is reused.

        What is too long comes back as what is to be asked next, once the messages that go have been reported.
        """
        started = time.perf_counter()
        seat = self._true_seat(session, holder)
        if seat is None:
            seat = self._returned(session)
        row, prompt = (None, Prompt()) if seat is None else (seat.row, seat.prompt)
        conversation = asking.conversation
        rendered, layout, asking, narrowed = self._laid_out(session, asking, row, prompt)
        if narrowed is not None:
            return narrowed
        tokens = layout.alignment.tokens
        check_length(self._store, len(tokens), "the conversation")
        self._evictor.say_if_untrained(len(tokens))
        if asking.n_evicted and row is not None and row.n:
            self._evictor.say_if_uncut(row)
        if asking.kept is not None and row is not None and not self._cut_out(session, row, asking.kept, len(tokens)):
            # It cannot be cut as it was to be: what stays is decoded anew.
            return self.begin(session, replace(asking, anew=True, expected=None, kept=None), holder)
        bent = None if layout.alignment.is_straight else layout
        asking = replace(asking, n_evicted=self._evictor.n_evicted(asking, prompt.layout))
        prompt = Prompt(len(tokens), rendered, said_in(session, conversation), conversation, bent)
        pending = self._start(self._wanted(session, tokens, asking), prompt, holder, started, asking=asking)
        if asking.window is not session.window_state:
            session.set_window(asking.window)
        self._evictor.count(asking.n_evicted)
        session.forget_appended()
        return pending

    def _returned(self, session: Session) -> Seat | None:
        """The seat of a session that was parked with a row that nobody can compute again."""
        parked = self._returning(session)
        return None if parked is None else self._restored(session, parked, but=(session,))

    def _returning(self, session: Session) -> Parked | None:
        """What of a parked session comes back as it was; None where it does not, or was not parked."""
        parked = self._parking.get(session)
        can = parked is not None and self._parking.can_return(session, parked, but=(session,))
        return parked if can else None

    def _restored(self, session: Session, parked: Parked, but: Sequence[Session]) -> Seat:
        """The same, with the cells of the system prompt in common once more."""
        started = time.perf_counter()
        seat = self._parking.restore(session, parked, but=but)
        row, restored = seat.row, time.perf_counter()
        again = self._planner.of_prefix(row)
        n = 0 if again is None else self._store.share_again(again, row)
        if row.n:
            prefix = Stretch("prefix", 0, n, time.perf_counter() - restored)
            seat.back = (*([prefix] if n else []), Stretch("cache", n, row.n, restored - started))
        return seat

    def _told(self, seat: Seat, stretches: list[Stretch]) -> list[Stretch]:
        """The stretches of a plan, in which a row that was brought back just now is not one that was there."""
        back, seat.back = seat.back, ()
        if not back or not stretches or stretches[0].source != "row" or stretches[0].p1 > back[-1].p1:
            return stretches
        n = stretches[0].p1
        told = [replace(s, p1=min(s.p1, n)) for s in back if s.p0 < n]
        self._snapshots.count_hits(sum(s.p1 - s.p0 for s in told if s.source == "cache"))
        return [*told, *stretches[1:]]

    def _foreseen(self, parked: Parked) -> Row:
        """The row that `_restored` will give back."""
        row = parked.as_row()
        again = self._planner.of_prefix(row)
        if again is None or not self._store.may_share_again(again, first_restored(row.end, self._store.caps)):
            return row
        return parked.as_row(self._store.rows[again.seq_id].cells[: again.p1])

    def _cut_out(self, session: Session, row: Row, kept: Kept, n_tokens: int) -> bool:
        """Bring the row to what is kept of it, if that can be, with cells for the `n_tokens` that it is to have."""
        n_more = n_tokens - kept.n_left(row)
        self._snapshots.keep(row)
        self._store.cut(row, kept.n_of(row))
        holes = kept.holes(row)
        return bool(holes) and self._evictor.cut_out(row, holes, n_more, self._way_for(session, row))

    def _way_for(self, session: Session, row: Row) -> Callable[[Cut], object]:
        return lambda cut: self._parking.make_way(cut, row, but=(session,))

    def make_room(self, session: Session, seat: Seat, n_needed: int, n_sink: int) -> int:
        """Take tokens out of the middle of a row, and the messages they were out of the window; how many went."""
        row, prompt = seat.row, seat.prompt
        self._store.reconcile(row)
        n = session.n_past = row.n
        if not n or n < prompt.n_tokens or row.namespace != session.namespace or not self._evictor.ways(row):
            return 0
        ranges, layout, gone = self._evictor.room_in(session, seat, n_needed, n_sink)
        if not ranges:
            return 0
        n_gone = size_of(ranges)
        self._snapshots.keep(row)
        done = self._evictor.cut_out(row, ranges, 0, self._way_for(session, row))
        if row.n == n:
            return 0
        session.n_past = row.n
        if not done:
            raise SnapshotError("make_room", 0, f"the row was cut to {row.n} of {n} tokens; prepare again")
        leaving = [m for i in gone if (m := layout.parts[i].message) is not None]
        layout = layout.without(ranges, gone)
        seat.prompt = replace(prompt, n_tokens=layout.reply[0], layout=layout)
        session.set_window(session.window_state.without(session.messages, leaving, reported=False))
        self._evictor.count(n_gone)
        return n_gone

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
        but = (session, *but)
        if self._seats.get(session, holder) is None and parked.owner is not None:
            self._restored(session, parked, but)
        is_back = partial(self._is_back, session, parked.prompt)
        wanted = _Wanted(session, parked.tokens, wants_logits, but)
        return self._start(wanted, parked.prompt, holder, started, on_return=is_back)

    def begin_again(self, session: Session, tokens: TokenArray, holder: object | None) -> Pending:
        """Begin to make a row hold what it was to hold, with fresh logits."""
        seat = self._seats.get(session, holder)
        prompt = Prompt() if seat is None else seat.prompt
        is_back, started = partial(self._is_back, session, prompt), time.perf_counter()
        return self._start(_Wanted(session, tokens, True, (session,)), prompt, holder, started, on_return=is_back)

    def _is_back(self, session: Session, prompt: Prompt) -> None:
        """All of a row that returns is there."""
        seat = self._seats.get(session, reading=True)
        if seat is not None:
            seat.prompt = prompt
        self._parking.forget(session)

    @staticmethod
    def _wanted(session: Session, tokens: TokenArray, asking: Asking) -> _Wanted:
        has_logits = not asking.conversation.is_empty
        return _Wanted(session, tokens, has_logits, (session,), asking.anew, asking.headroom)

    def _start(
        self,
        wanted: _Wanted,
        prompt: Prompt,
        holder: object | None,
        started: float,
        *,
        asking: Asking | None = None,
        on_return: Callable[[], None] | None = None,
    ) -> Pending:
        """Without `asking` a row returns, and `on_return` is called when it is there: a parked one stays parked as well
        until then."""
        session, tokens = wanted.session, wanted.tokens
        seat = self._true_seat(session, holder)
        match, plan = self._planned(seat, wanted)
        if seat is None:
            seat = self._seats.take(session)
        n_restored = 0
        try:
            self._snapshots.hold(match)  # or a save could push out what is to be restored
            self._save_what_is_lost(session, seat, plan, prompt.said)
            seat.n_begun += 1
            seat.prompt = replace(prompt, n_tokens=len(tokens))
            stretches = self._told(seat, self._store.apply(seat.row, plan))
            n_restored = self._restore(seat, plan, match, tokens, stretches)
        finally:
            self._snapshots.let_go(match, n_restored, len(tokens) - seat.row.n)
        if asking is not None:
            self._parking.forget(session)
        session.n_past = n_reused = seat.row.n
        self.n_tokens_reused += n_reused
        rendered = prompt.rendered or Rendered(tokens)
        pending = Pending(session, tokens, rendered, seat, seat.n_begun, n_reused, wanted.has_logits, stretches)
        pending.started, pending.on_return = started, on_return
        if asking is not None:
            pending.n_evicted, pending.dropped = asking.n_evicted, asking.dropped
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

    def _planned(self, seat: Seat | None, wanted: _Wanted) -> tuple[KvMatch, Plan]:
        """The plan, and what of the cache it counts on. Idle sessions are parked where cells or a slot are short."""
        while True:
            draft = self._draft(seat, wanted)
            if draft.refused is None:
                row = None if seat is None else seat.row
                if not self._parking.make_way(draft.plan, row, with_slot=seat is None, but=wanted.but):
                    return draft.match, draft.plan
            elif not self._seats.reclaim():
                raise draft.refused

    def _draft(self, seat: Seat | None, wanted: _Wanted) -> _Draft:
        """The best plan for which room can be made, or one for which it cannot. Asks only."""
        row, namespace = None if seat is None else seat.row, wanted.session.namespace
        match = self._snapshots.match(namespace, wanted.tokens)
        while True:
            plan = self._planner.plan(
                row, namespace, wanted.tokens, wants_logits=wanted.has_logits, cached=self._snapshots.cached(match),
                exactly=wanted.anew, headroom=wanted.headroom,
            )  # fmt: skip
            try:
                self._parking.who_goes(plan, row, with_slot=seat is None, but=wanted.but)
                return _Draft(match, plan)
            except CapacityError as e:
                if plan.restore is None or plan.restore.p0:
                    return _Draft(match, plan, e)
                match = self._snapshots.nothing  # a whole row from the cache needs cells that sharing does not

    def _save_what_is_lost(self, session: Session, seat: Seat, plan: Plan, said: Said) -> None:
        """Before a tail is dropped: unless only the template rewrote it, which it would do again."""
        drops = plan.n_keep < seat.row.n
        moves = seat.row.namespace != session.namespace
        only_grew = said[: len(seat.prompt.said)] == seat.prompt.said
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

    def _laid_out(
        self, session: Session, asking: Asking, row: Row | None, prompt: Prompt
    ) -> tuple[Rendered, Layout, Asking, Asking | None]:
        """The prompt, how the row will lie in it, what is asked for with that; last, where it is too long and something
        can go, what is to be asked next."""
        rendered = self._prompter.rendered(session, asking.conversation, prompt.rendered)
        layout, asking = self._evictor.layout(session, asking, rendered, row, prompt)
        narrowed = self._evictor.narrowed(
            session, asking, rendered, layout, row, lambda cut: self._parking.who_goes(cut, row, but=(session,))
        )
        return rendered, layout, asking, narrowed

    def preview(self, session: Session, asking: Asking) -> Preview | Asking:
        """What `begin` and its steps would do; changes nothing. What is too long comes back as what is to be asked
        next."""
        seat = self._seats.get(session, reading=True)
        row, prompt = (None, Prompt()) if seat is None else (seat.row, seat.prompt)
        parked = self._returning(session) if seat is None else None
        if parked is not None:
            row, prompt = self._foreseen(parked), parked.prompt
        _, layout, asking, narrowed = self._laid_out(session, asking, row, prompt)
        if narrowed is not None:
            return narrowed
        n_evicted = asking.n_evicted
        n_left = 0 if asking.kept is None or row is None else asking.kept.n_left(row)
        tokens = layout.alignment.tokens
        most, n = self._store.caps.n_row_max, len(tokens)
        n_free = max(0, self._store.caps.n_ctx_seq - n)
        if most is not None and n > most:
            return Preview(n_tokens=n, n_to_decode=n, fits=False, n_free=n_free, n_evicted=n_evicted)
        wanted = self._wanted(session, tokens, asking)
        draft = self._draft(seat, wanted)
        fits = draft.refused is None or n_left > 0
        if seat is None and row is not None and not n_left:
            n_left = min(common_prefix(row.tokens, tokens), n - wanted.has_logits)
        return Preview(
            n_tokens=n,
            n_to_decode=min(draft.plan.n_decode, n - n_left),
            fits=fits,
            n_free=n_free,
            n_evicted=n_evicted,
        )
