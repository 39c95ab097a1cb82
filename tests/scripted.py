"""Replies that say what a test wants, token by token, whatever the model's logits are."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from llama_sessions import ContextManager, Engine, Reply, Session, Stream


def ids_of(cm: ContextManager, text: str, *, by_byte: bool = False) -> list[int]:
    """Token ids that spell `text`; `by_byte`: as many tokens as can be."""
    parts: Iterable[str] = text if by_byte else [text]
    return [int(token) for part in parts for token in cm.vocab.tokenize(part)]


def script(stream: Stream, ids: Iterable[int]) -> Stream:
    """Let the stream sample exactly `ids`, then the end of generation."""
    cm = stream._cm
    left = iter([*ids, int(cm.vocab.eos)])
    stream._generation._sampler.sample = lambda *_: next(left)  # type: ignore[method-assign]
    return stream


def scripted(
    engine: Engine, session: Session, text: str | None, reply: str, *, by_byte: bool = False, **options: Any
) -> Stream:
    """A stream that samples the tokens of `reply`, then the end of generation."""
    return script(engine.stream(session, text, **options), ids_of(engine.cm, reply, by_byte=by_byte))


def reply_of(stream: Stream) -> Reply:
    """The reply at the end of a stream."""
    reply = list(stream)[-1].reply
    assert reply is not None
    return reply


def only_text(cm: ContextManager) -> dict[int, float]:
    """A bias that leaves tokens of plain letters and spaces alone: replies that are readable, and never end by
    themselves."""
    allowed = [t for t in range(cm.vocab.n_tokens) if not cm.vocab.is_eog(t) and is_plain(cm.vocab.piece(t))]
    return dict.fromkeys(set(range(cm.vocab.n_tokens)) - set(allowed), -math.inf)


def is_plain(piece: bytes) -> bool:
    return bool(piece) and all(char in b"abcdefghijklmnopqrstuvwxyz " for char in piece)


def wish(stream: Stream, ids: Iterable[int]) -> Stream:
    """Let the model want exactly `ids` one after the other, then the end of generation. What it gets is up to whatever
    stands between its logits and a greedy choice: a grammar, a budget."""
    generation = stream._generation
    left, choose = iter(ids), generation.choose

    def choose_what_is_wanted(logits: Any) -> int | None:
        logits = logits.copy()
        logits[next(left, int(stream._cm.vocab.eos))] = logits.max() + 1000.0
        return choose(logits)

    generation.choose = choose_what_is_wanted  # type: ignore[method-assign]
    return stream


def logits_seen(stream: Stream) -> list[np.ndarray]:
    """Copies of the logits that each token of a stream without a grammar is chosen from, as they come."""
    sampler, seen = stream._generation._sampler, []
    real = sampler.sample

    def recorded(logits: np.ndarray, grammar: Any = None) -> int | None:
        seen.append(logits.copy())
        return real(logits)

    sampler.sample = recorded  # type: ignore[method-assign]
    return seen
