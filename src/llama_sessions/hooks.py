"""The user's hooks, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .errors import OptionError
from .session import Session
from .types import Message

NAMES = ("before_encode", "on_evict", "sink_fn", "on_progress")


class Hooks:
    """`before_encode(messages, session) -> messages?`, `on_evict(dropped, session) -> messages?`,
    `sink_fn(session) -> int`, `on_progress(done, total, session) -> bool?`."""

    def __init__(self) -> None:
        self._hooks: dict[str, Callable[..., Any]] = {}

    @staticmethod
    def _check(name: str) -> None:
        if name not in NAMES:
            raise OptionError(f"unknown hook {name!r}; known: {', '.join(NAMES)}")

    def set(self, name: str, fn: Callable[..., Any]) -> None:
        self._check(name)
        if not callable(fn):
            raise OptionError(f"the hook {name!r} must be callable, not {fn!r}; clear_hook removes one")
        self._hooks[name] = fn

    def clear(self, name: str) -> None:
        self._check(name)
        self._hooks.pop(name, None)

    def before_encode(self, messages: list[Message], session: Session) -> list[Message]:
        """What the template is to see. The hook gets copies; what it returns, or None for `messages` as they are."""
        hook = self._hooks.get("before_encode")
        if hook is None:
            return messages
        copies = [dict(m) for m in messages]
        changed = hook(list(copies), session)
        if changed is None:
            return messages
        if not isinstance(changed, list | tuple):
            raise OptionError(f"the before_encode hook must return a list of messages or None, not {changed!r}")
        # What comes back as it was is the original still: what is known beside its dict goes with it.
        originals = {id(copy): message for copy, message in zip(copies, messages, strict=True)}
        return [originals[id(m)] if id(m) in originals and originals[id(m)] == m else m for m in changed]

    def on_progress(self, done: int, total: int, session: Session) -> bool:
        """Whether to go on; only False itself says no."""
        hook = self._hooks.get("on_progress")
        return hook is None or hook(done, total, session) is not False

    @property
    def watches_progress(self) -> bool:
        return "on_progress" in self._hooks
