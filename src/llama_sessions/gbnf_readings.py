"""In how many ways llama.cpp reads a text: the stacks of rules that it follows side by side.

It tries a token character by character and joins equal stacks only where the token ends, so that `(" " | " ")*` takes
2^n steps for a token of n spaces that is refused in the end: real vocabularies have 128, and the process hangs.
"""

from __future__ import annotations

from dataclasses import dataclass

from .gbnf_rules import Chars, Element, Grammar, Ref, Token

_N_CHARS = 128  # as long as tokens of one character repeated are (128 spaces: qwen2, llama3)
_N_MIXED = 12  # and one of several characters; behind it equal stacks are one
_N_CALM_CHARS = 16  # a text with few readings by then is not followed further
_FEW = 6
_BUDGET = 300_000  # stacks looked at for one grammar: 0.5 s; what was found by then stands
_BUDGET_OF_ONE = 40_000  # and for one rule; one that needs more has too many readings, however few of one text
_N_TRIED = 3  # characters that are tried at each step, those with the most readings up to it


@dataclass(frozen=True, slots=True)
class Readings:
    """The most readings found: `n`, of a text that begins rule number `rule`."""

    n: int
    text: str
    rule: int


def most_readings(grammar: Grammar, enough: int) -> Readings:
    """Look for a short text with many readings, and stop at more than `enough`. 0.5 s at most.

    It follows the character with the most readings from the beginning of each rule: a search, not a proof.
    """
    machine = _Machine(grammar)
    most = Readings(0, "", grammar.root)
    for number, rule in enumerate(grammar.rules):
        if number + 1 < len(grammar.rules) and grammar.rules[number + 1].at == rule.at:
            continue  # S' of x{0,9} with fewer repeats left than the next rule has
        found = machine.follow(number, enough)
        if found.n > most.n:
            most = found
        if most.n > enough or machine.n_looked_at > _BUDGET:
            break
    return most


class _TooManyError(Exception):
    """The budget of one rule is spent."""


class _Machine:
    """llama.cpp's stacks as numbers: 0 is the empty one, each other a position on top of another stack."""

    def __init__(self, grammar: Grammar) -> None:
        self.n_looked_at = self._n_allowed = 0
        self._elements: list[Element | None] = []  # all sequences, each with a None behind it
        self._starts: list[list[int]] = []  # by rule: where its alternatives begin
        for rule in grammar.rules:
            self._starts.append([])
            for sequence in rule.alternatives:
                self._starts[-1].append(len(self._elements))
                self._elements += [*sequence, None]
        self._stacks: list[tuple[int, int]] = [(-1, 0)]
        self._numbers: dict[tuple[int, int], int] = {}
        self._advanced: dict[int, list[int]] = {}

    def follow(self, rule: int, enough: int) -> Readings:
        """The most readings of the texts looked at that begin a rule."""
        self._n_allowed = self.n_looked_at + _BUDGET_OF_ONE
        text: list[str] = []
        try:
            return Readings(self._follow(rule, enough, text), "".join(text), rule)
        except _TooManyError:
            return Readings(enough + 1, "".join(text), rule)

    def _follow(self, rule: int, enough: int, text: list[str]) -> int:
        counts: dict[int, int] = {}
        for start in self._starts[rule]:
            for stack in self._advance(self._pushed(start, 0)):
                counts[stack] = counts.get(stack, 0) + 1
        n, n_token, most = len(counts), 0, len(counts)
        while len(text) < _N_CHARS and most <= enough:
            if len(text) == _N_CALM_CHARS and n < _FEW:
                break
            before, n, best = counts, 0, ""
            for char in self._candidates(before):
                after = self._step(before, char)
                total = sum(after.values())
                if total > n or (total == n and text[-1:] == [char]):
                    n, best, counts = total, char, after
            if not n or counts == before:
                break
            n_token += 1
            if n_token > _N_MIXED and best != text[-1]:
                n_token, counts = 1, dict.fromkeys(counts, 1)
                n = len(counts)
            text.append(best)
            most = max(most, n)
        return most

    def _look(self) -> None:
        self.n_looked_at += 1
        if self.n_looked_at > self._n_allowed:
            raise _TooManyError

    def _pushed(self, position: int, below: int) -> int:
        """The stack with what stands at a position on top, if anything does."""
        if self._elements[position] is None:
            return below
        number = self._numbers.setdefault((position, below), len(self._stacks))
        if number == len(self._stacks):
            self._stacks.append((position, below))
        return number

    def _advance(self, stack: int) -> list[int]:
        """The stacks that one comes to before the next character (llama_grammar_advance_stack)."""
        known = self._advanced.get(stack)
        if known is not None:
            return known
        todo, seen, found = [stack], {stack}, []
        while todo:
            top = todo.pop()
            self._look()
            position, below = self._stacks[top]
            element = self._elements[position] if top else None
            if not isinstance(element, Ref):
                found.append(top)
                continue
            behind = self._pushed(position + 1, below)
            for start in self._starts[element.rule]:
                following = self._pushed(start, behind)
                if following not in seen:
                    seen.add(following)
                    todo.append(following)
        self._advanced[stack] = found
        return found

    def _step(self, counts: dict[int, int], char: str) -> dict[int, int]:
        after: dict[int, int] = {}
        for stack, n in counts.items():
            self._look()
            position, below = self._stacks[stack]
            if stack and _matches(self._elements[position], ord(char)):
                for following in self._advance(self._pushed(position + 1, below)):
                    after[following] = after.get(following, 0) + n
        return after

    def _candidates(self, counts: dict[int, int]) -> list[str]:
        """The characters, of those at the borders of the classes, that most readings go on with."""
        tops = [(self._elements[self._stacks[stack][0]], n) for stack, n in counts.items() if stack]
        borders: set[int] = {ord("a")}
        for element, _ in tops:
            if isinstance(element, Chars):
                for low, high in element.ranges[:8]:
                    borders.add(high + 1 if element.negated else low)
        chars = sorted(border for border in borders if border < 0xD800)[:24]
        weights = {chr(char): sum(n for element, n in tops if _matches(element, char)) for char in chars}
        return sorted((char for char in weights if weights[char]), key=lambda char: -weights[char])[:_N_TRIED]


def _matches(element: Element | None, char: int) -> bool:
    if element is None or isinstance(element, Ref | Token):
        return False
    return any(low <= char <= high for low, high in element.ranges) != element.negated
