"""`llama_memory_seq_*` with every trap disarmed: ids, positions and moves are checked before C++ could assert on them.

Ranges are half-open `[p0, p1)` in positions, None is an open end (llama.cpp's -1 lives here alone).
Each call walks all n_ctx cells in llama.cpp: its cost grows with the context, not with the row.
"""

from __future__ import annotations

from typing import Any

import llama_cpp

from ..errors import OptionError, StateError
from ..options import checked_int
from ..types import Capabilities

_MAX_POS = 2**31 - 1


class LlamaMemory:
    """The memory of one context."""

    def __init__(self, handle: Any, capabilities: Capabilities) -> None:
        self._handle = handle
        self._caps = capabilities

    def _seq(self, name: str, seq_id: int) -> int:
        # -1 would mean every row, other negative ids and ids from n_seq_max on abort, at once or later.
        return checked_int(name, seq_id, 0, self._caps.n_seq_max - 1)

    @staticmethod
    def _range(p0: int | None, p1: int | None) -> tuple[int, int]:
        low = -1 if p0 is None else checked_int("p0", p0, 0, _MAX_POS)
        high = -1 if p1 is None else checked_int("p1", p1, 0, _MAX_POS)
        return low, high

    def seq_rm(self, seq_id: int, p0: int | None = None, p1: int | None = None) -> bool:
        """Take `[p0, p1)` out of a row; False where the memory refuses (a recurrent state cannot go back)."""
        low, high = self._range(p0, p1)
        return bool(llama_cpp.llama_memory_seq_rm(self._handle, self._seq("seq_id", seq_id), low, high))

    def seq_cp(self, src: int, dst: int, p0: int | None = None, p1: int | None = None) -> None:
        """Give `dst` a share of the cells of `src` in `[p0, p1)`; no KV is copied in a unified cache.

        Where only whole rows can be shared (a cache of streams, a recurrent state) a part is an OptionError: llama.cpp
        would abort on it, or copy more than was asked.
        """
        low, high = self._range(p0, p1)
        source, target = self._seq("src", src), self._seq("dst", dst)
        if not self._caps.unified or self._caps.keeps_state:
            end = self.pos_max(source)
            whole = low <= 0 and (high == -1 or (end is not None and high == end + 1))
            if not whole:
                raise OptionError(
                    f"this memory ({self._caps.kind.value}, unified={self._caps.unified}) shares whole rows only, "
                    f"not [{p0}, {p1}) of the {0 if end is None else end + 1} positions of row {src}"
                )
            low = high = -1
        llama_cpp.llama_memory_seq_cp(self._handle, source, target, low, high)

    def seq_add(self, seq_id: int, p0: int | None, p1: int | None, delta: int) -> None:
        """Shift positions `[p0, p1)` by `delta`; K is rotated at the next decode. StateError where that is wrong."""
        if not self._caps.can_shift:
            raise StateError(f"positions of this model cannot be shifted: {self._caps.shift_refused_because}")
        low, high = self._range(p0, p1)
        checked_int("delta", delta, -_MAX_POS, _MAX_POS)
        llama_cpp.llama_memory_seq_add(self._handle, self._seq("seq_id", seq_id), low, high, delta)

    def pos_min(self, seq_id: int) -> int | None:
        """The first position that is still whole in every layer; None for an empty row."""
        pos = llama_cpp.llama_memory_seq_pos_min(self._handle, self._seq("seq_id", seq_id))
        return None if pos < 0 else int(pos)

    def pos_max(self, seq_id: int) -> int | None:
        """The last position of a row; None for an empty row."""
        pos = llama_cpp.llama_memory_seq_pos_max(self._handle, self._seq("seq_id", seq_id))
        return None if pos < 0 else int(pos)

    def clear(self) -> None:
        """Empty every row."""
        llama_cpp.llama_memory_clear(self._handle, True)
