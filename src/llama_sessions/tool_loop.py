"""Tool calls answered by Python functions: call, answer, go on."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
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
            pairs = [(function.__name__, function) for function in functions]
        except (TypeError, AttributeError):
            raise OptionError(
                f"functions must be a dict of callables, or a list of functions, not {functions!r}"
            ) from None
        named = dict(pairs)
        if len(named) < len(pairs):
            names = ", ".join(name for name, _ in pairs)
            raise OptionError(f"two functions have one name ({names}); pass a dict with the names the model knows")
    for name, function in named.items():
        if not isinstance(name, str) or not callable(function):
            raise OptionError(f"the function {name!r} must be callable, not {function!r}")
        if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
            raise OptionError(f"the function {name!r} is async, and nobody awaits it here; pass one that returns")
    return named


def answer_calls(
    session: Session, calls: Iterable[Mapping[str, Any]], functions: Mapping[str, Callable[..., Any]]
) -> None:
    """Run each call and add its result to the session. What goes wrong is a result too: the model is told.

    What ends this early (an interrupt, an exit) is raised again; no call is left without a result then.
    """
    calls = list(calls)
    try:
        for call in calls:
            _add_result(session, call, _result_of(call, functions))
    except BaseException as e:
        known = [message for message in session.messages if isinstance(message, dict)]
        answered = {message.get("tool_call_id") for message in known if message.get("role") == "tool"}
        for call in calls:
            if call["id"] not in answered:
                with suppress(OptionError):  # a function that took the call out of the session
                    _add_result(session, call, _error(f"not finished: interrupted by {type(e).__name__}"))
        raise


def _add_result(session: Session, call: Mapping[str, Any], result: str) -> None:
    session.add_tool_result(result, call["id"], call["function"]["name"])


def _error(text: str) -> str:
    return json.dumps({"error": text})


def _result_of(call: Mapping[str, Any], functions: Mapping[str, Callable[..., Any]]) -> str:
    name = call["function"]["name"]
    if name not in functions:
        return _error(f"there is no function {name!r}; there are: {', '.join(functions)}")
    try:
        result = functions[name](**json.loads(call["function"]["arguments"]))
        text = result if isinstance(result, str) else json.dumps(result, default=str)
        return text.encode("utf-8", "replace").decode()
    except Exception as e:  # a function of the user's may raise anything; the model can try again
        return _error(f"{type(e).__name__}: {e}")
