"""Words shared by all layers: what a context can do, and the protocols behind which llama.cpp stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

TokenArray: TypeAlias = npt.NDArray[np.int32]
FloatArray: TypeAlias = npt.NDArray[np.float32]
ByteArray: TypeAlias = npt.NDArray[np.uint8]
Message: TypeAlias = dict[str, Any]

ROLES = ("system", "user", "assistant", "tool")


class MemoryKind(str, Enum):
    """What a model keeps per sequence; decides which moves are right."""

    FULL = "full"  # attention over everything
    WINDOW = "window"  # some layers see only the last n_swa tokens
    RECURRENT = "recurrent"  # one state a sequence
    HYBRID = "hybrid"  # attention and recurrent layers


class BlobKind(str, Enum):
    """What can be saved of a row, and what a blob can be used for."""

    RANGE = "range"  # any range can be saved, and any part of it used: attention over everything, in a unified cache
    ROW = "row"  # only whole rows are saved, and any first part of them can be used: streams
    STATE = "state"  # only whole rows are saved, and used only whole: recurrent layers


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What this context can do, read from llama.cpp after its creation.

    `n_ctx`: KV cells in all (one sequence's, times the streams, where not unified); `n_ctx_seq`: tokens one session
    can hold; `n_swa`: window in tokens, 0 without one; `n_cells`: cells that all rows share (None: each row has its
    own); `n_row_max`: most tokens a row can hold (None: nothing stops it); `kv_bytes_per_token`: bytes of K and V one
    token takes, 0 where that is not proportional; `fingerprint`: tells this model and its vocabulary from others.
    """

    kind: MemoryKind
    unified: bool
    n_ctx: int
    n_ctx_seq: int
    n_ctx_train: int
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    n_vocab: int
    n_swa: int
    swa_full: bool
    can_shift: bool
    shift_refused_because: str
    kv_bytes_per_token: int
    model: str
    fingerprint: str
    n_cells: int | None = field(init=False)
    n_row_max: int | None = field(init=False)

    def __post_init__(self) -> None:
        grows_for_ever = self.kind is MemoryKind.RECURRENT
        object.__setattr__(self, "n_cells", self.n_ctx if self.unified and not grows_for_ever else None)
        object.__setattr__(self, "n_row_max", None if grows_for_ever else self.n_ctx_seq)

    @property
    def keeps_state(self) -> bool:
        """Whether part of the memory is a state that cannot go back."""
        return self.kind in (MemoryKind.RECURRENT, MemoryKind.HYBRID)

    @property
    def can_have_holes(self) -> bool:
        """Whether tokens can be taken out of the middle of a row; else what stays is decoded anew."""
        return self.kind is MemoryKind.FULL or (self.kind is MemoryKind.WINDOW and self.swa_full)


class Memory(Protocol):
    """llama.cpp's memory of one context. Ranges are half-open `[p0, p1)` in positions; None is an open end."""

    def seq_rm(self, seq_id: int, p0: int | None = None, p1: int | None = None) -> bool: ...
    def seq_cp(self, src: int, dst: int, p0: int | None = None, p1: int | None = None) -> None: ...
    def seq_add(self, seq_id: int, p0: int | None, p1: int | None, delta: int) -> None: ...
    def pos_min(self, seq_id: int) -> int | None: ...
    def pos_max(self, seq_id: int) -> int | None: ...
    def clear(self) -> None: ...


@dataclass(slots=True)  # not frozen: that makes making one four times as dear, and there is one a token
class Run:
    """Consecutive tokens for one sequence in a batch: positions `pos .. pos + len(tokens)`.

    `tokens`: an array, or, for a single one, a tuple: numpy costs more than that token's whole bookkeeping.
    """

    seq_id: int
    pos: int
    tokens: TokenArray | tuple[int]
    wants_logits: bool  # of its last token


class Context(Protocol):
    """A llama.cpp context, or something that behaves like one (`testing.FakeContext`).

    `state_size`, `save_state`, `load_state`: the KV of one sequence as bytes; no shift and no copy between streams may
    be pending.
    """

    @property
    def capabilities(self) -> Capabilities: ...
    @property
    def memory(self) -> Memory: ...
    @property
    def last_error(self) -> str: ...
    def decode(self, runs: Sequence[Run]) -> int: ...
    def logits(self, index: int) -> FloatArray: ...
    def state_size(self, seq_id: int) -> int: ...
    def save_state(self, seq_id: int, out: ByteArray) -> None: ...
    def load_state(self, seq_id: int, blob: ByteArray) -> None: ...
    def close(self) -> None: ...


CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""A token that may be next, as llama.cpp's samplers take them (`llama_token_data`)."""


class Constraint(Protocol):
    """What a reply must be, token by token. `restrict` sets the logits of what is not allowed to -inf in the first `n`
    of an array of `CANDIDATE`."""

    def allows(self, token: int) -> bool: ...
    def restrict(self, candidates: npt.NDArray[Any], n: int) -> None: ...
    def accept(self, token: int) -> None: ...


class Vocab(Protocol):
    """Tokens and their text. `control` maps each control token's text to its id."""

    @property
    def n_tokens(self) -> int: ...
    @property
    def bos(self) -> int | None: ...
    @property
    def adds_bos(self) -> bool: ...
    @property
    def adds_space_prefix(self) -> bool: ...
    @property
    def control(self) -> dict[str, int]: ...
    def strips(self, token: int) -> tuple[bool, bool]: ...
    def tokenize(self, text: str, *, special: bool = False) -> TokenArray: ...
    def piece(self, token: int) -> bytes: ...
    def is_eog(self, token: int) -> bool: ...


class Formatter(Protocol):
    """Renders messages to text (a chat template)."""

    def render(self, messages: Sequence[Message], *, reply_header: bool = True, **variables: Any) -> str: ...
