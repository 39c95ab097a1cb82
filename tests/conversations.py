"""Sessions for tests, and what became of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from models import model_path
from oracle import oracle_for

from llama_sessions import ContextManager, Reply, Session
from llama_sessions.testing import FakeContext, fake_parts, fresh_logits

Loader = Callable[..., ContextManager]


def said(*texts: str, **options: Any) -> Session:
    """A session of user and assistant messages in turn."""
    session = Session(**options)
    for i, text in enumerate(texts):
        session.add("assistant" if i % 2 else "user", text)
    return session


def prepared(cm: ContextManager, *texts: str, **options: Any) -> list[Session]:
    """A session for each text, prepared in this order."""
    sessions = [said(text, **options) for text in texts]
    for session in sessions:
        cm.prepare(session)
    return sessions


def sources(session: Session) -> list[str]:
    """Where the tokens of its last prompt came from."""
    assert session.last_prepare is not None
    return [stretch.source for stretch in session.last_prepare.stretches]


def is_seated(cm: ContextManager, *sessions: Session) -> list[bool]:
    """Which of them have a row."""
    return [cm._seats.get(session, reading=True) is not None for session in sessions]


def over_fake(*, radix: Any = True, idle_park_after_s: float | None = None, **options: Any) -> ContextManager:
    """A manager over llama.cpp's rules in Python, with two sessions' slots unless said otherwise."""
    parts = fake_parts(**{"n_ctx": 600, "max_sessions": 2, **options})
    return ContextManager.over(parts, radix=radix, idle_park_after_s=idle_park_after_s)


def assert_exact(cm: ContextManager, session: Session) -> None:
    """Its logits are those of a fresh prefill of its tokens, by the oracle of the manager's model."""
    tokens = cm.tokens(session)
    if isinstance(cm._store.context, FakeContext):
        np.testing.assert_array_equal(cm.logits(session), fresh_logits(cm.capabilities, tokens))
    else:
        model = getattr(cm, "test_model", "llama-bpe")
        oracle_for(model_path(model)).assert_exact(cm.logits(session), tokens)


def assert_as_alone(cm: ContextManager, session: Session, reply: Reply, alone: Reply, model: str = "llama-bpe") -> None:
    """The reply is what it was alone, token for token, up to where two tokens are as likely as each other: within what
    batch splits make of this model's logits."""
    got, expected = reply.tokens, alone.tokens
    n = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
    if n is None:
        assert got == expected
        return
    oracle = oracle_for(model_path(model))
    logits = oracle.logits(cm.tokens(session)[: reply.n_prompt + n])
    gap = abs(float(logits[got[n]] - logits[expected[n]]))
    assert gap <= 2 * max(oracle.model_spread, 2e-3), f"token {n}: {got[n]} instead of {expected[n]}, {gap} apart"
