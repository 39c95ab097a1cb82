"""llama.cpp's memory in Python, rules and traps included: for your tests and ours, with no model and no C++.

    from llama_sessions import ContextManager
    from llama_sessions.testing import fake_parts

    cm = ContextManager.over(fake_parts(n_ctx=512, max_sessions=4))

What would abort the process raises `FakeAbort`; what llama.cpp gets silently wrong is just as wrong here: a cell's
content depends on every cell that was visible when it was computed, so logits that come out equal to those of a fresh
context prove that the right cells were there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

from .errors import SnapshotError
from .loading import Parts
from .types import ByteArray, Capabilities, FloatArray, MemoryKind, Message, Run, TokenArray

_CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_STATE_HEAD, _STATE_CELL = 8, 16  # bytes of a saved sequence, and of a cell in it
_N_VOCAB = 256 + len(_CONTROL)


class FakeAbort(BaseException):
    """llama.cpp would have killed the process here. No handler for Exception catches it, as none would that."""


@dataclass(slots=True)
class _Cell:
    pos: int
    owners: set[int]
    stream: int
    place: int  # in the buffer of its stream, where its content lies
    shift: int = 0  # positions moved but not yet rotated


def _mix(x: int) -> int:
    """splitmix64: a well-spread 64-bit number from another."""
    x = (x + 0x9E3779B97F4A7C15) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return x ^ (x >> 31)


class FakeMemory:
    """Cells with positions and owners.

    - `seq_cp` shares cells in a unified cache, and takes the whole state where there is one. Between streams it aborts
      for a part of a row; of a whole one it copies positions, and at the next decode, buffer over buffer, what is then
      in them: a save of the copy before that, or a load on either side, goes wrong.
    - `seq_add` moves a shared cell for every owner; K is rotated at the next decode.
    - `seq_rm` frees a cell when its last owner lets go; a recurrent state refuses to go back.
    - A window model gives cells that have left every owner's window to whoever needs one; a save leaves them out.
    """

    def __init__(self, capabilities: Capabilities) -> None:
        self.caps = capabilities
        self.cells: list[_Cell] = []
        self.buffers: dict[int, dict[int, int]] = {}
        """For each stream what its places hold, or held last."""
        self.n_operations = 0
        self._has_streams = not capabilities.unified and capabilities.kind is not MemoryKind.RECURRENT
        self._copies: list[tuple[int, int]] = []  # streams, put off until the next decode

    def _check(self, *seq_ids: int) -> None:
        for seq_id in seq_ids:
            if not 0 <= seq_id < self.caps.n_seq_max:
                raise FakeAbort(f"seq_id {seq_id} of {self.caps.n_seq_max}")

    def row(self, seq_id: int) -> list[_Cell]:
        """The cells of a sequence by position."""
        return sorted((c for c in self.cells if seq_id in c.owners), key=lambda c: c.pos)

    def stream(self, seq_id: int) -> int:
        """The stream of a sequence: its own, or the one that there is."""
        return seq_id if self._has_streams else 0

    def content(self, cell: _Cell) -> int:
        """What lies at its place: where a copy is pending, what was there before."""
        return self.buffers.get(cell.stream, {}).get(cell.place, 0)

    def add(self, seq_id: int, pos: int, content: int) -> None:
        """A cell of its own at the first free place."""
        stream = self.stream(seq_id)
        taken = {cell.place for cell in self.cells if cell.stream == stream}
        place = next(place for place in count() if place not in taken)
        self.cells.append(_Cell(pos, {seq_id}, stream, place))
        self.buffers.setdefault(stream, {})[place] = content

    def update(self) -> None:
        """What llama.cpp has put off until a decode: copies between streams, then the rotation of what was shifted."""
        for src, dst in self._copies:
            self.buffers[dst] = dict(self.buffers.get(src, {}))
        self._copies.clear()
        for cell in self.cells:
            cell.shift = 0

    def seq_rm(self, seq_id: int, p0: int | None = None, p1: int | None = None) -> bool:
        self._check(seq_id)
        self.n_operations += 1
        low, high = p0 or 0, 2**31 if p1 is None else p1
        row = self.row(seq_id)
        if self.caps.keeps_state and row and not (low == 0 and high > row[-1].pos) and low <= row[-1].pos < high:
            return False
        if self.caps.kind is MemoryKind.RECURRENT and row and high <= row[-1].pos and low > 0:
            return True  # the middle of a state: says yes and does nothing
        self.let_go(seq_id, [cell for cell in row if low <= cell.pos < high])
        return True

    def let_go(self, seq_id: int, cells: list[_Cell]) -> None:
        """Take an owner from cells; those that have none left are free."""
        for cell in cells:
            cell.owners.discard(seq_id)
        self.cells = [c for c in self.cells if c.owners]

    def seq_cp(self, src: int, dst: int, p0: int | None = None, p1: int | None = None) -> None:
        self._check(src, dst)
        self.n_operations += 1
        low, high = p0 or 0, 2**31 if p1 is None else p1
        row = self.row(src)
        if not self.caps.unified and not self.caps.keeps_state and row and (low > 0 or high <= row[-1].pos):
            raise FakeAbort('seq_cp of a part of a stream ("only supported for full KV buffers")')
        if src == dst:
            return
        if self.caps.keeps_state or not self.caps.unified:  # whole or not at all
            self.let_go(dst, self.row(dst))
            low, high = 0, 2**31
        if self._has_streams:
            self.cells += [_Cell(c.pos, {dst}, dst, c.place, c.shift) for c in row]
            self._copies.append((src, dst))
        elif self.caps.kind is MemoryKind.RECURRENT:
            for cell in row:
                self.add(dst, cell.pos, self.content(cell))
        else:
            for cell in row:
                if low <= cell.pos < high:
                    cell.owners.add(dst)

    def seq_add(self, seq_id: int, p0: int | None, p1: int | None, delta: int) -> None:
        self._check(seq_id)
        if not self.caps.can_shift:
            raise FakeAbort("seq_add where llama_memory_can_shift is false")
        self.n_operations += 1
        low, high = p0 or 0, 2**31 if p1 is None else p1
        for cell in self.row(seq_id):
            if low <= cell.pos < high:
                cell.pos += delta
                cell.shift += delta

    def pos_min(self, seq_id: int) -> int | None:
        self._check(seq_id)
        row = self.row(seq_id)
        if not row:
            return None
        return row[-1].pos if self.caps.keeps_state else row[0].pos  # a state has its last one alone

    def pos_max(self, seq_id: int) -> int | None:
        self._check(seq_id)
        row = self.row(seq_id)
        return row[-1].pos if row else None

    def clear(self) -> None:
        self.cells = []
        self._copies.clear()

    def room_for(self, seq_id: int, n: int) -> bool:
        """Make room for `n` cells; on a window model cells outside every owner's window are taken first."""
        if self.caps.kind is MemoryKind.RECURRENT:
            return True
        if not self.caps.unified:
            return len(self.row(seq_id)) + n <= self.caps.n_ctx_seq
        if self.caps.kind is MemoryKind.WINDOW and len(self.cells) + n > self.caps.n_ctx:
            ends = {s: self.row(s)[-1].pos for c in self.cells for s in c.owners}
            inside = [c for c in self.cells if any(c.pos > ends[s] - self.caps.n_swa for s in c.owners)]
            if len(inside) + n <= self.caps.n_ctx:
                self.cells = inside
        return len(self.cells) + n <= self.caps.n_ctx


@dataclass(slots=True)
class FakeContext:
    """Decodes by hashing. `codes`: return codes that the next decodes give instead of doing their work."""

    capabilities: Capabilities
    memory: FakeMemory = field(init=False)
    last_error: str = ""
    codes: deque[int] = field(default_factory=deque)
    n_decoded: int = 0
    closed: bool = False
    fails_to_load: bool = False
    _logits: dict[int, FloatArray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.memory = FakeMemory(self.capabilities)

    def decode(self, runs: Sequence[Run]) -> int:
        n = sum(len(run.tokens) for run in runs)
        if n > self.capabilities.n_batch:
            raise FakeAbort(f"a batch of {n} tokens with n_batch {self.capabilities.n_batch}")
        if self.codes:
            self.last_error = "an injected failure"
            return self.codes.popleft()
        memory = self.memory
        for run in runs:
            end = memory.pos_max(run.seq_id)
            if end is not None and run.pos != end + 1:
                return -1
        memory.update()
        before = [_Cell(c.pos, set(c.owners), c.stream, c.place, c.shift) for c in memory.cells]
        buffers = {stream: dict(places) for stream, places in memory.buffers.items()}
        self._logits = {}
        at = 0
        for run in runs:
            if not memory.room_for(run.seq_id, len(run.tokens)):
                memory.cells, memory.buffers = before, buffers
                return 1
            content = 0
            for i, token in enumerate(run.tokens):
                content = self._compute(run.seq_id, run.pos + i, int(token))
            at += len(run.tokens)
            if run.wants_logits:
                rng = np.random.default_rng(content)
                self._logits[at - 1] = rng.standard_normal(self.capabilities.n_vocab).astype(np.float32)
        self.n_decoded += n
        return 0

    def _compute(self, seq_id: int, pos: int, token: int) -> int:
        """A new cell for `token`: its content is a hash of all it sees, by distance."""
        caps, seen = self.capabilities, self.memory.row(seq_id)
        if caps.kind is MemoryKind.WINDOW:
            seen = [c for c in seen if c.pos > pos - caps.n_swa]
        if caps.kind is MemoryKind.RECURRENT:
            seen = seen[-1:]
        total = 0
        places = self.memory.buffers.get(self.memory.stream(seq_id), {})
        for cell in seen:
            total = (total + _mix(places[cell.place] ^ _mix(pos - cell.pos))) & (2**64 - 1)
        content = _mix(total ^ _mix(token + 1))
        if caps.kind is MemoryKind.RECURRENT:
            self.memory.let_go(seq_id, self.memory.row(seq_id))
        self.memory.add(seq_id, pos, content)
        return content

    def logits(self, index: int) -> FloatArray:
        if index not in self._logits:
            raise FakeAbort(f"llama_sampler_sample on the NULL logits of batch index {index}")
        return self._logits[index]

    def state_size(self, seq_id: int) -> int:
        return _STATE_HEAD + _STATE_CELL * len(self._saved(seq_id))

    def _saved(self, seq_id: int) -> list[_Cell]:
        """The cells that a save takes along: of a window model only those that its last token sees."""
        row = self.memory.row(seq_id)
        if self.capabilities.kind is not MemoryKind.WINDOW:
            return row
        return [cell for cell in row if cell.pos > row[-1].pos - self.capabilities.n_swa]

    def save_state(self, seq_id: int, out: ByteArray) -> None:
        """A shift or a copy that is pending is not in it: what comes back is wrong, as with llama.cpp."""
        cells = np.array([(cell.pos, self._seen_by_save(cell)) for cell in self._saved(seq_id)], np.uint64)
        out[:_STATE_HEAD] = np.array([len(cells)], np.uint64).view(np.uint8)
        out[_STATE_HEAD:] = cells.reshape(-1).view(np.uint8)

    def _seen_by_save(self, cell: _Cell) -> int:
        content = self.memory.content(cell)
        return _mix(content ^ _mix(cell.shift)) if cell.shift else content

    def load_state(self, seq_id: int, blob: ByteArray) -> None:
        """Cells of its own for everything; where there are none the sequence is left with a part."""
        memory = self.memory
        memory.seq_rm(seq_id)
        (n,) = blob[:_STATE_HEAD].copy().view(np.uint64).tolist()
        if self.fails_to_load or len(blob) != _STATE_HEAD + _STATE_CELL * n or not memory.room_for(seq_id, n):
            memory.add(seq_id, 0, 0)
            raise SnapshotError("llama_state_seq_set_data_ext", 0, "there is no room, or the blob is damaged")
        for pos, content in blob[_STATE_HEAD:].copy().view(np.uint64).reshape(n, 2).tolist():
            memory.add(seq_id, pos, content)

    def close(self) -> None:
        self.closed = True


class FakeVocab:
    """A token a byte, and ChatML's control tokens behind them."""

    n_tokens = _N_VOCAB
    bos: int | None = None
    adds_bos = False
    adds_space_prefix = False

    def __init__(self) -> None:
        self.control = {text: 256 + i for i, text in enumerate(_CONTROL)}

    def strips(self, token: int) -> tuple[bool, bool]:
        return False, False

    def tokenize(self, text: str, *, special: bool = False) -> TokenArray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < 256 else _CONTROL[token - 256].encode()

    def is_eog(self, token: int) -> bool:
        return token > 256


class FakeFormatter:
    """ChatML."""

    def render(self, messages: Sequence[Message], *, reply_header: bool = True, **variables: Any) -> str:
        text = "".join(f"<|im_start|>{m['role']}\n{m.get('content') or ''}<|im_end|>\n" for m in messages)
        return text + "<|im_start|>assistant\n" if reply_header else text


def fake_capabilities(
    *,
    n_ctx: int = 512,
    max_sessions: int = 4,
    n_batch: int = 64,
    kind: MemoryKind = MemoryKind.FULL,
    unified: bool = True,
    n_swa: int = 32,
    n_ctx_train: int | None = None,
) -> Capabilities:
    """Capabilities of a context with a prefix slot, a scratch slot and `max_sessions` others."""
    n_seq_max = max_sessions + 2
    can_shift = kind in (MemoryKind.FULL, MemoryKind.WINDOW)
    return Capabilities(
        kind=kind,
        unified=unified,
        n_ctx=n_ctx,
        n_ctx_seq=n_ctx if unified else n_ctx // n_seq_max,
        n_ctx_train=n_ctx if n_ctx_train is None else n_ctx_train,
        n_batch=n_batch,
        n_ubatch=n_batch,
        n_seq_max=n_seq_max,
        n_vocab=_N_VOCAB,
        n_swa=n_swa if kind is MemoryKind.WINDOW else 0,
        swa_full=True,
        can_shift=can_shift,
        shift_refused_because="" if can_shift else "a recurrent state does not move",
        kv_bytes_per_token=64,
        model="fake",
        fingerprint="fake",
    )


def fake_parts(**options: Any) -> Parts:
    """Parts for `ContextManager.over`; options as in `fake_capabilities`."""
    context = FakeContext(fake_capabilities(**options))
    return Parts(context, FakeVocab(), FakeFormatter(), context.close)


def fresh_logits(capabilities: Capabilities, tokens: TokenArray) -> FloatArray:
    """What a fresh fake context says after a prefill of `tokens`: the oracle for everything above."""
    context = FakeContext(capabilities)
    at = 0
    for i in range(0, len(tokens), capabilities.n_batch):
        part = tokens[i : i + capabilities.n_batch]
        at = len(part) - 1
        if context.decode([Run(0, i, part, wants_logits=True)]) != 0:
            raise FakeAbort("the oracle has no room")
    return context.logits(at)
