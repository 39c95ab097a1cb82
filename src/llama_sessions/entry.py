"""The door of a manager: who may enter, one at a time, and in which process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import StateError
from .llama import log


class _Inside:
    """Between these two the owner of the lock is known; `after` runs last, but not in a house that is closed."""

    __slots__ = ("after", "entry")

    def __init__(self, entry: Entry, after: Callable[[], None] | None = None) -> None:
        self.entry, self.after = entry, after

    def __enter__(self) -> None:
        self.entry.enter()

    def __exit__(self, *exc: object) -> None:
        if self.after is not None and not self.entry.closed:
            self.after()
        self.entry.leave()


class Entry:
    """A lock that knows its process, its owner, the threads that may only read, and whether the house is closed.

    `before` runs first inside the lock, `after` last: what happened is published before anybody else comes in.
    `closing` frees everything, once. A signal handler or a finaliser may come in the middle of a call of its own
    thread: it may read, it is refused a change, and a `close` waits for the end of the call.
    """

    def __init__(
        self, before: Callable[[], None], after: Callable[[], None], closing: Callable[[], None], *, quiet: bool
    ) -> None:
        self.closed = False
        self._closing = closing
        self._owner: int | None = None  # the thread inside; only a hint once an interrupt has hit the way out
        self._close_when_left = False
        self._before = before
        self._after = after
        self._quiet = quiet
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._readers: set[int] = set()

    @property
    def in_child(self) -> bool:
        """Whether this is a forked child, where llama.cpp must not be touched."""
        return os.getpid() != self._pid

    def check(self) -> None:
        """StateError where no call is allowed at all."""
        if self.in_child:
            raise StateError(
                "this manager belongs to the process that made it: llama.cpp's threads do not survive os.fork; "
                "load the model in the child, or use multiprocessing's 'spawn' start method"
            )
        if self.closed:
            raise StateError("the manager is closed; load the model again")

    def check_may_change(self) -> None:
        """StateError also for a thread that may only read now."""
        self.check()
        if threading.get_ident() in self._readers:
            raise StateError("from on_progress the manager may only be read; return False to cancel")

    def _is_inside(self) -> bool:
        """Whether the calling thread is in the middle of a call already."""
        return self._owner == threading.get_ident() and self._lock.locked()

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock for a call that may change something."""
        self.check_may_change()
        if self._is_inside():
            raise StateError("the manager is in the middle of a call of this thread (a signal handler?); call it later")
        with self._lock, _Inside(self, self._after):
            self.check()  # somebody may have closed it while this call waited
            log.capture.quiet = self._quiet
            self._before()
            yield

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the lock for a call that only looks."""
        self.check()
        if self._is_inside():
            yield
            return
        with self._lock, _Inside(self):
            self.check()
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

    def enter(self) -> None:
        """Called with the lock held."""
        self._owner = threading.get_ident()

    def leave(self) -> None:
        """Called with the lock still held."""
        self._owner = None
        if self._close_when_left and not self.closed:
            self._close_now()
