"""How many prompt tokens fit into a step beside the tokens of those who are talking."""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

_MOST = 0.1  # by which one measurement of what talkers take moves what is known of it
_ROW = 4  # tokens that llama.cpp's CPU kernels take at once: 11 cost what 12 do, and 7 more than 8
_LATEST = 9  # measurements of a prompt token whose median counts: a step that something else held up is none of them
_FIRST = 8  # prompt tokens beside others, before anything was measured
_CAREFUL = 0.9  # of what the share allows: a step that is a little too long is noticed, one too short is not
_AGAIN = 24  # steps with prompts after which one without shows anew what the others take


@dataclass(slots=True)
class _Talk:
    """What a step takes in which so many sessions decode a token each, and nothing else happens."""

    seconds: float
    n_since: int = 0  # steps with prompts


class Pace:
    """Measured step times: of `n` sessions that decode a token each, and of a prompt token in a batch with them.

    `share` of a step's time goes to prompts: 0.5 doubles the time between two tokens while somebody joins, 1.0 fills
    the batch.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self._talks: dict[int, _Talk] = {}
        # Beside others only: in a batch of prompts alone a token is cheaper.
        self._prompt_token: deque[float] = deque(maxlen=_LATEST)

    def note(self, n_next: int, n_prompt: int, seconds: float) -> None:
        """A step with `n_next` single tokens and `n_prompt` prompt tokens took so long."""
        talk = self._talks.get(n_next)
        if not n_prompt:
            if talk is None:
                self._talks[n_next] = _Talk(seconds)
            else:
                talk.seconds = min(max(seconds, talk.seconds * (1 - _MOST)), talk.seconds * (1 + _MOST))
                talk.n_since = 0
        elif talk is not None:
            talk.n_since += 1
            self._prompt_token.append(max(seconds - talk.seconds, seconds / 20, 1e-9) / n_prompt)

    def n_prompt(self, n_next: int, n_left: int) -> int:
        """Prompt tokens for the next step, at most `n_left`, beside `n_next` single tokens. 0 where it has to be seen
        first what those take alone."""
        if not n_next or self.share >= 1.0:
            return n_left
        talk = self._talks.get(n_next)
        if talk is None or talk.n_since >= _AGAIN:
            return 0
        if not self._prompt_token:
            return min(n_left, _FIRST)
        seconds = talk.seconds * self.share / (1.0 - self.share) * _CAREFUL
        n = int(seconds / statistics.median(self._prompt_token))
        whole = (n_next + n + _ROW // 2 - 1) // _ROW * _ROW - n_next  # the nearest that leaves no row half empty
        return min(n_left, max(1, whole if n >= _ROW else n))
