"""What happened: frozen records that the manager and the engine hand out. All spans are half-open token ranges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .session import Session
    from .types import Message


@dataclass(frozen=True, slots=True)
class Stretch:
    """Where the tokens `[p0, p1)` of a prepared row came from.

    `source`: "row" (were there), "prefix" (shared with the system prompt), "live" (shared with another session),
    "cache" (restored from saved KV), "decode" (computed).
    """

    source: str
    p0: int
    p1: int
    seconds: float

    def __str__(self) -> str:
        return f"{self.source} [{self.p0}, {self.p1}) {self.seconds * 1e3:.1f} ms"


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """One `prepare`: of `n_tokens` in the row then, `n_reused + n_decoded`; `seconds` of wall time.

    `n_evicted`: tokens that went to make the prompt fit, and `dropped` the session's own messages that left its window
    for it (the very dicts; not what `make_room` dropped before). `exact`: the whole row has the KV of a fresh prefill
    of its tokens; False once something was taken out of its middle and what follows was not decoded anew.
    """

    n_tokens: int
    n_reused: int
    n_decoded: int
    stretches: tuple[Stretch, ...]
    seconds: float
    n_evicted: int = 0
    dropped: tuple[Message, ...] = ()
    exact: bool = True

    def __str__(self) -> str:
        return (
            f"{self.n_tokens} tokens: {self.n_reused} reused, {self.n_decoded} decoded in {self.seconds * 1e3:.1f} ms"
            f" ({', '.join(map(str, self.stretches)) or 'nothing to do'})"
            f"{f', {self.n_evicted} evicted' if self.n_evicted else ''}{'' if self.exact else ', approximate'}"
        )


@dataclass(frozen=True, slots=True)
class Preview:
    """What `prepare` would do now: `n_tokens` in the row, `n_to_decode` of them anew; `fits`: without an error.

    `n_free`: tokens that the row could still take afterwards, by its own length; `n_evicted`: tokens that would go
    before. What an `on_evict` hook would return for them is not known, and not counted.
    """

    n_tokens: int
    n_to_decode: int
    fits: bool
    n_free: int
    n_evicted: int = 0


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one session got out of a step: tokens decoded, or the error that kept it out; `done`: logits are ready."""

    n_decoded: int
    done: bool
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class StepReport:
    """One `llama_decode`: a result for each session of the batch, and its wall time."""

    results: dict[Session, StepResult]
    n_tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class RadixStats:
    """The cache of saved KV; hits and misses are counted in tokens.

    `n_bytes` of `max_bytes` are in use, `n_bytes_private` of them for one session alone. `kind`: "range" (any stretch
    is saved and used), "row" (whole rows are saved, their first parts used), "state" (whole rows, used whole), "" (no
    cache).
    """

    n_hit_tokens: int = 0
    n_miss_tokens: int = 0
    n_bytes: int = 0
    n_nodes: int = 0
    n_tokens: int = 0
    n_tokens_evicted: int = 0
    n_bytes_private: int = 0
    max_bytes: int = 0
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Stats:
    """The manager's counters: of slots, sessions and the cache as they are now, the rest as of the last finished call.

    Slots count sessions only; `n_sessions` have one, `n_parked` gave theirs up; of both together `n_approximate` have
    KV that is approximate, after an eviction. `n_cells_used` sums the tokens of all
    rows, `n_cells_unique` counts a shared cell once; `n_cells_total` None: each row has cells of its own (or needs
    none). Native operations are `llama_memory_seq_*` calls that change something. `n_tokens_evicted`: tokens that
    went to make room, of prompts and of replies; what went of a reply counts once, however often it begins anew.
    """

    slots_total: int
    slots_free: int
    prefix_tokens: int
    prefix_cached: bool
    n_sink: int
    eviction: str
    n_evictions: int = 0
    n_tokens_evicted: int = 0
    radix: RadixStats = field(default_factory=RadixStats)
    n_sessions: int = 0
    n_parked: int = 0
    n_approximate: int = 0
    n_cells_total: int | None = None
    n_cells_used: int = 0
    n_cells_unique: int = 0
    n_native_operations: int = 0
    n_decodes: int = 0
    n_tokens_decoded: int = 0
    n_tokens_reused: int = 0
    decode_seconds: float = 0.0
    operation_seconds: float = 0.0
    prepare_seconds: float = 0.0
