"""From what all rows hold now to a plan for one session; asks llama.cpp for live positions, changes nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .errors import ContextOverflow
from .kv.plan import Cached, Plan, Share, Source, Wanted, make_plan
from .kv.prefix import Prefix
from .kv.row import Row, common_prefix
from .kv.store import RowStore
from .seats import Seats
from .types import TokenArray


class Planner:
    """Looks at the own row, the prefix, and the live rows of the namespace."""

    def __init__(self, store: RowStore, seats: Seats, prefix: Prefix) -> None:
        self._store = store
        self._seats = seats
        self._prefix = prefix

    def plan(
        self,
        row: Row | None,
        namespace: str | None,
        tokens: TokenArray,
        *,
        wants_logits: bool,
        cached: Cached | None = None,
        exactly: bool = False,
        headroom: int = 0,
    ) -> Plan:
        """`row`: the session's own, of use where it is true and of the namespace; `exactly`: as far as it is exact.
        `headroom`: tokens that a row with gaps must be able to take behind the prompt, or as many as a new one could.
        ContextOverflow where the prompt is longer than a row can be."""
        store = self._store
        check_length(store, len(tokens), "the conversation")
        if row is not None and (row.suspect is not None or row.namespace != namespace):
            row = None
        own = Source("row", -1, np.empty(0, np.int32)) if row is None else store.source(row, "row")
        others = []
        if self._prefix.row is not None and self._prefix.row.n:
            others.append(store.source(self._prefix.row, "prefix"))
        rows = [other.row for other in self._seats.seats() if other.row is not row]
        others += [
            store.source(live, "live")
            for live in rows
            if live.n and live.suspect is None and live.namespace == namespace
        ]
        has_logits = row is not None and row.logits is not None
        wanted = Wanted(tokens, has_logits=has_logits, wants_logits=wants_logits)
        if row is None or row.is_exact:
            return make_plan(wanted, own, others, store.caps, cached=cached, costs=store.sequences.costs)
        # What follows an eviction goes on as it is: nothing of another's can be put on it. Unless that gets as far.
        plan = make_plan(wanted, own, (), store.caps)
        exact = replace(own, tokens=own.tokens[: row.n_exact], jumps=())
        wanted = replace(wanted, has_logits=False)
        anew = make_plan(wanted, exact, others, store.caps, cached=cached, costs=store.sequences.costs)
        headroom = min(headroom, store.caps.n_ctx_seq - len(tokens))
        fits = store.caps.n_ctx_train >= row.offset + len(tokens) + headroom
        return anew if exactly or not fits or anew.n_decode <= plan.n_decode else plan

    def of_prefix(self, row: Row) -> Share | None:
        """What a row has in common with the system prompt."""
        prefix = self._prefix.row
        if prefix is None or prefix.suspect is not None:
            return None
        n = common_prefix(prefix.tokens, row.tokens[: row.n_exact])
        return Share("prefix", prefix.seq_id, 0, n) if n else None


def check_length(store: RowStore, n: int, what: str) -> None:
    """ContextOverflow if `n` tokens are more than one row can hold."""
    most = store.caps.n_row_max
    if most is not None and n > most:
        raise ContextOverflow(what, needed=n, available=most)
