"""The order in which the edges of a radix tree go: leaves first, the lowest priority first."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import heapify, heappop, heappush
from typing import Generic, TypeAlias

from .node import Node, V
from .policy import Policy, Usage, priority

# (goes last, priority, last use, stamp, node); stamps differ, so nodes are never compared.
Entry: TypeAlias = "tuple[bool, float, int, int, Node[V]]"


class Leaves(Generic[V]):
    """A heap of leaves by priority, with lazy invalidation: O(log n) a victim.

    `usage` tells what is known of a node, `nodes` iterates over all. A priority is asked for only when something has
    to go, once for each leaf that changed since; an entry whose stamp is not its node's is out of date.
    """

    def __init__(
        self, policy: Policy, usage: Callable[[Node[V]], Usage], nodes: Callable[[], Iterable[Node[V]]]
    ) -> None:
        self._policy = policy
        self._usage = usage
        self._nodes = nodes
        self._heap: list[Entry[V]] | None = None  # None: to be built anew
        self._n_built = 0
        self._changed: dict[Node[V], None] = {}  # in order, unlike a set: equal runs choose equally
        self._stamp = 0
        self.clock = 0.0
        """The highest priority that ever went (GreedyDual's L)."""

    def changed(self, node: Node[V]) -> None:
        """A node was used, unlocked, cut, or may have become a leaf."""
        if self._heap is not None and not node.children:
            self._changed[node] = None

    def forget(self) -> None:
        """Build the heap anew at the next choice."""
        self._heap, self._changed = None, {}

    def knows(self, node: Node[V]) -> bool:
        """Whether a leaf will be thought of. O(n): for proofs."""
        if self._heap is None or node in self._changed:
            return True
        return any(entry[4] is node and entry[3] == node.stamp for entry in self._heap)

    def choose(self, n_bytes: int, *, also_last: bool = True) -> list[Node[V]]:
        """The nodes that have to go for `n_bytes` to become free, children before parents. They are still in the tree.

        Empty where all that may go is not enough. `also_last` False: what goes last may not. What frees nothing by
        going is spared. Raises OptionError for a policy that fails.
        """
        heap = self._up_to_date()
        taken: list[Entry[V]] = []
        chosen: dict[Node[V], int] = {}  # with the bytes each frees
        n_left: dict[Node[V], int] = {}  # children that stay
        freed = 0
        while freed < n_bytes and heap:
            entry = heappop(heap)
            node = entry[4]
            if entry[3] != node.stamp or not self._may_go(node, n_left):
                continue  # a locked one comes back when it is unlocked, an inner one when it is a leaf
            taken.append(entry)
            if node.goes_last and not also_last:
                break  # and so do all that are left
            chosen[node] = self._usage(node).n_bytes
            freed += chosen[node]
            for above in node.path():
                parent = above.parent
                if parent is None or parent.parent is None:
                    break
                n_left[parent] = n_left.get(parent, len(parent.children)) - 1
                if not self._may_go(parent, n_left):
                    break
                if parent.value is not None:
                    heappush(heap, self._entry(parent))
                    break
                chosen[parent] = 0  # it only joined what is gone
        going = self._without_idle(chosen) if freed >= n_bytes else []
        gone = set(going)
        for entry in taken:
            heappush(heap, entry)  # also those that go: until they have gone, an interrupt may come
            if entry[4] in gone:
                self.clock = max(self.clock, entry[1])
        self._heap = heap
        return going

    def _up_to_date(self) -> list[Entry[V]]:
        """The heap with what changed. `self._heap` is None until the choice is made: an error in the middle costs one
        more building, nothing else."""
        heap, self._heap = self._heap, None
        if heap is None or len(heap) > 2 * self._n_built + 1024:  # mostly out of date, or the tree has grown
            heap = [self._entry(node) for node in self._nodes() if not node.children]
            heapify(heap)
            self._n_built = len(heap)
        else:
            for node in self._changed:
                if self._may_go(node, {}):
                    heappush(heap, self._entry(node))
        self._changed = {}
        return heap

    def _entry(self, node: Node[V]) -> Entry[V]:
        usage = self._usage(node)
        value = priority(self._policy, usage)
        self._stamp += 1
        node.stamp = self._stamp
        return node.goes_last, value, usage.last_use, node.stamp, node

    @staticmethod
    def _may_go(node: Node[V], n_left: dict[Node[V], int]) -> bool:
        return node.parent is not None and not node.n_locks and not n_left.get(node, len(node.children))

    @staticmethod
    def _without_idle(chosen: dict[Node[V], int]) -> list[Node[V]]:
        """Those of `chosen` that free bytes, or stand in the way of one that does."""
        needed: set[Node[V]] = set()
        for node in reversed(chosen):
            if chosen[node] or node.value is None or node.parent in needed:
                needed.add(node)
        return [node for node in chosen if node in needed]
