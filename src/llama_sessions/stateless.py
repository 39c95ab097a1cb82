"""Stateless calls with a whole message list: the session that holds most of it is found again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import OptionError
from .manager import ContextManager
from .session import Session, check_message, checked_tools
from .types import Message

_LAST_TURN = 2  # messages at the end of a known conversation that a caller may have changed: regenerate, edit


class Conversations:
    """Sessions behind calls that bring all their messages, least recently used first."""

    def __init__(self, cm: ContextManager) -> None:
        self._cm = cm
        self._sessions: list[Session] = []

    def session_for(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> Session:
        """A session that says exactly `messages`: the one that shares most of them, if it differs in its last turn at
        most, else a new one (which shares the cells of what it begins with). A slot is freed for it if need be.
        """
        if not isinstance(messages, list | tuple) or not messages:
            raise OptionError(f"messages must be a list of messages, not {messages!r}")
        wanted = [check_message(_flat(m), f"message {i}") for i, m in enumerate(messages)]
        tools = None if tools is None else [dict(tool) for tool in checked_tools(tools)]
        best, n_best = None, 0
        for session in self._sessions:
            n = _n_same(session.messages, wanted)
            goes_on = n >= len(session.messages) - _LAST_TURN and session.tools == tools
            if n > n_best and goes_on and not self._cm.is_held(session):
                best, n_best = session, n
        if best is None:
            self._free_a_slot()
            best = Session(tools=tools)
        else:
            self._sessions.remove(best)
        best.messages[n_best:] = [dict(m) for m in wanted[n_best:]]
        self._sessions.append(best)
        return best

    def _free_a_slot(self) -> None:
        if self._cm.slots.n_free:
            return
        oldest = next((s for s in self._sessions if not self._cm.is_held(s)), None)
        if oldest is not None:
            self._sessions.remove(oldest)
            self._cm.release(oldest)


def _flat(message: Any) -> Any:
    """OpenAI's list of text parts as one text."""
    if isinstance(message, dict) and isinstance(message.get("content"), list):
        parts = message["content"]
        if all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
            return {**message, "content": "".join(str(part.get("text", "")) for part in parts)}
    return message


def _n_same(known: Sequence[Message], wanted: Sequence[Message]) -> int:
    """Messages that two conversations begin with alike. Callers bring back what they were given, not the reasoning."""
    n = 0
    for a, b in zip(known, wanted, strict=False):
        if _said(a) != _said(b):
            break
        n += 1
    return n


def _said(message: Message) -> dict[str, Any]:
    """What counts when messages are compared: an absent field is an empty one."""
    return {k: v for k, v in message.items() if k != "reasoning_content" and v not in (None, "", [])}
