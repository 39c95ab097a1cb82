"""One JSON object as it arrives: where it ends, and the values of its own keys while they are still being written.

The scan follows the structure only (brackets, strings, commas), so that it can stop at the first character that cannot
be. Numbers, literals and escapes are for `loads_object`, once the object is whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container
from typing import Any

SPACE = " \t\r\n"
MAX_DEPTH = 128  # json's own scanner recurses: this many levels never bring it to its limit

_STRING_STOP = re.compile(r'["\\\x00-\x1f]')
_SCALAR_STOP = re.compile(r"[^-+.0-9A-Za-z]")
_CLOSING = {"{": "}", "[": "]"}

# What may come next.
_OBJECT, _KEY, _FIRST_KEY, _COLON, _VALUE, _FIRST_VALUE, _NEXT, _STRING, _ESCAPED, _SCALAR = range(10)


class JsonValue:
    """The text of one value so far, in the pieces in which it came. `whole`: it is complete."""

    __slots__ = ("pieces", "whole")

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.whole = False

    @property
    def text(self) -> str:
        """Costs the length of the value."""
        return "".join(self.pieces)


class JsonScan:
    """Reads one object, cut anywhere; the cost is linear in its length.

    `keys`: the only keys it may have of its own (None: any). A key that comes twice is wrong: which one counts would
    be anybody's guess. `done`: the object is whole. `wrong`: it can be none. `pieces`: its text. `values`: those of
    its own keys, with the one under way.
    """

    def __init__(self, keys: Container[str] | None = None) -> None:
        self.done = False
        self.wrong = False
        self.pieces: list[str] = []
        self.values: dict[str, JsonValue] = {}
        self._keys = keys
        self._stack: list[str] = []
        self._expects = _OBJECT
        self._in_key = False
        self._recorded: JsonValue | None = None  # the key or value of the object's own that is under way
        self._from = 0

    @property
    def over(self) -> bool:
        return self.done or self.wrong

    @property
    def text(self) -> str:
        """Costs the length of the object."""
        return "".join(self.pieces)

    def push(self, text: str, at: int = 0) -> int:
        """Read `text` from `at` on. Returns where it stopped: behind the object, at what is wrong, or at the end."""
        start = self._from = at
        while at < len(text) and not self.over:
            at = self._read(text, at)
        if at > start:
            self.pieces.append(text[start:at])
        if self._recorded is not None and at > self._from:
            self._recorded.pieces.append(text[self._from : at])
        return at

    def _read(self, text: str, at: int) -> int:
        """One character, or a run of them inside a string or number. Returns where the next one is."""
        expects = self._expects
        if expects == _STRING:
            stop = _STRING_STOP.search(text, at)
            return len(text) if stop is None else self._read_string_stop(text, stop.start())
        if expects == _ESCAPED:
            self._expects = _STRING
            return at + 1
        if expects == _SCALAR:
            stop = _SCALAR_STOP.search(text, at)
            if stop is None:
                return len(text)
            self._end_value(text, stop.start())
            return stop.start()
        char = text[at]
        if char in SPACE and expects != _OBJECT:
            return at + 1
        if expects in (_VALUE, _FIRST_VALUE) and not (char == "]" and expects == _FIRST_VALUE):
            return self._begin_value(char, at)
        if expects in (_KEY, _FIRST_KEY) and char == '"':
            self._expects = _STRING
            self._in_key = True
            if len(self._stack) == 1:
                self._record(JsonValue(), at)
        elif expects == _COLON and char == ":":
            self._expects = _VALUE
        elif expects == _OBJECT and char == "{":
            self._open(char)
        elif expects == _NEXT and char == ",":
            self._expects = _KEY if self._stack[-1] == "{" else _VALUE
        elif expects in (_NEXT, _FIRST_KEY, _FIRST_VALUE) and char == _CLOSING[self._stack[-1]]:
            self._stack.pop()
            self.done = not self._stack
            self._end_value(text, at + 1)
        else:
            self.wrong = True
            return at
        return at + 1

    def _read_string_stop(self, text: str, at: int) -> int:
        if text[at] == "\\":
            self._expects = _ESCAPED
        elif text[at] != '"':
            self.wrong = True  # a control character: JSON wants it escaped
            return at
        elif self._in_key:
            return self._end_key(text, at)
        else:
            self._end_value(text, at + 1)
        return at + 1

    def _end_key(self, text: str, at: int) -> int:
        self._in_key = False
        self._expects = _COLON
        if len(self._stack) > 1:
            return at + 1
        key = loads_string(self._recorded_to(text, at + 1).text)
        if key is None or key in self.values or (self._keys is not None and key not in self._keys):
            self.wrong = True
            return at
        self.values[key] = JsonValue()
        return at + 1

    def _begin_value(self, char: str, at: int) -> int:
        if len(self._stack) == 1:
            self._record(next(reversed(self.values.values())), at)
        if char in _CLOSING and len(self._stack) < MAX_DEPTH:
            self._open(char)
        elif char == '"':
            self._expects = _STRING
        elif char in "-0123456789tfn":
            self._expects = _SCALAR
        else:
            self.wrong = True
            return at
        return at + 1

    def _open(self, char: str) -> None:
        self._stack.append(char)
        self._expects = _FIRST_KEY if char == "{" else _FIRST_VALUE

    def _end_value(self, text: str, end: int) -> None:
        self._expects = _NEXT
        if len(self._stack) == 1:
            self._recorded_to(text, end).whole = True

    def _record(self, value: JsonValue, at: int) -> None:
        self._recorded, self._from = value, at

    def _recorded_to(self, text: str, end: int) -> JsonValue:
        value = self._recorded
        assert value is not None
        value.pieces.append(text[self._from : end])
        self._recorded = None
        return value


def loads_object(text: str) -> dict[str, Any] | None:
    """The object that `text` is by the letter of JSON; None if it is none."""
    value = _loads(text)
    return value if isinstance(value, dict) else None


def loads_string(text: str) -> str | None:
    """The string that `text`, with its quotes, is by the letter of JSON; None if it is none."""
    value = _loads(text)
    return value if isinstance(value, str) else None


def _loads(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):  # ValueError: also of a number with thousands of digits
        return None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
