"""Bytes of sampled tokens to visible text: never half a character, never a stop string or the start of one."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Feed it token bytes; it gives out text as soon as that is safe to show.

    `stopped`: a stop string was found; nothing after it, nor itself, is ever shown.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(stops)
        self._held = ""
        self._shown: list[str] = []
        self.stopped = False

    @property
    def text(self) -> str:
        """All that was shown. Costs its length."""
        return "".join(self._shown)

    def push(self, data: bytes, *, final: bool = False) -> str:
        """The text that `data` makes visible. `final`: nothing will follow, so nothing is held back."""
        if not self._stops:
            shown = self._decoder.decode(data, final)
            self._shown.append(shown)
            return shown
        if self.stopped:
            return ""
        self._held += self._decoder.decode(data, final)
        # The one that is complete first: then it does not matter how the tokens cut the text.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)[1]], ""
        else:
            keep = 0 if final else self._n_held_back()
            shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        self._shown.append(shown)
        return shown

    def _n_held_back(self) -> int:
        """Characters at the end that a stop string could begin with."""
        longest = 0
        for stop in self._stops:
            for n in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:n]):
                    longest = n
                    break
        return longest
