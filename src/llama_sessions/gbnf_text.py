"""GBNF text to rules, read as llama.cpp's parser reads it, but without recursion and knowing the place of a mistake.

llama.cpp prints a mistake to stderr and returns NULL; deep nesting runs its stack out (100,000 parentheses: seen with
0.3.36), and `x{5,3}` counts down from zero for ever.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NoReturn

from .errors import OptionError
from .gbnf_rules import Chars, Grammar, Ref, Rule, Sequence, Token, place, refuse, weight_of
from .options import checked_text

MAX_CHARS = 1_000_000
MAX_NESTING = 10_000  # parentheses: 1 KB of stack each in llama.cpp, which compiles on a deep one
MAX_RULES = 50_000  # groups and repetitions make rules too
MAX_ELEMENTS = 500_000  # 8 bytes each in llama.cpp, copied by each clone
MAX_REPEATS = 2000  # MAX_REPETITION_THRESHOLD; llama.cpp takes a larger maximum for no limit at all
_MAX_TOKEN = 2**32 - 1

_SPACE = re.compile(r"(?:[ \t]+|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]+|#[^\r\n]*)*")
_NAME = re.compile(r"[a-zA-Z0-9-]+")
_INT = re.compile(r"[0-9]+")
_ESCAPE = re.compile(r'\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([trn\\"\[\]-]))')
_ESCAPES = {"t": 9, "r": 13, "n": 10}


@dataclass(slots=True)
class _Open:
    """A rule or a group that is being read. `last`: where the item before an operator begins in the last sequence.

    `n_repeated`: llama.cpp's measure of that item, against its threshold. `n_before`: symbols there were before it.
    """

    number: int
    at: int
    nested: bool
    n_before: int = 0
    alternatives: list[Sequence] = field(default_factory=lambda: [[]])
    last: int = 0
    n_repeated: int = 1


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.pos = 0
        self.numbers: dict[str, int] = {}
        self.first_seen: list[int] = []  # by number: where in the text
        self.rules: dict[int, Rule] = {}
        self.tokens: list[Token] = []
        self.n_elements = 0
        self._one: dict[int, Chars] = {}

    def expected(self, what: str, at: int | None = None) -> NoReturn:
        at = self.pos if at is None else at
        rest = self.text[at : at + 24]
        refuse(self.text, at, f"expected {what}, found {rest!r}" if rest else f"expected {what}, found the end")

    def peek(self) -> str:
        return self.text[self.pos : self.pos + 1]

    def space(self, lines: bool) -> None:
        match = (_SPACE_AND_LINES if lines else _SPACE).match(self.text, self.pos)
        self.pos = match.end() if match else self.pos

    def step(self, lines: bool) -> None:
        """Over one character and the space behind it."""
        self.pos += 1
        self.space(lines)

    def matched(self, pattern: re.Pattern[str], what: str) -> str:
        match = pattern.match(self.text, self.pos)
        if match is None:
            self.expected(what)
        self.pos = match.end()
        return match.group()

    def new_symbol(self, at: int) -> int:
        self.first_seen.append(at)
        if len(self.first_seen) > MAX_RULES:
            refuse(self.text, at, f"more than {MAX_RULES} rules, groups and repetitions; make the grammar smaller")
        return len(self.first_seen) - 1

    def symbol(self, name: str, at: int) -> int:
        if name not in self.numbers:
            self.numbers[name] = self.new_symbol(at)
        return self.numbers[name]

    def count(self, n: int) -> None:
        self.n_elements += n
        if self.n_elements > MAX_ELEMENTS:
            refuse(self.text, self.pos, f"more than {MAX_ELEMENTS} characters, references and repeats of them by now")

    def grammar(self) -> None:
        self.space(True)
        while self.peek():
            self.rule()

    def rule(self) -> None:
        at = self.pos
        name = self.matched(_NAME, "the name of a rule (letters, digits, '-')")
        self.space(False)
        number = self.symbol(name, at)
        if not self.text.startswith("::=", self.pos):
            self.expected(f"'::=' after the rule's name {name!r}")
        self.pos += 3
        self.space(True)
        self.alternatives(name, _Open(number, at, nested=False))
        if self.peek() not in ("", "\r", "\n"):
            self.expected("an item, '|' or the end of the line")
        self.space(True)

    def alternatives(self, name: str, top: _Open) -> None:
        stack = [top]
        while True:
            here = stack[-1]
            char = self.peek()
            if char == "(":
                if len(stack) > MAX_NESTING:
                    refuse(self.text, self.pos, f"parentheses nested deeper than {MAX_NESTING}")
                n_before, at = len(self.first_seen), self.pos
                self.step(True)
                stack.append(_Open(self.new_symbol(at), at, True, n_before))
            elif char == "|":
                self.step(True)
                here.alternatives.append([])
                here.last = 0
                self.count(1)
            elif char == ")" and here.nested:
                self.close(name, stack.pop())
                parent = stack[-1]
                self.item(parent, [Ref(here.number)])
                parent.n_repeated = max(1, len(self.first_seen) - here.n_before)
                self.step(parent.nested)
            elif not self.piece(name, here, char):
                break
        if len(stack) > 1:
            self.expected(f"an item, '|' or the ')' that closes the '(' of {place(self.text, stack[-1].at)}")
        self.close(name, top)

    def close(self, name: str, done: _Open) -> None:
        self.rules[done.number] = Rule(name, done.at, done.alternatives)  # a second definition replaces the first

    def item(self, here: _Open, elements: Sequence) -> None:
        here.last, here.n_repeated = len(here.alternatives[-1]), 1
        here.alternatives[-1].extend(elements)
        self.count(sum(map(weight_of, elements)))

    def piece(self, name: str, here: _Open, char: str) -> bool:
        """Read one item without parts, or one operator; False: here is none."""
        if char == '"':
            self.item(here, self.literal())
        elif char == "[":
            self.item(here, self.char_class())
        elif char == ".":
            self.pos += 1
            self.item(here, [Chars((), negated=True)])
        elif char in ("<", "!"):
            self.item(here, [self.token()])
        elif _NAME.match(char):
            at = self.pos
            self.item(here, [Ref(self.symbol(self.matched(_NAME, "a name"), at))])
        elif char in ("*", "+", "?", "{"):
            self.operator(name, here, char)
            return True
        else:
            return False
        self.space(here.nested)
        return True

    def char(self, closing: str, opened: int) -> int:
        """One character, of what a `closing` character closes, that was opened at `opened`."""
        char = self.peek()
        if not char:
            self.expected(f"the {closing!r} that closes the {self.text[opened]!r} of {place(self.text, opened)}")
        if char != "\\":
            self.pos += 1
            return ord(char)
        escape = _ESCAPE.match(self.text, self.pos)
        if escape is None:
            self.expected('an escape: \\n \\r \\t \\\\ \\" \\[ \\] \\- \\xHH \\uHHHH or \\UHHHHHHHH')
        self.pos = escape.end()
        short, hexadecimal = escape.group(4), escape.group(1) or escape.group(2) or escape.group(3)
        return _ESCAPES.get(short, ord(short)) if short else int(hexadecimal, 16)

    def literal(self) -> Sequence:
        opened = self.pos
        self.pos += 1
        found: Sequence = []
        while self.peek() != '"':
            code = self.char('"', opened)
            found.append(self._one.setdefault(code, Chars(((code, code),))))
        self.pos += 1
        return found

    def char_class(self) -> Sequence:
        opened = self.pos
        self.pos += 1
        negated = self.peek() == "^"
        self.pos += negated
        ranges = []
        while self.peek() != "]":
            first = last = self.char("]", opened)
            if self.peek() == "-" and self.text[self.pos + 1 : self.pos + 2] != "]":
                self.pos += 1
                last = self.char("]", opened)
            ranges.append((first, last))
        self.pos += 1
        return [Chars(tuple(ranges), negated)] if ranges else []  # llama.cpp reads `[]` and `[^]` as nothing at all

    def token(self) -> Token:
        self.pos += self.peek() == "!"
        at = self.pos
        if self.peek() != "<":
            self.expected("a token, '<name>' or '<[id]>'")
        spelled = ""
        if self.text.startswith("<[", at):
            self.pos += 2
            start = self.pos
            digits = self.matched(_INT, "a token id")
            if len(digits) > 20 or int(digits) > _MAX_TOKEN:
                self.expected(f"a token id of at most {_MAX_TOKEN}", start)
            if not self.text.startswith("]>", self.pos):
                self.expected("']>' after the token id")
            self.pos += 2
        else:
            end = self.text.find(">", at)
            if end < 0:
                self.expected(f"the '>' that closes the '<' of {place(self.text, at)}", len(self.text))
            self.pos = end + 1
            spelled = self.text[at : self.pos]
        self.tokens.append(Token(spelled, at))
        return self.tokens[-1]

    def operator(self, name: str, here: _Open, char: str) -> None:
        at = self.pos
        self.step(here.nested)
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1), "{": (0, 0)}[char]
        if char == "{":
            low, high = self.bounds(here.nested)
        if here.last == len(here.alternatives[-1]):
            self.expected(f"an item before {char!r}", at)
        n_repeats = high or low or 1
        if here.n_repeated * n_repeats > MAX_REPEATS:
            refuse(
                self.text,
                at,
                f"{n_repeats} repeats of an item that counts for {here.n_repeated} itself; llama.cpp takes "
                f"{MAX_REPEATS} in all: repeat less often, or give the repeated groups rules of their own",
            )
        self.repeat(name, here, low, high, at)
        here.n_repeated *= n_repeats

    def bounds(self, nested: bool) -> tuple[int, int | None]:
        """The rest of `{m}`, `{m,}` or `{m,n}`."""
        low_at = self.pos
        low = self.number("a number of repeats")
        high: int | None = low
        self.space(nested)
        high_at = self.pos
        if self.peek() == ",":
            self.step(nested)
            high, high_at = None, self.pos
            if _INT.match(self.text, self.pos):
                high = self.number("a number of repeats")
                self.space(nested)
            if self.peek() != "}":
                self.expected("'}' or a number of repeats" if high is None else "'}'")
        elif self.peek() != "}":
            self.expected("',' or '}'")
        self.step(nested)
        if high is not None and high < low:
            self.expected(f"at most as many repeats as at least, {low}", high_at)
        for bound, at in ((low, low_at), (high, high_at)):
            if bound is not None and bound > MAX_REPEATS:
                self.expected(f"at most {MAX_REPEATS} repeats, which is llama.cpp's limit", at)
        return low, high

    def number(self, what: str) -> int:
        digits = self.matched(_INT, what).lstrip("0")
        return int(digits or "0") if len(digits) < 10 else 10**9

    def repeat(self, name: str, here: _Open, low: int, high: int | None, at: int) -> None:
        """Rewrite the last item S as llama.cpp does: S{2,3} is S S S', where S' is `S |`; S* is S', `S S' |`."""
        sequence = here.alternatives[-1]
        item = sequence[here.last :]
        weight = sum(map(weight_of, item))
        n_optional = 1 if high is None else high - low
        self.count(weight * max(0, low - 1) + (weight + 3) * n_optional)
        if low == 0:
            del sequence[here.last :]
        else:
            sequence.extend(item * (low - 1))
        number = -1
        for i in range(n_optional):
            inner = number
            number = self.new_symbol(at)
            rest: Sequence = [Ref(number)] if high is None else [Ref(inner)] if i else []
            self.rules[number] = Rule(name, at, [[*item, *rest], []], loops=high is None)
        if n_optional:
            sequence.append(Ref(number))


def read_gbnf(text: str, root: str) -> Grammar:
    """The rules of a grammar. Raises OptionError for what is no GBNF, and for what is larger than the bounds above."""
    checked_text("the grammar", text)
    if "\0" in text:
        refuse(text, text.index("\0"), "a NUL character, at which llama.cpp would stop reading; write it as \\x00")
    if len(text) > MAX_CHARS:
        raise OptionError(f"grammar: {len(text)} characters, more than {MAX_CHARS}; make it smaller")
    reader = _Reader(text)
    reader.grammar()
    for name, number in reader.numbers.items():
        if number not in reader.rules:
            refuse(text, reader.first_seen[number], f"rule {name!r} is used and nowhere defined")
    if root not in reader.numbers:
        known = ", ".join(list(reader.numbers)[:8]) or "no rule at all"
        raise OptionError(f"grammar: there is no rule {root!r} to begin with; there is {known}")
    rules = [reader.rules[number] for number in range(len(reader.first_seen))]
    return Grammar(text, rules, reader.numbers[root], reader.tokens)
