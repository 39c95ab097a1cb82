"""Random JSON schemas, and random texts of their grammars."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np

from llama_sessions.llama.grammar import Grammar
from llama_sessions.llama.vocab import LlamaVocab
from llama_sessions.types import CANDIDATE

NAMES = [
    "a",
    "b",
    "name",
    "date time",
    "root",
    "item",
    "space",
    "é",
    'x"y',
    "back\\slash",
    "new\nline",
    "😀",
    "a_b",
    "char",
]
VALUES: list[Any] = [
    "plain", "qu\"ote", "back\\slash", "new\nline", "tab\t", "é日😀", "", "nul\0", 0, -5, 1.5, True, False, None,
    [1, "x"], {"k": [None]}, "\b\f/", "]}", 10**20,
]  # fmt: skip
PATTERNS = [
    "^[a-z]{2,4}$",
    "^a|bc$",
    "^[^0-9]{1,3}$",
    r"^\d{3}-\w+$",
    "^.{2}$",
    r"^v[0-9]\.[0-9]$",
    "^(ab|c)*d?$",
    r"^[\w\-]$",
]


def schema(seed: int) -> dict[str, Any]:
    """The schema of a seed: objects, arrays, unions, references also to itself, and every kind of text."""
    rng = random.Random(seed)
    names = rng.sample(["node", "No_de", "string", "a", "t~/x"], rng.randint(0, 3))
    pointers = [f"#/$defs/{name.replace('~', '~0').replace('/', '~1')}" for name in names]

    def text() -> dict[str, Any]:
        kind = rng.randint(0, 4)
        if kind == 0:
            return {"type": "string", "format": rng.choice(["date", "time", "date-time", "uuid"])}
        if kind == 1:
            return {"type": "string", "pattern": rng.choice(PATTERNS)}
        low = rng.randint(0, 3)
        if kind == 2:
            return {"type": "string", "minLength": low, "maxLength": low + rng.randint(0, 5)}
        return {"type": "string", **({"minLength": low} if kind == 3 else {})}

    def one(depth: int) -> dict[str, Any]:
        makers: list[Callable[[], dict[str, Any]]] = [
            text,
            lambda: {"type": rng.choice(["integer", "number", "boolean", "null"])},
            lambda: {"enum": rng.sample(VALUES, rng.randint(1, 4))},
            lambda: {"const": rng.choice(VALUES)},
            lambda: {"type": rng.sample(["string", "null", "integer", "boolean"], 2), "maxLength": 3, "title": "t"},
        ]
        if depth < 3:
            makers += [lambda: array(depth + 1), lambda: an_object(depth + 1), lambda: union(depth + 1)] * 2
            if pointers:
                makers.append(lambda: {"$ref": rng.choice(pointers)})
        return rng.choice(makers)()

    def array(depth: int) -> dict[str, Any]:
        if rng.random() < 0.2:
            return {"type": "array", "prefixItems": [one(depth) for _ in range(rng.randint(1, 3))], "items": False}
        low = rng.randint(0, 2)
        bounds = rng.choice([{}, {"minItems": low}, {"minItems": low, "maxItems": low + rng.randint(0, 2)}])
        return {"type": "array", "items": one(depth), **bounds}

    def an_object(depth: int) -> dict[str, Any]:
        if rng.random() < 0.15:
            return {"type": "object", "additionalProperties": one(depth)}
        chosen = rng.sample(NAMES, rng.randint(0, 4))
        found = {"type": "object", "properties": {name: one(depth) for name in chosen}}
        found["required"] = [name for name in chosen if rng.random() < 0.6]
        if rng.random() < 0.5:
            found["additionalProperties"] = False
        return found

    def union(depth: int) -> dict[str, Any]:
        if rng.random() < 0.25:
            return {"allOf": [an_object_with("p", depth), an_object_with("q", depth)]}
        return {"anyOf": [one(depth) for _ in range(rng.randint(1, 3))]}

    def an_object_with(name: str, depth: int) -> dict[str, Any]:
        return {"properties": {name: one(depth)}, "required": [name]}

    top = one(0)
    definitions = {  # each may refer to all, and ends: what refers may be left out
        name: {"type": "object", "properties": {"v": text(), "next": one(2)}, "required": ["v"]} for name in names
    }
    return {**top, "$defs": definitions} if definitions else top


def text_of(grammar: Grammar, vocab: LlamaVocab, rng: random.Random, n_free: int = 30, n_most: int = 400) -> str | None:
    """A random text of a grammar: `n_free` tokens of any kind, then such as lead to an end. None: no end was found."""
    candidates = np.zeros(vocab.n_tokens, CANDIDATE)
    found = b""
    for n in range(n_most):
        candidates["id"], candidates["logit"] = np.arange(vocab.n_tokens), 0
        grammar.restrict(candidates, vocab.n_tokens)
        allowed = np.flatnonzero(np.isfinite(candidates["logit"])).tolist()
        if not allowed:
            return None
        ends = [token for token in allowed if vocab.is_eog(token)]
        if ends and (n > n_free or rng.random() < 0.1 or len(ends) == len(allowed)):
            grammar.accept(ends[0])
            return found.decode()
        allowed = [token for token in allowed if token not in ends]
        if n > n_free:
            pieces = {token: vocab.piece(token) for token in allowed}
            in_text = len(allowed) > vocab.n_tokens // 3
            for closer in (b'"',) if in_text else (b"}", b"]", b'"', b"n", b"0", b"a"):
                closing = [token for token in allowed if pieces[token] == closer]
                if closing:
                    allowed = closing
                    break
        token = rng.choice(allowed)
        found += vocab.piece(token)
        grammar.accept(token)
    return None
