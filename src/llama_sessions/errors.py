"""The error tree.

    LlamaSessionsError
    ├── OptionError (ValueError)     an argument is wrong; nothing was touched
    ├── StateError (RuntimeError)    right call, wrong moment
    ├── Cancelled                    a hook or a caller asked to stop; what was decoded stays
    ├── QueueFull                    .waiting, .limit
    ├── CapacityError                .needed, .available, .unit ("cells", "tokens" or "slots")
    │   ├── NoFreeSlot
    │   └── ContextOverflow
    ├── NativeError                  .call, .code: a llama.cpp function failed
    │   ├── DecodeError
    │   └── SnapshotError
    ├── TemplateError                the chat template raised, or does not parse
    └── ModelError                   the file is no model that can chat

Every message says what happened, with numbers, and what to do.
"""

from __future__ import annotations


class LlamaSessionsError(Exception):
    """Base class of everything this library raises on purpose."""


class OptionError(LlamaSessionsError, ValueError):
    """An argument or option is wrong. Nothing was touched."""


class StateError(LlamaSessionsError, RuntimeError):
    """The call is right but not now: closed, busy, another manager's session, a forked process."""


class Cancelled(LlamaSessionsError):
    """A hook or a caller asked to stop. What was decoded so far stays in the row."""


class QueueFull(LlamaSessionsError):
    """A bounded queue refused one more request."""

    def __init__(self, waiting: int, limit: int) -> None:
        self.waiting, self.limit = waiting, limit
        super().__init__(f"the queue is full: {waiting} waiting, limit {limit}; wait with wait_s, or raise max_waiting")


class CapacityError(LlamaSessionsError):
    """Something finite ran out: `needed` of `unit` were asked for, `available` were there."""

    def __init__(self, message: str, *, needed: int, available: int, unit: str) -> None:
        self.needed, self.available, self.unit = needed, available, unit
        super().__init__(message)


class NoFreeSlot(CapacityError):
    """Every slot is in use."""

    def __init__(self, capacity: int) -> None:
        super().__init__(
            f"no free slot: {capacity} of {capacity} in use; raise max_sessions, release or park a session",
            needed=1,
            available=0,
            unit="slots",
        )


class ContextOverflow(CapacityError):
    """One session is longer than what one session can hold (`n_ctx_seq` tokens)."""

    def __init__(self, what: str, *, needed: int, available: int, remedy: str = "") -> None:
        remedy = remedy or "shorten the messages or the system text, unpin messages, or raise n_ctx"
        super().__init__(
            f"{what}: {needed} tokens do not fit into the {available} of one session; {remedy}",
            needed=needed,
            available=available,
            unit="tokens",
        )


class NativeError(LlamaSessionsError):
    """A llama.cpp call failed; `code` is what it returned, `detail` its last line of error log."""

    def __init__(self, call: str, code: int, message: str, detail: str = "") -> None:
        self.call, self.code, self.detail = call, code, detail
        super().__init__(f"{call} returned {code}: {message}" + (f" (llama.cpp: {detail})" if detail else ""))


class DecodeError(NativeError):
    """`llama_decode` failed."""


class SnapshotError(NativeError):
    """Saving or restoring KV failed."""


class TemplateError(LlamaSessionsError):
    """The chat template does not parse, raised, or refuses what it was given."""


class ModelError(LlamaSessionsError):
    """The file cannot be loaded, or is no model that can chat."""
