"""Blobs: their pieces on the edges of a tree, their bytes in an arena, and both always saying the same."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ..errors import StateError
from ..options import RadixOptions, checked_int
from ..types import BlobKind
from .arena import Arena, Extent
from .blobs import Blob, BlobCutter, Piece, piece_bytes, splitter
from .policy import policy_for
from .radix import RadixTree

# Times the blob. Without a limit an insert may move the whole arena, with 0 much of it lies empty: benchmarks/radix.py
MOST_MOVED = 4


@dataclass(frozen=True, slots=True)
class Room:
    """Where a blob can go (`extent` None: nowhere, `refused` says why), and whose own rows went for it."""

    extent: Extent | None
    lost: tuple[Hashable, ...] = ()
    refused: str = ""


class BlobStore:
    """A tree and an arena. The bytes of the tree's pieces are the bytes in use of the arena, at any time.

    All changes happen within `changing()`. The tree is the truth: after an error or an interrupt the pieces that it
    still holds are counted, a blob whose bytes do not agree with them goes, and what no piece speaks for is free.
    """

    def __init__(
        self,
        options: RadixOptions,
        kind: BlobKind,
        cutter: BlobCutter | None,
        cost: Callable[[int, int], float] | None,
    ) -> None:
        self.arena = Arena(options.max_bytes)
        self.tree: RadixTree[Piece] = RadixTree(
            split=splitter(kind, cutter), n_bytes=piece_bytes, policy=policy_for(options.policy), cost=cost
        )
        self.suspect = False
        """A change began and did not end."""
        self._kind = kind
        self._cutter = cutter

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Bracket a change."""
        self.settle()
        self.suspect = True
        try:
            yield
        except BaseException:
            self._mend()
            raise
        self.suspect = False

    def settle(self) -> None:
        """Mend what an interrupt left, if it did."""
        if self.suspect:
            self._mend()

    def room(self, n_bytes: int) -> Room:
        """Room for `n_bytes`. What has to go for it goes; nothing where that is not enough.

        What is free may lie in pieces. It is brought together by moving at most `MOST_MOVED` times the bytes that are
        wanted; where that does not do, a little more goes (but nothing that goes last, and nothing that is locked), so
        that no insert stalls for the size of the whole arena.
        """
        checked_int("the size of a blob", n_bytes, 1)
        if n_bytes > self.arena.max_bytes:
            return Room(None, refused=f"{n_bytes} bytes are more than max_bytes={self.arena.max_bytes}")
        n_free = self.arena.n_free
        gone = self.tree.evict(n_bytes - n_free)
        if n_bytes > n_free and not gone:
            return Room(
                None, refused=f"{n_bytes} bytes are needed, {n_free} are free, and too much of the rest is locked"
            )
        self.release(gone)
        extent = self.arena.allocate(n_bytes)
        while extent is None and self.arena.n_to_move(n_bytes) > MOST_MOVED * n_bytes:
            more = self.tree.evict(max(1, n_bytes // 4), also_last=False)
            if not more:
                break
            self.release(more)
            gone += more
            extent = self.arena.allocate(n_bytes)
        if extent is None:
            self.arena.compact(n_bytes)
            extent = self.arena.allocate(n_bytes)
        lost = dict.fromkeys(piece.blob.owner for piece in gone if piece.blob.owner is not None)
        return Room(extent, tuple(lost))

    def release(self, gone: Iterable[Piece]) -> None:
        """Free the bytes of pieces that are no longer in the tree: whole blobs, or the rear of one, cut in place."""
        by_blob: dict[Blob, list[Piece]] = {}
        for piece in gone:
            by_blob.setdefault(piece.blob, []).append(piece)
        for blob, pieces in by_blob.items():
            n_bytes = sum(piece.n_bytes for piece in pieces)
            if n_bytes == blob.extent.n_bytes:
                self.arena.free(blob.extent)
            elif n_bytes:
                self._cut(blob, min(piece.p0 for piece in pieces), blob.extent.n_bytes - n_bytes)

    def _cut(self, blob: Blob, p1: int, n_bytes: int) -> None:
        if self._cutter is None:
            raise StateError("a piece counts bytes of a blob that cannot be cut")
        n_tokens = p1 - blob.p0
        data = self._cutter.cut(self.arena.view(blob.extent), 0, n_tokens)
        if len(data) != n_bytes:
            raise StateError(f"a cut to {n_tokens} tokens made {len(data)} bytes, not the {n_bytes} they take")
        blob.n_tokens = n_tokens
        self.arena.rewrite(blob.extent, data)

    def _pieces(self) -> dict[Blob, list[Piece]]:
        held: dict[Blob, list[Piece]] = {}
        for node in self.tree.nodes():
            if node.value is not None:
                held.setdefault(node.value.blob, []).append(node.value)
        return held

    def _mend(self) -> None:
        self.tree.mend()
        torn = self.arena.torn
        lost = {
            blob
            for blob, pieces in self._pieces().items()
            if blob.extent is torn or sum(piece.n_bytes for piece in pieces) != blob.extent.n_bytes
        }
        self.tree.mend(lost=[n for n in self.tree.nodes() if n.value is not None and n.value.blob in lost])
        self.arena.recover(blob.extent for blob in self._pieces())
        self.suspect = False

    def problems(self) -> list[str]:
        """Everything that does not add up, a sentence each."""
        found = [*self.tree.problems(), *self.arena.problems()]
        if self.suspect:
            found.append("a change was not finished")
        pieces_of = self._pieces()
        for blob, pieces in pieces_of.items():
            n_bytes = sum(piece.n_bytes for piece in pieces)
            if n_bytes != self.arena.view(blob.extent).nbytes:
                found.append(f"a blob of {blob.extent.n_bytes} bytes is counted as {n_bytes}")
            if any(piece.p0 < blob.p0 or piece.p1 > blob.p0 + blob.n_tokens for piece in pieces):
                found.append(f"a piece is not within its blob, [{blob.p0}, {blob.p0 + blob.n_tokens})")
        counted = (len(pieces_of), self.tree.n_bytes)
        if counted != (self.arena.n_extents, self.arena.n_used):
            held = f"the arena has {self.arena.n_extents} of {self.arena.n_used}"
            found.append(f"the tree knows {counted[0]} blobs of {counted[1]} bytes, {held}")
        for node in self.tree.nodes():
            piece = node.value
            if piece is not None and (piece.p1 != node.p1 or (self._kind is BlobKind.RANGE and piece.p0 != node.p0)):
                found.append(f"{node!r} holds {piece!r}")
        return found
