"""A step: pieces of work of several sessions into one `llama_decode`, and what came of each."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from .errors import CapacityError, DecodeError, LlamaSessionsError, OptionError, StateError
from .kv.plan import Plan
from .kv.store import Feed, RowStore, no_cells, no_room
from .options import checked_int
from .parking import Parking
from .pending import NextToken, Pending, PromptChunk, Work
from .planner import check_length
from .report import StepReport, StepResult
from .seats import Seats
from .session import Session

_ONE_TOKEN = StepResult(1, True)


@dataclass(slots=True)
class _Task:
    """A piece of work that goes into the batch."""

    work: Work
    session: Session
    feed: Feed


class Stepper:
    """Admits, decodes, books."""

    def __init__(self, store: RowStore, seats: Seats, parking: Parking) -> None:
        self._store = store
        self._seats = seats
        self._parking = parking

    def step(self, work: tuple[Work, ...], holder: object | None) -> StepReport:
        """One decode of checked work (maybe none). Where cells are short, idle sessions not in it are parked."""
        store = self._store
        results: dict[Session, StepResult] = {}
        tasks: list[_Task] = []
        n_tokens = 0
        sessions = [item.pending.session if isinstance(item, PromptChunk) else item.session for item in work]
        for item, session in zip(work, sessions, strict=True):
            try:
                feed = self._feed(item, session, holder)
            except LlamaSessionsError as e:
                results[session] = StepResult(0, False, e)
                continue
            tasks.append(_Task(item, session, feed))
            n_tokens += len(feed.tokens)
        free = store.n_free_cells()
        if free is not None and n_tokens > free:
            tasks = self._with_cells(tasks, sessions, results)
        started = time.perf_counter()
        park_one = partial(self._parking.park_one, sessions)
        code = store.decode([task.feed for task in tasks], park_one) if tasks else 0
        seconds = time.perf_counter() - started
        for task in tasks:
            results[task.session] = self._settle(task, code, seconds)
        return StepReport(results, sum([r.n_decoded for r in results.values()]), seconds)

    def _with_cells(
        self, tasks: list[_Task], sessions: list[Session], results: dict[Session, StepResult]
    ) -> list[_Task]:
        """The tasks, in their order, for which cells can be had; others than `sessions` are parked for them."""
        admitted: list[_Task] = []
        n_admitted = 0
        for task in tasks:
            n = len(task.feed.tokens)
            try:
                self._parking.make_way(Plan(n_admitted + n, 0), but=sessions)
                n_admitted += n
                admitted.append(task)
            except CapacityError as e:
                error = no_cells(n, e.available - n_admitted, self._store.caps)
                results[task.session] = StepResult(0, False, error)
        return admitted

    def checked(self, work: Iterable[Work]) -> tuple[Work, ...]:
        """The pieces of work; OptionError for work that is none."""
        try:
            work = tuple(work)
        except TypeError:
            raise OptionError(f"a step takes a list of PromptChunk and NextToken, not {work!r}") from None
        if not work:
            raise OptionError("a step needs at least one piece of work")
        n_tokens, sessions = 0, set()
        for item in work:
            if isinstance(item, PromptChunk) and isinstance(item.pending, Pending):
                n_tokens += min(checked_int("n_tokens", item.n_tokens, 1), item.pending.n_left)
                sessions.add(item.pending.session)
            elif isinstance(item, NextToken) and isinstance(item.session, Session):
                checked_int("token", item.token, 0, self._store.caps.n_vocab - 1)
                n_tokens += 1
                sessions.add(item.session)
            else:
                raise OptionError(f"a step takes PromptChunk and NextToken, not {item!r}")
        if len(sessions) < len(work):
            raise OptionError("a session may be in a step only once")
        if n_tokens > self._store.caps.n_batch:
            raise OptionError(f"{n_tokens} tokens are more than n_batch={self._store.caps.n_batch} takes in one step")
        return work

    def _feed(self, item: Work, session: Session, holder: object | None) -> Feed:
        """The tokens that go in for one session; raises what keeps them out."""
        seat = self._seats.get(session, holder)
        if seat is None:
            raise StateError("the session has no row; call prepare first")
        row = seat.row
        self._store.reconcile(row)
        session.n_past = row.n
        if isinstance(item, PromptChunk):
            pending = item.pending
            if pending.seat is not seat or pending.is_void:
                raise StateError("this Pending is void: the session was begun again")
            tokens = pending.tokens[row.n : row.n + item.n_tokens]
            if not len(tokens):
                raise StateError("this Pending is done; nothing is left to decode")
            return Feed(row, tokens, wants_logits=pending.wants_logits and len(tokens) == pending.n_left)
        if not row.n:
            raise StateError("nothing is prepared; call prepare first")
        if row.n < seat.n_prompt:
            raise StateError(f"only {row.n} of the prompt's {seat.n_prompt} tokens are decoded; call prepare first")
        check_length(self._store, row.n + 1, "one token more")
        return Feed(row, (item.token,), wants_logits=True)

    def _settle(self, task: _Task, code: int, seconds: float) -> StepResult:
        """Book what a decode did for one session."""
        session, feed, item = task.session, task.feed, task.work
        session.n_past = feed.row.n
        seat = self._seats.get(session, reading=True)
        if seat is not None:
            seat.last_used = time.monotonic()  # a decode may take longer than a session may be idle
        if code == 1:
            return StepResult(0, False, no_room(len(feed.tokens), self._store.n_free_cells(), self._store.caps))
        if code != 0:
            message = "the row keeps what was decoded; prepare again"
            return StepResult(0, False, DecodeError("llama_decode", code, message, self._store.context.last_error))
        if isinstance(item, NextToken):
            session.note_appended(item.token, self._store.caps.fingerprint)
            return _ONE_TOKEN
        item.pending.decode_seconds += seconds
        if item.pending.done:
            session.last_prepare = item.pending.report()
        return StepResult(len(feed.tokens), item.pending.done)
