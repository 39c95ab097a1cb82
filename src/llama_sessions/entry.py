"""The door of a manager: who may enter, one at a time, and in which process."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from .errors import StateError
from .llama import log


class Entry:
    """A re-entrant lock that knows its process, its threads that may only read, and whether the house is closed.

    `before` runs first inside the lock, `after` last: what happened is published before anybody else comes in.
    `closing` frees everything, once, and never under a call that is still running: the lock is re-entrant, so a signal
    handler or a finaliser may come in the middle of one.
    """

    def __init__(
        self, before: Callable[[], None], after: Callable[[], None], closing: Callable[[], None], *, quiet: bool
    ) -> None:
        self.closed = False
        self._closing = closing
        self._depth = 0  # of calls inside, all of one thread
        self._close_when_left = False
        self._before = before
        self._after = after
        self._quiet = quiet
        self._lock = threading.RLock()
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

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock for a call that may change something."""
        self.check_may_change()
        with self._lock:
            self.check()  # somebody may have closed it while this call waited
            if self._depth:
                raise StateError("the manager is in the middle of a call of this thread (a signal handler?); later")
            log.capture.quiet = self._quiet
            self._depth = 1
            try:
                self._before()
                yield
            finally:
                self._depth = 0
                self._after()
                if self._close_when_left:
                    self._close_now()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the lock for a call that only looks."""
        self.check()
        with self._lock:
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
        with self._lock:
            if self._depth:
                self._close_when_left = True
            elif not self.closed:
                self._close_now()

    def _close_now(self) -> None:
        self.closed = True
        self._closing()
