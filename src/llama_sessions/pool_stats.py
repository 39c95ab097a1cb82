"""A pool looked at from outside: counters, times, and the same for Prometheus."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, fields

from .reply import Reply

_MANY = 1024  # latest times that percentiles are made of


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Counters of a pool, as of its last step. Times in seconds, over the latest 1,024; 0.0 before there are any.

    `batch_fill`: tokens a step, of `n_batch`. Rates are tokens a second of step time.
    """

    n_waiting: int
    n_running: int
    n_paused: int
    n_done: int
    n_failed: int
    n_cancelled: int
    n_preemptions: int
    n_steps: int
    n_prompt_tokens: int
    n_generated_tokens: int
    batch_fill: float
    prompt_tokens_per_s: float
    generated_tokens_per_s: float
    first_token_p50_s: float
    first_token_p95_s: float
    between_tokens_p50_s: float
    between_tokens_p95_s: float
    step_seconds: float
    own_seconds: float


_HELP = {
    "n_waiting": "requests that wait to be admitted",
    "n_running": "requests that are being answered",
    "n_paused": "requests that gave way and wait to go on",
    "n_done": "requests answered, or out of time",
    "n_failed": "requests that ended in an error",
    "n_cancelled": "requests cancelled",
    "n_preemptions": "times a request gave way",
    "n_steps": "decode steps",
    "n_prompt_tokens": "prompt tokens decoded",
    "n_generated_tokens": "tokens generated",
    "step_seconds": "time spent in decode",
    "own_seconds": "time spent between decodes",
    "batch_fill": "tokens of all steps so far, of what would have filled their batches",
}
_GAUGES = ("n_waiting", "n_running", "n_paused", "batch_fill")


class Tally:
    """What a pool counts."""

    def __init__(self, n_batch: int) -> None:
        self._n_batch = n_batch
        self.n_done = self.n_failed = self.n_cancelled = self.n_preemptions = 0
        self.n_steps = self.n_prompt_tokens = self.n_generated_tokens = self._n_next = 0
        self.step_seconds = self.own_seconds = 0.0
        self._first: deque[float] = deque(maxlen=_MANY)
        self._between: deque[float] = deque(maxlen=_MANY)

    def note_step(self, n_next: int, n_prompt: int, seconds: float) -> None:
        self.n_steps += 1
        self.n_prompt_tokens += n_prompt
        self._n_next += n_next
        self.step_seconds += seconds

    def note_token(self, submitted: float, last: float) -> float:
        """A token came, `last` being when the one before it did (0.0: it is the first); returns when."""
        now = time.perf_counter()
        self.n_generated_tokens += 1
        if last:
            self._between.append(now - last)
        else:
            self._first.append(now - submitted)
        return now

    def note_end(self, error: BaseException | None, reply: Reply | None) -> None:
        """A request is over."""
        if error is not None:
            self.n_failed += 1
        elif reply is not None and reply.stop_reason == "cancelled":
            self.n_cancelled += 1
        else:
            self.n_done += 1

    def stats(self, n_waiting: int, n_running: int, n_paused: int) -> PoolStats:
        """As of now."""
        n_tokens = self.n_prompt_tokens + self._n_next
        seconds = self.step_seconds or 1.0
        first, between = list(self._first), list(self._between)
        return PoolStats(
            n_waiting=n_waiting,
            n_running=n_running,
            n_paused=n_paused,
            n_done=self.n_done,
            n_failed=self.n_failed,
            n_cancelled=self.n_cancelled,
            n_preemptions=self.n_preemptions,
            n_steps=self.n_steps,
            n_prompt_tokens=self.n_prompt_tokens,
            n_generated_tokens=self.n_generated_tokens,
            batch_fill=n_tokens / (self.n_steps * self._n_batch) if self.n_steps else 0.0,
            prompt_tokens_per_s=self.n_prompt_tokens / seconds,
            generated_tokens_per_s=self.n_generated_tokens / seconds,
            first_token_p50_s=percentile(first, 50),
            first_token_p95_s=percentile(first, 95),
            between_tokens_p50_s=percentile(between, 50),
            between_tokens_p95_s=percentile(between, 95),
            step_seconds=self.step_seconds,
            own_seconds=self.own_seconds,
        )


def percentile(values: Iterable[float], percent: int) -> float:
    """The value that `percent` of all are at or below; 0.0 of none."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else 0.0


def prometheus(stats: PoolStats) -> str:
    """The text form that Prometheus reads."""
    lines = []
    for field in fields(stats):
        name = field.name
        if name not in _HELP:
            continue
        kind = "gauge" if name in _GAUGES else "counter"
        full = "llama_sessions_" + name.removeprefix("n_") + ("" if kind == "gauge" else "_total")
        lines += [f"# HELP {full} {_HELP[name]}", f"# TYPE {full} {kind}", f"{full} {getattr(stats, name)}"]
    for what in ("first_token", "between_tokens"):
        full = f"llama_sessions_{what}_seconds"
        lines += [f"# HELP {full} time, over the latest {_MANY}", f"# TYPE {full} gauge"]
        lines += [f'{full}{{quantile="0.{p}"}} {getattr(stats, f"{what}_p{p}_s")}' for p in (50, 95)]
    return "\n".join(lines) + "\n"
