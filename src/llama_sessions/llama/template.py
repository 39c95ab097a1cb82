"""A model's chat template, rendered by llama-cpp-python's own Jinja formatter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from ..errors import OptionError, TemplateError
from ..marks import MARKS, written_out
from ..types import Message

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


_ESCAPED_MARKS = {json.dumps(mark)[1:-1]: mark for mark in MARKS}


class _Formatter(Jinja2ChatFormatter):  # type: ignore[misc]
    @staticmethod
    def tojson(x: Any, ensure_ascii: bool = False, *args: Any, **options: Any) -> str:
        """As the base class has it, with marks left in."""
        written: str = Jinja2ChatFormatter.tojson(written_out(x), ensure_ascii, *args, **options)
        if ensure_ascii:
            for escaped, mark in _ESCAPED_MARKS.items():
                written = written.replace(escaped, mark)
        return written


class ChatTemplate:
    """`text` is Jinja source; `bos` and `eos` are the texts that it may write."""

    def __init__(self, text: str, *, bos: str = "", eos: str = "") -> None:
        self.text = text
        environment = jinja2.Environment(
            extensions=[Jinja2ChatFormatter.IgnoreGenerationTags, "jinja2.ext.loopcontrols"]
        )
        try:
            self.looks_at_written_text = _looks_again(environment.parse(text))
            self._formatters = {
                header: _Formatter(text, eos_token=eos, bos_token=bos, add_generation_prompt=header)
                for header in (True, False)
            }
        except jinja2.TemplateSyntaxError as e:
            raise TemplateError(
                f"the chat template does not parse, line {e.lineno}: {e.message}; pass chat_template=..."
            ) from e

    def render(self, messages: Sequence[Message], *, reply_header: bool = True, **variables: Any) -> str:
        """The text of a conversation; `reply_header`: with the header that asks for a reply."""
        tools = variables.pop("tools", None)
        try:
            response = self._formatters[reply_header](messages=list(messages), tools=tools, **variables)
        except OptionError:
            raise
        except Exception as e:  # a template is a program of somebody else's: it may raise anything
            raise TemplateError(f"the chat template failed on {len(messages)} messages: {type(e).__name__}: {e}") from e
        return str(response.prompt)


def _looks_again(node: nodes.Node, written: bool = False) -> bool:
    """Whether a template could look at text it has put together: keep it in a variable, strip it, compare it.

    `written`: the node's value goes straight into the prompt. Errs on the side of yes.
    """
    if isinstance(node, nodes.Macro | nodes.CallBlock | nodes.FilterBlock | nodes.AssignBlock):
        return True
    builds = isinstance(node, nodes.Concat) or (
        isinstance(node, nodes.Filter) and node.name in ("join", "format", "tojson")
    )
    if isinstance(node, nodes.Add | nodes.Mod):
        builds = not any(
            isinstance(side, nodes.Const) and isinstance(side.value, int) for side in (node.left, node.right)
        )
    if builds and not written:
        return True
    if isinstance(node, nodes.CondExpr):
        branches = [branch for branch in (node.expr1, node.expr2) if branch is not None]
        return _looks_again(node.test) or any(_looks_again(branch, written) for branch in branches)
    straight = builds or isinstance(node, nodes.Output)
    return any(_looks_again(child, straight) for child in node.iter_child_nodes())
