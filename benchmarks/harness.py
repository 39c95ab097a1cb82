"""How the benchmarks measure: each part in a process of its own, parts interleaved, medians, a table, JSON.

A benchmark is a script with named parts. `run_part` starts the script again with `--part NAME`, hands it a config on
stdin and takes the JSON that it prints last. Interleaving (a b c, c b a, ...) spreads the machine's moods over all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Result = dict[str, Any]
Part = Callable[[Result], Result]


def described(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of a benchmark."""
    summary, _, rest = (doc or "").partition("\n")
    return argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def run_part(script: str, part: str, config: Mapping[str, Any]) -> Result:
    """The result of one part, in a fresh process."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    done = subprocess.run(
        [sys.executable, script, "--part", part],
        input=json.dumps(config),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{part} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    result: Result = json.loads(done.stdout.splitlines()[-1])
    return {**result, "load_before": load}


def serve_part(parts: Mapping[str, Part]) -> bool:
    """In a process that `run_part` started: run the part, print its result, return True."""
    if len(sys.argv) != 3 or sys.argv[1] != "--part":
        return False
    result = parts[sys.argv[2]](json.load(sys.stdin))
    print(json.dumps(result))
    return True


def interleaved(
    script: str, parts: Sequence[str], configs: Callable[[str], Mapping[str, Any]], n_rounds: int
) -> dict[str, list[Result]]:
    """Every part once a round; all results by part. Progress goes to stderr.

    Every second round goes backwards, so that no part gains from its place: a machine is fastest after a rest.
    """
    results: dict[str, list[Result]] = {part: [] for part in parts}
    for i in range(n_rounds):
        for part in parts if i % 2 == 0 else reversed(parts):
            started = time.perf_counter()
            results[part].append(run_part(script, part, configs(part)))
            took = time.perf_counter() - started
            print(f"round {i + 1}/{n_rounds} {part}: {took:.1f} s", file=sys.stderr, flush=True)
    return results


class Inside:
    """Counts the seconds inside functions, whoever calls them through their module or class, while it is entered."""

    def __init__(self, *functions: tuple[Any, str], now: Callable[[], float] = time.perf_counter) -> None:
        """`functions`: each a module or class, and a name in it."""
        self.seconds = 0.0
        self._now = now
        self._was = [(owner, name, getattr(owner, name)) for owner, name in functions]

    def __enter__(self) -> Inside:
        for owner, name, call in self._was:
            setattr(owner, name, self._timed(call))
        return self

    def __exit__(self, *exc: object) -> None:
        for owner, name, call in self._was:
            setattr(owner, name, call)

    def _timed(self, call: Callable[..., Any]) -> Any:
        def timed(*args: Any) -> Any:
            started = self._now()
            try:
                return call(*args)
            finally:
                self.seconds += self._now() - started

        return timed


def median(results: Sequence[Result], key: str) -> float:
    """The median of `key` over rounds."""
    return float(statistics.median(r[key] for r in results))


def spread(values: Sequence[float]) -> str:
    """Lowest to highest."""
    return f"{min(values):.3g}..{max(values):.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with aligned columns: the first to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (w - 1) if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *(line(row) for row in cells[1:])])


def met(yes: bool) -> str:
    """What a table says of a target."""
    return "met" if yes else "MISSED"


def ratio(value: float, limit: float) -> str:
    """`1.03x`; empty where there is nothing to compare with."""
    return f"{value / limit:.2f}x" if limit else ""


def machine() -> Result:
    """Where and with what this was measured."""
    name = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next((s.split(":")[1].strip() for s in cpuinfo.read_text().splitlines() if "model name" in s), name)
    return {
        "cpu": name,
        "n_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "llama_cpp_python": version("llama-cpp-python"),
        "llama_sessions": version("llama-sessions"),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def say(title: str) -> None:
    """The head of a report: what is measured, where."""
    m = machine()
    print(f"\n{title}")
    print(f"{m['cpu']}, {m['n_cores']} cores, Python {m['python']}, llama-cpp-python {m['llama_cpp_python']}\n")


def write_json(path: str | None, claim: str, config: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Everything that was measured, round by round."""
    if path is None:
        return
    body = {"claim": claim, "machine": machine(), "config": config, "results": results}
    Path(path).write_text(json.dumps(body, indent=1) + "\n")
    print(f"\nwritten to {path}")
