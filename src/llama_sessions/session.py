"""What was said: system text, messages, and beside them the token ids of replies. No KV lives here."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import OptionError
from .options import checked_bool, checked_text
from .report import PrepareReport
from .types import ROLES, Message


def check_message(message: object, where: str) -> Message:
    """An OpenAI-style message dict with a known role and text content, else OptionError naming `where`."""
    if not isinstance(message, dict):
        raise OptionError(f"{where} must be a dict with 'role' and 'content', not {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        raise OptionError(f"{where} has the role {role!r}; known roles: {', '.join(ROLES)}")
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        return message
    checked_text(f"the content of {where}", content)
    return message


def checked_tools(tools: object) -> Sequence[Mapping[str, Any]]:
    """OpenAI-style tool definitions, else OptionError."""
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise OptionError(f"tools must be a list of dicts (OpenAI tool definitions), not {tools!r}")
    return tools


def checked_variables(variables: object) -> Mapping[str, Any]:
    """Variables for a chat template, by name, else OptionError."""
    if not isinstance(variables, Mapping) or not all(isinstance(name, str) for name in variables):
        raise OptionError(f"template_kwargs must be a dict with names as keys, not {variables!r}")
    return variables


@dataclass(frozen=True, slots=True, eq=False)
class SpokenReply:
    """What is known about an assistant message beside its dict: the ids that spelled it, or that it is trusted.

    `ids` empty: no ids are known. `trusted`: special-token text in it is control, not text.
    """

    message: Message
    text: str
    ids: tuple[int, ...] = ()
    trusted: bool = False


class Session:
    """One conversation.

    `messages` is a plain list of OpenAI-style dicts, yours to edit: the next `prepare` finds what still holds.
    `system` None inherits the manager's `set_system`, `""` means none. `namespace` keeps KV apart: sessions of
    different namespaces never share any, but for the manager's own system prompt. `tools` and `template_kwargs` go
    to the chat template as they are.

    `n_past` (tokens in the row) and `last_prepare` (a `PrepareReport`) are set by the manager.
    """

    def __init__(
        self,
        system: str | None = None,
        namespace: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self.system = None if system is None else checked_text("system", system)
        self.namespace = None if namespace is None else checked_text("namespace", namespace)
        self.tools = None if tools is None else [dict(tool) for tool in checked_tools(tools)]
        self.template_kwargs = dict(checked_variables(template_kwargs or {}))
        self.messages: list[Message] = []
        self.n_past = 0
        self.last_prepare: PrepareReport | None = None
        self._replies: list[SpokenReply] = []
        self._appended: list[int] = []

    def __repr__(self) -> str:
        return f"<Session {len(self.messages)} messages, n_past={self.n_past}>"

    def add(self, role: str, content: str, **fields: Any) -> Message:
        """Append a message; returns its dict."""
        message = check_message({"role": role, "content": content, **fields}, "the message")
        self.messages.append(message)
        return message

    def add_user(self, text: str) -> Message:
        return self.add("user", text)

    def add_assistant(self, text: str, trusted: bool = False) -> Message:
        """Append an assistant message.

        Tokens that were appended to the row since the last `prepare` stand for it, if they spell `text`. `trusted`:
        special-token text in it (`<|im_end|>`) becomes control tokens; otherwise it is tokenised as text.
        """
        checked_bool("trusted", trusted)
        return self.add_reply(text, self._appended, trusted=trusted)

    def add_tool_result(self, content: str, tool_call_id: str | None = None, name: str | None = None) -> Message:
        """Append what a tool answered."""
        fields = {"tool_call_id": tool_call_id, "name": name}
        return self.add("tool", content, **{k: v for k, v in fields.items() if v is not None})

    def add_reply(
        self, text: str, ids: Sequence[int], *, trusted: bool = False, behind: Message | None = None
    ) -> Message:
        """Add an assistant message that was generated as `ids` (checked against `text` when it is rendered).

        It goes `behind` the message it answers, if that is still there; else to the end.
        """
        message = check_message({"role": "assistant", "content": text}, "the message")
        at = next((i + 1 for i, m in enumerate(self.messages) if m is behind), len(self.messages))
        self.messages.insert(at, message)
        if ids or trusted:
            live = {id(m) for m in self.messages}
            # Records of messages that are gone still serve a copy with the same text, but only the latest few.
            gone = [r for r in self._replies if id(r.message) not in live][-16:]
            kept = {id(r) for r in gone} | {id(r) for r in self._replies if id(r.message) in live}
            self._replies = [r for r in self._replies if id(r) in kept]
            self._replies.append(SpokenReply(message, text, tuple(ids), trusted))
        self._appended.clear()
        return message

    def replies(self, messages: Sequence[Message] | None = None) -> list[SpokenReply | None]:
        """For each message (None: the session's) what is known beside its dict: by the dict itself, else by its text
        (it may be a copy). Trust goes with the dict alone: another's text may be the same."""
        messages = self.messages if messages is None else messages
        if not self._replies:
            return [None] * len(messages)
        by_dict = {id(r.message): r for r in self._replies}
        by_text = {r.text: r for r in self._replies if not r.trusted}
        found: list[SpokenReply | None] = []
        for message in messages:
            reply = None
            if isinstance(message, dict) and message.get("role") == "assistant":
                text = message.get("content")
                reply = by_dict.get(id(message))
                if reply is None or reply.text != text:
                    reply = by_text.get(text) if isinstance(text, str) else None
            found.append(reply)
        return found

    def note_appended(self, token: int) -> None:
        """Called by the manager: `token` was decoded after the last prompt token."""
        self._appended.append(token)

    def forget_appended(self) -> None:
        """Called by the manager: the row was prepared anew, without what had been appended to it."""
        self._appended.clear()

    def copy(self) -> Session:
        """The same conversation in a session of its own: messages are copied deeply, reply ids come along."""
        tools, variables = copy.deepcopy((self.tools, self.template_kwargs))
        twin = Session(self.system, self.namespace, tools, variables)
        twins: dict[int, Any] = {}
        twin.messages = copy.deepcopy(self.messages, twins)
        twin._replies = [
            SpokenReply(twins.get(id(r.message), r.message), r.text, r.ids, r.trusted) for r in self._replies
        ]
        twin._appended = list(self._appended)
        return twin
