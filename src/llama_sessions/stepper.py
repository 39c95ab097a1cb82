"""A step: pieces of work of several sessions into one `llama_decode`, and what came of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from .errors import CapacityError, ContextOverflow, DecodeError, LlamaSessionsError, OptionError, StateError
from .kv.plan import Plan
from .kv.row import Row
from .kv.store import Feed, RowStore, no_cells, no_room
from .options import checked_int
from .parking import Parking
from .pending import NextToken, Pending, PromptChunk, Work
from .report import StepReport, StepResult
from .seats import Seat, Seats
from .session import Session
from .types import FloatArray

_ONE_TOKEN = StepResult(1, True)


@dataclass(slots=True)
class _Task(Feed):
    """A piece of work that goes into the batch, and whose it is."""

    work: Work
    seat: Seat


class Stepper:
    """Admits, decodes, books."""

    def __init__(self, store: RowStore, seats: Seats, parking: Parking) -> None:
        self._store = store
        self._seats = seats
        self._parking = parking

    def step(
        self,
        work: tuple[Work, ...],
        holder: object | None,
        read: Callable[[Session, FloatArray], object] | None = None,
    ) -> StepReport:
        """One decode of checked work (maybe none). Where cells are short, idle sessions not in it are parked. `read`
        gets the logits of each that has some now, which are not to be kept."""
        results: dict[Session, StepResult] = {}
        tasks: list[_Task] = []
        for item in work:
            try:
                task = self._task(item, holder)
            except LlamaSessionsError as e:
                results[item.session] = StepResult(0, False, e)
                continue
            tasks.append(task)
        seconds = self._run(tasks, [item.session for item in work], results)
        if read is not None:
            for task in tasks:
                session = task.work.session
                if task.wants_logits and results[session].error is None:
                    read(session, self._store.logits(task.row))
        return StepReport(results, sum([r.n_decoded for r in results.values()]), seconds)

    def step_one(self, item: Work, holder: object | None, but: Sequence[Session] = ()) -> Row:
        """The same with one piece of work; raises its error. Returns the row that it went into. `but`: who else is not
        to be parked for it."""
        task, session = self._task(item, holder), item.session
        results: dict[Session, StepResult] = {}
        self._run([task], [session, *but], results)
        error = results[session].error
        if error is not None:
            raise error
        return task.row

    def _run(self, tasks: list[_Task], sessions: list[Session], results: dict[Session, StepResult]) -> float:
        """Decode what there are cells for, without parking any of `sessions`; fills in `results`. The seconds of it."""
        store = self._store
        free = store.n_free_cells()
        n_tokens = 0
        for task in tasks:
            n_tokens += len(task.tokens)
        if free is not None and n_tokens > free:
            tasks = self._with_cells(tasks, sessions, results)
        started = time.perf_counter()
        code = store.decode(tasks, partial(self._parking.park_one, sessions)) if tasks else 0
        seconds = time.perf_counter() - started
        for task in tasks:
            results[task.work.session] = self._settle(task, code, seconds)
        return seconds

    def _with_cells(
        self, tasks: list[_Task], sessions: list[Session], results: dict[Session, StepResult]
    ) -> list[_Task]:
        """The tasks, in their order, for which cells can be had; others than `sessions` are parked for them."""
        admitted: list[_Task] = []
        n_admitted = 0
        for task in tasks:
            n = len(task.tokens)
            try:
                self._parking.make_way(Plan(n_admitted + n, 0), but=sessions)
                n_admitted += n
                admitted.append(task)
            except CapacityError as e:
                error = no_cells(n, e.available - n_admitted, self._store.caps)
                results[task.work.session] = StepResult(0, False, error)
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
                sessions.add(item.session)
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

    def _task(self, item: Work, holder: object | None) -> _Task:
        """The tokens that go in for one session; raises what keeps them out."""
        session = item.session
        seat = self._seats.get(session, holder)
        if seat is None:
            raise StateError("the session has no row; call prepare first")
        row = seat.row
        if row.suspect is not None:
            self._store.reconcile(row)
        session.n_past = row.n
        if isinstance(item, PromptChunk):
            pending = item.pending
            if pending.seat is not seat or pending.is_void:
                raise StateError("this Pending is void: the session was begun again")
            tokens = pending.tokens[row.n : row.n + item.n_tokens]
            if not len(tokens):
                raise StateError("this Pending is done; nothing is left to decode")
            return _Task(row, tokens, pending.wants_logits and len(tokens) == pending.n_left, item, seat)
        if not row.n:
            raise StateError("nothing is prepared; call prepare first")
        if row.n < seat.prompt.n_tokens:
            raise StateError(
                f"only {row.n} of the prompt's {seat.prompt.n_tokens} tokens are decoded; call prepare first"
            )
        room = self._store.n_room(row)
        if room is not None and room < 1:
            remedy = "let make_room take older ones out of the row, or raise n_ctx"
            raise ContextOverflow("one token more", needed=row.n + 1, available=row.n, remedy=remedy)
        return _Task(row, (item.token,), True, item, seat)

    def _settle(self, task: _Task, code: int, seconds: float) -> StepResult:
        """Book what a decode did for one session."""
        item = task.work
        session = item.session
        session.n_past = task.row.n
        task.seat.last_used = time.monotonic()  # a decode may take longer than a session may be idle
        if code == 1:
            return StepResult(0, False, no_room(len(task.tokens), self._store.n_free_cells(), self._store.caps))
        if code != 0:
            message = "the row keeps what was decoded; prepare again"
            return StepResult(0, False, DecodeError("llama_decode", code, message, self._store.context.last_error))
        if isinstance(item, NextToken):
            session.note_appended(item.token, self._store.caps.fingerprint)
            return _ONE_TOKEN
        item.pending.decode_seconds += seconds
        return StepResult(len(task.tokens), item.pending.conclude())
