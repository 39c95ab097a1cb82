"""The cache of saved KV: what prompts share is kept once, by its tokens, within a budget of bytes.

The bytes of a run of tokens are opaque here. What is one owner's alone (an approximate row) lies in the same budget,
under the owner's name, and no prompt of anybody else can find it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, replace

from ..errors import OptionError, StateError
from ..options import RadixOptions, checked_namespace
from ..report import RadixStats
from ..types import BlobKind, TokenArray
from .arena import ByteArray
from .blob_store import BlobStore
from .blobs import Blob, BlobCutter, BlobPart, Given, Piece, Saver
from .node import Match, Segment, checked_tokens

KvMatch = Match[Piece]


@dataclass(frozen=True, slots=True)
class OwnerSpace:
    """The namespace of what belongs to one owner; no text equals it."""

    owner: Hashable


@dataclass(frozen=True, slots=True)
class Inserted:
    """What an insert did. `n_tokens`, `n_bytes`: newly kept (0: all was there, or `refused` says why not).

    `n_tokens_evicted`: what went to make room. `lost`: the owners whose own rows went with it. `no_room`: the budget
    refused it.
    """

    n_tokens: int = 0
    n_bytes: int = 0
    n_tokens_evicted: int = 0
    lost: tuple[Hashable, ...] = ()
    refused: str = ""
    no_room: bool = False


class RadixCache:
    """Saved KV by tokens, within `options.max_bytes`; one caller at a time.

    `kind`: what the memory can do. `cutter`: cuts ranges (`BlobKind.RANGE` alone); without one a blob counts whole
    until its last part goes. `cost(p0, p1)`: what decoding these positions costs, for the policy (None: their number).

    A split copies nothing: both edges hold pieces of one blob. When the rear one goes, the front is cut in place, which
    needs no room, and the rest is free. Edges that follow each other are joined by whoever restores them.

    An error or an interrupt in the middle of a change costs at most what was being changed. What was evicted before a
    save failed stays evicted.
    """

    def __init__(
        self,
        options: RadixOptions,
        *,
        kind: BlobKind = BlobKind.RANGE,
        cutter: BlobCutter | None = None,
        cost: Callable[[int, int], float] | None = None,
    ) -> None:
        if cutter is not None and kind is not BlobKind.RANGE:
            raise OptionError(f"a cutter is of no use where blobs are of kind {kind.value!r}: they hold whole rows")
        self.kind = kind
        self._options = options
        self._cutter = cutter
        self._store = BlobStore(options, kind, cutter, cost)
        self._tree, self._arena = self._store.tree, self._store.arena
        self._n_hit = self._n_miss = self._n_evicted = 0

    # -- asking

    def match(self, namespace: str | None, tokens: TokenArray) -> KvMatch:
        """The longest prefix of (n,) int32 `tokens` that can be restored. Changes nothing. At most 1 ms for 32,768.

        Raises OptionError for a namespace that is no text, or tokens that are no such array.
        """
        found = self._tree.match(checked_namespace(namespace), tokens)
        return Match(namespace, 0, (), None) if self._store.suspect else self._usable(found)

    def private(self, owner: Hashable) -> KvMatch | None:
        """What is kept for `owner` alone, to `read`, `lock` or `touch`; None if there is nothing, or it was evicted."""
        tops = [] if self._store.suspect else self._tree.tops(OwnerSpace(owner))
        if not tops:
            return None
        (node,) = tops
        return Match(OwnerSpace(owner), node.p1, (Segment(node, 0, node.p1),), node)

    def read(self, match: KvMatch) -> list[BlobPart]:
        """The blobs that make up a match, from position 0 on: as few as hold it. No byte is copied.

        Views are valid until the next change of the cache. StateError if part of the match has gone since.
        """
        if match.node is None:
            return []
        if self._store.suspect or match.node.parent is None:
            raise StateError("what was found is no longer in the cache; match again, and lock what must stay")
        parts: list[BlobPart] = []
        p1 = match.n_tokens
        for node in match.node.path():
            blob = None if node.value is None else node.value.blob
            if blob is not None and blob.p0 < p1:
                parts.append(BlobPart(self._arena.view(blob.extent), blob.p0, p1, blob.n_tokens))
                p1 = blob.p0
        return parts[::-1]

    @property
    def n_locks(self) -> int:
        """Locks that nobody has undone yet."""
        return sum(node.n_locks for node in self._tree.nodes())

    def stats(self) -> RadixStats:
        """Counters, as of now."""
        owners = [name for name in self._tree.namespaces() if isinstance(name, OwnerSpace)]
        owned = [node.value for name in owners for node in self._tree.tops(name)]
        return RadixStats(
            n_hit_tokens=self._n_hit,
            n_miss_tokens=self._n_miss,
            n_bytes=self._arena.n_used,
            n_nodes=self._tree.n_nodes,
            n_tokens=self._tree.n_tokens,
            n_tokens_evicted=self._n_evicted,
            n_bytes_private=sum(piece.n_bytes for piece in owned if piece is not None),
            max_bytes=self._arena.max_bytes,
            kind=self.kind.value,
        )

    def describe(self) -> Iterator[str]:
        """The tree as lines of text: one a namespace, and below it one an edge."""
        for visit in self._tree.walk():
            node, name = visit.node, visit.namespace
            n_bytes = 0 if node.value is None else node.value.n_bytes
            locked = f", locked {node.n_locks} times" if node.n_locks else ""
            whose = f"owner {name.owner!r}" if isinstance(name, OwnerSpace) else f"namespace {name!r}"
            line = f"[{node.p0}, {node.p1}) {n_bytes} bytes, used {node.n_uses} times{locked}"
            yield "  " * visit.depth + line + ("" if visit.depth else f" ({whose})")

    # -- changing

    def lock(self, match: KvMatch) -> None:
        """Keep what was found until it is unlocked as often. StateError if it has gone already."""
        if match.node is not None:
            self._store.settle()
            self._tree.lock(match.node)

    def unlock(self, match: KvMatch) -> None:
        """Undo one `lock`."""
        if match.node is not None:
            self._store.settle()
            self._tree.unlock(match.node)

    def unlock_all(self) -> None:
        """Undo every lock: for an owner that knows that nobody holds one any more. O(nodes)."""
        self._store.settle()
        self._tree.unlock_all()

    def touch(self, match: KvMatch, *, n_hit: int, n_miss: int) -> None:
        """Record that `n_hit` tokens of a match were used, and that `n_miss` of the prompt had to be decoded."""
        self._store.settle()
        if n_hit and match.node is not None:
            self._tree.touch(match.node)
        self._n_hit += n_hit
        self._n_miss += n_miss

    def insert(self, namespace: str | None, tokens: TokenArray, p0: int, blob: ByteArray) -> Inserted:
        """Keep a (n,) uint8 blob of the positions `[p0, len(tokens))` of a prompt: what of it is not here yet.

        A clean no (`Inserted.refused`) where the tokens before `p0` are not here, where there are fewer new ones than
        `min_tokens`, or where all that is not locked is too little room. Raises OptionError for a blob of another size
        than its tokens have, or a policy that fails; what it failed about has not gone then.
        """
        n = len(checked_tokens(tokens))
        if not 0 <= p0 <= n or (p0 and self.kind is not BlobKind.RANGE):
            raise OptionError(f"a blob of {n} tokens of kind {self.kind.value!r} cannot begin at {p0}")
        if self._cutter is not None and len(blob) != self._cutter.n_bytes(n - p0):
            needed = self._cutter.n_bytes(n - p0)
            raise OptionError(f"a blob of {n - p0} tokens has {needed} bytes, not {len(blob)}")
        return self._insert(checked_namespace(namespace), tokens, p0, Given(blob, p0, self._cutter))

    def save(self, namespace: str | None, tokens: TokenArray, saver: Saver) -> Inserted:
        """Like `insert`, with a saver that is asked for exactly the positions that are not here yet (or the whole row).

        It writes into the arena: no copy of ours. What it raises is passed on, and nothing is kept. It must not use the
        cache.
        """
        return self._insert(checked_namespace(namespace), tokens, None, saver)

    def save_private(self, owner: Hashable, tokens: TokenArray, saver: Saver, *, exact: bool) -> Inserted:
        """Keep a whole row for `owner` alone, in place of what it had. `exact` False: nobody can compute it again, so
        it goes after everything else; True: in its turn."""
        self.drop_private(owner)
        return self._insert(OwnerSpace(owner), tokens, None, saver, owner=owner, goes_last=not exact)

    def drop_private(self, owner: Hashable) -> bool:
        """Forget what is kept for `owner`; whether there was something. StateError while it is locked."""
        self._store.settle()
        tops = self._tree.tops(OwnerSpace(owner))
        if tops and not any(node.n_locks for node in tops):
            with self._store.changing():
                self._store.release(self._tree.clear(OwnerSpace(owner)))
        elif tops:
            raise StateError(f"what is kept for {owner!r} is locked; unlock it first")
        return bool(tops)

    def clear(self, *namespaces: str | None) -> int:
        """Drop these namespaces (none named: all); returns how many tokens went. What is locked stays, with its path,
        and so does what belongs to one owner."""
        names: list[Hashable] = [checked_namespace(name) for name in namespaces] or [
            name for name in self._tree.namespaces() if not isinstance(name, OwnerSpace)
        ]
        with self._store.changing():
            before = self._tree.n_tokens
            if names:
                self._store.release(self._tree.clear(*names))
            self._arena.give_back()
            return before - self._tree.n_tokens

    # -- proof

    def problems(self) -> list[str]:
        """Everything that does not add up, a sentence each."""
        return self._store.problems()

    def check_integrity(self) -> None:
        """StateError that names everything that does not add up. O(n), for tests."""
        found = self.problems()
        if found:
            raise StateError("the cache does not add up (please report this): " + "; ".join(found))

    # -- within

    def _usable(self, found: KvMatch) -> KvMatch:
        """What of a match can be restored, and the node on which that hangs."""
        if self.kind is BlobKind.RANGE or found.node is None:
            return found
        if self.kind is BlobKind.STATE:
            for i in range(len(found.segments), 0, -1):
                segment = found.segments[i - 1]
                if segment.node.value is not None and segment.p1 == segment.node.p1:
                    return Match(found.namespace, segment.p1, found.segments[:i], segment.node)
        else:
            for node in found.node.subtree():  # any row that goes on from here begins with the same tokens
                if node.value is not None:
                    return replace(found, node=node)
        return Match(found.namespace, 0, (), None)

    def _insert(
        self,
        namespace: Hashable,
        tokens: TokenArray,
        p0: int | None,
        saver: Saver,
        *,
        owner: Hashable | None = None,
        goes_last: bool = False,
    ) -> Inserted:
        """`p0`: where the blob begins, if it is there already."""
        tokens = checked_tokens(tokens)
        n = len(tokens)
        with self._store.changing():
            found = self._tree.match(namespace, tokens)
            usable = self._usable(found)
            q = usable.n_tokens
            if q == n:
                if usable.node is not None:
                    self._tree.touch(usable.node)
                return Inserted()
            if q < (p0 or 0):
                return Inserted(refused=f"only {q} of the {p0} tokens before the new ones are here")
            if owner is None and n - q < self._options.min_tokens:
                return Inserted(refused=f"{n - q} new tokens are fewer than min_tokens={self._options.min_tokens}")
            start = q if self.kind is BlobKind.RANGE else 0
            if p0 is not None and self._cutter is None:
                start = p0
            n_bytes = saver.n_bytes(start, n)
            # What a range is to hang on must not go for it; a whole row needs nothing before it.
            held = found.node if self.kind is BlobKind.RANGE else None
            if held is not None:
                self._tree.lock(held)
            try:
                before = self._tree.n_tokens
                room = self._store.room(n_bytes)
                n_evicted = before - self._tree.n_tokens
                self._n_evicted += n_evicted
                if room.extent is None:
                    return Inserted(refused=room.refused, no_room=True)
                saver.save(start, n, self._arena.view(room.extent))
                self._link(namespace, tokens, Blob(room.extent, start, n - start, owner), goes_last)
            finally:
                if held is not None:
                    self._tree.unlock(held)
        return Inserted(n - q, n_bytes, n_evicted, room.lost)

    def _link(self, namespace: Hashable, tokens: TokenArray, blob: Blob, goes_last: bool) -> None:
        """Put a blob, filled, into the tree."""
        n, n_bytes = len(tokens), blob.extent.n_bytes
        node = self._tree.insert(namespace, tokens, lambda q: Piece(blob, q, n, n_bytes), goes_last=goes_last)
        if node is None:  # a state within a longer one: it gets a border of its own
            node = self._tree.match(namespace, tokens).node
            if node is not None and n < node.p1:
                node = self._tree.divide(node, n - node.p0)
            if node is not None:
                self._tree.replace(node, Piece(blob, node.p0, n, n_bytes))
        if self.kind is BlobKind.ROW and node is not None:
            for above in list(node.path())[1:]:
                if above.value is not None and not above.n_locks:  # the longer row can do what this one could
                    self._store.release([above.value])
                    self._tree.replace(above, None)
