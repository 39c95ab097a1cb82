"""A `llama_batch` over numpy arrays of our own: filling it costs a few slice assignments, whatever its length."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import llama_cpp
import numpy as np

from ..types import Run


class Batch:
    """Up to `capacity` tokens, each of one sequence. The C struct points into the arrays, which live as long as it."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._token = np.zeros(capacity, np.int32)
        self._pos = np.zeros(capacity, np.int32)
        self._seq_id = np.zeros(capacity, np.int32)
        self._n_seq_id = np.ones(capacity, np.int32)
        self._logits = np.zeros(capacity, np.int8)
        # Single values go in through these: less work than numpy's own indexing, once a token.
        arrays: tuple[Any, ...] = (self._token, self._pos, self._seq_id, self._logits)
        self._one: Any = [memoryview(array) for array in arrays]
        self.wishes: memoryview = self._one[3]  # for the logits of each token that was put in last
        # One pointer a token, to its single sequence id.
        self._seq_ptr = self._seq_id.ctypes.data + 4 * np.arange(capacity, dtype=np.uintp)

        def at(array: Any, ctype: Any) -> Any:
            return ctypes.cast(array.ctypes.data, ctypes.POINTER(ctype))

        self.native = llama_cpp.llama_batch(
            n_tokens=0,
            token=at(self._token, ctypes.c_int32),
            embd=None,
            pos=at(self._pos, ctypes.c_int32),
            n_seq_id=at(self._n_seq_id, ctypes.c_int32),
            seq_id=ctypes.cast(self._seq_ptr.ctypes.data, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=at(self._logits, ctypes.c_int8),
        )

    def fill(self, runs: Sequence[Run]) -> int:
        """Put the runs in, one after the other; returns the number of tokens. The caller has checked the sum."""
        at = 0
        for run in runs:
            n = len(run.tokens)
            if n == 1:
                token, pos, seq_id, logits = self._one
                token[at], pos[at], seq_id[at], logits[at] = int(run.tokens[0]), run.pos, run.seq_id, run.wants_logits
            else:
                self._token[at : at + n] = run.tokens
                self._pos[at : at + n] = np.arange(run.pos, run.pos + n)
                self._seq_id[at : at + n] = run.seq_id
                self._logits[at : at + n] = 0
                self._logits[at + n - 1] = run.wants_logits
            at += n
        self.native.n_tokens = at
        return at
