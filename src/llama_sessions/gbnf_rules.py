"""What a GBNF grammar is: rules by number, each alternatives, each a sequence of elements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn, TypeAlias

from .errors import OptionError


@dataclass(frozen=True, slots=True)
class Chars:
    """One character: one within `ranges` (code points, both ends included), or with `negated` one in none of them."""

    ranges: tuple[tuple[int, int], ...]
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Token:
    """One token of the vocabulary, or with `!` any other. `spelled`: `<name>`, which only a vocabulary knows."""

    spelled: str
    at: int


@dataclass(frozen=True, slots=True)
class Ref:
    """What rule number `rule` matches."""

    rule: int


Element: TypeAlias = Chars | Token | Ref
Sequence: TypeAlias = list[Element]


@dataclass(slots=True)
class Rule:
    """Alternatives, each a sequence. `name`: of the rule in the text that it is, or is a part of; `at`: its place.

    `loops`: it stands for a repetition without limit.
    """

    name: str
    at: int
    alternatives: list[Sequence]
    loops: bool = False


@dataclass(frozen=True, slots=True)
class Grammar:
    """Rules by number, as llama.cpp numbers them."""

    text: str
    rules: list[Rule]
    root: int
    tokens: list[Token]


def place(text: str, at: int) -> str:
    """`line 3, column 7`, both from 1, in characters. A line ends at LF, CR or CR LF."""
    before = text[:at].replace("\r\n", "\n").replace("\r", "\n")
    return f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"


def refuse(text: str, at: int, what: str) -> NoReturn:
    """Raise OptionError that says where and `what`."""
    raise OptionError(f"grammar: {place(text, at)}: {what}")


def weight_of(element: Element) -> int:
    """Elements that llama.cpp makes of it, at most."""
    return max(1, 2 * len(element.ranges)) if isinstance(element, Chars) else 1
