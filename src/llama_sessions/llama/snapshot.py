"""The KV of one sequence as bytes: `llama_state_seq_*` with sizes and returns checked.

A blob names no model: only bytes that this context has written go back into it (facts of llama.cpp: a blob of another
model of the same shape loads without a word, and a damaged recurrent one aborts).
"""

from __future__ import annotations

import ctypes
from typing import Any

import llama_cpp

from ..errors import SnapshotError
from ..types import ByteArray
from . import log

_BYTES = ctypes.POINTER(ctypes.c_uint8)


def state_size(handle: Any, seq_id: int) -> int:
    """Bytes that `save_state` writes for a sequence. 0.1 ms."""
    with log.capture as captured:
        n = int(llama_cpp.llama_state_seq_get_size_ext(handle, seq_id, 0))
        detail = captured.last_error
    if n <= 0:
        raise SnapshotError("llama_state_seq_get_size_ext", n, f"the size of sequence {seq_id} is not known", detail)
    return n


def save_state(handle: Any, seq_id: int, out: ByteArray) -> None:
    """Write a sequence into (n,) uint8 `out`, which must be exactly as long. 0.2 ms a MB into memory that was touched
    before, twelve times that into fresh pages."""
    with log.capture as captured:
        n = int(llama_cpp.llama_state_seq_get_data_ext(handle, out.ctypes.data_as(_BYTES), len(out), seq_id, 0))
        detail = captured.last_error
    if n != len(out):
        message = f"sequence {seq_id} was to take {len(out)} bytes; nothing was saved"
        raise SnapshotError("llama_state_seq_get_data_ext", n, message, detail)


def load_state(handle: Any, seq_id: int, blob: ByteArray) -> None:
    """Make a sequence what a blob says. It is emptied first; on an error it may hold a part, so empty it again."""
    with log.capture as captured:
        n = int(llama_cpp.llama_state_seq_set_data_ext(handle, blob.ctypes.data_as(_BYTES), len(blob), seq_id, 0))
        detail = captured.last_error
    if n != len(blob):
        message = f"sequence {seq_id} was to be made of {len(blob)} bytes; there may be no cells for it"
        raise SnapshotError("llama_state_seq_set_data_ext", n, message, detail)
