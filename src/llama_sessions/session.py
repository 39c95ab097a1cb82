"""What was said: system text, messages, and beside them the token ids of replies. No KV lives here."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, TypeVar

from .errors import OptionError
from .messages import check_message, checked_tools, checked_variables, role_of
from .options import checked_bool, checked_int, checked_list, checked_namespace, checked_text
from .report import PrepareReport
from .spoken import SpokenReplies, SpokenReply, words_of
from .types import Message
from .window import Window, among, checked_places, places

T = TypeVar("T")

_VERSION = 2  # of what `to_dict` writes


class Session:
    """One conversation.

    `messages` is a plain list of OpenAI-style dicts, yours to edit: the next `prepare` finds what still holds.
    `system` None inherits the manager's `set_system`, `""` means none. `namespace` keeps KV apart: sessions of
    different namespaces never share any, but for the manager's own system prompt. `tools` and `template_kwargs` go
    to the chat template as they are.

    Where they grow too long for the context, some go out of the `window`, which is what the model sees; the list stays
    whole. Pins and what is out follow the dicts themselves: a copy of one is a new message.

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
        self.namespace = namespace
        self.tools = None if tools is None else [dict(tool) for tool in checked_tools(tools)]
        self.template_kwargs = dict(checked_variables(template_kwargs or {}))
        self.messages: list[Message] = []
        self.n_past = 0
        self.last_prepare: PrepareReport | None = None
        self._raw = False
        self._replies = SpokenReplies()
        self._appended: list[int] = []
        self._appended_by = ""
        self._window = Window()
        self._pinned: tuple[Message, ...] = ()

    @classmethod
    def raw(cls, text: str, namespace: str | None = None) -> Session:
        """A session without a template: the prompt is `text` and whatever is added to it, in order, as it stands.

        Control-token text in it and in what you add is control, but for assistant messages: there it is text, unless
        they are `trusted` (`add_assistant(..., trusted=True)`); replies keep the ids they were sampled as. A BOS is put
        before it all where the vocabulary wants one.
        """
        self = cls("", namespace)
        self._raw = True
        self.add_user(text)
        return self

    @property
    def namespace(self) -> str | None:
        """Sessions of different namespaces share no KV. A change counts from the next `prepare` on."""
        return self._namespace

    @namespace.setter
    def namespace(self, namespace: str | None) -> None:
        self._namespace = checked_namespace(namespace)

    @property
    def is_raw(self) -> bool:
        """Whether the messages are put together as they stand, without a template."""
        return self._raw

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
        return self.add_reply(text, self._appended, model=self._appended_by, trusted=trusted)

    def add_tool_result(self, content: str, tool_call_id: str | None = None, name: str | None = None) -> Message:
        """Append what a tool answered; OptionError for a `tool_call_id` that no message of the assistant has."""
        calls = self._calls_latest_first()
        call = next((call for call in calls if call.get("id") == tool_call_id), None)
        if tool_call_id is not None and call is None:
            made = ", ".join(repr(call.get("id")) for call in reversed([*self._calls_latest_first()])) or "none"
            raise OptionError(f"no tool call has the id {tool_call_id!r}; calls made: {made}")
        fields = {"tool_call_id": tool_call_id, "name": name or (call and call["function"].get("name"))}
        return self.add("tool", content, **{k: v for k, v in fields.items() if v is not None})

    def _calls_latest_first(self) -> Iterator[Mapping[str, Any]]:
        for i in reversed(range(len(self.messages))):
            yield from reversed(check_message(self.messages[i], f"message {i}").get("tool_calls") or ())

    def undo(self) -> int:
        """Take back the last message of the user and all that came of it (all there is, where no user spoke); returns
        how many messages went."""
        n = len(self.messages)
        latest = (i for i in reversed(range(n)) if check_message(self.messages[i], f"message {i}")["role"] == "user")
        del self.messages[next(latest, 0) :]
        return n - len(self.messages)

    def add_reply(
        self,
        text: str,
        ids: Sequence[int],
        *,
        model: str = "",
        trusted: bool = False,
        behind: Message | None = None,
        begun: Sequence[int] = (),
        **fields: Any,
    ) -> Message:
        """Add an assistant message that the model with that fingerprint generated as `ids` (checked against `text`
        when it is rendered), or only as `begun` (see `SpokenReply`).

        It goes `behind` the message it answers, if that is still there; else to the end.
        """
        message = check_message({"role": "assistant", "content": text, **fields}, "the message")
        n = len(self.messages)
        at = next((i + 1 for i in reversed(range(n)) if self.messages[i] is behind), n)
        self.messages.insert(at, message)
        self._know(message, ids, trusted, model, begun)
        return message

    def extend_reply(
        self, message: Message, text: str, ids: Sequence[int], *, model: str, begun: Sequence[int] = (), **fields: Any
    ) -> None:
        """Let an assistant message go on: its content becomes `text`, which that model spells `ids` (or that it has
        only `begun`), and `fields` are set."""
        trusted = any(r.trusted for r in self._replies if r.message is message)
        message.update(fields, content=checked_text("the content", text))
        self._replies = SpokenReplies(r for r in self._replies if r.message is not message)
        self._know(message, ids, trusted, model, begun)

    def _know(self, message: Message, ids: Sequence[int], trusted: bool, model: str, begun: Sequence[int]) -> None:
        text, thought = words_of(message)
        reply = SpokenReply(message, text, tuple(map(int, ids)), trusted, model, thought, tuple(map(int, begun)))
        if reply.ids or reply.trusted or reply.begun:
            live = set(map(id, self.messages))
            # Records of messages that are gone still serve a copy with the same text, but only the latest few.
            gone = {id(r) for r in [r for r in self._replies if id(r.message) not in live][:-16]}
            if gone:
                self._replies = SpokenReplies(r for r in self._replies if id(r) not in gone)
            self._replies.add(reply)
        self._appended.clear()

    def replies(self, messages: Sequence[Message] | None = None) -> list[SpokenReply | None]:
        """For each message (None: the session's) what is known beside its dict: by the dict itself, else by its text
        (it may be a copy). Trust goes with the dict alone: another's text may be the same."""
        return [self._replies.of(m) for m in (self.messages if messages is None else messages)]

    def note_appended(self, token: int, model: str) -> None:
        """Called by the manager: `token` was decoded after the last prompt token, by that model."""
        self._appended.append(int(token))
        self._appended_by = model

    def forget_appended(self) -> None:
        """Called by the manager: the row was prepared anew, without what had been appended to it."""
        self._appended.clear()

    @property
    def window(self) -> list[Message]:
        """What the model sees: the messages that were not evicted, and what `on_evict` put in place of the others.

        A new list of the very dicts, as of the last `prepare` or `make_room`; messages that were added since are in it.
        It has all of them again once what followed an evicted message is taken back.
        A system text and what `before_encode` puts in are not. With "fifo" a message of which tokens are left in the
        row is still in it.
        """
        return self.window_state.seen(self.messages)

    @property
    def window_state(self) -> Window:
        """Which messages are out of the window, and what stands for them.

        None is, once the last message or the last question is one of them: what came behind it was taken back, and with
        it the reason.
        """
        messages, window = self.messages, self._window
        if not window.out or not isinstance(messages, list) or not messages:  # what else it may be is told later
            return window
        asked = next((m for m in reversed(messages) if role_of(m) == "user"), None)
        return Window() if window.hides(messages[-1]) or window.hides(asked) else window

    def set_window(self, window: Window) -> None:
        """Called by the manager: what the model sees from now on."""
        self._window = window

    def reset_window(self) -> None:
        """Let the model see all messages again; what `on_evict` put in place of some is gone. The next `prepare`
        decodes what comes back and all behind it, and evicts again what does not fit."""
        self._window = Window()

    def pin_message(self, index: int, on: bool = True) -> None:
        """Let a message stay whole in the window, whatever is evicted, and its turn with it: many templates refuse an
        answer without its question. `on=False` undoes it. One that is out already does not come back by it:
        `reset_window` brings it.

        `index`: in `messages`, negative ones from the end; OptionError for one that is not there. The pin goes with the
        dict: not with the index, nor with a copy. Where so much is pinned that nothing more can go, `prepare` raises
        ContextOverflow.
        """
        message = self._message_at(index)
        others = [m for m in self.pinned_messages() if m is not message]
        self._pinned = (*others, message) if checked_bool("on", on) else tuple(others)

    def is_message_pinned(self, index: int) -> bool:
        message = self._message_at(index)
        return any(m is message for m in self._pinned)

    def pinned_messages(self) -> list[Message]:
        """The messages of the list that are pinned, in its order: the very dicts."""
        return list(among(self.messages, self._pinned))

    def _message_at(self, index: int) -> Message:
        n = len(self.messages)
        if not n:
            raise OptionError(f"there is no message {index!r}: the session has 0 messages; add one first")
        return self.messages[checked_int("the index of a message", index, -n, n - 1)]

    def copy(self) -> Session:
        """The same conversation in a session of its own: messages are copied deeply; reply ids, pins and the window
        come along."""
        return self.copy_with_map()[0]

    def copy_with_map(self) -> tuple[Session, dict[int, Message]]:
        """A copy, and the copied dict of each message and replacement by the `id` of the original."""
        tools, variables = _copied((self.tools, self.template_kwargs))
        twin = Session(self.system, self.namespace, tools, variables)
        twin._raw = self._raw
        window, pinned = self._window, self._pinned
        originals = list(self.messages), window.replacements, window.withdrawn
        copies = _copied(originals)  # in one go: what stands in both is one dict in the copy, too
        twins = {id(m): copied for m, copied in zip(chain(*originals), chain(*copies), strict=True)}
        twin.messages = copies[0]
        twin._replies = SpokenReplies(replace(r, message=twins.get(id(r.message), r.message)) for r in self._replies)
        twin._appended, twin._appended_by = list(self._appended), self._appended_by
        twin._window = window.copied(twins)
        twin._pinned = among(twin.messages, [twins[id(m)] for m in pinned if id(m) in twins])
        return twin, twins

    def to_dict(self) -> dict[str, Any]:
        """What was said, as JSON-able data: after a restart `from_dict` and the next `prepare` bring it all back.

        Reply ids go with the fingerprint of their model; where another one reads them the text counts alone.
        """
        at = {id(m): i for i, m in enumerate(self.messages)}
        return {
            "version": _VERSION,
            "raw": self._raw,
            "system": self.system,
            "namespace": self.namespace,
            "tools": _copied(self.tools),
            "template_kwargs": _copied(self.template_kwargs),
            "messages": _copied(self.messages),
            "replies": [
                {
                    "message": at[id(r.message)],
                    "ids": list(r.ids),
                    "begun": list(r.begun),
                    "model": r.model,
                    "trusted": r.trusted,
                }
                for r in self._replies
                if id(r.message) in at and words_of(r.message) == r.said
            ],
            "pins": places(self.messages, self._pinned),
            "window": self._window.to_dict(self.messages),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Session:
        """The session that `to_dict` wrote down; OptionError for what it did not write."""
        if not isinstance(data, Mapping) or not {"version", "messages"} <= data.keys():
            raise OptionError("from_dict takes what Session.to_dict gave: a dict with 'version' and 'messages'")
        version = checked_int("the version of a saved session", data["version"], 1)
        if version > _VERSION:
            raise OptionError(f"the session was saved in version {version}; this one reads up to {_VERSION}: upgrade")
        data = _copied(dict(data))
        self = cls(data.get("system"), data.get("namespace"), data.get("tools"), data.get("template_kwargs"))
        self._raw = checked_bool("raw", data.get("raw", False))
        messages = checked_list("'messages'", data["messages"])
        self.messages = [check_message(m, f"message {i}") for i, m in enumerate(messages)]
        for i, reply in enumerate(checked_list("'replies'", data.get("replies", []))):
            self._replies.add(_checked_reply(reply, self.messages, f"reply {i}"))
        self._pinned = checked_places("'pins'", data.get("pins", []), self.messages)
        self._window = Window.from_dict(data.get("window", {}), self.messages)
        return self


def _copied(value: T) -> T:
    """A deep copy; OptionError for what is nested too deep for one."""
    try:
        return copy.deepcopy(value)
    except RecursionError:
        raise OptionError("a message, a tool or a variable is nested too deep to be copied") from None


def check_session(session: object) -> Session:
    """`session` if it is one, else OptionError."""
    if not isinstance(session, Session):
        raise OptionError(f"a Session is wanted, not {session!r}")
    return session


def _checked_reply(data: object, messages: Sequence[Message], where: str) -> SpokenReply:
    """A reply of a saved session, else OptionError naming `where`."""
    if not isinstance(data, Mapping):
        raise OptionError(f"{where} must be a dict, not {data!r}")
    at = checked_int(f"'message' of {where}", data.get("message"), 0, len(messages) - 1)
    text, thought = words_of(messages[at])
    return SpokenReply(
        messages[at],
        text,
        _checked_ids(data, "ids", where),
        checked_bool(f"'trusted' of {where}", data.get("trusted", False)),
        checked_text(f"'model' of {where}", data.get("model", "")),
        thought,
        _checked_ids(data, "begun", where),
    )


def _checked_ids(data: Mapping[str, Any], name: str, where: str) -> tuple[int, ...]:
    ids = checked_list(f"{name!r} of {where}", data.get(name, ()))
    return tuple(checked_int(f"an id of {where}", token, 0, 2**31 - 1) for token in ids)
