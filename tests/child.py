"""Runs what might abort in a child process, so that an abort is a failed test and not a dead suite."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

_TESTS = Path(__file__).parent


def run_child(code: str, *args: str, timeout: float = 120) -> str:
    """Run Python source in a fresh interpreter that can import the test helpers; returns what it printed.

    Fails the test with the child's output if it died of a signal, or exited with anything but 0.
    """
    source = f"import sys; sys.path.insert(0, {str(_TESTS)!r})\n" + textwrap.dedent(code)
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", source, *args], capture_output=True, text=True, timeout=timeout
    )
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    assert done.returncode == 0, f"the child ended with {how}:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout
