"""The tokens of one reply, and what they say: content, thinking, tool calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .reply_parser import Part, ReplyParser
from .text_stream import TextStream


class Speech:
    """Feed it tokens with their bytes; it gives out what they make visible, a part a kind."""

    def __init__(self, stops: Sequence[str], parser: ReplyParser) -> None:
        self.tokens: list[int] = []
        self._pieces: list[bytes] = []
        self._stream = TextStream(stops)
        self._parser = parser
        self._over = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stream.stopped

    @property
    def is_thinking(self) -> bool:
        return self._parser.is_thinking

    @property
    def text(self) -> str:
        return self._parser.content

    @property
    def thinking(self) -> str:
        return self._parser.thinking

    @property
    def tool_calls(self) -> Sequence[Mapping[str, Any]]:
        """Complete once it has ended."""
        return self._parser.tool_calls

    def push(self, token: int, piece: bytes) -> list[Part]:
        """What one more token makes visible."""
        self._pieces.append(piece)  # first: an interrupt in between leaves a piece for every token
        self.tokens.append(token)
        return self._parser.push(self._stream.push(piece))

    def end(self) -> list[Part]:
        """Whatever was held back; nothing the second time."""
        if self._over:
            return []
        self._over = True
        return self._parser.push(self._stream.push(b"", final=True), final=True)

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
