"""The model in the box: small enough to ship, and it remembers."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from llama_sessions import ContextManager, Engine, Session, builtin_model

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

from eval_tiny_chat import manager, recall
from tiny_chat_data import Words, is_held_out


@pytest.fixture
def cm() -> ContextManager:
    return ContextManager.load(builtin_model(), max_sessions=3, n_threads=1)


def ask(cm: ContextManager, session: Session, text: str) -> str:
    return Engine(cm).chat(session, text, temperature=0, max_tokens=40).text


def test_it_is_at_most_four_mebibytes() -> None:
    assert Path(builtin_model()).stat().st_size <= 4 * 2**20


def test_it_recalls_names_it_never_saw_in_training(cm: ContextManager) -> None:
    words = Words(random.Random(5), held_out=True)
    names = [words.name() for _ in range(10)]
    assert all(is_held_out(name) for name in names)
    right = 0
    for name in names:
        session = Session()
        ask(cm, session, f"My name is {name}.")
        ask(cm, session, "The weather is fine.")
        right += ask(cm, session, "What is my name?") == f"Your name is {name}."
        cm.release(session)
    assert right >= 9


@pytest.mark.parametrize("kind", ["known", "unknown", "password"])
@pytest.mark.parametrize("low", [384, 896])
def test_it_recalls_up_to_its_whole_context(kind: str, low: int) -> None:
    """Ten of the two hundred trials a bin that the model card has from `tools/eval_tiny_chat.py`."""
    with manager(builtin_model()) as cm:
        assert recall(cm, kind, low, 10) >= 0.9
        assert not cm.stats().n_evictions


def test_it_says_what_it_was_not_told(cm: ContextManager) -> None:
    session = Session("You are a helpful assistant.")
    ask(cm, session, "My dog is called Telmi.")
    assert ask(cm, session, "What is my cat called?") == "You have not told me what your cat is called."
    assert ask(cm, session, "What is the password?") == "You have not told me the password."


def test_it_keeps_a_list_and_counts(cm: ContextManager) -> None:
    session = Session()
    ask(cm, session, "Add bread to my list.")
    assert ask(cm, session, "Add nails to my list.") == "Your list: bread, nails."
    assert ask(cm, session, "Count to 7.") == "1, 2, 3, 4, 5, 6, 7."
    assert ask(cm, session, "What is on my list?") == "Your list: bread, nails."
