"""What moving, restoring and decoding KV costs here: what was measured on this machine."""

from __future__ import annotations

from dataclasses import dataclass, field

_RISES = 1.05  # times as much at the most, from one measurement to the next
_ENOUGH = 3  # measurements before one is believed
_MANY = 32  # tokens from which on a decode, or a restore, says what each of many costs


@dataclass(slots=True)
class Average:
    """What something costs when nothing disturbs it: falls at once, rises slowly, so that one stall says nothing.

    `value`: None before a few measurements. What is thought too dear is not done, and so not measured again: that is
    why a high value must not come from chance.
    """

    value: float | None = None
    _lowest: float = float("inf")
    _n: int = 0

    def add(self, measured: float) -> None:
        self._lowest = min(measured, self._lowest * _RISES)
        self._n += 1
        if self._n >= _ENOUGH:
            self.value = self._lowest


@dataclass(slots=True)
class Costs:
    """Seconds: of a `llama_memory_seq_*` call (it grows with n_ctx), a restored token, a decoded one among many.

    Before something has been measured it is thought to be worth while: reuse is what the library is for.
    """

    operation: Average = field(default_factory=Average)
    restored_token: Average = field(default_factory=Average)
    decoded_token: Average = field(default_factory=Average)

    def note_decode(self, n_tokens: int, seconds: float) -> None:
        if n_tokens >= _MANY:
            self.decoded_token.add(seconds / n_tokens)

    def note_restore(self, n_tokens: int, seconds: float) -> None:
        if n_tokens >= _MANY:
            self.restored_token.add(seconds / n_tokens)

    def decode(self, n_tokens: int) -> float | None:
        """Seconds that `n_tokens` more in a batch cost."""
        return None if self.decoded_token.value is None else n_tokens * self.decoded_token.value

    def is_worth_sharing(self, n_tokens: int) -> bool:
        """Whether to share `n_tokens` with another row costs less than to decode them: one operation."""
        return self._is_less(1, 0, n_tokens)

    def is_worth_restoring(self, n_tokens: int, n_restored: int | None = None) -> bool:
        """Whether to restore `n_tokens` costs less than to decode them: two operations, and their bytes (or those of
        `n_restored`, where they come only with others)."""
        return self._is_less(2, n_tokens if n_restored is None else n_restored, n_tokens)

    def _is_less(self, n_operations: int, n_restored: int, n_tokens: int) -> bool:
        decode = self.decode(n_tokens)
        if decode is None:
            return True
        restore = n_restored * (self.restored_token.value or 0.0)
        return n_operations * (self.operation.value or 0.0) + restore < decode
