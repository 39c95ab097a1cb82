"""Stateless calls with a whole message list: the session that holds most of it is found again."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from .errors import OptionError
from .messages import check_message
from .session import Session
from .types import Message

_LAST_TURN = 2  # messages at the end of a known conversation that a caller may have changed: regenerate, edit
_MOST = 256  # conversations that are remembered


class Conversations:
    """Sessions behind calls that bring all their messages, the least recently used first.

    A session belongs to one call at a time: `take` hands it out, and nobody else finds it until it is given back.
    """

    def __init__(self) -> None:
        self._sessions: list[Session] = []
        self._given_back: deque[Session] = deque()
        self._lock = threading.Lock()

    @staticmethod
    def saying(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> Session:
        """A new session that says exactly `messages`; OptionError for what nobody can answer."""
        if not isinstance(messages, list | tuple) or not messages:
            raise OptionError(f"messages must be a list of messages, not {messages!r}")
        wanted = [check_message(_flat(m), f"message {i}") for i, m in enumerate(messages)]
        session = Session(tools=tools)
        if wanted[-1]["role"] == "assistant":
            raise OptionError("the last message is the assistant's already: there is nothing to answer")
        session.messages = [dict(m) for m in wanted]
        return session

    def take(self, asking: Session) -> Session:
        """A session that says what `asking` says: the one that shares most of its messages, if it differs in its last
        turn at most, else `asking` itself (which shares the cells of what it begins with).

        More of them than slots are known: those that wait longest are parked like any idle session.
        """
        wanted, tools = asking.messages, asking.tools
        n_rules = next((i for i, m in enumerate(wanted) if m["role"] != "system"), len(wanted))
        with self._lock:
            self._collect()
            best, n_best = None, n_rules  # a system text alone is everybody's
            for session in self._sessions:
                n = _n_same(session.messages, wanted)
                if n > n_best and n >= len(session.messages) - _LAST_TURN and session.tools == tools:
                    best, n_best = session, n
            if best is None:
                return asking
            self._sessions.remove(best)
        best.messages[n_best:] = wanted[n_best:]
        return best

    def give_back(self, session: Session) -> None:
        """The call is over; others may go on from its conversation. Never waits: a finaliser may call it, in the middle
        of a `take` of its own thread."""
        self._given_back.append(session)

    def _collect(self) -> None:
        """What was given back, latest last. Called under the lock."""
        while self._given_back:
            self._sessions.append(self._given_back.popleft())
        del self._sessions[:-_MOST]


def _flat(message: Any) -> Any:
    """OpenAI's list of text parts as one text."""
    if isinstance(message, dict) and isinstance(message.get("content"), list):
        parts = message["content"]
        if all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
            return {**message, "content": "".join(str(part.get("text", "")) for part in parts)}
    return message


def _n_same(known: Sequence[Message], wanted: Sequence[Message]) -> int:
    """Messages that two conversations begin with alike."""
    n = 0
    for a, b in zip(known, wanted, strict=False):
        # Callers bring back what they were given, often without the reasoning.
        ours = a if "reasoning_content" in b else {k: v for k, v in a.items() if k != "reasoning_content"}
        if _said(ours) != _said(b):
            break
        n += 1
    return n


def _said(message: Mapping[str, Any]) -> dict[str, Any]:
    """What counts when messages are compared: an absent field is an empty one."""
    return {k: v for k, v in message.items() if v not in (None, "", [])}
