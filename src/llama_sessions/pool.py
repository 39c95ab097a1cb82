"""`Pool`: many sessions answered at once, each step one `llama_decode` for all of them.

A step takes the next token of everybody who talks and fills up with prompts that wait, as much as their share of its
time allows. Who comes later joins at the next step, who is finished leaves at once.
"""

from __future__ import annotations

import threading
import time
import warnings
from types import TracebackType
from typing import Any

from .batching import Batcher
from .errors import OptionError, QueueFull, StateError
from .generation import Generation
from .generation_options import GenerationOptions
from .manager import ContextManager
from .options import checked_float, checked_int
from .pool_stats import PoolStats, prometheus
from .session import Session, check_session
from .ticket import Ticket


class Pool:
    """Answers many sessions together. `submit` from any thread; then `run`, or `step` in a loop of your own, or
    `with Pool(cm) as pool:`, where a worker thread of the pool drives it.

    `prefill_share`: of a step's time while others talk; 0.5 at most doubles the time between two tokens, with 1.0
    newcomers come first. `max_waiting`: how many may wait to be admitted.

    A pool without a worker that is dropped, tickets and all, while requests are under way ends them with what was said
    as soon as the garbage collector finds it, and warns.
    """

    def __init__(self, cm: ContextManager, *, prefill_share: float = 0.5, max_waiting: int = 1024) -> None:
        if not isinstance(cm, ContextManager):
            raise OptionError(f"Pool takes a ContextManager, not {cm!r}")
        share = checked_float("prefill_share", prefill_share, 0.0, 1.0)
        if not share:
            raise OptionError("prefill_share must be above 0, or nobody ever joins")
        self.cm = cm
        self._limit = checked_int("max_waiting", max_waiting, 1)
        self._batcher = Batcher(cm, share)
        self._stepping = threading.Lock()
        self._stepper: int | None = None  # the thread inside a step
        self._drains = False  # nobody comes in any more
        self._closed = False
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
        first; nobody is passed over for ever. Never waits for a decode.

        Raises QueueFull where `max_waiting` wait already (after `wait_s` seconds, if given), StateError for a session
        that is generating or was submitted already, OptionError, TemplateError. What there is never room for, because
        sessions outside of the pool hold it, is the ticket's CapacityError.
        """
        checked = GenerationOptions.build(options)
        check_session(session)
        checked_int("priority", priority, -(2**31), 2**31 - 1)
        until = time.monotonic() + (0.0 if wait_s is None else checked_float("wait_s", wait_s, 0.0))
        return self.add(session, text, checked, priority=priority, until=until)

    def add(
        self,
        session: Session,
        text: str | None,
        options: GenerationOptions,
        *,
        priority: int = 0,
        until: float = 0.0,
        seconds_ago: float = 0.0,
    ) -> Ticket:
        """`submit` of what was checked; waits for a place `until` then. `seconds_ago`: how long the call of which it is
        a part has been going on."""
        batcher = self._batcher
        self.check_takes()
        batcher.check_is_new(session)
        generation = Generation(self.cm, session, text, options, holder=batcher)
        ticket = Ticket(self, generation, priority, options.timeout_s, seconds_ago)
        while True:
            with batcher.changed:
                self.check_takes()
                if len(batcher.waiting) < self._limit:
                    batcher.add(ticket)
                    return ticket
                left = until - time.monotonic()
                if left <= 0:
                    raise QueueFull(len(batcher.waiting), self._limit)
                if self._worker is not None:
                    self._check_outside()
                    batcher.changed.wait(left)
                    continue
            self._step()

    @property
    def is_full(self) -> bool:
        """Whether the next `submit` would be refused, or have to wait."""
        return len(self._batcher.waiting) >= self._limit

    # -- driving it

    def run(self) -> None:
        """Step until everybody has a reply (or an error, which their ticket has)."""
        self._check_open()
        if self._worker is not None:
            raise StateError("the pool's worker drives it; wait for a ticket's result instead")
        while self._step():
            pass

    def step(self) -> bool:
        """One step for everybody; False where nothing is left to do.

        What goes wrong for one session is its ticket's; only what concerns all of them is raised.
        """
        self._check_open()
        return self._step()

    def _step(self) -> bool:
        """`step`, or nothing and False in a pool that somebody has closed meanwhile."""
        self._check_outside()
        with self._stepping:
            if self._closed:
                return False
            self._stepper = threading.get_ident()
            try:
                self._batcher.step()
            except Exception as e:
                if self.cm.is_closed:
                    self._shut()
                    self._end_all(e)
                raise
            finally:
                if self._closed:  # from within this step
                    self._end_all()
                self._stepper = None
            return not self._batcher.is_idle

    def wait_for(self, ticket: Ticket, timeout: float | None, *, until_over: bool) -> None:
        """Until a ticket has something new, or is over, or for `timeout` seconds; without a worker for a step of one's
        own."""
        if self._worker is None and not self._closed:
            self._step()
        else:
            self._check_outside()
            ticket.wait(timeout, until_over=until_over)

    def wake(self) -> None:
        """There is something to look at."""
        with self._batcher.changed:
            self._batcher.changed.notify_all()

    def _is_inside(self) -> bool:
        """Whether the calling thread is in the middle of a step already."""
        return self._stepper == threading.get_ident() and self._stepping.locked()  # an interrupt may leave the first

    def _check_outside(self) -> None:
        if self._is_inside():
            raise StateError("the pool is in the middle of a step of this thread, which a hook must not wait for")

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
        batcher = self._batcher
        while True:
            with batcher.changed:
                while batcher.is_idle and not self._drains:
                    batcher.changed.wait()
            drains = self._drains  # asked before: who came in until then is there
            try:
                if not self._step() and drains:
                    break
            except BaseException as e:  # nobody steps any more: whoever waits has to hear why
                self._shut()
                with self._stepping:
                    self._end_all(e)
                return
        with self._stepping:
            if self._closed:  # whoever closes it may be interrupted while it waits for this
                self._end_all()

    def _end_all(self, error: BaseException | None = None) -> None:
        """Everybody ends with what was said; `error`: what concerns all of them, a closed manager, say. Called within
        `_stepping`."""
        self._stepper = threading.get_ident()  # whoever is told of it must not wait for the pool, as in a step
        try:
            for ticket in self._batcher.tickets:
                if error is None:
                    self._batcher.cut_short(ticket, "cancelled")
                else:
                    self._batcher.end(ticket, error)
        finally:
            self._stepper = None

    def close(self, *, drain: bool = False) -> None:
        """End what is under way with what was said so far, or, with `drain`, wait for it; `submit` is refused from now
        on. Again: nothing. Sessions keep their rows and what was said. From a hook it does not wait."""
        if drain:
            with self._batcher.changed:
                self._drains = True
                self._batcher.changed.notify_all()
        else:
            self._shut()
        if self._is_inside():
            return  # the step that this is in sees to the rest
        if self._worker is not None:
            self._worker.join()
        elif drain:
            while self._step():
                pass
        self._shut()
        with self._stepping:
            self._end_all()

    def __del__(self) -> None:
        batcher = getattr(self, "_batcher", None)  # of an `__init__` that raised there is none
        if batcher is not None and not batcher.is_idle:  # with a worker it would not be garbage
            n = batcher.abandon()
            warnings.warn(
                f"a Pool was dropped with {n} requests under way; use `with Pool(cm) as pool:`, or close it",
                ResourceWarning,
                stacklevel=1,  # whose fault it was is on no stack any more
                source=self,
            )

    def _shut(self) -> None:
        with self._batcher.changed:  # whoever submits is in before this, or refused
            self._closed = self._drains = True
            self._batcher.changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise StateError("the pool is closed; make another")

    @property
    def has_worker(self) -> bool:
        """Whether a thread of its own drives it, or did."""
        return self._worker is not None

    def check_takes(self) -> None:
        """StateError once it is closed, or about to be."""
        if self._drains:
            raise StateError("the pool is closed, or about to be; make another")

    # -- looking at it

    def stats(self) -> PoolStats:
        """Counters and times as of the last step. Never waits for one."""
        return self._batcher.stats()

    def metrics(self) -> str:
        """The same in the text form that Prometheus reads."""
        return prometheus(self.stats())
