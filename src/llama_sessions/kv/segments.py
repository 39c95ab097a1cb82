"""llama.cpp's bytes of saved KV, cut and joined by tokens in numpy.

A blob of attention over everything, in one stream and with flash attention on (V not transposed), is laid out as

    magic, seq_id, n_stream (1), n_cells            4 x 4 bytes
    n_cells x (position, 1, seq_id)                 12 bytes each
    v_trans (0), n_layer                            2 x 4 bytes
    each layer's K, then each layer's V:            type (4), bytes a row (8), n_cells rows

(llama-kv-cache.cpp, state_write). Nothing of this is promised: `SegmentLayout.learn` reads a blob, and a self-test
(`kv.snapshot`) compares its cuts and joins with llama.cpp's own before they are relied upon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..types import ByteArray

_HEAD = 16  # bytes before the cells
_CELL = 12  # bytes a cell
_TENSOR = 12  # bytes before the rows of a tensor


@dataclass(frozen=True, slots=True)
class SegmentLayout:
    """How blobs of one context are laid out: the bytes that are the same in all of them, and the size of each tensor's
    rows. A `BlobCutter`; it also joins."""

    head: bytes
    middle: bytes
    tensors: tuple[bytes, ...]  # what stands before each tensor's rows
    row_bytes: tuple[int, ...]

    @classmethod
    def learn(cls, blob: ByteArray) -> SegmentLayout | None:
        """The layout of a blob; None where it is not of this form."""
        data = blob.tobytes()
        if len(data) < _HEAD:
            return None
        _, _, n_stream, n = np.frombuffer(data[:_HEAD], np.uint32).tolist()
        at = _HEAD + _CELL * n
        middle = data[at : at + 8]
        if n_stream != 1 or not n or len(middle) < 8:
            return None
        v_trans, n_layer = np.frombuffer(middle, np.uint32).tolist()
        at += 8
        tensors: list[bytes] = []
        row_bytes: list[int] = []
        while at + _TENSOR <= len(data) and len(tensors) < 2 * n_layer:
            row = int(np.frombuffer(data[at + 4 : at + _TENSOR], np.uint64)[0])
            tensors.append(data[at : at + _TENSOR])
            row_bytes.append(row)
            at += _TENSOR + n * row
        if v_trans or at != len(data) or len(tensors) not in (n_layer, 2 * n_layer):
            return None
        return cls(data[: _HEAD - 4], middle, tuple(tensors), tuple(row_bytes))

    def n_bytes(self, n_tokens: int) -> int:
        """The size of a blob of `n_tokens`."""
        fixed = _HEAD + len(self.middle) + _TENSOR * len(self.tensors)
        return fixed + n_tokens * (_CELL + sum(self.row_bytes))

    def most_tokens(self, n_bytes: int) -> int:
        """How many tokens a blob of at most `n_bytes` can hold; at least one."""
        return max(1, (n_bytes - self.n_bytes(0)) // (self.n_bytes(1) - self.n_bytes(0)))

    def positions(self, blob: ByteArray) -> npt.NDArray[np.int32]:
        """(n,) int32, the position of each cell, in the blob's order."""
        cells: npt.NDArray[np.int32] = self._cells(blob)[:, :4].copy().view(np.int32)[:, 0]
        return cells

    def cut(self, blob: ByteArray, a: int, b: int) -> ByteArray:
        """The tokens `[a, b)` of a blob (counted from its own first) as a blob of their own."""
        out = np.empty(self.n_bytes(b - a), np.uint8)
        self.join([(blob, a, b)], out)
        return out

    def join(self, parts: Sequence[tuple[ByteArray, int, int]], out: ByteArray) -> None:
        """Write the tokens `[a, b)` of each part, one after the other, into (n_bytes,) `out` as one blob."""
        n = sum(b - a for _, a, b in parts)
        self._put(out, n)
        sizes = [self._n_tokens(blob) for blob, _, _ in parts]
        for target, place in zip(self._arrays(out, n), range(1 + len(self.row_bytes)), strict=True):
            at = 0
            for (blob, a, b), size in zip(parts, sizes, strict=True):
                target[at : at + b - a] = self._array(blob, size, place)[a:b]
                at += b - a

    def put_in_order(self, blob: ByteArray) -> None:
        """Sort a blob by position, in place: cells lie in the order in which llama.cpp found room for them."""
        positions = self.positions(blob)
        if (positions[1:] < positions[:-1]).any():
            order = np.argsort(positions, kind="stable")
            for array in self._arrays(blob, len(positions)):
                array[:] = array[order]

    # -- within

    def _n_tokens(self, blob: ByteArray) -> int:
        return int(blob[_HEAD - 4 : _HEAD].copy().view(np.uint32)[0])

    def _cells(self, blob: ByteArray) -> ByteArray:
        return self._array(blob, self._n_tokens(blob), 0)

    def _put(self, out: ByteArray, n: int) -> None:
        """Everything but the cells and the rows."""

        def write(at: int, data: bytes) -> int:
            out[at : at + len(data)] = np.frombuffer(data, np.uint8)
            return at + len(data)

        at = write(0, self.head + np.uint32(n).tobytes()) + _CELL * n
        at = write(at, self.middle)
        for tensor, row in zip(self.tensors, self.row_bytes, strict=True):
            at = write(at, tensor) + n * row

    def _arrays(self, blob: ByteArray, n: int) -> list[ByteArray]:
        return [self._array(blob, n, place) for place in range(1 + len(self.row_bytes))]

    def _array(self, blob: ByteArray, n: int, place: int) -> ByteArray:
        """(n, bytes) view of the cells (`place` 0), or of the rows of tensor `place - 1`."""
        if place == 0:
            return blob[_HEAD : _HEAD + _CELL * n].reshape(n, _CELL)
        before = _HEAD + _CELL * n + len(self.middle) + place * _TENSOR + n * sum(self.row_bytes[: place - 1])
        row = self.row_bytes[place - 1]
        return blob[before : before + n * row].reshape(n, row)
