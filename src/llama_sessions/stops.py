"""Stop strings: text up to the first of them, and never the start of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Feed it text; it gives out what is safe to show.

    `stopped`: a stop string was found; nothing after it, nor itself, is ever shown.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str, *, final: bool = False) -> str:
        """The text that `text` makes safe. `final`: nothing will follow, so nothing is held back."""
        if not self._stops:
            return text
        if self.stopped:
            return ""
        self._held += text
        # The one that is complete first: then it does not matter how the tokens cut the text.
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)[1]], ""
        else:
            n_safe = len(self._held) - (0 if final else n_begun(self._held, 0, self._stops))
            shown, self._held = self._held[:n_safe], self._held[n_safe:]
        return shown


def n_begun(text: str, at: int, words: Sequence[str]) -> int:
    """Characters at the end of `text[at:]` that one of `words` begins with, but not all of it."""
    longest = 0
    for word in words:
        for n in range(min(len(word) - 1, len(text) - at), longest, -1):
            if text.endswith(word[:n]):
                longest = n
                break
    return longest
