"""A gate in `decode`, for tests of what others may do meanwhile: nothing there depends on how fast a machine is."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from llama_sessions.testing import FakeContext

LONG_S = 60.0  # after which a test that would hang fails


class Gate:
    """Lets as many decodes through as it is told; who comes after them stands inside, with the manager's lock, as in a
    decode that takes its time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n: float = 0, *, of: Any = FakeContext) -> None:
        self.inside = threading.Event()  # a decode stands at the gate
        self._left = n
        self._changed = threading.Condition()
        real, gate = of.decode, self

        def decode(this: Any, runs: Any) -> int:
            gate._pass()
            code: int = real(this, runs)
            return code

        monkeypatch.setattr(of, "decode", decode)

    def _pass(self) -> None:
        with self._changed:
            if self._left < 1:
                self.inside.set()
            assert self._changed.wait_for(lambda: self._left >= 1, LONG_S)
            self._left -= 1

    def let(self, n: float) -> None:
        """Let so many more through."""
        with self._changed:
            self.inside.clear()
            self._left += n
            self._changed.notify_all()

    def wait(self) -> None:
        """Until as many are through as were let, and one more stands inside."""
        assert self.inside.wait(LONG_S)

    def open(self) -> None:
        """Let everybody through from now on."""
        self.let(math.inf)


def wait_until(is_so: Callable[[], object]) -> None:
    """Until another thread has made it so."""
    deadline = time.monotonic() + LONG_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.001)
