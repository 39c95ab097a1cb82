"""Tool calls answered by Python functions: call, answer, go on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .errors import OptionError
from .session import Session

Functions = Mapping[str, Callable[..., Any]] | Iterable[Callable[..., Any]]


def checked_functions(functions: Functions) -> dict[str, Callable[..., Any]]:
    """Functions by name, else OptionError."""
    if isinstance(functions, Mapping):
        named = dict(functions)
    else:
        try:
            named = {function.__name__: function for function in functions}
        except (TypeError, AttributeError):
            raise OptionError(
                f"functions must be a dict of callables, or a list of functions, not {functions!r}"
            ) from None
    for name, function in named.items():
        if not isinstance(name, str) or not callable(function):
            raise OptionError(f"the function {name!r} must be callable, not {function!r}")
    return named


def answer_calls(
    session: Session, calls: Iterable[Mapping[str, Any]], functions: Mapping[str, Callable[..., Any]]
) -> None:
    """Run each call and add its result to the session. What goes wrong is a result too: the model is told."""
    for call in calls:
        name = call["function"]["name"]
        session.add_tool_result(_result_of(call, functions), call["id"], name)


def _result_of(call: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> str:
    name = call["function"]["name"]
    if name not in functions:
        return json.dumps({"error": f"there is no function {name!r}; there are: {', '.join(functions)}"})
    try:
        result = functions[name](**json.loads(call["function"]["arguments"]))
        text = result if isinstance(result, str) else json.dumps(result, default=str)
        return text.encode("utf-8", "replace").decode()
    except Exception as e:  # a function of the user's may raise anything; the model can try again
        return json.dumps({"error": f"{type(e).__name__}: {e}"})
