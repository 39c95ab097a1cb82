"""A session's prompt: which system text counts, what `before_encode` makes of the messages, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .errors import OptionError
from .hooks import Hooks
from .kv.prefix import Prefix
from .options import checked_text
from .render import Rendered, Renderer
from .session import Session, SpokenReply, check_message
from .types import Message, TokenArray


def message_list(session: Session) -> list[Message]:
    """The session's own list; OptionError where somebody put something else in its place."""
    messages = session.messages
    if not isinstance(messages, list):
        raise OptionError(f"session.messages must be a list of messages, not {messages!r}")
    return messages


@dataclass(frozen=True, slots=True)
class Conversation:
    """What the template is to see (system text first), and what is known beside each message."""

    messages: Sequence[Message]
    replies: Sequence[SpokenReply | None]

    @property
    def is_empty(self) -> bool:
        """Nobody has said anything yet: there is a system text at most."""
        return all(isinstance(m, dict) and m.get("role") == "system" for m in self.messages)


class Prompter:
    """Reads sessions; changes nothing."""

    def __init__(self, renderer: Renderer, prefix: Prefix, hooks: Hooks) -> None:
        self.renderer = renderer
        self._prefix = prefix
        self._hooks = hooks

    def conversation(self, session: Session) -> Conversation:
        """Calls the `before_encode` hook, so not under the lock. The session's own system text wins, then a system
        message at the head of its messages, then the manager's."""
        messages = list(message_list(session))
        brings_own = bool(messages) and isinstance(messages[0], dict) and messages[0].get("role") == "system"
        system = session.system if session.system is not None else None if brings_own else self._prefix.text
        if system:
            messages.insert(0, {"role": "system", "content": checked_text("the session's system text", system)})
        seen = self._hooks.before_encode(messages, session)
        return Conversation(seen, session.replies(seen))

    def rendered(self, session: Session, conversation: Conversation, last: Rendered | None) -> Rendered:
        """The whole prompt with the reply header; of an empty conversation the stem that all begin with.

        `last`: the session's last one, of which is taken what stays.
        """
        if conversation.is_empty:
            for i, message in enumerate(conversation.messages):
                check_message(message, f"message {i}")
            text = "".join(m.get("content") or "" for m in conversation.messages)
            return Rendered(self._stem(session, text) if text else np.empty(0, np.int32))
        return self.renderer.render(
            conversation.messages,
            conversation.replies,
            tools=session.tools,
            variables=session.template_kwargs,
            last=last,
        )

    def _stem(self, session: Session, text: str) -> TokenArray:
        return self.renderer.stem(text, tools=session.tools, variables=session.template_kwargs)
