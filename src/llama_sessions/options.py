"""Options, checked at the door: every bound and every relation is checked here, once, before anything is touched."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import numpy as np

from .errors import OptionError

T = TypeVar("T")


def checked_int(name: str, value: object, low: int, high: int | None = None) -> int:
    """`value` as an int within `[low, high]`, else OptionError. Accepts numpy integers, refuses bools and floats."""
    if isinstance(value, bool | np.bool_):  # numpy 1's are integers, with a warning
        raise OptionError(f"{name} must be an integer, not {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise OptionError(f"{name} must be an integer, not {value!r}") from None
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"from {low} to {high}"
        raise OptionError(f"{name} must be {bounds}, not {number}")
    return number


def checked_float(name: str, value: object, low: float, high: float = math.inf) -> float:
    """`value` as a finite float within `[low, high]`, else OptionError. Accepts numpy's numbers, refuses bools."""
    try:
        if isinstance(value, bool | np.bool_ | str | bytes | bytearray):
            raise TypeError
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise OptionError(f"{name} must be a number, not {value!r}") from None
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or not low <= number <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise OptionError(f"{name} must be a finite number {bounds}, not {value!r}")
    return number


def checked_choice(name: str, value: T, choices: Sequence[T]) -> T:
    if value not in choices or isinstance(value, bool) != isinstance(choices[choices.index(value)], bool):
        raise OptionError(f"{name} must be one of {', '.join(map(repr, choices))}, not {value!r}")
    return value


def checked_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise OptionError(f"{name} must be True or False, not {value!r}")
    return value


def checked_text(name: str, value: object) -> str:
    """`value` as text that has a UTF-8 form, else OptionError."""
    if not isinstance(value, str):
        raise OptionError(f"{name} must be text (str), not {type(value).__name__}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:
        raise OptionError(
            f"{name} holds a lone surrogate at character {e.start} ({value[e.start]!r}), which has no UTF-8 form; "
            "decode the bytes it came from with errors='replace'"
        ) from None
    return value


def function_name(function: Callable[..., Any]) -> str:
    """What to call a function of the user's in a message."""
    return getattr(function, "__name__", None) or repr(function)


def checked_list(name: str, value: object) -> Sequence[Any]:
    """A list (or tuple), else OptionError."""
    if not isinstance(value, list | tuple):
        raise OptionError(f"{name} must be a list, not {type(value).__name__}")
    return value


def check_known(what: str, options: Mapping[str, Any], known: Sequence[str]) -> None:
    """OptionError for the first name that is not known."""
    for name in options:
        if name not in known:
            raise OptionError(f"unknown {what} {name!r}; known: {', '.join(known)}")


def build_options(cls: Callable[..., T], what: str, options: Mapping[str, Any]) -> T:
    """`cls(**options)`; OptionError for a name that it does not have."""
    check_known(what, options, [f.name for f in fields(cls)])  # type: ignore[arg-type]
    return cls(**options)


def checked_namespace(namespace: object) -> str | None:
    """`namespace` if it is text or None, else OptionError."""
    return None if namespace is None else checked_text("namespace", namespace)


@dataclass(frozen=True, slots=True, kw_only=True)
class RadixOptions:
    """How the cache of saved KV is kept: at most `max_bytes`, runs of at least `min_tokens`, thinned by `policy`.

    `policy`: "lru", "lfu", "gdsf" (what saves least time a byte goes first), or a function of your own from `Usage` to
    a number; what has the lowest goes first, leaves of the tree before what they hang on.

    What is restored from several pieces passes through a buffer beside it: an eighth of `max_bytes` (or 1 MiB) at most.
    """

    max_bytes: int = 512 * 2**20
    min_tokens: int = 1
    policy: str | Callable[..., Any] = "lru"

    def __post_init__(self) -> None:
        checked_int("max_bytes", self.max_bytes, 1)
        checked_int("min_tokens", self.min_tokens, 1)
        if not callable(self.policy):
            checked_choice("policy", self.policy, ("lru", "lfu", "gdsf"))


def default_headroom(n_tokens: int) -> int:
    """What is kept free for the reply of so many tokens, where nothing else is said."""
    return min(256, n_tokens // 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class ManagerOptions:
    """Options of a `ContextManager`.

    `headroom`: tokens that `prepare` keeps free for the reply (None: min(256, n_ctx_seq // 4)); what is longer than
    n_ctx_seq less that loses something first. `eviction`: what goes: "message" (whole turns, oldest first), "fifo"
    (the oldest tokens, a quarter of what can go at once), or a function from `Eviction` to token ranges. `n_sink`: the
    first tokens behind the system text stay in the row, whatever they belong to (the `sink_fn` hook says it for each
    session). A system text, messages pinned with `Session.pin_message` and the last user turn always stay; of a turn
    with many tool calls the oldest go, with their results, where there would be no room else.

    `overflow`: what becomes of the KV behind a hole. "shift": it moves up, for two native operations a hole and one
    rotation of K; where others share its cells it needs as many free ones. "gap": it stays at its positions, up to the
    length the model was trained for: for models that must not shift. "reprefill": it is decoded anew, which alone is
    exact. What cannot be had falls back to the next of the three, and the log says so once.

    `no_think`: ask the template for replies without thinking. `system_fallback` "user": where a template refuses a
    system text, it goes into the first user message. `radix`: keep saved KV (see `RadixOptions`). `idle_park_after_s`:
    park whoever is idle for longer. `log` False: nothing that llama.cpp prints goes to the log.
    """

    headroom: int | None = None
    n_sink: int = 4
    eviction: str | Callable[..., Any] = "message"
    overflow: str = "shift"
    no_think: bool = False
    system_fallback: str | None = None
    radix: bool | RadixOptions = True
    idle_park_after_s: float | None = None
    log: bool = True

    def __post_init__(self) -> None:
        if self.headroom is not None:
            checked_int("headroom", self.headroom, 0)
        checked_int("n_sink", self.n_sink, 0)
        if not callable(self.eviction):
            checked_choice("eviction", self.eviction, ("message", "fifo"))
        checked_choice("overflow", self.overflow, ("shift", "gap", "reprefill"))
        checked_bool("no_think", self.no_think)
        checked_choice("system_fallback", self.system_fallback, (None, "user"))
        if not isinstance(self.radix, bool | RadixOptions):
            raise OptionError(f"radix must be True, False or RadixOptions(...), not {self.radix!r}")
        if self.idle_park_after_s is not None:
            checked_float("idle_park_after_s", self.idle_park_after_s, 0.0)
        checked_bool("log", self.log)

    @classmethod
    def build(cls, options: Mapping[str, Any]) -> ManagerOptions:
        return build_options(cls, "option", options)

    @property
    def radix_options(self) -> RadixOptions | None:
        """How saved KV is kept; None: not at all."""
        if isinstance(self.radix, RadixOptions):
            return self.radix
        return RadixOptions() if self.radix else None

    def headroom_for(self, n_ctx_seq: int) -> int:
        """Tokens kept free for the reply."""
        if self.headroom is None:
            return default_headroom(n_ctx_seq)
        return checked_int("headroom", self.headroom, 0, n_ctx_seq - 1)

    def n_sink_for(self, n_ctx_seq: int) -> int:
        """Tokens behind the system text that an eviction leaves in the row."""
        return checked_int("n_sink", self.n_sink, 0, n_ctx_seq - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """Settings of the llama.cpp context behind `ContextManager.load`. None: llama.cpp's own choice, see `load`."""

    n_ctx: int | None = None
    max_sessions: int = 8
    n_batch: int = 512
    n_ubatch: int = 512
    n_threads: int | None = None
    n_gpu_layers: int = -1
    type_k: int | None = None
    type_v: int | None = None
    flash_attn: str | bool = "auto"
    swa_full: bool = True
    kv_unified: bool = True

    def __post_init__(self) -> None:
        # llama.cpp keeps positions and cells in int32; prefix and scratch take two of its 256 sequences.
        if self.n_ctx is not None:
            checked_int("n_ctx", self.n_ctx, 1, 2**31 - 256)
        checked_int("max_sessions", self.max_sessions, 1, 254)
        checked_int("n_batch", self.n_batch, 1, 2**20)
        checked_int("n_ubatch", self.n_ubatch, 1, 2**20)
        if self.n_threads is not None:
            checked_int("n_threads", self.n_threads, 1, 512)
        checked_int("n_gpu_layers", self.n_gpu_layers, -1, 2**31 - 1)
        for name in ("type_k", "type_v"):
            if getattr(self, name) is not None:
                checked_int(name, getattr(self, name), 0, 63)
        checked_choice("flash_attn", self.flash_attn, ("auto", True, False))
        checked_bool("swa_full", self.swa_full)
        checked_bool("kv_unified", self.kv_unified)
        if self.n_batch < self.n_seq_max:
            # llama.cpp aborts the process on this one (4 against 18, seen with 0.3.36).
            raise OptionError(
                f"n_batch={self.n_batch} is below the {self.n_seq_max} sequences of max_sessions={self.max_sessions} "
                f"(two are ours: prefix and scratch); raise n_batch to at least {self.n_seq_max}"
            )
        if self.n_ctx is not None and self.n_ctx < self.n_seq_max:
            raise OptionError(
                f"n_ctx={self.n_ctx} is below the {self.n_seq_max} sequences of max_sessions={self.max_sessions}; "
                "raise n_ctx: it is the total shared by all sessions"
            )

    @property
    def n_seq_max(self) -> int:
        return self.max_sessions + 2

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[LoadOptions, dict[str, Any]]:
        """Those of `options` that are of the context, checked, and the rest, which must be `ManagerOptions`."""
        mine = {f.name for f in fields(cls)}
        known = [*(f.name for f in fields(cls)), *(f.name for f in fields(ManagerOptions))]
        check_known("option", options, known)
        return cls(**{k: v for k, v in options.items() if k in mine}), {
            k: v for k, v in options.items() if k not in mine
        }
