"""What a radix tree is made of: nodes with the edges that lead to them, and what a match found."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from ..errors import OptionError
from ..types import TokenArray

V = TypeVar("V")


class Node(Generic[V]):
    """A node and the edge that leads to it: the (n,) int32 `tokens` at positions `[p0, p1)` and their `value`.

    To others a node is a handle: to be asked, locked and handed back to the tree, never changed. `parent` None: a root,
    or a node that is no longer in the tree. `value` None: nothing is kept here, the node only joins its children.
    `stamp`, `clock`: see `Leaves`.
    """

    __slots__ = ("children", "clock", "goes_last", "last_use", "n_locks", "n_uses", "p0", "parent", "stamp", "tokens",
                 "value")  # fmt: skip

    def __init__(self, parent: Node[V] | None, tokens: TokenArray, p0: int, value: V | None) -> None:
        tokens.flags.writeable = False  # handed out; a change would make the tree lie
        self.parent = parent
        self.tokens = tokens
        self.p0 = p0
        self.value = value
        self.children: dict[int, Node[V]] = {}
        self.n_locks = 0
        self.n_uses = 1
        self.last_use = 0
        self.clock = 0.0
        self.goes_last = False
        self.stamp = 0

    def __repr__(self) -> str:
        return f"<Node [{self.p0}, {self.p1}): {len(self.children)} children>"

    @property
    def p1(self) -> int:
        return self.p0 + len(self.tokens)

    def path(self) -> Iterator[Node[V]]:
        """This node and those above it, the root not included."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def subtree(self) -> list[Node[V]]:
        """This node and all below it, parents before children. No recursion: a long chat is a deep tree."""
        found = [self]
        for node in found:
            found.extend(node.children.values())
        return found


@dataclass(frozen=True, slots=True)
class Segment(Generic[V]):
    """The tokens `[p0, p1)` of a prompt are those of `node`'s edge: all of it, or (the last one) its first part."""

    node: Node[V]
    p0: int
    p1: int


@dataclass(frozen=True, slots=True)
class Match(Generic[V]):
    """The first `n_tokens` of a prompt are in the tree: along `segments`, from position 0 on without a gap.

    `node`: what has to stay so that they stay (None: nothing was found); lock it to be sure of that.
    """

    namespace: Hashable
    n_tokens: int
    segments: tuple[Segment[V], ...]
    node: Node[V] | None


@dataclass(frozen=True, slots=True)
class Visit(Generic[V]):
    """One step of a walk: `depth` edges below the root of `namespace`."""

    namespace: Hashable
    depth: int
    node: Node[V]


def checked_tokens(tokens: TokenArray) -> TokenArray:
    """`tokens` as a contiguous (n,) int32 array, else OptionError."""
    if not isinstance(tokens, np.ndarray) or tokens.dtype != np.int32 or tokens.ndim != 1:
        what = f"{tokens.dtype} {tokens.shape}" if isinstance(tokens, np.ndarray) else type(tokens).__name__
        raise OptionError(f"tokens must be an (n,) int32 array, not {what}")
    return np.ascontiguousarray(tokens)
