"""Saved KV as the cache sees it: opaque bytes for a run of tokens, of which an edge of the tree holds a part."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

from ..types import BlobKind
from .arena import ByteArray, Extent


class BlobCutter(Protocol):
    """Cuts blobs of `BlobKind.RANGE` by tokens. Only llama.cpp's side knows how a blob is laid out.

    `n_bytes(n)`: the exact size of a blob of n tokens. `cut(blob, a, b)`: its tokens `[a, b)` as a blob of their own.
    """

    def n_bytes(self, n_tokens: int) -> int: ...
    def cut(self, blob: ByteArray, a: int, b: int) -> ByteArray: ...


class Saver(Protocol):
    """Saves KV of a row on demand, straight into the arena.

    `n_bytes(p0, p1)`: how large a blob of the positions `[p0, p1)` is; `save(p0, p1, out)` writes it to the (n_bytes,)
    uint8 `out`, which is valid during the call, and raises if it cannot.
    """

    def n_bytes(self, p0: int, p1: int) -> int: ...
    def save(self, p0: int, p1: int, out: ByteArray) -> None: ...


class Given:
    """A `Saver` over a blob that is there already and begins at `p0`; without a cutter it is kept whole."""

    def __init__(self, blob: ByteArray, p0: int, cutter: BlobCutter | None) -> None:
        self._blob = blob
        self._p0 = p0
        self._cutter = cutter

    def n_bytes(self, p0: int, p1: int) -> int:
        return len(self._blob) if self._cutter is None else self._cutter.n_bytes(p1 - p0)

    def save(self, p0: int, p1: int, out: ByteArray) -> None:
        if p0 == self._p0 or self._cutter is None:
            out[:] = self._blob
        else:
            out[:] = self._cutter.cut(self._blob, p0 - self._p0, p1 - self._p0)


@dataclass(slots=True, eq=False)
class Blob:
    """Bytes of `n_tokens` positions from `p0` on. `owner` None: anybody's with these tokens."""

    extent: Extent
    p0: int
    n_tokens: int
    owner: Hashable | None = None


@dataclass(frozen=True, slots=True)
class Piece:
    """The positions `[p0, p1)` of a blob, on one edge of the tree.

    `n_bytes`: what becomes free when this piece and all behind it are gone; over the pieces of a blob that is its size.
    A piece in front never goes before one behind it: they lie on one path of the tree, and leaves go first.
    """

    blob: Blob
    p0: int
    p1: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class BlobPart:
    """What to restore: the first `p1 - p0` of the `n_tokens` tokens of a blob, at positions `[p0, p1)`.

    `view`: the whole blob, (n,) uint8, valid until the next change of the cache.
    """

    view: ByteArray
    p0: int
    p1: int
    n_tokens: int


def piece_bytes(piece: Piece) -> int:
    return piece.n_bytes


def splitter(kind: BlobKind, cutter: BlobCutter | None) -> Callable[[Piece, int], tuple[Piece | None, Piece | None]]:
    """How the value of an edge is divided where two prompts part.

    Nothing is copied: both edges hold pieces of one blob from then on, and its bytes are cut when the rear one goes.
    """

    def split(piece: Piece, n: int) -> tuple[Piece | None, Piece | None]:
        if kind is not BlobKind.RANGE:
            return None, piece  # a whole row belongs to its end
        blob, middle = piece.blob, piece.p0 + n
        # Without a cutter nothing is free before the front is gone.
        rear = 0 if cutter is None else cutter.n_bytes(piece.p1 - blob.p0) - cutter.n_bytes(middle - blob.p0)
        return Piece(blob, piece.p0, middle, piece.n_bytes - rear), Piece(blob, middle, piece.p1, rear)

    return split
