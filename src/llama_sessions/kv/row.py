"""A row: the exact token ids that one `seq_id` holds, position by position."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..types import FloatArray, TokenArray


def common_prefix(a: TokenArray, b: TokenArray) -> int:
    """Length of the longest common prefix of two int32 arrays; one vectorised compare."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    first = int(differs.argmax()) if n else 0
    return first if n and differs[first] else n


class Row:
    """Tokens and cells of one sequence.

    `cells[i]` is a number for the KV cell of position i; rows that share a cell hold the same number. New content is
    written behind `n` first and committed by setting `n`, so an interrupt in between leaves the row as it was.
    `suspect`: None, or the number of leading positions that are surely right after a change that did not finish.
    `logits`: None, a batch index (still in the context's buffer), or a (n_vocab,) float32 array.
    """

    __slots__ = ("_cells", "_tokens", "logits", "n", "namespace", "seq_id", "suspect")

    def __init__(self, seq_id: int, namespace: str | None = None) -> None:
        self.seq_id = seq_id
        self.namespace = namespace
        self.n = 0
        self.suspect: int | None = None
        self.logits: int | FloatArray | None = None
        self._tokens = np.empty(256, np.int32)
        self._cells = np.empty(256, np.int64)

    def __repr__(self) -> str:
        return f"<Row {self.seq_id}: {self.n} tokens>"

    @property
    def tokens(self) -> TokenArray:
        """(n,) int32 view."""
        return self._tokens[: self.n]

    @property
    def cells(self) -> npt.NDArray[np.int64]:
        """(n,) int64 view."""
        return self._cells[: self.n]

    def write(self, at: int, tokens: TokenArray, cells: npt.NDArray[np.int64]) -> None:
        """Put content at positions `at ..` without committing it: `n` does not change."""
        end = at + len(tokens)
        if end > len(self._tokens):
            size = max(end, 2 * len(self._tokens))
            more_tokens = np.concatenate([self._tokens[:at], np.empty(size - at, np.int32)])
            more_cells = np.concatenate([self._cells[:at], np.empty(size - at, np.int64)])
            self._tokens, self._cells = more_tokens, more_cells  # both or none, also on an interrupt
        self._tokens[at:end] = tokens
        self._cells[at:end] = cells
