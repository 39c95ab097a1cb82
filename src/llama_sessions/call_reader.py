"""Tool calls as they arrive: what one opener begins, up to where it is whole or cannot be a call any more.

    HERMES    <tool_call> {"name": ..., "arguments": {...}} </tool_call>
    MISTRAL   [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]
              [TOOL_CALLS]name[CALL_ID]...[ARGS]{...}            [CALL_ID] and [ARGS] may be missing
    LLAMA3    {"name": ..., "parameters": {...}}; ...            to the end of the reply

"arguments" and "parameters" mean the same: an object, or a string that holds one. A call in tags may leave them out.
Each grammar is a generator that reads on where it left off and yields where it wants more text.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeAlias

from .json_scan import SPACE, JsonScan, JsonValue, loads_object, loads_string
from .reply_format import ToolFormat

# What the bare JSON of a call may have. Any other key says at once that the reply is JSON for its own sake.
_BARE_KEYS = frozenset({"type", "id", "name", "arguments", "parameters"})
_MAX_NAME = 256  # characters of a name that stands outside JSON

_Reads: TypeAlias = Generator[None, None, bool]  # returns whether it was there
_Peeks: TypeAlias = Generator[None, None, str]  # returns the next character, "" at the end of the reply


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """News of one tool call, as in OpenAI's streams.

    The first of a call has its `name`; then come fragments that concatenate to its `arguments`. `index` is the call's
    place in `tool_calls`. `withdrawn`: it was no call after all, so remove it; its text follows as content. Calls are
    withdrawn last one first, and the next call then has the same index, with another `id`.
    """

    index: int
    id: str
    name: str = ""
    arguments: str = ""
    withdrawn: bool = False


class _Call:
    """One call under way: its name, its arguments, and the deltas that nobody has taken yet."""

    def __init__(self, index: int, call_id: str) -> None:
        self.index = index
        self.id = call_id
        self.name = ""
        self.arguments = ""
        self.deltas: list[ToolCallDelta] = []
        self._n_given = 0

    def named(self, name: str) -> None:
        self.name = name
        self.deltas.append(ToolCallDelta(self.index, self.id, name))

    def give(self, pieces: list[str]) -> None:
        """Give out what is new of the text of an object."""
        if self._n_given < len(pieces) and pieces[0][0] == "{":
            self._fragment("".join(pieces[self._n_given :]))
            self._n_given = len(pieces)

    def finish(self, arguments: str) -> None:
        """All is well, and these are the arguments. What was not given out piece by piece is given out now."""
        self.arguments = arguments
        if not self._n_given:
            self._fragment(arguments)

    def _fragment(self, text: str) -> None:
        self.deltas.append(ToolCallDelta(self.index, self.id, arguments=text))

    def as_dict(self) -> dict[str, Any]:
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class CallReader:
    """Reads what follows one opener: one call, or several that stand or fall together.

    `outcome`: None while it is under way, True for calls, False for what can be none. `raw`: all of its text.
    """

    def __init__(self, tool_format: ToolFormat, opener: str, first_index: int, new_id: Callable[[], str]) -> None:
        self.outcome: bool | None = None
        self._raw = [opener]
        self._first_index = first_index
        self._new_id = new_id
        self._calls: list[_Call] = []
        self._n_shown = 0
        self._text, self._at, self._ended = "", 0, False
        grammars = {ToolFormat.HERMES: self._hermes, ToolFormat.MISTRAL: self._mistral, ToolFormat.LLAMA3: self._llama3}
        self._grammar = grammars[tool_format]()

    @property
    def raw(self) -> str:
        """Costs its length."""
        return "".join(self._raw)

    @property
    def tool_calls(self) -> list[dict[str, Any]]:
        """The calls in OpenAI's form."""
        return [call.as_dict() for call in self._calls]

    def push(self, text: str, at: int, *, final: bool) -> int:
        """Read `text` from `at` on; returns where it stopped. `final`: nothing will follow `text`."""
        self._text, self._at, self._ended = text, at, final
        try:
            next(self._grammar)
        except StopIteration as stop:
            self.outcome = stop.value
        self._raw.append(text[at : self._at])
        return self._at

    def take_deltas(self) -> list[ToolCallDelta]:
        """What is new since the last time."""
        if self.outcome is False:
            shown, self._n_shown = self._calls[: self._n_shown], 0
            return [ToolCallDelta(call.index, call.id, withdrawn=True) for call in reversed(shown)]
        deltas: list[ToolCallDelta] = []
        for call in self._calls[max(0, self._n_shown - 1) :]:
            deltas += call.deltas
            call.deltas.clear()
        # Only the last one may still be without a name.
        self._n_shown = len(self._calls) - (1 if self._calls and not self._calls[-1].name else 0)
        return deltas

    # -- grammars

    def _hermes(self) -> _Reads:
        yield from self._space()
        if not (yield from self._json_call()):
            return False
        yield from self._space()
        return (yield from self._literal("</tool_call>"))

    def _mistral(self) -> _Reads:
        if (yield from self._space()) != "[":
            return (yield from self._named_call())
        self._at += 1
        while True:
            yield from self._space()
            if not (yield from self._json_call()):
                return False
            char = yield from self._space()
            if char not in ("]", ","):
                return False
            self._at += 1
            if char == "]":
                return True

    def _llama3(self) -> _Reads:
        yield from self._space()
        while True:
            if not (yield from self._json_call(bare=True)):
                return False
            if not (yield from self._space(SPACE + ";")):
                return True

    def _named_call(self) -> _Reads:
        name = yield from self._word("_-.:/")
        if not name or len(name) > _MAX_NAME:
            return False
        if (yield from self._space()) == "[":
            self._at += 1
            if (yield from self._peek()) == "C":
                if not (yield from self._literal("CALL_ID]")):
                    return False
                yield from self._word("_-")
                if not (yield from self._literal("[")):
                    return False
            if not (yield from self._literal("ARGS]")):
                return False
            yield from self._space()
        call = self._begin()
        scan = JsonScan()
        while not scan.over:
            if not (yield from self._peek()):
                return False
            self._at = scan.push(self._text, self._at)
            if not call.name:
                call.named(name)
            call.give(scan.pieces)
        if scan.wrong or loads_object(scan.text) is None:
            return False
        call.finish(scan.text)
        return True

    def _json_call(self, *, bare: bool = False) -> _Reads:
        """One object with a name and arguments. `bare`: without tags around it, so there must be arguments, and
        nothing else that a call has not."""
        call = self._begin()
        scan = JsonScan(_BARE_KEYS if bare else None)
        name: str | None = None
        while not scan.over:
            if not (yield from self._peek()):
                return False
            self._at = scan.push(self._text, self._at)
            value, arguments = scan.values.get("name"), _arguments_of(scan)
            if name is None and value is not None and value.whole:
                name = _checked_name(value.text) or ""  # "": looked at once, it may be long and no string
            # {"name": "Anna", ...} is no news of a call before there are arguments.
            if name and not call.name and not (bare and arguments is None):
                call.named(name)
            if call.name and arguments is not None:
                call.give(arguments.pieces)
        if scan.wrong or not call.name or loads_object(scan.text) is None:
            return False
        if len(scan.values.keys() & {"arguments", "parameters"}) > 1:
            return False
        arguments = _arguments_of(scan)
        text = "{}" if arguments is None else _checked_arguments(arguments.text)
        if text is None:
            return False
        call.finish(text)
        return True

    # -- what they are made of

    def _begin(self) -> _Call:
        # The id is drawn here and not with the name, so that it does not matter how the text is cut.
        call = _Call(self._first_index + len(self._calls), self._new_id())
        self._calls.append(call)
        return call

    def _peek(self) -> _Peeks:
        while self._at >= len(self._text) and not self._ended:
            yield
        return self._text[self._at : self._at + 1]

    def _space(self, space: str = SPACE) -> _Peeks:
        """Go past white space, to the character behind it."""
        while (char := (yield from self._peek())) and char in space:
            self._at += 1
        return char

    def _literal(self, literal: str) -> _Reads:
        for wanted in literal:
            if (yield from self._peek()) != wanted:
                return False
            self._at += 1
        return True

    def _word(self, more: str) -> _Peeks:
        """Letters, digits and what is in `more`; stops one character above the limit of a name."""
        word: list[str] = []
        while (char := (yield from self._peek())) and (char.isalnum() or char in more) and len(word) <= _MAX_NAME:
            word.append(char)
            self._at += 1
        return "".join(word)


def _arguments_of(scan: JsonScan) -> JsonValue | None:
    return scan.values.get("arguments") or scan.values.get("parameters")


def _checked_name(text: str) -> str | None:
    """The name that a JSON value is."""
    name = loads_string(text)
    return name if name and name.strip() and _has_utf8(name) else None


def _checked_arguments(text: str) -> str | None:
    """The text of an object, from the JSON value that stands for it: itself, a string of it, or none at all."""
    if text in ("null", '""'):
        return "{}"
    if text[0] == '"':
        text = loads_string(text) or ""
        return text if loads_object(text) is not None and _has_utf8(text) else None
    return text if text[0] == "{" else None


def _has_utf8(text: str) -> bool:
    """Whether it can be written: an escape may stand for half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
