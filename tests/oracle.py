"""The oracle: a fresh context's prefill of the same tokens, through bare llama_cpp calls and none of our code.

Logits differ with the batch split (0.015 on a scale of 4.3 was measured), so equality is asked for within twice the
spread that splits alone give on that model: `spread`.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL + 1)  # the oracle's own models load in silence

Floats = npt.NDArray[np.float32]


class Oracle:
    """Fresh prefills on one model. The context is cleared before each, which is as good as a new one."""

    def __init__(self, path: Path, n_ctx: int = 2048, n_batch: int = 2048) -> None:
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        assert self.model, f"{path} did not load"
        p = llama_cpp.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = n_ctx, n_batch, 512, 1
        p.n_threads = p.n_threads_batch = 1
        p.swa_full = True
        self.ctx = llama_cpp.llama_init_from_model(self.model, p)
        self.vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.vocab)
        self.batch = llama_cpp.llama_batch_init(n_batch, 0, 1)

    def logits(self, tokens: Sequence[int] | npt.NDArray[np.int32], split: int | None = None) -> Floats:
        """(n_vocab,) logits after a prefill of `tokens` in one batch, or in batches of `split`."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.ctx), True)
        ids = [int(t) for t in tokens]
        step = split or len(ids)
        last = 0
        for begin in range(0, len(ids), step):
            part = ids[begin : begin + step]
            for i, token in enumerate(part):
                self.batch.token[i], self.batch.pos[i] = token, begin + i
                self.batch.n_seq_id[i], self.batch.seq_id[i][0] = 1, 0
                self.batch.logits[i] = i == len(part) - 1
            self.batch.n_tokens = last = len(part)
            code = llama_cpp.llama_decode(self.ctx, self.batch)
            assert code == 0, f"the oracle's llama_decode returned {code}"
        pointer = llama_cpp.llama_get_logits_ith(self.ctx, last - 1)
        return np.ctypeslib.as_array(pointer, (self.n_vocab,)).copy()

    def spread(self, tokens: Sequence[int] | npt.NDArray[np.int32]) -> float:
        """The largest difference that batch splits alone make on these tokens."""
        whole = self.logits(tokens)
        return max(float(np.abs(whole - self.logits(tokens, s)).max()) for s in (1, 3, 7, 32) if s < len(tokens))

    @cached_property
    def model_spread(self) -> float:
        """The same over fixed random rows of 20 to 300 tokens: what splits make of this model."""
        rng = np.random.default_rng(0)
        return max(self.spread(rng.integers(0, 256, n).astype(np.int32)) for n in (20, 45, 80, 150, 300))

    def tokenize(self, text: str, *, special: bool = True) -> list[int]:
        """The plain call over the whole text, no BOS added."""
        data = text.encode()
        out = (ctypes.c_int32 * (len(data) + 2))()
        n = llama_cpp.llama_tokenize(self.vocab, data, len(data), out, len(out), False, special)
        assert n >= 0
        return list(out[:n])

    def detokenize(self, tokens: Sequence[int] | npt.NDArray[np.int32]) -> bytes:
        """The bytes of all pieces, control tokens included."""
        out = b""
        for token in tokens:
            buffer = ctypes.create_string_buffer(256)
            n = llama_cpp.llama_token_to_piece(self.vocab, int(token), buffer, 256, 0, True)
            assert n >= 0
            out += buffer.raw[:n]
        return out

    def assert_exact(self, logits: Any, tokens: Sequence[int] | npt.NDArray[np.int32]) -> None:
        """`logits` equal a fresh prefill's of `tokens` within twice the spread of splits on this model."""
        worst = float(np.abs(np.asarray(logits) - self.logits(tokens)).max())
        # A floor for models whose splits make no difference at all: one part in a thousand of the logits' scale.
        bound = 2 * max(self.model_spread, 2e-3)
        assert worst <= bound, f"off by {worst:.4f} after {len(tokens)} tokens; splits alone: {self.model_spread:.4f}"


@lru_cache(maxsize=16)
def oracle_for(path: Path) -> Oracle:
    """One oracle a model, kept for the whole run."""
    return Oracle(path)
