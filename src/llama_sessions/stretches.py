"""What a template wrote, cut into text between control tokens, as llama.cpp cuts it."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

import numpy as np

from .marks import Marker
from .types import TokenArray, Vocab

NO_TOKENS: TokenArray = np.empty(0, np.int32)
NO_TOKENS.flags.writeable = False  # one for all
_WHITE = " \t\n\v\f\r"  # C's isspace: what a control token with lstrip or rstrip swallows


@dataclass(frozen=True, slots=True)
class Region:
    """Characters `[a, b)` of a stretch come from message `index`: from `start` in its content, up to `end` in it.

    One of the two is None where the template cut the content there: text of its own may then be within the region.
    """

    index: int
    start: int | None
    end: int | None
    a: int
    b: int


@dataclass(slots=True)
class TextStretch:
    """Text between two control tokens; `control` is the one that ends it (None: the end of the prompt).

    `end`: where in what the template wrote the next stretch begins; None where content goes on across the border.
    What stands before and behind such a place can be cut, and tokenised, on its own. `tokens`, how many stand before
    them in the prompt, and the messages that kept their own ids in it (`kept`) come when the prompt is put together.
    """

    text: str
    regions: list[Region]
    control: int | None
    control_text: str = ""
    end: int | None = None
    n_tokens_before: int = 0
    tokens: TokenArray = field(default_factory=lambda: NO_TOKENS)
    kept: Set[int] = frozenset()

    @property
    def n_tokens_until(self) -> int:
        """Tokens of the prompt up to and with `control`."""
        return self.n_tokens_before + len(self.tokens) + (self.control is not None)


def split(
    marked: str, marker: Marker, vocab: Vocab, trusted: Set[int], behind: TextStretch | None = None
) -> list[TextStretch]:
    """Cut what a template wrote at its control tokens; note which characters come from which message.

    `trusted`: messages whose control tokens are real ones. `behind`: only what follows this stretch.
    """
    out: list[TextStretch] = []
    parts: list[str] = []
    regions: list[Region] = []
    at, swallow = 0, False
    if behind is not None and behind.end is not None and behind.control is not None:
        at, swallow = behind.end, vocab.strips(behind.control)[1]
    length = last_mark = 0
    opened: tuple[int, int, int] | None = None  # message, where in its content, where in the stretch
    for m in marker.scan.finditer(marked, at):
        kind = m.lastgroup
        begin, after = m.span()
        text = marked[at:begin]
        at = after
        if swallow:
            text = text.lstrip(_WHITE)
            swallow = not text and kind is not None
        parts.append(text)
        length += len(text)
        if kind == "literal":
            literal = marker.literal(m["literal"])
            parts.append(literal)
            length += len(literal)
            swallow = False
        elif kind == "end":
            index, end = int(m["closed"]), int(m["end"])
            if opened is not None and opened[0] == index:
                regions.append(Region(index, opened[1], end, opened[2], length))
            else:
                regions.append(Region(index, None, end, last_mark, length))
            opened, last_mark = None, length
        else:
            if opened is not None:
                regions.append(Region(opened[0], opened[1], None, opened[2], length))
            if kind == "start":
                opened, last_mark = (int(m["index"]), int(m["start"]), length), length
                continue
            token = vocab.control[m[0]]
            strips_left, swallow = vocab.strips(token)
            if opened is not None:
                # Trusted content with a control token in it goes on in the next stretch.
                index, start, a = opened
                opened = (index, start + length - a + len(m[0]), 0) if index in trusted else None
            joined = "".join(parts)
            out.append(
                TextStretch(
                    joined.rstrip(_WHITE) if strips_left else joined,
                    regions,
                    token,
                    m[0],
                    after if opened is None else None,
                )
            )
            parts, regions, length, last_mark = [], [], 0, 0
    rest = marked[at:]
    parts.append(rest.lstrip(_WHITE) if swallow else rest)
    if opened is not None:
        regions.append(Region(opened[0], opened[1], None, opened[2], length + len(parts[-1])))
    out.append(TextStretch("".join(parts), regions, None))
    return out
