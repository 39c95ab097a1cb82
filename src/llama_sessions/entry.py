"""The door of a manager: who may enter, one at a time, and in which process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import StateError
from .llama import log


class _Process:
    """Which process this is, without asking the system at each call."""

    def __init__(self) -> None:
        self.renew()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self.pid = os.getpid()


_process = _Process()


class _Inside:
    """The inside of the house: between these two the owner of the lock is known. One object serves all calls.

    `before` runs first; `after` runs last, but not in a house that is closed.
    """

    __slots__ = ("after", "before", "entry")

    def __init__(
        self, entry: Entry, before: Callable[[], None] | None = None, after: Callable[[], None] | None = None
    ) -> None:
        self.entry, self.before, self.after = entry, before, after

    def __enter__(self) -> None:
        entry = self.entry
        entry.owner = threading.get_ident()
        try:
            log.capture.quiet = entry.quiet
            if entry.closed or entry.is_borrowed:  # what held when this call began to wait may not hold now
                entry.check()
            if self.before is not None:
                self.before()
        except BaseException:
            entry.leave()
            raise

    def __exit__(self, *exc: object) -> None:
        try:
            if self.after is not None and not self.entry.closed:
                self.after()
        finally:
            self.entry.leave()


class Entry:
    """A lock that knows its process, its owner, the threads that may only read, and whether the house is closed.

    `before` runs first inside the lock, `after` last: what happened is published before anybody else comes in.
    `closing` frees everything, once. A signal handler or a finaliser may come in the middle of a call of its own
    thread: it may read, it is refused a change, and a `close` waits for the end of the call.
    """

    def __init__(
        self,
        before: Callable[[], None],
        after: Callable[[], None],
        closing: Callable[[], None],
        is_gone: Callable[[], bool] | None,
        *,
        quiet: bool,
    ) -> None:
        self.closed = False
        self._is_gone = is_gone
        self.is_borrowed = is_gone is not None  # then whether it is there still is asked at each call
        self._closing = closing
        self.owner: int | None = None  # the thread inside; only a hint once an interrupt has hit the way out
        self._close_when_left = False
        self.quiet = quiet
        self._lock = threading.Lock()
        self.change = _Inside(self, before, after)
        self.use = _Inside(self, before)
        self._looking = _Inside(self)
        self._pid = _process.pid
        self._readers: set[int] = set()

    @property
    def in_child(self) -> bool:
        """Whether this is a forked child, where llama.cpp must not be touched."""
        return _process.pid != self._pid

    @property
    def is_gone(self) -> bool:
        """Whether the weights were somebody else's, who has freed them."""
        return self._is_gone is not None and self._is_gone()

    def check(self) -> None:
        """StateError where no call is allowed at all."""
        if self.in_child:
            raise StateError(
                "this manager belongs to the process that made it: llama.cpp's threads do not survive os.fork; "
                "use multiprocessing's 'spawn' start method, and load the model there"
            )
        if self.closed:
            raise StateError("the manager is closed; load the model again")
        if self.is_gone:
            raise StateError("the Llama whose weights this manager uses was closed; close the manager first next time")

    def check_may_change(self) -> None:
        """StateError also for a thread that may only read now."""
        self.check()
        if threading.get_ident() in self._readers:
            raise StateError("from on_progress the manager may only be read; return False to cancel")

    def _is_inside(self) -> bool:
        """Whether the calling thread is in the middle of a call already."""
        return self.owner == threading.get_ident() and self._lock.locked()

    def gate(self) -> threading.Lock:
        """The lock, for a call that may change something: `with entry.gate(), entry.change:`.

        `entry.change` publishes what happened at its end, `entry.use` does not. Two steps, as only a lock's own
        `with` cannot be hit by an interrupt between taking it and knowing so.
        """
        if self._readers or self.closed or _process.pid != self._pid or self.is_borrowed:
            self.check_may_change()
        if self._is_inside():
            raise StateError("the manager is in the middle of a call of this thread (a signal handler?); call it later")
        return self._lock

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the lock for a call that only looks; from within a call of its own thread, at once."""
        self.check()
        if self._is_inside():
            yield
            return
        with self._lock, self._looking:
            yield

    @contextmanager
    def only_reading(self) -> Iterator[None]:
        """Until this ends, the calling thread may not change anything."""
        thread = threading.get_ident()
        self._readers.add(thread)
        try:
            yield
        finally:
            self._readers.discard(thread)

    def close(self) -> None:
        """Close the door, at the end of the call that is under way; nothing if closed already, or in a forked child."""
        if self.in_child or self.closed:
            return
        if not self.is_gone:
            self.check_may_change()
        if self._is_inside():
            self._close_when_left = True
            return
        with self._lock:
            if not self.closed:
                self._close_now()

    def _close_now(self) -> None:
        self.closed = True
        self._closing()

    def leave(self) -> None:
        """Called with the lock still held."""
        self.owner = None
        if self._close_when_left and not self.closed:
            self._close_now()
