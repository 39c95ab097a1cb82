"""Messages through the template: what it may see of them, and what it writes, with marks in it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from .errors import OptionError, TemplateError
from .marks import Marker, Said
from .memo import Memo
from .messages import checked_tools, checked_variables
from .types import Formatter, Message

_RESERVED = frozenset({"self", "messages", "tools", "functions", "function_call", "tool_choice", "bos_token",
                       "eos_token", "add_generation_prompt", "reply_header", "raise_exception",
                       "strftime_now"})  # fmt: skip
_KEPT = 16 * 2**20  # characters of contents that are remembered
_PLAIN = {"role", "content"}  # checked, and handled apart


@dataclass(frozen=True, slots=True, eq=False)
class Shown:
    """A message as the template is to see it.

    `text` begins `start` characters into the content of message `index` (below 0: the system text stands before it);
    None: no content. `safe` is `text` with control text defused; `fields` are the message, defused but for its content.
    """

    fields: Message
    index: int
    start: int
    text: str | None
    safe: str | None

    @property
    def is_hot(self) -> bool:
        """Whether there is special-token text in it that must stay text."""
        return self.text != self.safe


class TemplateWriter:
    """One template. Control text in untrusted content never gets through it as control."""

    def __init__(
        self, formatter: Formatter, marker: Marker, *, no_think: bool = False, system_fallback: str | None = None
    ) -> None:
        self._formatter = formatter
        self._marker = marker
        self._variables: dict[str, Any] = {"enable_thinking": False} if no_think else {}
        self._system_fallback = system_fallback
        self._safe: Memo[tuple[bool, str], tuple[str, str]] = Memo(_KEPT, lambda key: len(key[1]) + 64)
        self._refuses_system: bool | None = None
        self._writes_objects: bool | None = None
        self._sees_marks = bool(getattr(formatter, "looks_at_written_text", False)) or self._probe_marks()

    def _shown(self, messages: Sequence[Message], trusted: Set[int]) -> list[Shown]:
        """What the template may see of the messages."""
        shown = []
        defuse_all = self._marker.defuse_all
        for i, message in enumerate(messages):
            fields = dict(message)
            if not message.keys() <= _PLAIN:
                fields = {
                    k if k in _PLAIN else defuse_all(k): v if k in _PLAIN else defuse_all(v) for k, v in message.items()
                }
            if fields.get("tool_calls"):
                fields["tool_calls"] = [self._shown_call(call) for call in fields["tool_calls"]]
            content = message.get("content")
            if content is None:
                shown.append(Shown(fields, i, 0, None, None))
                continue
            key = (i in trusted, content)
            texts = self._safe.get(key)
            if texts is None:
                unmarked = self._marker.without_marks(content)
                texts = self._safe.keep(key, (unmarked, unmarked if i in trusted else self._marker.defuse(content)))
            shown.append(Shown(fields, i, 0, *texts))
        return shown

    def _shown_call(self, call: Any) -> Any:
        """A tool call with its arguments as an object, where the template writes objects as JSON itself."""
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
            return call
        if self._writes_objects is None:
            self._writes_objects = self._probe_objects()
        try:
            arguments = json.loads(function["arguments"]) if self._writes_objects else None
        except (ValueError, RecursionError):
            arguments = None
        return call if arguments is None else {**call, "function": {**function, "arguments": arguments}}

    def _probe_objects(self) -> bool:
        """Whether the template writes a tool call's arguments right when they are an object, not JSON text."""
        function = {"name": "probe", "arguments": {"needle": "hay"}}
        call = {"id": "probe0123", "type": "function", "function": function}
        messages: list[Message] = [
            {"role": "user", "content": "A"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            return re.search(r'"needle": ?"hay"', self._formatter.render(messages, **self._variables)) is not None
        except TemplateError:
            return False

    def _fold_system(self, messages: list[Shown]) -> list[Shown]:
        """Where the template refuses a system message: into the first user message, if the user said so."""
        if not messages or messages[0].fields["role"] != "system" or not self._template_refuses_system():
            return messages
        if self._system_fallback != "user":
            raise TemplateError(
                "the chat template refuses the system role; pass system_fallback='user' to put the system text into "
                "the first user message, or use no system text"
            )
        system, *rest = messages
        first = next((i for i, m in enumerate(rest) if m.fields["role"] == "user"), None)
        if first is None:
            return [replace(system, fields={**system.fields, "role": "user"}), *rest]
        user = rest[first]
        text, safe = f"{system.text}\n\n{user.text}", f"{system.safe}\n\n{user.safe}"
        rest[first] = replace(user, start=-len(f"{system.text}\n\n"), text=text, safe=safe)
        return rest

    def write(
        self,
        messages: Sequence[Message],
        trusted: Set[int],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        reply_header: bool,
    ) -> str:
        """What the template writes, with marks in it. `trusted`: messages whose special-token text is control.

        One render is enough, unless there is special-token text that the template might look at, or it looks at text
        that it has put together. Then it is asked again without marks, and what it wrote is compared.
        """
        marker = self._marker
        shown = self._fold_system(self._shown(messages, trusted))

        def write(content: Callable[[Shown], str | None]) -> str:
            seen = [m.fields if m.text is None else {**m.fields, "content": content(m)} for m in shown]
            return self._format(seen, tools, variables, reply_header)

        def said(m: Shown) -> str:
            return Said(m.text or "", m.index, m.start, marker.without_control if m.is_hot else None)

        hot = {m.index for m in shown if m.is_hot}
        if not hot:
            written = write(said)
            if not self._sees_marks:
                return written
            without = write(lambda m: m.text)
            return written if marker.plain(written) == marker.plain(without) else without
        safe = write(lambda m: Said(m.safe or "", m.index, m.start))
        try:
            expected = marker.plain(write(lambda m: m.text))
            if marker.plain(safe) == expected:
                return safe
            written = write(said)
        except TemplateError:
            return safe  # it refuses such text as control; as text it may stand
        # What gets out some way that a `Said` does not see comes without marks, as control that `safe` does not have.
        leaks = not hot <= marker.messages(written) or marker.controls(written) != marker.controls(safe)
        if not leaks and marker.plain(written) == expected:
            return written
        without = write(lambda m: m.safe)
        return safe if marker.plain(safe) == marker.plain(without) else without

    def _template_refuses_system(self) -> bool:
        if self._refuses_system is None:
            user = {"role": "user", "content": "A"}
            try:
                self._formatter.render([{"role": "system", "content": "S"}, user], **self._variables)
                self._refuses_system = False
            except TemplateError:
                self._formatter.render([user], **self._variables)  # if this fails too, it is not about the system
                self._refuses_system = True
        return self._refuses_system

    def _format(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        reply_header: bool,
    ) -> str:
        variables = checked_variables(variables or {})
        clash = _RESERVED & set(variables)
        if clash:
            raise OptionError(f"template_kwargs must not set {', '.join(sorted(clash))}: the renderer does")
        given = {**self._variables, **variables}
        if tools is not None:
            given["tools"] = self._marker.defuse_all(checked_tools(tools))
        return self._formatter.render(messages, reply_header=reply_header, **given)

    def _probe_marks(self) -> bool:
        """Whether marks show in what this template writes."""
        messages: list[Message] = [
            {"role": "user", "content": " one\n"},
            {"role": "assistant", "content": "two "},
            {"role": "user", "content": "three"},
        ]
        marked = [{**m, "content": Said(m["content"], i)} for i, m in enumerate(messages)]
        try:
            plain = self._formatter.render(messages, **self._variables)
            return self._marker.plain(self._formatter.render(marked, **self._variables)) != plain
        except TemplateError:
            return False  # a template that fails on this says so at its first use
