"""`Pool`: many sessions answered at once, each step one `llama_decode` for all of them.

A step takes the next token of everybody who talks and fills up with prompts that wait, as much as their share of its
time allows. Who comes later joins at the next step, who is finished leaves at once.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

from .errors import (
    Cancelled,
    CapacityError,
    ContextOverflow,
    DecodeError,
    OptionError,
    QueueFull,
    StateError,
)
from .generation import Generation
from .generation_options import GenerationOptions
from .kv.row import common_prefix
from .manager import ContextManager
from .options import checked_float, checked_int
from .pace import Pace
from .pending import NextToken, PromptChunk, Work
from .pool_stats import PoolStats, Tally, prometheus
from .report import StepResult
from .session import Session, check_session
from .ticket import Ticket

_STEM = 16  # tokens of a common stem from which on it is worth waiting for whoever decodes it
_PATIENCE = 8  # times that others may go first


class Pool:
    """Answers many sessions together. `submit` from any thread; then `run`, or `step` in a loop of your own, or
    `with Pool(cm) as pool:`, where a worker thread of the pool drives it.

    `prefill_share`: of a step's time while others talk; 0.5 at most doubles the time between two tokens, with 1.0
    newcomers come first. `max_waiting`: how many may wait to be admitted.
    """

    def __init__(self, cm: ContextManager, *, prefill_share: float = 0.5, max_waiting: int = 1024) -> None:
        if not isinstance(cm, ContextManager):
            raise OptionError(f"Pool takes a ContextManager, not {cm!r}")
        share = checked_float("prefill_share", prefill_share, 0.0, 1.0)
        if not share:
            raise OptionError("prefill_share must be above 0, or nobody ever joins")
        self.cm = cm
        self._limit = checked_int("max_waiting", max_waiting, 1)
        self._pace = Pace(share)
        self._tally = Tally(cm.capabilities.n_batch)
        self._stepping = threading.Lock()
        self._news = threading.Condition()
        self._waiting: list[Ticket] = []
        self._running: list[Ticket] = []  # in the order in which they were admitted
        self._paused: list[Ticket] = []  # gave way; the oldest first
        self._by_session: dict[Session, Ticket] = {}
        self._may_admit = True  # something changed since the last one that could not be
        self._closed = False
        self._drains = False
        self._worker: threading.Thread | None = None

    # -- asking for replies

    def submit(
        self,
        session: Session,
        text: str | None = None,
        *,
        priority: int = 0,
        wait_s: float | None = None,
        **options: Any,
    ) -> Ticket:
        """Ask for a reply; options as of `Engine.chat`. A higher `priority` is admitted first, otherwise whoever came
        first; nobody is passed over for ever.

        Raises QueueFull where `max_waiting` wait already (after `wait_s` seconds, if given), StateError for a session
        that is generating or was submitted already, OptionError, TemplateError.
        """
        checked = GenerationOptions.build(options)
        check_session(session)
        checked_int("priority", priority, -(2**31), 2**31 - 1)
        generation = Generation(self.cm, session, text, checked, holder=self)
        self._wait_for_place(wait_s)
        with self._news:
            self._check_open()
            if session in self._by_session:
                raise StateError("the session is in the pool already; wait for its reply, or cancel it")
            if len(self._waiting) >= self._limit:
                raise QueueFull(len(self._waiting), self._limit)
            self.cm.hold(session, self)
            ticket = Ticket(self, generation, priority, checked.timeout_s)
            self._by_session[session] = ticket
            self._waiting.append(ticket)
            self._may_admit = True
            self._news.notify_all()
        return ticket

    def _wait_for_place(self, wait_s: float | None) -> None:
        """Until there is a place in the queue; QueueFull after `wait_s` seconds."""
        if wait_s is None:
            return
        until = time.monotonic() + checked_float("wait_s", wait_s, 0.0)
        while len(self._waiting) >= self._limit and not self._closed:
            left = until - time.monotonic()
            if left <= 0:
                raise QueueFull(len(self._waiting), self._limit)
            if self._worker is None:
                self.step()
            else:
                with self._news:
                    self._news.wait(min(left, 0.05))

    # -- driving it

    def run(self) -> None:
        """Step until everybody has a reply (or an error, which their ticket has)."""
        self._check_not_driven()
        while self.step():
            pass

    def step(self) -> bool:
        """One step for everybody; False where nothing is left to do.

        What goes wrong for one session is its ticket's; only what concerns all of them is raised.
        """
        self._check_open()
        with self._stepping:
            started = time.perf_counter()
            decoded = self._tally.step_seconds
            self._end_what_is_asked_to()
            self._admit()
            work = self._packed()
            if work:
                self._decode(work)
                self._sample()
            elif not self._running:
                self._fail_whoever_never_fits()
            self._tally.own_seconds += time.perf_counter() - started - (self._tally.step_seconds - decoded)
            return bool(self._waiting or self._running or self._paused)

    def _check_not_driven(self) -> None:
        if self._worker is not None and threading.current_thread() is not self._worker:
            raise StateError("the pool's worker drives it; wait for a ticket's result instead")

    def wait_for(self, ticket: Ticket, timeout: float | None) -> None:
        """Until a ticket has something new, or for `timeout` seconds; without a worker by a step of one's own."""
        if self._worker is None:
            self.step()
        else:
            ticket.wait(timeout)

    def wake(self) -> None:
        """There is something to look at."""
        with self._news:
            self._news.notify_all()

    # -- a step

    def _end_what_is_asked_to(self) -> None:
        for ticket in [*self._waiting, *self._running, *self._paused]:
            why = "cancelled" if ticket.is_cancelled else "timeout" if ticket.is_late else None
            if why is not None:
                self._finish(ticket, why)

    def _finish(self, ticket: Ticket, why: str) -> None:
        try:
            ticket.put(ticket.generation.cut_short(why))
        except Exception as e:
            self._end(ticket, e)
            return
        self._end(ticket)

    def _end(self, ticket: Ticket, error: BaseException | None = None) -> None:
        """It is over, with a reply or an error; the others do not notice."""
        if error is not None:
            ticket.generation.fail()
            self._tally.n_failed += 1
        elif ticket.is_cancelled:
            self._tally.n_cancelled += 1
        else:
            self._tally.n_done += 1
        with self._news:
            for tickets in (self._waiting, self._running, self._paused):
                if ticket in tickets:
                    tickets.remove(ticket)
            self._by_session.pop(ticket.session, None)
            self._may_admit = True
            self._news.notify_all()
        self.cm.let_go(ticket.session, self)
        ticket.end("done" if error is None else "failed", error)

    def _admit(self) -> None:
        """Bring back who gave way, then admit who waits, as long as there is room for what is needed now."""
        while self._may_admit and (self._paused or self._waiting):
            ticket = self._paused[0] if self._paused else self._next_in_line()
            try:
                if ticket.state == "paused":
                    ticket.generation.come_back()
                elif not ticket.generation.start(ticket.seconds, may_wait=True):
                    self._may_admit = self._park_who_waits(ticket)
                    continue
            except CapacityError as e:
                if ticket.state != "paused" or isinstance(e, ContextOverflow):
                    self._end(ticket, e)
                else:
                    self._may_admit = self._park_who_waits(ticket)
                continue
            except Exception as e:
                self._end(ticket, e)
                continue
            with self._news:
                (self._paused if ticket.state == "paused" else self._waiting).remove(ticket)
                self._running.append(ticket)
                ticket.state = "prompt"
            self._share_stem(ticket)

    def _park_who_waits(self, but: Ticket) -> bool:
        """Park the row of a session that waits, too, the last in line; whether there was one."""
        return any(self.cm.park(t.session, holder=self) for t in reversed(self._waiting) if t is not but)

    def _next_in_line(self) -> Ticket:
        """Who is admitted next: the highest priority, then who came first; but nobody is passed over for ever."""
        first = max(self._waiting, key=lambda t: (t.n_passed_over >= _PATIENCE, t.priority, -t.submitted))
        for ticket in self._waiting:
            if ticket.submitted < first.submitted:
                ticket.n_passed_over += 1
        return first

    def _share_stem(self, ticket: Ticket) -> None:
        """Let it wait for whoever is decoding a stem that both begin with."""
        mine = ticket.generation.pending
        if mine is None or self.cm.capabilities.keeps_state:
            return
        for other in self._running:
            theirs = other.generation.pending
            if other is ticket or theirs is None or other.session.namespace != ticket.session.namespace:
                continue
            n = min(common_prefix(mine.tokens, theirs.tokens), mine.n_tokens - 1)
            if n - mine.row.n >= _STEM and theirs.row.n < n:
                ticket.waits_for = (other, n)
                return

    def _still_waits(self, ticket: Ticket) -> bool:
        """Whether the stem it is to share is still being decoded; if not, its prompt is planned anew."""
        if ticket.waits_for is None:
            return False
        other, n = ticket.waits_for
        theirs = other.generation.pending
        if theirs is not None and other in self._running and theirs.row.n < n:
            return True
        ticket.waits_for = None
        ticket.generation.begin_prompt()
        return False

    def _packed(self) -> list[tuple[Ticket, Work]]:
        """The next token of everybody who talks, then prompts, the oldest first."""
        alone = next((t for t in self._running if t.goes_alone), None)
        tickets = list(self._running) if alone is None else [alone]
        left = self.cm.capabilities.n_batch
        packed: list[tuple[Ticket, Work]] = []
        prompts: list[Ticket] = []
        for ticket in tickets:
            try:
                if ticket.generation.pending is not None:
                    if alone is not None or not self._still_waits(ticket):
                        prompts.append(ticket)
                    continue
                item = ticket.generation.work(1)
            except Exception as e:
                self._end(ticket, e)
                continue
            if item is not None and left:
                packed.append((ticket, item))
                left -= 1
        left = self._pace.n_prompt(len(packed), left)
        for ticket in prompts:
            pending = ticket.generation.pending
            if pending is None or not left:
                continue
            try:
                self.cm.ask_progress(pending)
                item = ticket.generation.work(left)
            except Cancelled:
                self._finish(ticket, "cancelled")
                continue
            except Exception as e:
                self._end(ticket, e)
                continue
            if item is not None:
                packed.append((ticket, item))
                left -= min(left, pending.n_left)
        return packed

    def _decode(self, packed: list[tuple[Ticket, Work]]) -> None:
        report = self.cm.step([item for _, item in packed], holder=self)
        n_next = sum(isinstance(item, NextToken) for _, item in packed)
        n_prompt = sum(report.results[t.session].n_decoded for t, i in packed if isinstance(i, PromptChunk))
        self._tally.note_step(n_next, n_prompt, report.seconds)
        errors = [(t, i, r) for t, i in packed if (r := report.results[t.session]).error is not None]
        if not errors:
            self._pace.note(n_next, n_prompt, report.seconds)
            for ticket, _ in packed:
                ticket.goes_alone = False
            return
        short = False
        for ticket, item, result in errors:
            short = self._settle(ticket, item, result, is_alone=len(packed) == 1) or short
        if short:
            self._give_way()

    def _settle(self, ticket: Ticket, item: Work, result: StepResult, *, is_alone: bool) -> bool:
        """What an error of a step means for one of them; whether somebody has to give way for it."""
        error = result.error
        if isinstance(error, CapacityError) and not isinstance(error, ContextOverflow):
            return True
        if not isinstance(error, DecodeError) or ticket.goes_alone or is_alone:
            self._end(ticket, error)
            return False
        # The batch failed as a whole. Everybody in it goes on alone from what its row truly holds: whose fault it was
        # shows then.
        ticket.goes_alone = True
        try:
            if error.code > 1 or error.code < -1:  # some of it may have been done
                ticket.generation.begin_again()
        except Exception as e:
            self._end(ticket, e)
        return False

    def _give_way(self) -> None:
        """Cells ran out: the youngest of those who run gives up its row, to go on later; one alone its own past."""
        if not self._running:
            return
        ticket = min(self._running, key=lambda t: (t.priority, -self._running.index(t)))
        try:
            if len(self._running) == 1:
                if not ticket.generation.gives_way():
                    free = self.cm.stats()
                    n_total = free.n_cells_total or 0
                    raise CapacityError(
                        f"{free.n_cells_unique} of {n_total} cells are held, by sessions outside of the pool too; "
                        "release a session or raise n_ctx",
                        needed=1,
                        available=n_total - free.n_cells_unique,
                        unit="cells",
                    )
                return
            ticket.generation.give_up_row()
        except Exception as e:
            self._end(ticket, e)
            return
        self._tally.n_preemptions += 1
        with self._news:
            self._running.remove(ticket)
            ticket.state, ticket.waits_for, ticket.goes_alone = "paused", None, False
            self._paused.append(ticket)
            self._paused.sort(key=lambda t: t.submitted)
            self._may_admit = False  # or it would take back at once what it gave

    def _sample(self) -> None:
        """A token for everybody whose logits are ready."""
        for ticket in list(self._running):
            generation = ticket.generation
            try:
                if generation.pending is not None or generation.work(1) is not None:
                    continue
                token = self.cm.read_logits(ticket.session, generation.choose, holder=self)
                chunks = generation.chunks(token)
            except BaseException as e:
                self._end(ticket, e)
                if not isinstance(e, Exception):
                    raise
                continue
            ticket.state = "running"
            ticket.last_token_at = self._tally.note_token(ticket.submitted, ticket.last_token_at)
            ticket.put(chunks)
            if generation.reply is not None:
                self._end(ticket)

    def _fail_whoever_never_fits(self) -> None:
        """Nobody runs and nobody could be admitted: what is missing is held by sessions outside of the pool."""
        if self._may_admit or not (self._paused or self._waiting):
            return
        ticket = self._paused[0] if self._paused else self._next_in_line()
        self._may_admit = True
        try:
            if ticket.state == "paused":
                ticket.generation.come_back()
            else:
                ticket.generation.start(ticket.seconds)
        except Exception as e:
            self._end(ticket, e)
            return
        with self._news:
            (self._paused if ticket.state == "paused" else self._waiting).remove(ticket)
            self._running.append(ticket)
            ticket.state = "prompt"

    # -- the worker

    def __enter__(self) -> Pool:
        self._check_open()
        if self._worker is None:
            self._worker = threading.Thread(target=self._work, name="llama-sessions-pool", daemon=True)
            self._worker.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close(drain=kind is None)

    def _work(self) -> None:
        while True:
            with self._news:
                while not (self._waiting or self._running or self._paused or self._closed or self._drains):
                    self._news.wait()
                if self._closed or (self._drains and not (self._waiting or self._running or self._paused)):
                    return
            try:
                self.step()
            except BaseException as e:
                self._fail_all(e)
                return

    def _fail_all(self, error: BaseException) -> None:
        """What concerns all of them: the manager is closed, say. Everybody keeps what was said."""
        self._closed = True
        for ticket in [*self._running, *self._paused, *self._waiting]:
            self._end(ticket, error)

    def close(self, *, drain: bool = False) -> None:
        """End what is under way with what was said so far, or, with `drain`, wait for it; then `submit` is refused.
        Again: nothing. Sessions keep their rows and what was said."""
        with self._news:
            self._drains = True
            if not drain:
                self._closed = True
            self._news.notify_all()
        worker = self._worker
        if worker is not None and worker is not threading.current_thread():
            worker.join()
        elif drain and worker is None and not self._closed:
            while self.step():
                pass
        self._closed = True
        with self._stepping:
            for ticket in [*self._running, *self._paused, *self._waiting]:
                ticket.is_cancelled = True
                self._finish(ticket, "cancelled")

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("the pool is closed; make another")

    # -- looking at it

    def stats(self) -> PoolStats:
        """Counters and times as of the last step. Never waits for one."""
        return self._tally.stats(len(self._waiting), len(self._running), len(self._paused))

    def metrics(self) -> str:
        """The same in the text form that Prometheus reads."""
        return prometheus(self.stats())
