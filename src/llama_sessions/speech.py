"""The tokens of one reply, and what they say: content, thinking, tool calls."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

from .reply_parser import Part, ReplyParser


class Speech:
    """Feed it tokens with their bytes; it gives out what they make visible, a part a kind; never half a character."""

    def __init__(self, parser: ReplyParser) -> None:
        self.tokens: list[int] = []
        self._pieces: list[bytes] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._parser = parser
        self._over = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._parser.stopped

    @property
    def is_thinking(self) -> bool:
        return self._parser.is_thinking

    @property
    def n_closed(self) -> int:
        """While it is thinking: characters of the tag that closes it which stand there already, whole."""
        return 0 if self._decoder.getstate()[0] else self._parser.n_closed

    def said_behind(self, piece: bytes) -> str:
        """While it is thinking: what would be said behind it, if `piece` came next."""
        return self._parser.said_behind((self._decoder.getstate()[0] + piece).decode("utf-8", "replace"))

    @property
    def text(self) -> str:
        return self._parser.content

    @property
    def thinking(self) -> str:
        return self._parser.thinking

    @property
    def only_thought(self) -> bool:
        """Whether a thinking was begun, and nothing came behind it."""
        return self._parser.has_thought and not (self.text or self.tool_calls or self.stopped)

    @property
    def tool_calls(self) -> Sequence[Mapping[str, Any]]:
        """Complete once it has ended."""
        return self._parser.tool_calls

    def push(self, token: int, piece: bytes) -> list[Part]:
        """What one more token makes visible."""
        self._pieces.append(piece)  # first: an interrupt in between leaves a piece for every token
        self.tokens.append(token)
        return self._parser.push(self._decoder.decode(piece))

    def go_on(self, pieces: Sequence[bytes]) -> int:
        """What was said earlier of the same reply, and is not said again; returns how many tokens were thought."""
        n_thought = 0
        for piece in pieces:
            n_thought += self.is_thinking
            self._parser.push(self._decoder.decode(piece))
        return n_thought

    def end(self, *, cut: bool = False) -> list[Part]:
        """Whatever was held back; nothing the second time. `cut`: more would have come, so what is no whole character
        yet is not said, and whoever goes on says it."""
        if self._over:
            return []
        self._over = True
        if cut:
            self._decoder.reset()
        return self._parser.push(self._decoder.decode(b"", final=True), final=True)

    def ids_spelling(self, text: str) -> list[int]:
        """The sampled ids that spell the content `text` (neither a stop string nor thinking); empty if none do."""
        data, spoken = text.encode(), b"".join(self._pieces)
        begin = spoken.rfind(data) if self.thinking else 0
        at, first = 0, None
        for i, piece in enumerate(self._pieces):
            if at == begin:
                first = i
            at += len(piece)
            if first is not None and at - begin >= len(data):
                found = spoken[begin:at] == data
                return self.tokens[first : i + 1] if found else []
        return []
