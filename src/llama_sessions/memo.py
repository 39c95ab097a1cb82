"""A dict with a bound."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Memo(Generic[K, V]):
    """Remembers values, and forgets the older half when they weigh more than `limit` in all.

    `weigh`: what a key with its value counts for. What weighs more than a sixteenth of the limit is not kept at all.
    """

    def __init__(self, limit: int, weigh: Callable[[K], int]) -> None:
        self._limit = limit
        self._weigh = weigh
        self._weight = 0
        self._values: dict[K, V] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: K) -> bool:
        return key in self._values

    def get(self, key: K) -> V | None:
        return self._values.get(key)

    def keep(self, key: K, value: V) -> V:
        """Remember `value`, if it is not too heavy; returns it."""
        weight = self._weigh(key)
        if weight * 16 > self._limit:
            return value
        with self._lock:
            self._keep(key, value, weight)
        return value

    def _keep(self, key: K, value: V, weight: int) -> None:
        if self._weight + weight > self._limit:
            for old in list(self._values)[: (len(self._values) + 1) // 2]:
                self._weight -= self._weigh(old)
                del self._values[old]
        if key not in self._values:
            self._weight += weight
        self._values[key] = value
