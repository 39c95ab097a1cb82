"""A thread with a large stack, for what llama.cpp does by recursion."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ..errors import StateError
from .log import capture

T = TypeVar("T")

STACK_BYTES = 512 * 2**20  # reserved, not touched

_stack_size_lock = threading.Lock()  # threading.stack_size is global


def on_a_deep_stack(work: Callable[[], T], needed_for: str) -> T:
    """Run `work` on a thread with a stack of 512 MiB; its result or its exception is ours. About 0.1 ms.

    Raises StateError, naming what it is `needed_for`, where no such thread can be had.
    """
    outcome: list[Any] = []
    quiet = capture.quiet

    def run() -> None:
        capture.quiet = quiet  # each thread has its own
        try:
            outcome.append((work(), None))
        except BaseException as e:
            outcome.append((None, e))

    with _stack_size_lock:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="llama-sessions-deep-stack")
            thread.start()
        except RuntimeError as e:
            raise StateError(
                f"no thread with a stack of {STACK_BYTES >> 20} MiB can be had, which {needed_for}; "
                "raise the limit on address space"
            ) from e
        finally:
            threading.stack_size(before)
    interrupt: BaseException | None = None
    while thread.is_alive():
        try:
            thread.join()
        except BaseException as e:  # noqa: PERF203 - Ctrl-C waits until the thread has let go of what it works on
            interrupt = e
    if interrupt is not None:
        raise interrupt
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]
