"""A KeyboardInterrupt before each bytecode of the package, one after the other, or behind one call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import pytest

import llama_sessions

T = TypeVar("T")
ROOT = str(Path(llama_sessions.__file__).parent)


def ctrl_c(_: object) -> None:
    """As Python's own handler."""
    raise KeyboardInterrupt


@contextmanager
def interrupted_behind(owner: type, method: str) -> Iterator[None]:
    """A KeyboardInterrupt behind a call of a method, which whoever is within has to let out."""
    real = getattr(owner, method)

    def interrupted(*args: Any) -> None:
        real(*args)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(owner, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            yield


def interrupted_everywhere(
    start: Callable[[], T],
    act: Callable[[T], object],
    check: Callable[[T], object],
    step: int = 1,
    press: Callable[[T], object] = ctrl_c,
) -> int:
    """`act` on a new `start()` with an interrupt before the k-th bytecode inside the package, for each k there is (or
    each `step`-th); `check` what is left after each. Returns how many there were. `press`: what an interrupt calls."""
    k = 0
    while True:
        thing, left = start(), k

        def local(frame: FrameType, event: str, arg: Any, thing: T = thing) -> Any:
            nonlocal left
            if event == "opcode":
                left -= 1
                if left == -1:
                    press(thing)
            return local

        def trace(frame: FrameType, event: str, arg: Any) -> Any:
            code = frame.f_code
            # What is raised at the edge of the log callback, outside of its `try`, ctypes swallows: nobody's fault.
            if not code.co_filename.startswith(ROOT) or code.co_name == "forward":
                return None
            frame.f_trace_opcodes = True
            return local

        sys.settrace(trace)
        try:
            act(thing)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        check(thing)
        if left >= 0:
            return k // step
        k += step
