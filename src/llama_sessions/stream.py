"""`Stream`: one reply, chunk by chunk, at the pace of whoever iterates."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from types import TracebackType

from .errors import Cancelled, CapacityError, StateError
from .generation import Generation
from .manager import ContextManager
from .pending import NextToken
from .reply import Chunk, Reply


def reach_logits(cm: ContextManager, generation: Generation, why_stop: Callable[[], str | None]) -> str | None:
    """Start a generation, if it is new, and decode its prompt, chunk by chunk, as long as `why_stop` has no reason
    against it.

    Returns why it ended before the next token could be sampled; None: it did not.
    """
    n_batch = cm.capabilities.n_batch
    try:
        if generation.is_new and why_stop() is None:
            generation.start()
        pending = generation.pending
        while pending is not None and why_stop() is None:
            cm.ask_progress(pending)
            work = generation.work(n_batch)
            if work is not None:
                cm.step_one(work, holder=generation.holder)
            if generation.pending is None:
                cm.ask_progress(pending)
            pending = generation.pending
    except Cancelled:
        return "cancelled"
    return why_stop()


class Stream(Iterator[Chunk]):
    """Iterates over the chunks of one reply. Nothing happens before the first `next`.

    `cancel`, from any thread, ends it with last chunks of what was held back and the reply. Closing it early (`close`,
    leaving a `with`, or dropping it) ends the reply with what was said so far; what was held back then, in case a stop
    string or a tag would come of it, is in the reply though no chunk showed it.

    One thread at a time may advance it: whoever comes meanwhile gets a StateError, or, at the same instant, its turn.
    """

    _state = "over"  # until __init__ is through: __del__ comes after an interrupted one too

    def __init__(self, cm: ContextManager, generation: Generation) -> None:
        self._cm = cm
        self._generation = generation
        self._inside = threading.Lock()
        self._ready: deque[Chunk] = deque()
        self._stop = False
        self._close = False
        self._state = "new"

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        if self._inside.locked():
            raise StateError("the stream is being advanced already, by another thread or from within a hook")
        with self._inside:  # and not acquire and release: an interrupt between them would lock it for ever
            if self._state == "over":  # asked in here: two threads may have come in at the same instant
                raise StopIteration
            try:
                if not self._ready:
                    self._ready.extend(self._advance())
                chunk = self._ready.popleft()
            except BaseException:
                try:
                    self._generation.fail()
                finally:
                    self._state = "over"
                raise
            if chunk.reply is not None:
                self._state = "over"
        if self._close:  # somebody asked for it while this was inside, too late to be seen there
            self.close()
        return chunk

    def _advance(self) -> list[Chunk]:
        generation, cm = self._generation, self._cm
        self._state = "running"
        why = self._why_stop() if generation.is_under_way else reach_logits(cm, generation, self._why_stop)
        if why is not None:
            return generation.cut_short(why)
        work = generation.work(1)
        if isinstance(work, NextToken):
            try:
                token = cm.step_and_read(work, generation.choose, holder=generation.holder)
            except CapacityError:
                if not generation.gives_way():
                    raise
                return self._advance()
        else:
            token = cm.read_logits(generation.session, generation.choose, holder=generation.holder)
        why = self._why_stop()
        return generation.chunks(token) if why is None else generation.cut_short(why)

    def _why_stop(self) -> str | None:
        if self._stop:
            return "cancelled"
        generation = self._generation
        return "timeout" if generation.timeout_s is not None and generation.is_late else None

    @property
    def reply(self) -> Reply | None:
        """The finished reply; None while it is under way."""
        return self._generation.reply

    def cancel(self) -> None:
        """End the reply after the step it is in; the next chunk is the last. From any thread; never waits."""
        self._stop = True

    def close(self) -> None:
        """End the reply with what was said so far; again: nothing. While another thread, or a hook, is inside `next`,
        that `next` ends it after the step it is in."""
        self._close = self._stop = True  # first: whoever is inside asks for it on the way out
        if self._inside.locked():
            return
        with self._inside:
            if self._state == "running":
                self._generation.fail()
            elif self._state == "new":
                self._generation.leave()
            self._state = "over"

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self._state != "over":
            self.close()
