"""The rows of one context, and the native calls that change them, each bracketed so that an interrupt is survived.

Every change goes: mark the row suspect (how much of it is right whatever happens), call llama.cpp, commit, unmark. A
row found suspect is reconciled with the live positions before its next use.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import CapacityError, SnapshotError, StateError
from ..report import Stretch
from ..types import ByteArray, Capabilities, Context, FloatArray, MemoryKind, Run, TokenArray
from .plan import Demand, Plan, Share, Source, can_be_cut, first_needed
from .row import Jumps, Row, end_of
from .sequences import Sequences

logger = logging.getLogger("llama_sessions")


def no_cells(needed: int, free: int, caps: Capabilities) -> CapacityError:
    """The error that says that cells ran out."""
    return CapacityError(
        f"{needed} cells are needed and {free} of {caps.n_cells} can be had; release a session or raise n_ctx",
        needed=needed,
        available=free,
        unit="cells",
    )


def no_room(n: int, free: int | None, caps: Capabilities) -> CapacityError:
    """The error that says that llama.cpp found no place for a batch (its code 1), though by our count there is one."""
    counted = "" if free is None else f" where {free} of {caps.n_cells} cells should be free"
    narrow = caps.kind is MemoryKind.WINDOW and not caps.swa_full
    more = "release a session, or raise n_ctx" if not narrow else "release a session, or load with swa_full=True"
    message = f"llama.cpp found no room for {n} tokens{counted}, and nobody is left to be parked; {more}"
    return CapacityError(message, needed=n, available=0, unit="cells")


def _n_unique(cells: Sequence[npt.NDArray[np.int64]]) -> int:
    """Cells of several rows, a shared one counted once."""
    # Rows are runs of rising numbers, which a merge sort takes in one pass (np.unique: ten times as long).
    together = np.sort(np.concatenate(cells), kind="stable") if cells else np.empty(0, np.int64)
    return int((together[1:] != together[:-1]).sum()) + 1 if len(together) else 0


@dataclass(slots=True)  # not frozen, for the same reason as `Run`
class Feed:
    """Tokens to decode at the end of a row."""

    row: Row
    tokens: TokenArray | tuple[int]
    wants_logits: bool


class RowStore:
    """All rows by `seq_id`, the account of their cells, and counters of native work."""

    def __init__(self, context: Context, scratch: int | None = None) -> None:
        self.context = context
        self.caps: Capabilities = context.capabilities
        self.rows: dict[int, Row] = {}
        self.sequences = Sequences(context, scratch)
        # What llama.cpp does at the next decode only: copies between streams, and shifts. Until then no save or load.
        self.is_pending = False
        self.n_shifts = 0  # decodes that had a shift to do
        self._shifts = False
        self.n_decodes = 0
        self.n_tokens_decoded = 0
        self.decode_seconds = 0.0
        self._next_cell = 0
        self._n_unique: int | None = 0
        self._in_buffer: list[Row] = []  # rows whose logits are still in the context's own buffer

    def forget_counts(self) -> None:
        """Begin to count anew: what was done so far was a test."""
        self.n_decodes = self.n_tokens_decoded = 0
        self.decode_seconds = 0.0
        self._n_unique = None
        self.sequences.forget_counts()

    # -- asking

    def n_unique_cells(self) -> int:
        """Cells in use, a shared one counted once. Counted anew only after a share, a trim or an interrupt."""
        if self._n_unique is None:
            self._n_unique = _n_unique([row.cells for row in self.rows.values()])
        return self._n_unique

    def n_used_cells(self) -> int:
        """Cells in use, a shared one counted for each row."""
        n = 0  # no comprehension: that is a call of its own, once a token
        for row in self.rows.values():
            n += row.n
        return n

    def n_free_cells(self) -> int | None:
        """Cells that nobody holds; None where rows do not compete for cells."""
        return None if self.caps.n_cells is None else self.caps.n_cells - self.n_unique_cells()

    def n_short(self, plan: Demand, row: Row | None = None, gone: Collection[Row] = ()) -> int:
        """Cells that are missing for a plan on `row`, once the rows `gone` are dropped as well; 0 if there are enough.

        A shared cell is free when the last row that holds it lets go: what the plan keeps or shares is held all along.
        A row that is not here yet, but parked, will hold what is kept of it.
        """
        free, is_here = self.n_free_cells(), row is None or row.seq_id >= 0
        if free is None or (is_here and plan.n_new_cells <= free) or self.caps.n_cells is None:
            return 0
        held = [r.cells for r in self.rows.values() if r is not row and r not in gone]
        if row is not None:
            held.append(plan.kept(row.cells))
        if plan.share is not None:
            held.append(self.rows[plan.share.seq_id].cells[: plan.share.p1])
        return max(0, plan.n_new_cells - (self.caps.n_cells - _n_unique(held)))

    def source(self, row: Row, name: str) -> Source:
        """What `row` offers a plan, with its live first position."""
        first = 0
        if row.n and self.caps.kind is not MemoryKind.FULL:
            first = self.sequences.first(row.seq_id)
        # What follows an eviction is of use to its own row alone.
        tokens = row.tokens if name == "row" else row.tokens[: row.n_exact]
        return Source(name, row.seq_id, tokens, first, row.jumps)

    def logits(self, row: Row) -> FloatArray:
        """(n_vocab,) float32 logits after the row's last token; a view, good until the next change of that row."""
        if row.logits is None:
            raise StateError("no logits: nothing was decoded since the row last changed; call prepare first")
        return self.context.logits(row.logits) if isinstance(row.logits, int) else row.logits

    def n_room(self, row: Row) -> int | None:
        """Tokens that still fit at the end of `row`, cells aside; None where nothing stops it."""
        if self.caps.n_row_max is None:
            return None
        # Positions of a row with gaps run ahead of its tokens, and stop where the model was trained to.
        beyond = max(0, self.caps.n_ctx_train - row.end) if row.offset else self.caps.n_row_max
        return min(self.caps.n_row_max - row.n, beyond)

    def shared_cells(self, row: Row, p0: int = 0) -> npt.NDArray[np.bool_]:
        """(n - p0,) bool: which cells from token `p0` on another row holds as well."""
        # Streams have cells of their own, also where one is a copy of another.
        others = [r.cells for r in self.rows.values() if r is not row and r.n] if self.caps.unified else []
        tail = row.cells[p0:]
        return np.isin(tail, np.concatenate(others)) if others else np.zeros(len(tail), np.bool_)

    # -- changing rows

    def add(self, seq_id: int, namespace: str | None = None) -> Row:
        """A new, empty row. Whatever cells a lost owner left under the id are dropped."""
        if self.sequences.end(seq_id):
            self.sequences.remove(seq_id, 0)
        row = self.rows[seq_id] = Row(seq_id, namespace)
        return row

    def remove(self, row: Row) -> None:
        """Drop the row and its cells."""
        self.cut(row, 0)
        self.rows.pop(row.seq_id, None)

    def cut(self, row: Row, n: int) -> int:
        """Keep the first `n` tokens of a row, or none where its memory cannot; returns how many stayed."""
        if n >= row.n and row.suspect is None:
            return row.n
        n = min(n, row.n)
        if not can_be_cut(self.source(row, "row"), n, self.caps):
            n = 0
        self.spoil(row, n)
        row.shorten(n)  # at once: a row never claims a token that an interrupt may find gone
        if not self.sequences.remove(row.seq_id, row.end) or not self.is_as_booked(row):
            row.suspect = 0
            row.shorten(0)
            self.sequences.remove(row.seq_id, 0)
        row.suspect = None
        return row.n

    def reconcile(self, row: Row) -> None:
        """Make a suspect row true again: keep what surely held before and after the change that did not finish."""
        if row.suspect is None:
            return
        row.n = min(row.n, row.suspect, row.n_before(self.sequences.end(row.seq_id)))
        self.cut(row, 0 if self.caps.keeps_state else row.n)

    def apply(self, row: Row, plan: Plan) -> list[Stretch]:
        """Cut and share as planned; what is left to decode is up to the caller. At most two operations a stretch."""
        stretches = []
        share = plan.share
        # Between streams a share replaces the whole row: to empty it first would be one operation too many.
        replaces = share is not None and share.p0 == 0 and not self.caps.unified
        started = time.perf_counter()
        if plan.n_keep != row.n and not replaces:
            self.cut(row, plan.n_keep)
        if row.n and not replaces:
            stretches.append(Stretch("row", 0, row.n, time.perf_counter() - started))
        # A cut that went deeper than planned leaves nothing to put the share on: then all is decoded.
        if share is not None and (replaces or share.p0 == row.n):
            started = time.perf_counter()
            if self.share(self.rows[share.seq_id], row, share.p0, share.p1):
                stretches.append(Stretch(share.name, share.p0, share.p1, time.perf_counter() - started))
        return stretches

    def share(self, src: Row, dst: Row, p0: int, p1: int) -> bool:
        """Give `dst`, which ends at `p0`, the cells `[p0, p1)` of `src`; no KV is computed or moved.

        Between streams `dst` becomes `[0, p1)` of `src`, whatever it was. False: llama.cpp does not hold what was
        expected; `dst` is then empty.
        """
        self.spoil(dst, p0)
        dst.shorten(p0)
        whole_only = not self.caps.unified or self.caps.keeps_state
        self.is_pending = self.is_pending or not self.caps.unified  # before the call: an interrupt may follow
        if whole_only:
            self.sequences.copy(src.seq_id, dst.seq_id)
        else:
            self.sequences.copy(src.seq_id, dst.seq_id, end_of(src.jumps, p0), end_of(src.jumps, p1))
        if whole_only and p1 < src.n:
            self.sequences.remove(dst.seq_id, end_of(src.jumps, p1))
        tokens, cells = src.tokens[p0:p1], src.cells[p0:p1]
        if p1 <= src.n_exact:
            return self.commit(dst, p0, tokens, cells)
        jumps = tuple(jump for jump in src.jumps if jump[0] < p1)
        return self.commit(dst, p0, tokens, cells, n_exact=src.n_exact, jumps=jumps)

    def may_share_again(self, share: Share, first: int) -> bool:
        """Whether a row with the same tokens, of which the positions from `first` on are whole, can take the cells of a
        share: no window is torn, and streams, which have no cells in common, take a whole row or nothing."""
        source = self.source(self.rows[share.seq_id], share.name)
        can_be = self.caps.unified and not self.caps.keeps_state
        return can_be and can_be_cut(source, share.p1, self.caps) and first <= share.p1

    def share_again(self, share: Share, row: Row) -> int:
        """Give `row` the cells `[0, p1)` that a share says, in place of cells of its own with the same tokens, or at
        the front of an empty row. Returns how many tokens it got; 0: where a window would be torn, or the row is empty.
        """
        src, n, p1 = self.rows[share.seq_id], row.n, share.p1
        if not n:
            return p1 if self.share(src, row, 0, p1) else 0
        if not self.may_share_again(share, self.source(row, "row").first_pos):
            return 0
        self.spoil(row, 0)
        self.sequences.remove(row.seq_id, 0, p1)
        self.sequences.copy(src.seq_id, row.seq_id, 0, p1)
        return p1 if self.commit(row, 0, src.tokens[:p1], src.cells[:p1]) else 0

    def finish_pending(self) -> bool:
        """Let llama.cpp do what it has put off, by decoding a token in the scratch; whether nothing is pending."""
        scratch = self.sequences.scratch
        if self.is_pending and scratch is not None:
            n_tokens = self.n_tokens_decoded
            try:
                with self.sequences.passing():
                    self.decode([Feed(Row(scratch), (0,), wants_logits=False)])
            finally:
                self._n_unique, self.n_tokens_decoded = None, n_tokens  # it was nobody's token
        return not self.is_pending

    def decode(self, feeds: Sequence[Feed], park_one: Callable[[], bool] | None = None) -> int:
        """One `llama_decode` of all feeds; returns its code. On 1 and -1 the rows are as before; on a compute failure
        each row is what llama.cpp finished of it.

        On 1 (no room), where rows share cells, it is tried again as long as `park_one` drops some other row.
        """
        code = self._decode(feeds)
        while code == 1 and park_one is not None and self.caps.n_cells is not None and park_one():
            code = self._decode(feeds)
        return code

    def _decode(self, feeds: Sequence[Feed]) -> int:
        fed = {feed.row.seq_id for feed in feeds}
        for row in self._in_buffer:
            # The next decode overwrites the buffer: logits nobody has read yet are copied out (14 us at 152k). Those of
            # a fed row too, where llama.cpp may refuse a batch that our count let pass: the row is then as before.
            if isinstance(row.logits, int) and (row.seq_id not in fed or self.caps.kind is not MemoryKind.FULL):
                row.logits = self.context.logits(row.logits).copy()
        self._in_buffer = []
        runs, before = [], []
        n_total = 0
        for feed in feeds:
            row, n = feed.row, len(feed.tokens)
            before.append(row.logits)
            row.logits = None
            row.suspect = row.n
            if isinstance(feed.tokens, tuple):
                row.put(row.n, feed.tokens[0], self._next_cell)
                self._next_cell += 1
            else:
                row.write(row.n, feed.tokens, self.new_cells(n))
            n_total += n
            runs.append(Run(row.seq_id, row.n + row.offset, feed.tokens, feed.wants_logits))
        n_unique, self._n_unique = self._n_unique, None
        started = time.perf_counter()
        code = self.context.decode(runs)
        seconds = time.perf_counter() - started
        self.decode_seconds += seconds
        self.n_decodes += 1
        if code == 0:
            if self.is_pending:
                self.n_shifts += self._shifts
                self.is_pending = self._shifts = False
            self.sequences.costs.note_decode(n_total, seconds)
            self.n_tokens_decoded += n_total
            end = 0
            for feed in feeds:
                row = feed.row
                row.n += len(feed.tokens)
                end += len(feed.tokens)
                if feed.wants_logits:
                    row.logits = end - 1
                    self._in_buffer.append(row)
                row.suspect = None
            self._n_unique = None if n_unique is None else n_unique + n_total
        elif code in (1, -1):
            for feed, logits in zip(feeds, before, strict=True):
                feed.row.suspect = None  # memory is as before the call
                feed.row.logits = None if isinstance(logits, int) else logits
            self._n_unique = n_unique
        else:
            for feed in feeds:
                self._keep_what_was_done(feed)
        return code

    def _keep_what_was_done(self, feed: Feed) -> None:
        """After a compute failure: micro-batches already done stay; a recurrent state is of no use."""
        row = feed.row
        done = self.sequences.end(row.seq_id) - row.end
        if self.caps.keeps_state or not 0 <= done <= len(feed.tokens):
            self.cut(row, 0)
        else:
            row.n += done
            row.suspect = None

    def load(self, row: Row, blob: ByteArray, tokens: TokenArray, p0: int, p1: int) -> bool:
        """Put a blob that holds `tokens[p0:p1]` (and maybe more) at the end of `row`, which ends at `p0`.

        False where llama.cpp has no room, or does not hold afterwards what was expected: the row is then as before, or
        empty.
        """
        started = time.perf_counter()
        self.spoil(row, p0)
        try:
            self.sequences.load(row.seq_id, blob, p0, p1)
        except SnapshotError as e:
            logger.warning("saved KV could not be restored and is decoded instead: %s", e)
            row.n = p0
            self.cut(row, p0)
            return False
        if not self.commit(row, p0, tokens[p0:p1], self.new_cells(p1 - p0)):
            return False
        self.sequences.costs.note_restore(p1 - p0, time.perf_counter() - started)
        return True

    def load_row(self, row: Row, blob: ByteArray, tokens: TokenArray, n_exact: int, jumps: Jumps) -> bool:
        """Put a blob of a whole row back, gaps and all; False: it could not be, and the row is empty."""
        self.spoil(row, 0)
        row.shorten(0)
        try:
            self.context.load_state(row.seq_id, blob)
        except SnapshotError as e:
            logger.warning("a parked row could not be restored and is decoded instead: %s", e)
            self.cut(row, 0)
            return False
        return self.commit(row, 0, tokens, self.new_cells(len(tokens)), n_exact=n_exact, jumps=jumps)

    # -- native

    def new_cells(self, n: int) -> npt.NDArray[np.int64]:
        """(n,) int64 numbers for cells that no row has had."""
        self._next_cell += n
        return np.arange(self._next_cell - n, self._next_cell)

    def note_shift(self) -> None:
        """Before a shift: until the next decode nothing may be saved or loaded."""
        self.is_pending = self._shifts = True

    def spoil(self, row: Row, n_sure: int) -> None:
        """Before a change: only the first `n_sure` positions are right whatever happens, and the logits are gone."""
        row.suspect = n_sure if row.suspect is None else min(n_sure, row.suspect)
        row.logits = None
        self._n_unique = None

    def commit(
        self,
        row: Row,
        at: int,
        tokens: TokenArray,
        cells: npt.NDArray[np.int64],
        *,
        n_exact: int | None = None,
        jumps: Jumps | None = None,
    ) -> bool:
        """The end of a change: from token `at` on the row holds these, and behind them what it held before.

        `n_exact`: it is approximate from there on; `jumps`: its gaps now (None: as before). False: llama.cpp does not
        hold what was expected; the row is then empty.
        """
        row.write(at, tokens, cells)
        row.n = max(row.n, at + len(tokens))
        if jumps is not None:
            row.set_jumps(jumps)
        if n_exact is not None:
            row.mark_approximate(n_exact)
        if not self.is_as_booked(row):
            self.cut(row, 0)
            return False
        row.suspect = None
        return True

    def is_as_booked(self, row: Row) -> bool:
        """Whether llama.cpp agrees on where the row ends, and still holds what its next token will look at."""
        if self.sequences.end(row.seq_id) != row.end:
            return False
        if self.caps.kind is not MemoryKind.WINDOW or not row.n:
            return True
        return self.sequences.first(row.seq_id) <= first_needed(row.jumps, row.n, self.caps)
