"""The limit: bare llama.cpp calls, with every batch laid out before the clock starts."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from typing import Any

import llama_cpp


def has_amx() -> bool:
    """Whether this is a CPU build with AMX: built by GCC 12 it dies in the AMX kernels of q8_0 weights, unless they are
    loaded without extra buffer types, as `ContextManager.load` does."""
    return b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info()


def plain_buffers() -> bool:
    """Load every later model of this process without extra buffer types, if the CPU build has AMX; says whether. A peer
    is alive and comparable only with the same setting."""
    if not has_amx():
        return False
    default = llama_cpp.llama_model_default_params

    def params() -> Any:
        p = default()
        p.use_extra_bufts = False
        return p

    for module in (llama_cpp, llama_cpp.llama_cpp):  # `Llama` asks the second, our calls the first
        module.llama_model_default_params = params
    return True


class Bare:
    """A model and a context with the settings of `ContextManager.load`, driven by sequence id; over the weights of
    `other`, if given."""

    def __init__(self, config: dict[str, Any], other: Bare | None = None) -> None:
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)
        llama_cpp.llama_backend_init()
        self.has_plain_buffers = plain_buffers()
        path = config["model"].encode()
        self.model = other.model if other else None
        if not self.model:
            self.model = llama_cpp.llama_model_load_from_file(path, llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"{config['model']} did not load")
        p = llama_cpp.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch = config["n_ctx"], config["n_batch"], config["n_ubatch"]
        p.n_seq_max = config["n_sessions"] + 2
        p.n_threads = p.n_threads_batch = config["n_threads"]
        p.flash_attn_type, p.swa_full, p.no_perf = -1, True, True
        p.kv_unified = config.get("kv_unified", True)
        self.ctx = llama_cpp.llama_init_from_model(self.model, p)
        if not self.ctx:
            raise RuntimeError("llama.cpp could not make the context")
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.n_batch = llama_cpp.llama_n_batch(self.ctx)

    def batches(self, tokens: Sequence[int], pos: int, seq_id: int, *, n_batch: int | None = None) -> list[Batch]:
        """`tokens` from `pos` on, cut at `n_batch`; the last asks for logits."""
        size = n_batch or self.n_batch
        found, n = [], len(tokens)
        for i in range(0, n, size):
            part = tokens[i : i + size]
            m = len(part)
            found.append(Batch(part, range(pos + i, pos + i + m), [seq_id] * m, [i + k == n - 1 for k in range(m)]))
        return found

    def decode(self, batch: Batch) -> None:
        code = llama_cpp.llama_decode(self.ctx, batch.native)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")

    def share(self, src: int, dst: int, p0: int, p1: int) -> None:
        llama_cpp.llama_memory_seq_cp(self.memory, src, dst, p0, p1)

    def trim(self, seq_id: int, p0: int) -> None:
        llama_cpp.llama_memory_seq_rm(self.memory, seq_id, p0, -1)

    def shift_out(self, seq_id: int, p0: int, p1: int) -> None:
        """Drop `[p0, p1)`, and move up what follows."""
        llama_cpp.llama_memory_seq_rm(self.memory, seq_id, p0, p1)
        llama_cpp.llama_memory_seq_add(self.memory, seq_id, p1, -1, p0 - p1)

    def sample(self, chain: Any, index: int = -1) -> int:
        return int(llama_cpp.llama_sampler_sample(chain, self.ctx, index))

    def decode_and_sample(self, batch: Batch, chains: Sequence[Any]) -> None:
        """A step of several sequences, each with a chain of its own; what was sampled is what comes next."""
        self.decode(batch)
        for i, chain in enumerate(chains):
            batch.token[i] = self.sample(chain, i)
            batch.pos[i] += 1

    def eog_tokens(self) -> list[int]:
        return [t for t in range(self.n_vocab) if llama_cpp.llama_vocab_is_eog(self.vocab, t)]


class Batch:
    """A `llama_batch`; C reads the arrays in place. `wishes`: for each token whether it asks for logits."""

    def __init__(
        self, tokens: Sequence[int], positions: Sequence[int], seq_ids: Sequence[int], wishes: Sequence[bool]
    ) -> None:
        n = len(tokens)
        self.token = (ctypes.c_int32 * n)(*tokens)
        self.pos = (ctypes.c_int32 * n)(*positions)
        self._n_seq_id = (ctypes.c_int32 * n)(*[1] * n)
        self._seqs = {seq_id: (ctypes.c_int32 * 1)(seq_id) for seq_id in seq_ids}
        pointer = ctypes.POINTER(ctypes.c_int32)
        self._seq_id = (pointer * n)(*[ctypes.cast(self._seqs[seq_id], pointer) for seq_id in seq_ids])
        self._logits = (ctypes.c_int8 * n)(*wishes)
        self.native = llama_cpp.llama_batch(
            n_tokens=n,
            token=self.token,
            embd=None,
            pos=self.pos,
            n_seq_id=self._n_seq_id,
            seq_id=self._seq_id,
            logits=self._logits,
        )


def sampler_chain(n_vocab: int, banned: Sequence[int] = (), *, greedy: bool = True, seed: int = 0) -> Any:
    """The samplers that `GenerationOptions` makes: greedy, or the defaults (top-k 40, top-p 0.95, min-p 0.05, 0.8)."""
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    add = llama_cpp.llama_sampler_chain_add
    if banned:
        biases = (llama_cpp.llama_logit_bias * len(banned))(*[(t, float("-inf")) for t in banned])
        add(chain, llama_cpp.llama_sampler_init_logit_bias(n_vocab, len(banned), biases))
    if greedy:
        add(chain, llama_cpp.llama_sampler_init_greedy())
        return chain
    add(chain, llama_cpp.llama_sampler_init_top_k(40))
    add(chain, llama_cpp.llama_sampler_init_top_p(0.95, 1))
    add(chain, llama_cpp.llama_sampler_init_min_p(0.05, 1))
    add(chain, llama_cpp.llama_sampler_init_temp(0.8))
    add(chain, llama_cpp.llama_sampler_init_dist(seed))
    return chain
