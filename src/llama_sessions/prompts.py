"""A session's prompt: which system text counts, what `before_encode` makes of the messages, and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from .errors import OptionError
from .hooks import Hooks
from .kv.prefix import Prefix
from .messages import check_message, role_of
from .options import checked_text
from .render import Rendered, Renderer
from .session import Session
from .spans import Span
from .spoken import SpokenReply
from .types import Message, TokenArray
from .window import Window


def message_list(session: Session) -> list[Message]:
    """The session's own list; OptionError where somebody put something else in its place."""
    messages = session.messages
    if not isinstance(messages, list):
        raise OptionError(f"session.messages must be a list of messages, not {messages!r}")
    return messages


def check_partial(messages: Sequence[Message]) -> Message:
    """The last message, if it is the assistant's and has text to continue; OptionError otherwise."""
    last = messages[-1] if messages else None
    if not isinstance(last, dict) or last.get("role") != "assistant" or last.get("tool_calls"):
        raise OptionError("continue_last goes on with the assistant's last message, and the last message is none")
    return check_message(last, "the last message")


@dataclass(frozen=True, slots=True, eq=False)
class Conversation:
    """What the template is to see (system text first), and what is known beside each message.

    `owners`: for each the session's own message behind it (or the replacement of some), None for one that was put in.
    `is_raw`: there is no template. `continue_last`: the prompt ends within the last message.
    """

    messages: Sequence[Message]
    replies: Sequence[SpokenReply | None]
    owners: Sequence[Message | None] = ()
    is_raw: bool = False
    continue_last: bool = False

    @property
    def is_empty(self) -> bool:
        """Nobody has said anything yet: there is a system text at most."""
        return all(role_of(m) == "system" for m in self.messages)


Said: TypeAlias = tuple[tuple[str, ...], ...]


def said_of(message: Message) -> tuple[str, ...]:
    """A message as it was, whatever becomes of its dict; an absent field is an empty one."""
    more = ""
    if len(message) > 2:
        fields = ((repr(key), repr(value)) for key, value in message.items() if key not in ("role", "content"))
        more = repr(sorted(field for field in fields if field[1] not in ("None", "''", "[]")))
    return message["role"], message.get("content") or "", more if more != "[]" else ""


def said_in(session: Session, conversation: Conversation) -> Said:
    """All that the template was given: to tell whether a conversation only grew."""
    return (repr(session.tools), repr(session.template_kwargs)), *map(said_of, conversation.messages)


class Prompter:
    """Reads sessions; changes nothing. `raw` renders sessions without a template; `model`: whose reply ids count."""

    def __init__(self, renderer: Renderer, raw: Renderer, prefix: Prefix, hooks: Hooks, model: str) -> None:
        self.renderer = renderer
        self._raw = raw
        self._prefix = prefix
        self._hooks = hooks
        self._model = model

    def conversation(
        self, session: Session, window: Window | None = None, *, continue_last: bool = False
    ) -> Conversation:
        """What a window over the session's messages shows (None: the session's own).

        Calls the `before_encode` hook, so not under the lock. The session's own system text wins, then a system
        message at the head of its messages, then the manager's; a raw session has none.
        """
        own = message_list(session)
        messages = (window or session.window_state).seen(own)
        # A system text at the head is nobody's to drop, but for one that stands for messages that are out.
        brings_own = bool(messages) and role_of(messages[0]) == "system" and messages[0] is own[0]
        system = session.system if session.system is not None else None if brings_own else self._prefix.text
        head: Message | None = own[0] if brings_own else None
        if system and not session.is_raw:
            head = {"role": "system", "content": checked_text("the session's system text", system)}
            messages.insert(0, head)
        pairs = self._hooks.before_encode(messages, session)
        seen = [message for message, _ in pairs]
        if continue_last:
            check_partial(seen)
        replies = [
            r if r is None or r.model == self._model else replace(r, ids=(), begun=()) for r in session.replies(seen)
        ]
        owners = [None if owner is head else owner for _, owner in pairs]
        return Conversation(seen, replies, owners, session.is_raw, continue_last)

    def rendered(self, session: Session, conversation: Conversation, last: Rendered | None) -> Rendered:
        """The whole prompt with the reply header; of an empty conversation the stem that all begin with.

        `last`: the session's last one, of which is taken what stays.
        """
        if conversation.is_empty and not conversation.is_raw:
            for i, message in enumerate(conversation.messages):
                check_message(message, f"message {i}")
            text = "".join(m.get("content") or "" for m in conversation.messages)
            return Rendered(self._stem(session, text) if text else np.empty(0, np.int32))
        renderer = self._raw if conversation.is_raw else self.renderer
        return renderer.render(
            conversation.messages,
            conversation.replies,
            tools=session.tools,
            variables=session.template_kwargs,
            continue_last=conversation.continue_last,
            last=last,
        )

    def spans(self, conversation: Conversation, rendered: Rendered) -> tuple[Span, ...]:
        """The tokens of each message in its prompt. Raises what rendering raises."""
        return (self._raw if conversation.is_raw else self.renderer).spans(rendered, conversation.messages)

    def _stem(self, session: Session, text: str) -> TokenArray:
        return self.renderer.stem(text, tools=session.tools, variables=session.template_kwargs)
