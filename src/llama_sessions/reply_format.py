"""How a model writes its thinking and its tool calls, as far as its chat template tells."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from .errors import OptionError
from .options import checked_text


class ToolFormat(str, Enum):
    """How tool calls are written; `call_reader` has the grammars. Each one's `opener` is the text that begins it."""

    HERMES = "hermes"  # <tool_call>{"name": ..., "arguments": {...}}</tool_call>; Qwen too
    MISTRAL = "mistral"  # [TOOL_CALLS][{"name": ..., "arguments": {...}}], or [TOOL_CALLS]name[ARGS]{...}
    LLAMA3 = "llama3"  # the whole reply: {"name": ..., "parameters": {...}}, perhaps behind <|python_tag|>

    @property
    def opener(self) -> str:
        return _OPENERS[self]


_OPENERS = {
    ToolFormat.HERMES: "<tool_call>",
    ToolFormat.MISTRAL: "[TOOL_CALLS]",
    ToolFormat.LLAMA3: "<|python_tag|>",
}

_TAG = re.compile(r"(?P<left><\|?|\[|◁)/?(?P<name>(?:\w+:)?\w+)(?P<right>\|?>|\]|▷)")
_THINKING = frozenset({"think", "thinking", "thought", "thoughts", "reasoning"})

# A key in JSON that a template shows or writes, not one that it looks up.
_PARAMETERS_KEY = re.compile(r'\\?"parameters\\?"\s*:')


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplyFormat:
    """The tags around a model's thinking, and the formats in which its tool calls are understood."""

    think_open: str = "<think>"
    think_close: str = "</think>"
    tool_formats: tuple[ToolFormat, ...] = tuple(ToolFormat)

    def __post_init__(self) -> None:
        for name in ("think_open", "think_close"):
            tag = checked_text(name, getattr(self, name))
            if not tag or tag != tag.strip():
                raise OptionError(f"{name} must be a tag without white space around it, not {tag!r}")
        if self.think_open == self.think_close:
            raise OptionError(f"think_open and think_close must differ, both are {self.think_open!r}")
        for tool_format in self.tool_formats:
            if not isinstance(tool_format, ToolFormat):
                raise OptionError(f"tool_formats must be of {', '.join(map(str, ToolFormat))}, not {tool_format!r}")

    @classmethod
    def of(cls, template_source: str) -> ReplyFormat:
        """Read from the Jinja source of a chat template. Where it does not tell: `<think>`, and any tool format."""
        tools = tuple(known for known in ToolFormat if known.opener in template_source)
        if not tools and _PARAMETERS_KEY.search(template_source):
            tools = (ToolFormat.LLAMA3,)
        pairs = list(dict.fromkeys(_thinking_tags(template_source)))
        # A template that only cuts old thinking away names the closing tag alone.
        pairs.sort(key=lambda pair: not (pair[0] in template_source and pair[1] in template_source))
        think_open, think_close = pairs[0] if pairs else (cls().think_open, cls().think_close)
        return cls(think_open=think_open, think_close=think_close, tool_formats=tools or tuple(ToolFormat))

    def starts_thinking(self, prompt_text: str) -> bool:
        """Whether a rendered prompt ends inside the thinking: its last tag opens it, with only white space behind.

        A header that opens and closes it at once (Qwen3 told not to think) ends outside. What stands further up is of
        other messages and does not count.
        """
        return prompt_text.rstrip().endswith(self.think_open)


def _thinking_tags(source: str) -> Iterator[tuple[str, str]]:
    """Pairs of tags of which the source names one or both, in the order of what it names.

    A pair differs by a slash (`<think>`, `[/THINK]`, `<seed:think>`) or by a word (`<|START_THINKING|>`).
    """
    for tag in _TAG.finditer(source):
        left, name, right = tag["left"], tag["name"], tag["right"]
        words = name.rpartition(":")[2].split("_")
        edges = [word for word in words if word.lower() in ("start", "begin", "end")]
        subjects = [word.lower() for word in words if word not in edges and word.lower() != "of"]
        if len(subjects) != 1 or subjects[0] not in _THINKING:
            continue
        if edges:
            edge = edges[0]
            begin, start, end = (w.upper() if edge.isupper() else w for w in ("begin", "start", "end"))
            for first in (edge,) if edge != end else (start, begin):
                yield left + name.replace(edge, first) + right, left + name.replace(edge, end) + right
            continue
        pair = f"{left}{name}{right}", f"{left}/{name}{right}"
        # `m[thinking]` is a look-up, and `<|think|>` alone asks for thinking in a system text.
        if left in ("<", "◁") or (left == "[" and name.isupper()) or (pair[0] in source and pair[1] in source):
            yield pair
