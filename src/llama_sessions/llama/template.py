"""A model's chat template, rendered by llama-cpp-python's own Jinja formatter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jinja2
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from ..errors import OptionError, TemplateError
from ..types import Message

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'"
    " }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ChatTemplate:
    """`text` is Jinja source; `bos` and `eos` are the texts that it may write."""

    def __init__(self, text: str, *, bos: str = "", eos: str = "") -> None:
        self.text = text
        try:
            self._formatters = {
                header: Jinja2ChatFormatter(text, eos_token=eos, bos_token=bos, add_generation_prompt=header)
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
