"""The shared system prompt: its text, and its KV in a reserved row that every session copies from."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import DecodeError
from ..types import TokenArray
from .plan import Plan, can_be_cut
from .row import Row, common_prefix
from .store import Feed, RowStore, no_room


class Prefix:
    """`seq_id` None: there is no slot for it; the text is then remembered only."""

    def __init__(self, store: RowStore, seq_id: int | None) -> None:
        self._store = store
        self.seq_id = seq_id
        self.text: str | None = None
        self.row: Row | None = None if seq_id is None else store.add(seq_id)

    @property
    def has_slot(self) -> bool:
        return self.seq_id is not None

    @property
    def n_tokens(self) -> int:
        """Tokens of the prompt that are in the row."""
        return 0 if self.row is None else self.row.n

    def remember(self, text: str) -> int:
        """Where there is no slot: keep the text alone; returns 0 tokens."""
        self.text = text
        return self.n_tokens

    def set(
        self,
        text: str,
        tokens: TokenArray,
        *,
        make_way: Callable[[Plan, Row], object],
        park_one: Callable[[], bool],
    ) -> int:
        """Remember `text` and decode what its (n,) int32 `tokens` do not share with the last prefix.

        `make_way` makes cells for a plan or raises, before anything is touched; `park_one`: see `RowStore.decode`.
        Returns the tokens in the row: all, or 0 without a slot. On an error the text stays the old one and the row is
        empty, or what was decoded of it.
        """
        if self.row is not None:
            self._decode(self.row, tokens, make_way, park_one)
        return self.remember(text)

    def _decode(
        self, row: Row, tokens: TokenArray, make_way: Callable[[Plan, Row], object], park_one: Callable[[], bool]
    ) -> None:
        store = self._store
        store.reconcile(row)
        n_keep = common_prefix(row.tokens, tokens)
        if not can_be_cut(store.source(row, "prefix"), n_keep, store.caps):
            n_keep = 0
        make_way(Plan(len(tokens), n_keep), row)
        store.cut(row, n_keep)
        while row.n < len(tokens):
            part = tokens[row.n : row.n + store.caps.n_batch]
            code = store.decode([Feed(row, part, wants_logits=False)], park_one)
            if code == 1:
                raise no_room(len(part), store.n_free_cells(), store.caps)
            if code != 0:
                raise DecodeError("llama_decode", code, "the system prompt was not encoded", store.context.last_error)

    def copy_to(self, row: Row, n: int | None = None) -> int:
        """Give `row` the first `n` tokens of the prefix (None: all) by sharing its cells; returns how many it got."""
        if self.row is None:
            return 0
        n = self.n_tokens if n is None else min(n, self.n_tokens)
        self._store.cut(row, 0)
        return n if n and self._store.share(self.row, row, 0, n) else 0

    def clear(self) -> None:
        """Forget text and KV."""
        self.text = None
        if self.row is not None:
            self._store.cut(self.row, 0)
