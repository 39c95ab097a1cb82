"""KV of rows in the cache: kept where it would be lost, restored where a prompt begins with it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from ..errors import SnapshotError
from ..notice import Notice
from ..options import RadixOptions
from ..report import RadixStats
from ..types import BlobKind, ByteArray, Capabilities, MemoryKind, TokenArray
from .plan import Cached, first_seen
from .row import Jumps, Row, end_of
from .store import Feed, RowStore

if TYPE_CHECKING:
    from .blobs import BlobPart
    from .cache import Inserted, KvMatch, RadixCache
    from .segments import SegmentLayout

logger = logging.getLogger("llama_sessions")

_N_PROBED, _CUT = 5, 2  # tokens of the self-test, and where they are cut
_SHARE_JOINED, _LEAST_JOINED = 8, 2**20  # of the budget, and bytes: what may be joined at once
_FLAG = 1  # byte behind a state: whether logits are with it


def blob_kind(caps: Capabilities, *, has_scratch: bool) -> BlobKind:
    """What can be saved of a row of this memory."""
    if caps.kind is not MemoryKind.FULL:
        return BlobKind.STATE  # of a window a blob has the end alone, and a state is one
    return BlobKind.RANGE if caps.unified and has_scratch else BlobKind.ROW


class RowSaver:
    """A `Saver` over one row."""

    def __init__(self, store: RowStore, row: Row, layout: SegmentLayout | None) -> None:
        self._store = store
        self._row = row
        self._layout = layout

    @property
    def _logits_bytes(self) -> int:
        if not self._store.caps.keeps_state:
            return 0
        return _FLAG + (0 if self._row.logits is None else 4 * self._store.caps.n_vocab)

    def n_bytes(self, p0: int, p1: int) -> int:
        if self._layout is not None:
            return self._layout.n_bytes(p1 - p0)
        return self._store.sequences.size(self._row.seq_id, *self._positions(p0, p1)) + self._logits_bytes

    def _positions(self, p0: int, p1: int) -> tuple[int, int]:
        return end_of(self._row.jumps, p0), end_of(self._row.jumps, p1)

    def save(self, p0: int, p1: int, out: ByteArray) -> None:
        n_logits = self._logits_bytes
        state = out[: len(out) - n_logits]
        self._store.sequences.save(self._row.seq_id, *self._positions(p0, p1), state)
        if self._layout is not None:
            self._layout.put_in_order(state)
        if n_logits:
            # A state cannot lose its last token, so the logits after it have to come back with it.
            out[-1] = n_logits > _FLAG
            if n_logits > _FLAG:
                out[len(state) : -1] = self._store.logits(self._row).view(np.uint8)


class Snapshots:
    """The cache over the rows of one context; with `options` None there is none, and all answers are "nothing"."""

    def __init__(self, store: RowStore, options: RadixOptions | None) -> None:
        # Here: reading these, and what they need, is a tenth of the package's import, and without a cache of no use.
        from .node import Match

        self._store = store
        self.nothing: KvMatch = Match(None, 0, (), None)
        """What a match is that found nothing."""
        self.kind = blob_kind(store.caps, has_scratch=store.sequences.scratch is not None)
        self._layout = None
        self._cache: RadixCache | None = None
        self._most_joined = 0  # bytes
        self._no_room = Notice()
        self._holds = self._saves = False  # in the middle of it, or an interrupt was
        self._joined: ByteArray = np.empty(0, np.uint8)
        self.stats = RadixStats()
        """As of the last change; may be read from any thread."""
        if options is not None:
            if self.kind is BlobKind.RANGE:
                self._layout = self._proven_layout()
            from .cache import RadixCache

            cost = self._seconds if self.kind is BlobKind.RANGE else None
            self._cache = RadixCache(options, kind=self.kind, cutter=self._layout, cost=cost)
            self._most_joined = max(options.max_bytes // _SHARE_JOINED, _LEAST_JOINED)
            self._take_stock()

    def _take_stock(self) -> None:
        if self._cache is not None:
            self.stats = self._cache.stats()

    def _seconds(self, p0: int, p1: int) -> float:
        """What decoding positions `[p0, p1)` costs; a token further back costs a little more."""
        return float(p1 - p0) * (1.0 + p0 / 32768)

    def describe(self) -> list[str]:
        return [] if self._cache is None else list(self._cache.describe())

    def problems(self) -> list[str]:
        """Everything that does not add up between two calls, a sentence each."""
        if self._cache is None:
            return []
        n_locks = self._cache.n_locks
        return self._cache.problems() + ([f"{n_locks} locks are left on saved KV"] if n_locks else [])

    def clear(self) -> int:
        """Forget what is saved, but for what one owner alone has; returns how many tokens went."""
        self._mend_locks()
        n_tokens = 0 if self._cache is None else self._cache.clear()
        self._joined = np.empty(0, np.uint8)
        self._take_stock()
        return n_tokens

    def settle(self) -> None:
        """Mend what an interrupt left."""
        self._mend_locks()
        self._count(self.nothing, 0, 0)

    # -- restoring

    def match(self, namespace: str | None, tokens: TokenArray) -> KvMatch:
        """What is saved of a prompt. Changes nothing."""
        if self._cache is None or not len(tokens):
            return self.nothing
        return self._cache.match(namespace, tokens)

    def cached(self, match: KvMatch) -> Cached | None:
        """The same for a plan."""
        if self._cache is None or match.node is None:
            return None
        has_logits = False
        if self.kind is BlobKind.STATE and self._store.caps.keeps_state:
            (part,) = self._cache.read(match)
            has_logits = bool(part.view[-1])
        return Cached(self.kind, match.n_tokens, has_logits)

    def hold(self, match: KvMatch) -> None:
        """Keep what was found until `let_go`."""
        if self._cache is not None:
            self._mend_locks()
            self._holds = True
            self._cache.lock(match)

    def let_go(self, match: KvMatch, n_hit: int, n_miss: int) -> None:
        """End a `hold`; of the prompt so many tokens came from here, so many are left to decode."""
        if self._cache is not None:
            if match.node is not None and match.node.n_locks:  # else an interrupt came before the hold
                self._cache.unlock(match)
            self._holds = False
            self._count(match, n_hit, n_miss)

    def count_hits(self, n_tokens: int) -> None:
        """Of a prompt that took them from what was kept for its row alone."""
        self._count(self.nothing, n_tokens, 0)

    def _mend_locks(self) -> None:
        """Undo those that an interrupt left. Only where nobody is in the middle of a hold or a save."""
        if self._cache is not None and (self._holds or self._saves):
            self._cache.unlock_all()
            self._holds = self._saves = False

    def _count(self, match: KvMatch, n_hit: int, n_miss: int) -> None:
        if self._cache is not None:
            self._cache.touch(match, n_hit=n_hit, n_miss=n_miss)
            self._take_stock()

    def restore(self, row: Row, match: KvMatch, tokens: TokenArray, p0: int, p1: int) -> int:
        """Bring `[p0, p1)` back to a row that ends at `p0`; returns how many tokens. Where something cannot be, the row
        ends there, or is empty."""
        if self._cache is None or row.n != p0 or not self._store.finish_pending():
            return 0
        parts = [part for part in self._cache.read(match) if part.p1 > p0 and part.p0 < p1]
        if self._layout is not None:
            self._restore_ranges(row, parts, tokens, p0, p1, self._layout)
        else:
            self._restore_whole(row, parts, tokens, p0, p1)
        return max(0, row.n - p0)

    def _restore_whole(self, row: Row, parts: list[BlobPart], tokens: TokenArray, p0: int, p1: int) -> None:
        for part in parts:
            begin, end = max(p0, part.p0), min(p1, part.p1)
            state = part.view
            if self._store.caps.keeps_state:
                n_logits = _FLAG + (4 * self._store.caps.n_vocab if part.view[-1] else 0)
                state = part.view[: len(part.view) - n_logits]
            if not self._store.load(row, state, tokens, begin, end):
                return
            if len(part.view) - len(state) > _FLAG:
                row.logits = part.view[len(state) : -1].copy().view(np.float32)

    def _restore_ranges(
        self, row: Row, parts: list[BlobPart], tokens: TokenArray, p0: int, p1: int, layout: SegmentLayout
    ) -> None:
        """By one load, where one blob is just that or the join of several is small; else by several."""
        if [(part.p0, part.p0 + part.n_tokens) for part in parts] == [(p0, p1)]:
            self._store.load(row, parts[0].view, tokens, p0, p1)
            return
        n_most = layout.most_tokens(self._most_joined)
        for begin in range(p0, p1, n_most):
            end = min(begin + n_most, p1)
            if not self._store.load(row, self._join(parts, begin, end, layout), tokens, begin, end):
                return

    def _join(self, parts: list[BlobPart], p0: int, p1: int, layout: SegmentLayout) -> ByteArray:
        """One blob of exactly `[p0, p1)`, valid until the next."""
        cuts = [
            (part.view, max(p0, part.p0) - part.p0, min(p1, part.p1) - part.p0)
            for part in parts
            if part.p1 > p0 and part.p0 < p1
        ]
        n_bytes = layout.n_bytes(p1 - p0)
        if len(self._joined) < n_bytes:  # kept: fresh pages cost twelve times as much to write
            self._joined = np.empty(n_bytes, np.uint8)
        layout.join(cuts, self._joined[:n_bytes])
        return self._joined[:n_bytes]

    # -- keeping

    def keep(self, row: Row) -> int:
        """Make the row true, and save what it holds and the cache does not yet; returns how many tokens. What cannot be
        saved is not, and the log says why. Raises OptionError where a policy of the user's fails."""
        store = self._store
        store.reconcile(row)
        if self._cache is None or not row.n or not store.finish_pending():
            return 0
        if store.caps.kind is MemoryKind.WINDOW and store.sequences.first(row.seq_id) > first_seen(row.n, store.caps):
            return 0  # another session's decode has taken part of its window
        if not row.is_exact and self.kind is not BlobKind.RANGE:
            return 0  # a blob is a whole row here, and what follows an eviction is no one's but this row's
        if not self._holds:
            self._mend_locks()
        self._saves = True
        try:
            tokens = row.tokens[: row.n_exact].copy()
            inserted = self._cache.save(row.namespace, tokens, RowSaver(store, row, self._layout))
            self._saves = False
        except SnapshotError as e:
            logger.warning("%d tokens of KV could not be saved and will be decoded again: %s", row.n, e)
            return 0
        if inserted.refused:
            text = "%d tokens of KV are not kept and will be decoded again: %s"
            if inserted.no_room:
                self._no_room.say(logger, text, row.n, inserted.refused)
            else:
                logger.debug(text, row.n, inserted.refused)
        self._note(inserted)
        return inserted.n_tokens

    def _note(self, inserted: Inserted) -> None:
        """After a save: the stock, and the rows that nobody can compute again and that went for it."""
        self._take_stock()
        if inserted.lost:
            logger.warning("%d parked rows are decoded anew when they return: the cache is full", len(inserted.lost))

    # -- what one row alone has

    def keep_private(self, owner: int, row: Row) -> bool:
        """Save a row that nobody can compute again, for `owner` alone; whether it was."""
        if self._cache is None or not self._store.finish_pending():
            return False
        if not self._holds:
            self._mend_locks()
        self._saves = True
        try:
            saver = RowSaver(self._store, row, self._layout)
            inserted = self._cache.save_private(owner, row.tokens.copy(), saver, exact=False)
            self._saves = False
        except SnapshotError as e:
            logger.warning("%d tokens of KV could not be saved: %s", row.n, e)
            return False
        self._note(inserted)
        if inserted.refused:
            logger.warning("a row of %d tokens is not kept as it is: %s", row.n, inserted.refused)
        return not inserted.refused

    def has_private(self, owner: int) -> bool:
        """Whether it is still kept."""
        return self._cache is not None and self._cache.private(owner) is not None

    def restore_private(self, owner: int, row: Row, tokens: TokenArray, n_exact: int, jumps: Jumps) -> bool:
        """Bring back to an empty row what was kept for `owner`; False: it is gone, and the row empty."""
        match = None if self._cache is None else self._cache.private(owner)
        if self._cache is None or match is None or not self._store.finish_pending():
            return False
        (part,) = self._cache.read(match)
        return self._store.load_row(row, part.view, tokens, n_exact, jumps)

    def drop_private(self, owner: int) -> None:
        """Forget it."""
        if self._cache is not None:
            self._cache.drop_private(owner)
            self._take_stock()

    # -- proof

    def _proven_layout(self) -> SegmentLayout | None:
        """The layout of blobs, if cuts and joins in numpy are llama.cpp's own, byte for byte; None where they are not.

        Decodes five tokens in the scratch, and saves them whole and in parts.
        """
        from .segments import SegmentLayout

        store, sequences = self._store, self._store.sequences
        if sequences.scratch is None:
            return None
        probe = Row(sequences.scratch)
        tokens = np.arange(_N_PROBED, dtype=np.int32) % store.caps.n_vocab
        second = store.caps.n_seq_max - 1  # a sequence that nobody has yet
        try:
            if store.caps.n_batch < _N_PROBED or store.decode([Feed(probe, tokens, wants_logits=False)]) != 0:
                return None

            def saved(p0: int, p1: int) -> ByteArray:
                sequences.copy(probe.seq_id, second, p0, p1)
                blob = np.empty(store.context.state_size(second), np.uint8)
                store.context.save_state(second, blob)
                sequences.remove(second, 0)
                return blob

            whole, head, tail = saved(0, _N_PROBED), saved(0, _CUT), saved(_CUT, _N_PROBED)
            layout = SegmentLayout.learn(whole)
            if layout is None or layout.positions(whole).tolist() != list(range(_N_PROBED)):
                return None
            joined = np.empty(layout.n_bytes(_N_PROBED), np.uint8)
            layout.join([(head, 0, _CUT), (tail, 0, _N_PROBED - _CUT)], joined)
            cuts = [layout.cut(whole, 0, _CUT), layout.cut(whole, _CUT, _N_PROBED), joined]
            proven = all(np.array_equal(a, b) for a, b in zip(cuts, [head, tail, whole], strict=True))
            return layout if proven else None
        except SnapshotError:
            return None
        finally:
            for seq_id in (second, probe.seq_id):
                sequences.remove(seq_id, 0)
            store.forget_counts()
