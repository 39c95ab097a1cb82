"""`Ticket`: one request to a pool, from the outside: its chunks, its reply, its end."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from .errors import StateError
from .generation import Generation
from .options import checked_float
from .reply import Chunk, Reply
from .session import Session

if TYPE_CHECKING:
    from .pool import Pool

logger = logging.getLogger("llama_sessions")


class Ticket(Iterator[Chunk]):
    """Iterate over its chunks, or ask for its `result`. From any thread.

    Where the pool has no worker, whoever waits here steps the pool meanwhile.
    """

    def __init__(
        self, pool: Pool, generation: Generation, priority: int, timeout_s: float | None, seconds_ago: float
    ) -> None:
        self._pool = pool
        self.generation = generation
        self.session: Session = generation.session
        self.priority = priority
        self.submitted = time.perf_counter()
        self._asked = self.submitted - seconds_ago
        self.state = "waiting"
        """`waiting | prompt | running | paused | done | failed`."""
        self.error: BaseException | None = None
        self.is_cancelled = False
        self.n_passed_over = 0  # times somebody who came later went first
        self.waits_for: tuple[Ticket, int] | None = None  # who decodes a stem that this one will share
        self.goes_alone = False  # a batch failed with it: whose fault it was shows alone
        self.is_torn = False  # a step that did not finish had it: nobody knows what of its work was done
        self.last_token_at = 0.0
        self.last_turn = 0  # where more talk than a batch has room for
        self._timeout_s = timeout_s
        self._ready: deque[Chunk] = deque()
        self._changed = threading.Condition()
        self._n_awaiting = 0  # threads that want to hear of it
        self._listener: Callable[[], None] | None = None

    def __repr__(self) -> str:
        return f"<Ticket {self.state}, {self.n_generated} tokens>"

    # -- for whoever submitted it

    def __iter__(self) -> Ticket:
        return self

    def __next__(self) -> Chunk:
        while True:
            chunk = self.take()
            if chunk is not None:
                return chunk
            if self.is_over:
                if self._ready:  # it came in between the two questions
                    continue
                self._raise()
                raise StopIteration
            self._pool.wait_for(self, None, until_over=False)

    def take(self) -> Chunk | None:
        """The next chunk, if there is one already."""
        try:
            return self._ready.popleft()
        except IndexError:
            return None

    def result(self, timeout: float | None = None) -> Reply:
        """The whole reply. Raises what ended it instead, or TimeoutError after `timeout` seconds: it goes on then."""
        until = None if timeout is None else time.monotonic() + checked_float("timeout", timeout, 0.0)
        while not self.is_over:
            left = None if until is None else until - time.monotonic()
            if left is not None and left <= 0:
                raise TimeoutError(f"no reply within {timeout} s; it goes on, cancel() ends it")
            self._pool.wait_for(self, left, until_over=True)
        self._raise()
        if self.reply is None:
            raise StateError("the request ended without a reply")
        return self.reply

    def cancel(self) -> None:
        """End it before the next step, with what was said. Never waits."""
        self.is_cancelled = True
        self._pool.wake()

    @property
    def reply(self) -> Reply | None:
        return self.generation.reply

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed")

    @property
    def n_generated(self) -> int:
        """Tokens said so far."""
        return self.generation.n_generated

    @property
    def seconds(self) -> float:
        """Since it was asked for."""
        return time.perf_counter() - self._asked

    @property
    def is_late(self) -> bool:
        """Whether its `timeout_s` is over."""
        return self._timeout_s is not None and self.seconds >= self._timeout_s

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    # -- for the pool

    def put(self, chunks: Sequence[Chunk]) -> None:
        """Hand out chunks."""
        self._ready.extend(chunks)
        if self._n_awaiting:  # no lock where nobody waits: this is once a token
            with self._changed:
                self._changed.notify_all()
        if self._listener is not None:
            self._tell()

    def end(self, chunks: Sequence[Chunk]) -> None:
        """It is over, with the last chunks."""
        with self._changed:
            self._ready.extend(chunks)
            self.waits_for = None
            self.state = "done" if self.error is None else "failed"
            self._changed.notify_all()
        self._tell()

    def wait(self, timeout: float | None, *, until_over: bool) -> None:
        """Until there is a chunk, or it is over."""
        with self._changed:
            self._n_awaiting += 1  # before it looks: whoever brings something looks at this afterwards
            try:
                self._changed.wait_for(lambda: self.is_over or (self._ready and not until_over), timeout)
            finally:
                self._n_awaiting -= 1

    def on_change(self, listener: Callable[[], None] | None) -> None:
        """Call `listener` whenever there is something new; from the thread that steps the pool. StateError for a second
        one: each would take chunks that the other waits for."""
        if listener is not None and self._listener is not None:
            raise StateError("somebody reads the chunks of this ticket already; hand them on from there")
        self._listener = listener

    def _tell(self) -> None:
        listener = self._listener
        if listener is not None:
            try:
                listener()
            except Exception:  # of whoever listens; neither this reply nor the others' is to suffer
                logger.exception("what listens to a ticket raised")
