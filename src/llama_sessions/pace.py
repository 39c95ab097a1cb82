"""How many prompt tokens fit into a step beside the tokens of those who are talking."""

from __future__ import annotations

_WEIGHT = 0.25  # of the newest measurement
_FIRST = 8  # prompt tokens beside others, before anything was measured
_CAREFUL = 0.9  # of what the share allows: a step that is a little too long is noticed, one too short is not


class Pace:
    """Measured step times: of `n` sessions that decode a token each, and of a prompt token in a batch with them.

    `share` of a step's time goes to prompts: 0.5 doubles the time between two tokens while somebody joins, 1.0 fills
    the batch.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._decode: dict[int, float] = {}
        self._prompt_token: float | None = None

    def note(self, n_next: int, n_prompt: int, seconds: float) -> None:
        """A step with `n_next` single tokens and `n_prompt` prompt tokens took so long."""
        if n_prompt:
            decode = self.decode_seconds(n_next) if n_next else 0.0
            if decode is not None:
                each = max(seconds - decode, seconds / 20, 1e-9) / n_prompt
                self._prompt_token = _mean(self._prompt_token, each)
            elif self._prompt_token is None:
                self._prompt_token = max(seconds, 1e-9) / (n_next + n_prompt)
            else:  # or, as long as there is always a prompt, it would never be known what the others take
                self._decode[n_next] = max(seconds - n_prompt * self._prompt_token, seconds / 20)
        elif n_next:
            self._decode[n_next] = _mean(self._decode.get(n_next), seconds)

    def decode_seconds(self, n_next: int) -> float | None:
        """What a step of `n_next` single tokens takes; from the nearest number that was measured, scaled no further
        than in proportion."""
        if n_next in self._decode:
            return self._decode[n_next]
        if not self._decode:
            return None
        nearest = min(self._decode, key=lambda n: abs(n - n_next))
        return self._decode[nearest] * max(0.5, min(2.0, n_next / nearest))

    def n_prompt(self, n_next: int, n_left: int) -> int:
        """Prompt tokens for the next step, at most `n_left`, beside `n_next` single tokens."""
        if not n_next or self.share >= 1.0:
            return n_left
        decode = self.decode_seconds(n_next)
        if decode is None or self._prompt_token is None:
            return min(n_left, _FIRST)
        seconds = decode * self.share / (1.0 - self.share) * _CAREFUL
        return min(n_left, max(1, int(seconds / self._prompt_token)))


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + _WEIGHT * (new - old)
