"""A radix tree over token runs: what many prompts share is kept once. It knows nothing of what its edges hold.

The path from a root to a node spells the tokens of positions `[0, p1)`; the edge into each node holds a value for its
own tokens alone. Every edge owns its ids (a split copies them, 4 bytes a token): a view would keep the ids of a whole
prompt alive for the few that are left of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Generic

import numpy as np

from ..errors import OptionError, StateError
from ..types import TokenArray
from .leaves import Leaves
from .node import Match, Node, Segment, V, Visit, checked_tokens
from .policy import Policy, Usage, lru
from .row import common_prefix


class RadixTree(Generic[V]):
    """Values by runs of tokens, with a root for each namespace.

    `split(value, n)`: the values of the first n tokens of an edge and of the rest; either may be None, where a value
    cannot be divided and stays whole on the other. `n_bytes(value)`: what becomes free when the edge goes; always the
    same for the same value, 0 where another part must go too. `cost(p0, p1)`: what computing these tokens again would
    cost (None: their number), for the policy. All three must be pure: they are asked before anything changes, and may
    raise.

    A change that an interrupt cut short is mended at the next change, at the price of the edge it was about; until
    then nothing matches.
    """

    def __init__(
        self,
        *,
        split: Callable[[V, int], tuple[V | None, V | None]],
        n_bytes: Callable[[V], int],
        policy: Policy = lru,
        cost: Callable[[int, int], float] | None = None,
    ) -> None:
        self._split = split
        self._n_bytes_of = n_bytes
        self._cost = cost
        self._roots: dict[Hashable, Node[V]] = {}
        self._leaves: Leaves[V] = Leaves(policy, self._usage, self.nodes)
        self._tick = 0
        self._unfinished: tuple[Node[V], int] | None = None  # the child under this key is not to be trusted
        self.n_nodes = 0
        self.n_tokens = 0
        self.n_bytes = 0

    # -- asking

    def match(self, namespace: Hashable, tokens: TokenArray) -> Match[V]:
        """The longest prefix of (n,) int32 `tokens` in the tree. Changes nothing at all. O(n) in C, O(edges) in Python.

        Raises OptionError for tokens that are no such array.
        """
        tokens = checked_tokens(tokens)
        node = self._roots.get(namespace)
        if node is None or self._unfinished is not None:
            return Match(namespace, 0, (), None)
        segments: list[Segment[V]] = []
        data = tokens.tobytes()
        p0 = 0
        while p0 < len(tokens) and (child := node.children.get(int(tokens[p0]))) is not None:
            # One memcmp an edge; only the edge at which the prompt leaves the tree is looked at token by token.
            is_whole = data.startswith(child.tokens, 4 * p0)  # type: ignore[arg-type]  # any buffer will do
            p1 = child.p1 if is_whole else p0 + common_prefix(child.tokens, tokens[p0:])
            segments.append(Segment(child, p0, p1))
            node, p0 = child, p1
            if not is_whole:
                break
        return Match(namespace, p0, tuple(segments), segments[-1].node if segments else None)

    def namespaces(self) -> list[Hashable]:
        return list(self._roots)

    def tops(self, namespace: Hashable) -> list[Node[V]]:
        """The nodes just below a root: one for each first token."""
        root = self._roots.get(namespace)
        return [] if root is None else list(root.children.values())

    def nodes(self) -> Iterator[Node[V]]:
        """All nodes, parents before children; not while the tree changes."""
        for root in self._roots.values():
            yield from root.subtree()[1:]

    def walk(self) -> Iterator[Visit[V]]:
        """All nodes depth first, for a printable map."""
        for namespace, root in self._roots.items():
            stack = [Visit(namespace, 0, child) for child in reversed(root.children.values())]
            while stack:
                visit = stack.pop()
                yield visit
                below = reversed(visit.node.children.values())
                stack.extend(Visit(namespace, visit.depth + 1, child) for child in below)

    # -- changing

    def touch(self, node: Node[V]) -> None:
        """Record one use of the path to `node`. StateError if it is no longer in the tree."""
        self.mend()
        self._check_in_tree(node)
        self._tick += 1
        for used in node.path():
            used.last_use = self._tick
            used.n_uses += 1
            used.clock = self._leaves.clock
        self._leaves.changed(node)

    def insert(
        self,
        namespace: Hashable,
        tokens: TokenArray,
        value: Callable[[int], V],
        *,
        p0: int = 0,
        goes_last: bool = False,
    ) -> Node[V] | None:
        """Add what of (n,) int32 `tokens` the tree does not have yet; returns its node, or None if nothing was missing.

        `value(q)` makes the value of the new edge `[q, n)`; it is called once, before anything changes, and must leave
        the tree alone. `p0`: where the caller's data begin; StateError where the tree ends before that.
        `goes_last`: the edge is evicted only when all others are gone.
        """
        self.mend()
        found = self.match(namespace, tokens)
        q = found.n_tokens
        if q < p0:
            raise StateError(f"the tree holds {q} of the {p0} tokens before the new ones; insert from {q} on")
        if q == len(tokens):
            return None
        made = value(q)
        size = self._n_bytes_of(made)
        parent = found.node
        if parent is not None and q < parent.p1:
            parent = self.divide(parent, q - parent.p0)
        edge = checked_tokens(tokens)[q:].copy()
        root = parent or self._roots.get(namespace) or Node(None, np.empty(0, np.int32), 0, None)
        leaf = Node(root, edge, q, made)
        self._tick += 1
        leaf.last_use, leaf.clock, leaf.goes_last = self._tick, self._leaves.clock, goes_last
        key = int(edge[0])
        self._unfinished = (root, key)
        root.children[key] = leaf
        if parent is None:
            self._roots[namespace] = root
        self._count(1, len(edge), size)
        self._leaves.changed(leaf)
        self._unfinished = None
        return leaf

    def divide(self, node: Node[V], n: int) -> Node[V]:
        """Put a border behind the first `n` tokens of an edge; returns the new node, which ends there.

        `node` stays what it was to its holders: the end of its path, with its locks and children. Raises OptionError
        unless both halves have tokens.
        """
        self.mend()
        self._check_in_tree(node)
        if not 0 < n < len(node.tokens):
            raise OptionError(f"an edge of {len(node.tokens)} tokens cannot be divided behind {n}")
        head_value, tail_value = (None, None) if node.value is None else self._split(node.value, n)
        size = self._size(head_value) + self._size(tail_value) - self._size(node.value)
        parent = node.parent
        if parent is None:
            raise StateError("the root has no edge")
        head = Node(parent, node.tokens[:n].copy(), node.p0, head_value)
        head.n_uses, head.last_use, head.clock = node.n_uses, node.last_use, node.clock
        head.goes_last = node.goes_last
        tail = node.tokens[n:].copy()
        tail.flags.writeable = False
        head.children[int(tail[0])] = node
        key = int(head.tokens[0])
        self._unfinished = (parent, key)
        node.tokens, node.p0, node.value, node.parent = tail, node.p0 + n, tail_value, head
        parent.children[key] = head
        self._count(1, 0, size)
        self._leaves.changed(node)
        self._unfinished = None
        return head

    def replace(self, node: Node[V], value: V | None) -> V | None:
        """Give an edge another value; returns the old one. A leaf whose value is None goes with the next eviction."""
        self.mend()
        self._check_in_tree(node)
        old, size = node.value, self._size(value)
        parent = node.parent
        if parent is None:
            raise StateError("the root has no edge")
        self._unfinished = (parent, int(node.tokens[0]))
        node.value = value
        self._count(0, 0, size - self._size(old))
        self._leaves.changed(node)
        self._unfinished = None
        return old

    def lock(self, node: Node[V]) -> None:
        """Keep `node`, and so the path to it, until it is unlocked as often. StateError if it is not in the tree."""
        self.mend()
        self._check_in_tree(node)
        node.n_locks += 1

    def unlock(self, node: Node[V]) -> None:
        """Undo one `lock`; StateError without one."""
        if node.n_locks < 1:
            raise StateError(f"{node!r} is not locked")
        self._leaves.changed(node)  # before it may go
        node.n_locks -= 1

    def unlock_all(self) -> None:
        """Undo every lock: for an owner that knows that nobody holds one any more. O(nodes)."""
        self.mend()
        for node in self.nodes():
            while node.n_locks:
                self.unlock(node)

    def evict(self, n_bytes: int, *, also_last: bool = True) -> list[V]:
        """Drop leaves, and what becomes a leaf, until `n_bytes` are free; returns the values that went.

        Nothing goes, and nothing is returned, where all that is not locked is not enough (`also_last` False: what
        is marked to go last counts as locked). O(log n) a victim. Raises OptionError for a policy that fails,
        and then nothing has gone.
        """
        self.mend()
        return self._drop(self._leaves.choose(n_bytes, also_last=also_last)) if n_bytes > 0 else []

    def remove(self, node: Node[V]) -> list[V]:
        """Drop `node` and all below it; returns their values. StateError if one of them is locked."""
        self.mend()
        self._check_in_tree(node)
        below = node.subtree()
        n_locked = sum(1 for each in below if each.n_locks)
        if n_locked:
            raise StateError(
                f"{n_locked} of the {len(below)} nodes at and below {node!r} are locked; unlock them first"
            )
        return self._drop(below[::-1])

    def clear(self, *namespaces: Hashable) -> list[V]:
        """Drop these namespaces (none named: all); returns the values that went. What is locked stays, and its path."""
        self.mend()
        roots = [self._roots[name] for name in namespaces or list(self._roots) if name in self._roots]
        kept = {node for root in roots for each in root.subtree() if each.n_locks for node in each.path()}
        return self._drop([node for root in roots for node in root.subtree()[:0:-1] if node not in kept])

    def mend(self, *, lost: Sequence[Node[V]] = ()) -> None:
        """Drop what an interrupt left half changed, and the nodes that the owner knows to be `lost`, with all below
        them, locked or not. Values that go are not returned: whoever owns them counts those that are left."""
        if self._unfinished is None and not lost:
            return
        broken = [] if self._unfinished is None else [self._unfinished]
        for parent, key in [*broken, *((node.parent, int(node.tokens[0])) for node in lost if node.parent is not None)]:
            self._unfinished = (parent, key)
            child = parent.children.pop(key, None)
            for node in [] if child is None else child.subtree():
                node.parent = None
        nodes = list(self.nodes())
        self.n_nodes, self.n_tokens = len(nodes), sum(len(node.tokens) for node in nodes)
        self.n_bytes = sum(self._size(node.value) for node in nodes)
        self._leaves.forget()
        self._forget_empty_roots()
        self._unfinished = None

    # -- proof

    def problems(self) -> list[str]:
        """Everything that does not add up, a sentence each."""
        found = [] if self._unfinished is None else ["a change was not finished"]
        nodes = list(self.nodes())
        for each in [*self._roots.values(), *nodes]:
            for key, child in each.children.items():
                if child.parent is not each or child.p0 != each.p1:
                    found.append(f"{child!r} does not follow {each!r}")
                if not len(child.tokens) or int(child.tokens[0]) != key:
                    found.append(f"{child!r} stands under {key}, which is not its first token")
        for node in nodes:
            if node.n_locks < 0:
                found.append(f"{node!r} has {node.n_locks} locks")
            if not node.children and not node.n_locks and not self._leaves.knows(node):
                found.append(f"{node!r} would never go")
        counted = (len(nodes), sum(len(n.tokens) for n in nodes), sum(self._size(n.value) for n in nodes))
        if counted != (self.n_nodes, self.n_tokens, self.n_bytes):
            booked = f"{self.n_nodes} nodes, {self.n_tokens} tokens, {self.n_bytes} bytes"
            found.append(f"{booked} are booked, {counted[0]}, {counted[1]}, {counted[2]} are there")
        found += [f"the root of {name!r} is empty" for name, root in self._roots.items() if not root.children]
        return found

    def check_integrity(self) -> None:
        """StateError that names everything that does not add up. O(n), for tests."""
        found = self.problems()
        if found:
            raise StateError("the tree does not add up (please report this): " + "; ".join(found))

    # -- within

    def _size(self, value: V | None) -> int:
        return 0 if value is None else self._n_bytes_of(value)

    def _usage(self, node: Node[V]) -> Usage:
        n = len(node.tokens)
        cost = float(n) if self._cost is None else self._cost(node.p0, node.p1)
        return Usage(node.last_use, node.n_uses, n, self._size(node.value), cost, node.clock)

    def _count(self, n_nodes: int, n_tokens: int, n_bytes: int) -> None:
        self.n_nodes += n_nodes
        self.n_tokens += n_tokens
        self.n_bytes += n_bytes

    @staticmethod
    def _check_in_tree(node: Node[V]) -> None:
        if node.parent is None:
            raise StateError("that node is no longer in the tree; match again, and lock what must stay")

    def _drop(self, nodes: Sequence[Node[V]]) -> list[V]:
        """Unlink nodes, children before parents."""
        values: list[V] = []
        emptied = False
        for node in nodes:
            parent, key = node.parent, int(node.tokens[0])
            if parent is None:
                continue
            self._unfinished = (parent, key)
            node.parent = None
            del parent.children[key]
            self._count(-1, -len(node.tokens), -self._size(node.value))
            if node.value is not None:
                values.append(node.value)
            if not parent.children:
                emptied = emptied or parent.parent is None
                self._leaves.changed(parent)
        if emptied:
            self._forget_empty_roots()
        self._unfinished = None
        return values

    def _forget_empty_roots(self) -> None:
        self._roots = {name: root for name, root in self._roots.items() if root.children}
