"""What messages, tool definitions and template variables must be, checked at the door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .errors import OptionError
from .options import checked_text
from .types import ROLES, Message


def role_of(message: object) -> str:
    """The role of what may be a message; "" where there is none."""
    role = message.get("role") if isinstance(message, dict) else None
    return role if isinstance(role, str) else ""


def check_message(message: object, where: str) -> Message:
    """An OpenAI-style message dict with a known role and text content, else OptionError naming `where`."""
    if not isinstance(message, dict):
        raise OptionError(f"{where} must be a dict with 'role' and 'content', not {type(message).__name__}")
    role = role_of(message)
    if role not in ROLES:
        raise OptionError(f"{where} has the role {message.get('role')!r}; known roles: {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list | tuple) and all(_is_call(call) for call in calls)):
        raise OptionError(f"the tool_calls of {where} must be a list of OpenAI tool calls, not {calls!r}")
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        return message
    checked_text(f"the content of {where}", content)
    return message


def _is_call(call: object) -> bool:
    """Whether it is a tool call in OpenAI's form, as far as anything here looks at it."""
    function = call.get("function") if isinstance(call, Mapping) else None
    return isinstance(function, Mapping) and isinstance(call.get("id", ""), str)  # type: ignore[attr-defined]


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
