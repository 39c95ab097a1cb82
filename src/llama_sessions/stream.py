"""`Stream`: one reply, chunk by chunk, at the pace of whoever iterates."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType

from .errors import Cancelled, StateError
from .generation import Generation
from .manager import ContextManager
from .pending import NextToken
from .reply import Chunk, Reply


class Stream(Iterator[Chunk]):
    """Iterates over the chunks of one reply. Nothing happens before the first `next`.

    `cancel`, from any thread, ends it with a last chunk that carries the reply. Closing it early (`close`, leaving a
    `with`, or dropping it) ends the reply with what was said so far.
    """

    _state = "over"  # until __init__ is through: __del__ comes after an interrupted one too

    def __init__(self, cm: ContextManager, generation: Generation) -> None:
        self._cm = cm
        self._generation = generation
        self._inside = threading.Lock()
        self._ready: deque[Chunk] = deque()
        self._stop = False
        self._state = "new"

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        if self._state == "over":
            raise StopIteration
        if self._inside.locked():
            raise StateError("the stream is being advanced already, by another thread or from within a hook")
        with self._inside:  # and not acquire and release: an interrupt between them would lock it for ever
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
        return chunk

    def _advance(self) -> list[Chunk]:
        generation = self._generation
        is_new, self._state = self._state == "new", "running"
        try:
            if is_new and not self._stop:
                generation.start()
            if generation.pending is not None:
                self._decode_prompt()
            why = self._why_stop()
        except Cancelled:
            why = "cancelled"
        if why is not None:
            return [Chunk("", None, generation.finish(why))]
        cm, work = self._cm, generation.work(1)
        if isinstance(work, NextToken):
            token = cm.step_and_read(work, generation.choose, holder=generation.holder)
        else:
            token = cm.read_logits(generation.session, generation.choose, holder=generation.holder)
        why = self._why_stop()
        return generation.chunks(token) if why is None else [Chunk("", None, generation.finish(why))]

    def _decode_prompt(self) -> None:
        """The rest of the prompt, chunk by chunk, as long as nothing says stop."""
        generation, n_batch = self._generation, self._cm.capabilities.n_batch
        pending = generation.pending
        while pending is not None and self._why_stop() is None:
            self._cm.ask_progress(pending)
            work = generation.work(n_batch)
            if work is not None:
                self._cm.step_one(work, holder=generation.holder)
            if generation.pending is None:
                self._cm.ask_progress(pending)
            pending = generation.pending

    def _why_stop(self) -> str | None:
        return "cancelled" if self._stop else "timeout" if self._generation.is_late else None

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
        if self._inside.locked():
            self._stop = True
            return
        with self._inside:
            if self._state == "running":
                self._generation.fail()
            self._state = "over"

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self._state != "over":
            self.close()
