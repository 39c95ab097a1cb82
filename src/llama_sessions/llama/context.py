"""A llama.cpp context: created with settings that cannot abort, decoded through checked batches."""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp
import numpy as np

from ..errors import ModelError, OptionError, StateError
from ..options import LoadOptions, checked_int
from ..types import ByteArray, Capabilities, FloatArray, MemoryKind, Run
from . import log
from .batch import Batch
from .memory import LlamaMemory
from .model import Model
from .snapshot import load_state, save_state, state_size

# Types llama.cpp takes for K and V, with bytes a value: f32 f16 q4_0 q4_1 q5_0 q5_1 q8_0 iq4_nl bf16.
KV_TYPES = {0: 4.0, 1: 2.0, 2: 18 / 32, 3: 20 / 32, 6: 22 / 32, 7: 24 / 32, 8: 34 / 32, 20: 18 / 32, 30: 2.0}
_F16, _BF16 = 1, 30
_BLOCK = 32  # numbers that each of the quantised ones packs together
_DEFAULT_CTX = 8192
_N_VIEWS = 512  # places of the logits buffer that are remembered
_FIRST_PAGE = 4096  # no address below it is ever valid

_computed_in: set[int] = set()  # where llama.cpp has computed with several threads: this process, or one it came from


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """All cores of a small machine, half of a large one's (the other half are mostly hyper-threads)."""
    cores = usable_cores()
    return cores if cores <= 4 else cores // 2


def _shift_refused(model: Model, kind: MemoryKind, native: bool, k_type: int | None, plain_rope: bool) -> str:
    """Why positions must not be shifted; empty where they may.

    A shift multiplies every K of the whole cache by the rope magnitude, so it is right only where that is 1.
    """
    if kind in (MemoryKind.RECURRENT, MemoryKind.HYBRID):
        return "a recurrent state does not move"
    if not native:
        return "llama.cpp says so (llama_memory_can_shift)"
    if k_type is None:
        return "the type of K is not known for a context made elsewhere"
    if k_type == _BF16:
        return "K is bf16"
    if KV_TYPES[k_type] < KV_TYPES[_F16] and model.head_size("key") == _BLOCK:
        return f"K is quantised in heads of {_BLOCK} numbers, of which a shift crashes the process"
    scaling = model.meta("{arch}.rope.scaling.type") or "none"
    factor = model.meta_number("{arch}.rope.scaling.attn_factor")
    if scaling not in ("none", "linear") or factor not in (None, 1.0) or not plain_rope:
        return f"the rope magnitude may not be 1 (scaling {scaling!r}, attn_factor {factor})"
    return ""


def read_capabilities(
    handle: Any, model: Model, *, k_type: int | None, v_type: int | None, swa_full: bool | None,
    unified: bool | None, plain_rope: bool,
) -> Capabilities:  # fmt: skip
    """What the context says of itself after its creation; what was asked for counts for nothing."""
    if llama_cpp.llama_model_is_recurrent(model.handle):
        kind = MemoryKind.RECURRENT
    elif llama_cpp.llama_model_is_hybrid(model.handle):
        kind = MemoryKind.HYBRID
    else:
        kind = MemoryKind.WINDOW if llama_cpp.llama_model_n_swa(model.handle) > 0 else MemoryKind.FULL
    n_ctx, n_seq_max = int(llama_cpp.llama_n_ctx(handle)), int(llama_cpp.llama_n_seq_max(handle))
    n_ctx_seq = int(llama_cpp.llama_n_ctx_seq(handle))
    native_shift = bool(llama_cpp.llama_memory_can_shift(llama_cpp.llama_get_memory(handle)))
    refused = _shift_refused(model, kind, native_shift, k_type, plain_rope)
    values = 0 if kind is MemoryKind.RECURRENT else model.kv_values_per_token()
    mean_bytes = (KV_TYPES[k_type or _F16] + KV_TYPES[v_type or _F16]) / 2
    return Capabilities(
        kind=kind,
        unified=(n_seq_max == 1 or n_ctx_seq == n_ctx) if unified is None else unified or n_seq_max == 1,
        n_ctx=n_ctx,
        n_ctx_seq=n_ctx_seq,
        n_ctx_train=model.n_ctx_train,
        n_batch=int(llama_cpp.llama_n_batch(handle)),
        n_ubatch=int(llama_cpp.llama_n_ubatch(handle)),
        n_seq_max=n_seq_max,
        n_vocab=int(llama_cpp.llama_vocab_n_tokens(model.vocab_handle)),
        n_swa=max(0, int(llama_cpp.llama_model_n_swa(model.handle))),
        swa_full=bool(swa_full),
        can_shift=not refused,
        shift_refused_because=refused,
        kv_bytes_per_token=int(values * mean_bytes),
        model=model.description,
        fingerprint=model.fingerprint,
    )


class LlamaContext:
    """Over a `llama_context_p`; owned ones are freed by `close`, or at exit."""

    def __init__(self, handle: Any, capabilities: Capabilities, *, owned: bool, model: Model) -> None:
        self.handle = handle
        self._leaves_threads = _n_threads(handle) > 1
        self.capabilities = capabilities
        self.memory = LlamaMemory(llama_cpp.llama_get_memory(handle), capabilities)
        self.last_error = ""
        self.model = model  # the weights must outlive the context
        self._batch = Batch(capabilities.n_batch)
        self._n_decoded = 0
        self._vocab_row: Any = ctypes.c_float * capabilities.n_vocab
        self._views: dict[int, FloatArray] = {}
        pid = os.getpid()

        def free(model: Model = model) -> None:  # which keeps the weights until the context is gone
            # Without its weights a context cannot be freed in safety: it is left behind.
            if owned and os.getpid() == pid and not model.is_gone:
                with log.capture:
                    llama_cpp.llama_free(handle)

        self._finalizer = weakref.finalize(self, free)

    @classmethod
    def create(cls, model: Model, options: LoadOptions) -> LlamaContext:
        """A context with the settings of `options`. Raises ModelError where llama.cpp refuses."""
        k_type = _F16 if options.type_k is None else options.type_k
        v_type = _F16 if options.type_v is None else options.type_v
        for name, value in (("type_k", k_type), ("type_v", v_type)):
            if value not in KV_TYPES:
                raise OptionError(f"{name}={value} is no KV type of llama.cpp; known ggml types: {sorted(KV_TYPES)}")
        n_ctx = options.n_ctx or min(model.n_ctx_train or _DEFAULT_CTX, _DEFAULT_CTX)
        n_ctx = max(n_ctx, options.n_seq_max)
        n_cells = n_ctx if options.kv_unified else options.n_seq_max * _padded(-(-n_ctx // options.n_seq_max))
        n_values = model.kv_values_per_token() * n_cells
        _check_it_fits_memory(n_ctx, n_values * (KV_TYPES[k_type] + KV_TYPES[v_type]) / 2)
        p = llama_cpp.llama_context_default_params()
        p.n_ctx, p.n_batch = n_ctx, min(options.n_batch, max(n_ctx, options.n_seq_max))
        p.n_ubatch, p.n_seq_max = min(options.n_ubatch, p.n_batch), options.n_seq_max
        p.n_threads = p.n_threads_batch = options.n_threads or default_threads()
        _check_threads_are_here(p.n_threads)
        p.type_k, p.type_v = k_type, v_type
        p.flash_attn_type = {"auto": -1, True: 1, False: 0}[options.flash_attn]
        p.swa_full, p.kv_unified = options.swa_full, options.kv_unified
        p.no_perf = True
        handle = cls._checked(lambda: llama_cpp.llama_init_from_model(model.handle, p), model)
        capabilities = read_capabilities(
            handle, model, k_type=k_type, v_type=v_type, swa_full=options.swa_full, unified=options.kv_unified,
            plain_rope=True,
        )  # fmt: skip
        return cls(handle, capabilities, owned=True, model=model)

    @staticmethod
    def _checked(init: Callable[[], Any], model: Model) -> Any:
        log.install()
        with log.capture as captured:
            handle = init()
            detail = captured.last_error
        if not handle:
            raise ModelError(f"llama.cpp could not make a context for {model.name}: {detail or 'no reason given'}")
        if not llama_cpp.llama_get_memory(handle) or not llama_cpp.llama_get_causal_attn(handle):
            with log.capture:
                llama_cpp.llama_free(handle)
            raise ModelError(f"{model.name} keeps no KV to chat with (an embedding model?); use a decoder-only model")
        return handle

    @classmethod
    def adopt(cls, handle: Any, vocab_handle: Any) -> LlamaContext:
        """Over a context of the caller's: cleared, never freed by us."""
        _check_pointer("ctx", handle)
        _check_pointer("vocab", vocab_handle)
        model = Model(llama_cpp.llama_get_model(handle), owned=False, name="the context's model")
        if _address(model.vocab_handle) != _address(vocab_handle):
            raise OptionError("vocab is not that of the context's model; pass llama_model_get_vocab(model)")
        if not llama_cpp.llama_get_memory(handle) or not llama_cpp.llama_get_causal_attn(handle):
            raise ModelError("the context keeps no KV to chat with (an embedding model?); use a decoder-only model")
        _check_threads_are_here(_n_threads(handle))
        log.install()
        capabilities = read_capabilities(
            handle, model, k_type=None, v_type=None, swa_full=None, unified=None, plain_rope=False
        )
        context = cls(handle, capabilities, owned=False, model=model)
        context.memory.clear()
        return context

    def decode(self, runs: Sequence[Run]) -> int:
        """One `llama_decode`; returns its code (0 ok, 1 no room, -1 invalid, 2 aborted, -2 no memory, -3 failed).

        `last_error` then holds llama.cpp's last error line. Raises OptionError for what would abort: more than
        n_batch tokens, ids out of range.
        """
        caps = self.capabilities
        n = 0
        for run in runs:
            n += len(run.tokens)
        if not 0 < n <= caps.n_batch:
            raise OptionError(f"a batch must have 1 to {caps.n_batch} tokens (n_batch), not {n}")
        for run in runs:
            tokens = run.tokens
            low, high = (tokens[0], tokens[0]) if isinstance(tokens, tuple) else (tokens.min(), tokens.max())
            if low < 0 or high >= caps.n_vocab:
                raise OptionError(f"token {low if low < 0 else high} is outside the vocabulary of {caps.n_vocab}")
            if not 0 <= run.seq_id < caps.n_seq_max or run.pos < 0:
                raise OptionError(f"sequence {run.seq_id} at position {run.pos} is outside {caps.n_seq_max} sequences")
        self._n_decoded = 0
        self._batch.fill(runs)
        if self._leaves_threads:
            _computed_in.add(os.getpid())
            self._leaves_threads = False  # known from now on
        with log.capture as captured:
            code = int(llama_cpp.llama_decode(self.handle, self._batch.native))
            self.last_error = captured.last_error
        if code == 0:
            self._n_decoded = n
        return code

    def logits(self, index: int) -> FloatArray:
        """(n_vocab,) float32 view of the logits of batch token `index`; valid until the next decode."""
        if not 0 <= index < self._n_decoded:
            raise StateError(f"no logits at batch index {index}: the last decode had {self._n_decoded} tokens")
        if not self._batch.wishes[index]:
            raise StateError(f"no logits were asked for at batch index {index}")
        # Such an index is never refused, so there is no log line to catch.
        address = ctypes.addressof(llama_cpp.llama_get_logits_ith(self.handle, index).contents)
        # Nearly always the same few places; np.ctypeslib.as_array would make a new array once a token.
        view = self._views.get(address)
        if view is None:
            if len(self._views) >= _N_VIEWS:
                self._views.clear()
            view = self._views[address] = np.frombuffer(self._vocab_row.from_address(address), np.float32)
        return view

    def state_size(self, seq_id: int) -> int:
        """Bytes of a sequence's KV."""
        return state_size(self.handle, self._checked_seq(seq_id))

    def save_state(self, seq_id: int, out: ByteArray) -> None:
        """Write a sequence's KV into `out`, which must be exactly `state_size` long, else SnapshotError."""
        save_state(self.handle, self._checked_seq(seq_id), out)

    def load_state(self, seq_id: int, blob: ByteArray) -> None:
        """Replace a sequence by what a blob of this context says. SnapshotError: empty the sequence afterwards."""
        load_state(self.handle, self._checked_seq(seq_id), blob)

    def _checked_seq(self, seq_id: int) -> int:
        return checked_int("seq_id", seq_id, 0, self.capabilities.n_seq_max - 1)

    def close(self) -> None:
        """Free the context, if it is ours. Again: nothing."""
        self._finalizer()


def _n_threads(handle: Any) -> int:
    return int(max(llama_cpp.llama_n_threads(handle), llama_cpp.llama_n_threads_batch(handle)))


def _check_threads_are_here(n_threads: int) -> None:
    """StateError in a forked child where a decode would wait for ever: OpenMP's threads stay behind, and it counts on
    them (seen with libgomp; one thread alone needs none)."""
    if n_threads > 1 and _computed_in - {os.getpid()} and b"OPENMP = 1" in llama_cpp.llama_print_system_info():
        raise StateError(
            "llama.cpp has computed with several threads in the process that this one was forked from, and would wait "
            "for them for ever; use multiprocessing's 'spawn' start method, or n_threads=1"
        )


def _padded(n_cells: int) -> int:
    """As llama.cpp rounds the cells of a stream."""
    return -(-n_cells // 256) * 256


def _address(pointer: Any) -> int:
    return int(getattr(pointer, "value", pointer) or 0)


def _check_pointer(name: str, pointer: Any) -> None:
    # ctypes would take any text, bytes or number for an address, and llama.cpp would read there.
    if isinstance(pointer, bool) or not isinstance(pointer, int | ctypes.c_void_p | None):
        raise OptionError(f"{name} must be a pointer from llama_cpp's own functions, not {pointer!r}")
    if _address(pointer) < _FIRST_PAGE:
        raise OptionError(f"{name} must be a live llama.cpp pointer, not NULL")


def _check_it_fits_memory(n_ctx: int, n_bytes: float) -> None:
    # llama.cpp touches every page of the KV at once: beyond the machine's memory the kernel kills the process.
    if llama_cpp.llama_supports_gpu_offload() or not hasattr(os, "sysconf"):
        return
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if n_bytes > total:
        raise OptionError(
            f"n_ctx={n_ctx} needs {n_bytes / 2**30:.1f} GiB of KV and this machine has {total / 2**30:.1f} GiB; "
            "lower n_ctx"
        )
