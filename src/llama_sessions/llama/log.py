"""llama.cpp's log into `logging`, and its last error line into our exceptions.

The callback goes in at the first load, never at import, and stays for the life of the process: C code may call it at
any time. Lines that come from calls that are not ours go on to whoever was installed before.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from types import TracebackType
from typing import Any

import llama_cpp

logger = logging.getLogger("llama_sessions.llama")

# A library logs in silence until its user asks for it.
logging.getLogger("llama_sessions").addHandler(logging.NullHandler())

# ggml_log_level (llama-cpp-python's own table is one off: seen with 0.3.36).
_LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
_CONTINUE = 5  # GGML_LOG_LEVEL_CONT: goes on with the previous line's level


class Capture(threading.local):
    """Marks the calling thread as inside one of our native calls; keeps the last error text of that call.

    Re-entrant; use as `with capture:`. `quiet`: nothing goes to `logging`.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.level = logging.DEBUG
        self.last_error = ""
        self.quiet = False
        self.raised: BaseException | None = None

    def __enter__(self) -> Capture:
        if self.depth == 0:
            self.last_error = ""
        self.depth += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.depth -= 1
        if not self.depth and self.raised is not None:
            raised, self.raised = self.raised, None
            if e is None:
                raise raised

    def take(self, level: int, text: str) -> None:
        if level != _CONTINUE:
            self.level = _LEVELS.get(level, logging.DEBUG)
        line = text.rstrip()
        if not line.strip("."):
            return
        if self.level >= logging.ERROR:
            # The first lines say what is wrong, the last ones only that it is.
            self.last_error = f"{self.last_error}; {line}" if self.last_error else line
        if not self.quiet:
            logger.log(self.level, "%s", line)


capture = Capture()
_installed: list[Any] = []


def install() -> None:
    """Put our callback in, once a process. Whatever was there before keeps getting what is not ours."""
    if _installed:
        return
    previous, previous_data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(previous), ctypes.byref(previous_data))

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def forward(level: int, text: bytes, user_data: Any) -> None:
        try:
            if capture.depth:
                capture.take(level, text.decode("utf-8", "replace"))
            elif previous:
                previous(level, text, previous_data)
        except BaseException as e:  # ctypes would swallow it: Ctrl-C, or a logging handler that raises
            capture.raised = e

    _installed.extend((forward, previous, previous_data))
    llama_cpp.llama_log_set(forward, ctypes.c_void_p(0))
