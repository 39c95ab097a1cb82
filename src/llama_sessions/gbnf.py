"""Whether llama.cpp can live with a grammar: syntax, bounds, left recursion, and how many readings a text may have.

What passes here is accepted by llama.cpp, and neither kills nor hangs it. What llama.cpp refuses is refused here.
"""

from __future__ import annotations

from dataclasses import dataclass

from .gbnf_readings import most_readings
from .gbnf_rules import Chars, Grammar, Ref, Sequence, Token, place, refuse
from .gbnf_text import read_gbnf

MAX_WAYS = 10_000  # to begin a rule; llama.cpp compares each with each
MAX_VISITS = 200_000_000  # elements that llama.cpp looks at in search of left recursion, at most; 10 ns each
MAX_READINGS = 4000  # 2 us each in llama.cpp, for each token that begins with the text


@dataclass(frozen=True, slots=True)
class NamedToken:
    """`<name>` in a grammar; `place`: its line and column."""

    spelled: str
    place: str


@dataclass(frozen=True, slots=True)
class GrammarSummary:
    """What a checked grammar consists of. `tokens` must each be one token of the vocabulary, which only it knows.

    `ends`: whether any finite text matches.
    """

    n_rules: int
    ends: bool
    tokens: tuple[NamedToken, ...]


def check_gbnf(text: str, root: str = "root") -> GrammarSummary:
    """Raise OptionError, saying where, for a grammar that llama.cpp would refuse, or abort, crash or hang on.

    About 1 us a character, and 50 us a rule.
    """
    grammar = read_gbnf(text, root)
    nullable = _that_match(grammar, (Ref,))
    begins = _begins_with(grammar, nullable)
    _check_ways(grammar, nullable, begins, _from_the_bottom(grammar, begins))
    if grammar.tokens:
        _check_tokens_follow_no_chars(grammar, nullable)
    most = most_readings(grammar, MAX_READINGS)
    if most.n > MAX_READINGS:
        rule = grammar.rules[most.rule]
        refuse(
            text,
            rule.at,
            f"rule {rule.name!r} goes on from {most.text!r} in more than {MAX_READINGS} ways, and llama.cpp would "
            "follow them all; write it so that each text has one reading",
        )
    tokens = tuple(NamedToken(token.spelled, place(text, token.at)) for token in grammar.tokens if token.spelled)
    ends = _that_match(grammar, (Ref, Chars, Token))[grammar.root]
    return GrammarSummary(len(grammar.rules), ends, tokens)


def _that_match(grammar: Grammar, allowed: tuple[type, ...]) -> list[bool]:
    """Which rules match something, in finitely many steps, using only elements of some kinds.

    With references alone that is nothing: the rules that may be empty. llama.cpp's own test for these sees only those
    with an empty alternative.
    """
    matches = [False] * len(grammar.rules)
    used_in: list[list[list[int]]] = [[] for _ in grammar.rules]  # by rule: [rule, references to be empty yet]
    found = []
    for number, rule in enumerate(grammar.rules):
        for sequence in rule.alternatives:
            refs = [element for element in sequence if isinstance(element, Ref)]
            if not all(isinstance(element, allowed) for element in sequence):
                continue
            waiting = [number, len(refs)]
            for ref in refs:
                used_in[ref.rule].append(waiting)
            if not refs:
                found.append(number)
    while found:
        number = found.pop()
        if matches[number]:
            continue
        matches[number] = True
        for waiting in used_in[number]:
            waiting[1] -= 1
            if not waiting[1]:
                found.append(waiting[0])
    return matches


def _begins_with(grammar: Grammar, nullable: list[bool]) -> list[list[int]]:
    """By rule: the rules that its text may begin with, once for each way to them.

    That a repetition comes back to itself behind an empty item is no harm: it is the last of its sequence, so that
    the stack does not grow. llama.cpp refuses it all the same where the item has an empty alternative itself.
    """
    has_empty = [not all(rule.alternatives) for rule in grammar.rules]
    begins: list[list[int]] = []
    for number, rule in enumerate(grammar.rules):
        first: list[int] = []
        for sequence in rule.alternatives:
            seen_by_llama = True
            for element in sequence:
                if not isinstance(element, Ref) or (element.rule == number and rule.loops and not seen_by_llama):
                    break
                first.append(element.rule)
                if not nullable[element.rule]:
                    break
                seen_by_llama = seen_by_llama and has_empty[element.rule]
        begins.append(first)
    return begins


def _from_the_bottom(grammar: Grammar, begins: list[list[int]]) -> list[int]:
    """All rules, each after those that it begins with. Refuses left recursion, naming the circle.

    Left recursion that llama.cpp misses, through a rule that is empty by way of others, grows its stacks without end.
    """
    order: list[int] = []
    state = [0] * len(begins)  # 1: on the path, 2: done
    for start in range(len(begins)):
        if state[start]:
            continue
        path, states = [start], [iter(begins[start])]
        state[start] = 1
        while path:
            following = next(states[-1], None)
            if following is None:
                state[path[-1]] = 2
                order.append(path.pop())
                states.pop()
            elif state[following] == 1:
                _refuse_circle(grammar, path[path.index(following) :])
            elif not state[following]:
                state[following] = 1
                path.append(following)
                states.append(iter(begins[following]))
    return order


def _refuse_circle(grammar: Grammar, circle: list[int]) -> None:
    first = grammar.rules[circle[0]]
    if len(circle) == 1 and first.loops:
        what = f"in rule {first.name!r}, what is repeated without limit may be empty; let it match a character at least"
        refuse(grammar.text, first.at, what)
    names = [grammar.rules[number].name for number in [*circle, circle[0]]]
    shown = [name for i, name in enumerate(names) if i == 0 or name != names[i - 1]] or names[:1]
    if len(shown) == 1:
        shown *= 2
    what = f"left recursion, rule {first.name!r} may begin with itself: {' -> '.join(shown)}; put the recursion last"
    refuse(grammar.text, first.at, what)


def _check_ways(grammar: Grammar, nullable: list[bool], begins: list[list[int]], order: list[int]) -> None:
    """Refuse what takes llama.cpp exponential time: it walks every way to every rule that one may begin with."""
    ways, visits = [0] * len(begins), [0] * len(begins)
    total = 0
    for number in order:
        rule = grammar.rules[number]
        firsts = [_edge(sequence, nullable, backwards=False) for sequence in rule.alternatives]
        n_direct = sum(not (first and isinstance(first[-1], Ref) and not nullable[first[-1].rule]) for first in firsts)
        ways[number] = n_direct + sum(ways[following] for following in begins[number])
        visits[number] = sum(map(len, rule.alternatives)) + sum(visits[following] for following in begins[number])
        total += visits[number]
        if ways[number] > MAX_WAYS or total > MAX_VISITS:
            what = f"rule {rule.name!r} may begin in too many ways, more than {MAX_WAYS} or through too many rules"
            refuse(grammar.text, rule.at, f"{what}; let its alternatives begin with different characters")


def _check_tokens_follow_no_chars(grammar: Grammar, nullable: list[bool]) -> None:
    """Refuse a token element that may come directly after characters.

    llama.cpp would let a token through that begins with these characters and matches the element as a whole, and then
    abort on it: inside a token it follows characters only (llama_grammar_accept_token, seen with 0.3.36).
    """
    ends_in_chars, begins_with_token = (
        _spread(grammar, nullable, Chars, backwards=True),
        _spread(grammar, nullable, Token, backwards=False),
    )
    for rule in grammar.rules:
        for sequence in rule.alternatives:
            after_chars = False
            for element in sequence:
                if isinstance(element, Ref):
                    token, empty, chars = (
                        begins_with_token[element.rule],
                        nullable[element.rule],
                        ends_in_chars[element.rule],
                    )
                else:
                    token, empty, chars = isinstance(element, Token), False, isinstance(element, Chars)
                if after_chars and token:
                    at = element.at if isinstance(element, Token) else rule.at
                    what = f"in rule {rule.name!r} a token comes after characters"
                    refuse(grammar.text, at, f"{what}; match what stands before it by tokens too, such as !<name>*")
                after_chars = chars or (after_chars and empty)


def _spread(grammar: Grammar, nullable: list[bool], kind: type, *, backwards: bool) -> list[bool]:
    """Which rules may begin (`backwards`: end) with an element of a kind."""
    found = [False] * len(grammar.rules)
    used_at_edge: list[list[int]] = [[] for _ in grammar.rules]
    todo = []
    for number, rule in enumerate(grammar.rules):
        for sequence in rule.alternatives:
            for element in _edge(sequence, nullable, backwards):
                if isinstance(element, Ref):
                    used_at_edge[element.rule].append(number)
                elif isinstance(element, kind):
                    todo.append(number)
    while todo:
        number = todo.pop()
        if not found[number]:
            found[number] = True
            todo.extend(used_at_edge[number])
    return found


def _edge(sequence: Sequence, nullable: list[bool], backwards: bool) -> Sequence:
    """The elements that a sequence may begin (`backwards`: end) with."""
    ordered = sequence[::-1] if backwards else sequence
    for i, element in enumerate(ordered):
        if not isinstance(element, Ref) or not nullable[element.rule]:
            return ordered[: i + 1]
    return ordered
