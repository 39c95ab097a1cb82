"""Random GBNF: grammars that are right by construction, and the same with characters changed."""

from __future__ import annotations

import random

_LITERALS = ['"a"', '"ab"', r'"\n"', r'"\"x"', '"é"', '"日本"', '"0"', '" "', r'"\u00e9\x41"', '""']
_CLASSES = [
    "[a-z]",
    "[^a-z]",
    "[0-9]",
    "[ab]",
    r"[^\"\\]",
    "[é-ü]",
    r"[\]\-x]",
    "[a-]",
    "[ \t\n]",
    "[^]",
    "[]",
    "[^日]",
]
_NOTHING = ('""', "[]", "[^]")
_NOISE = [*"abc01 \t\n\r()[]{}|*+?.,\"'\\-^#:=<>!_xuU", "é", "日", "::=", "{2,", "{0,3}", "\r\n", "# no\n", "\\x4"]


def item(rng: random.Random, names: list[str], depth: int) -> str:
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(_LITERALS)
    if kind < 0.5:
        return rng.choice(_CLASSES)
    if kind < 0.54:
        return "."
    if kind < 0.56:
        return rng.choice(["<[5]>", "!<[7]>", "<|im_end|>", "<nope>", "<[99999]>"])
    if (kind < 0.75 or depth > 3) and names:
        return rng.choice(names)
    if depth > 3:
        return "[x-z]"
    lines = rng.choice(["", " ", "\n", " # c\n "])
    return f"({lines}{alternatives(rng, names, depth + 1)}{lines})"


def alternatives(rng: random.Random, names: list[str], depth: int = 0) -> str:
    def sequence() -> str:
        parts = []
        for _ in range(rng.choice([0, 1, 1, 1, 1, 2, 2, 2, 3, 4])):
            what = item(rng, names, depth)
            bound = rng.randint(0, 3)
            operators = ["", "", "", "?", f"{{{bound}}}", f"{{{bound},{bound + 2}}}"]
            if what[0] in '"[.' or rng.random() < 0.1:  # others may be empty, which llama.cpp refuses to repeat
                operators += ["*", "+", f"{{{bound},}}"]
            operator = rng.choice(operators)
            parts.append(what if what in _NOTHING else what + operator)  # there is nothing to repeat
        return " ".join(parts) or '""'  # a rule of nothing would go on in the next line

    return " | ".join(sequence() for _ in range(rng.choice([1, 1, 2, 3])))


def grammar(seed: int) -> str:
    """The grammar of a seed. Half of them are changed in some characters."""
    rng = random.Random(seed)

    def below(names: list[str], i: int) -> list[str]:
        """Rules that rule number `i` may refer to: now and then also itself and those above."""
        return names if rng.random() < 0.15 else names[i + 1 :]

    names = ["root", *rng.sample(["a", "b", "c-1", "d", "3"], rng.randint(0, 4))]
    ending = rng.choice(["\n", "\n\n", "\r\n", " # end\n", "\r"])
    text = ending.join(f"{name} ::= {alternatives(rng, below(names, i))}" for i, name in enumerate(names))
    for _ in range(rng.choice([0, 0, 0, 0, 1, 2, 3])):
        at = rng.randint(0, len(text))
        text = text[:at] + rng.choice([rng.choice(_NOISE), ""]) + text[at + rng.choice([0, 1, 1]) :]
    return text
