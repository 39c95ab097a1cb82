"""The user's hooks, by name."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any

from .errors import OptionError
from .messages import check_message
from .options import checked_int, function_name
from .session import Session
from .types import Message

NAMES = ("before_encode", "on_evict", "sink_fn", "on_progress")


def _asked(hook: Callable[..., Any], *args: object) -> Any:
    """What a hook says. A StopIteration of its own would end whoever iterates over a reply without a word: it becomes a
    RuntimeError, as in Python's generators."""
    try:
        return hook(*args)
    except StopIteration as e:
        raise RuntimeError(f"the hook {function_name(hook)} raised StopIteration") from e


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What an `on_evict` hook put in the place of messages that go. `said`: as these were then."""

    hook: Callable[..., Any]
    dropped: tuple[Message, ...]
    said: tuple[str, ...]
    messages: tuple[Message, ...]

    def is_to(self, dropped: Sequence[Message]) -> bool:
        """Whether it was asked for these very dicts, which say what they said then."""
        same = len(dropped) == len(self.dropped) and all(map(is_, dropped, self.dropped))
        return same and self.said == tuple(map(repr, dropped))


class Hooks:
    """`before_encode(messages, session) -> messages?`, `on_evict(dropped, session) -> messages?`,
    `sink_fn(session) -> int`, `on_progress(done, total, session) -> bool?`."""

    def __init__(self) -> None:
        self._hooks: dict[str, Callable[..., Any]] = {}
        self._evicting = threading.local()

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

    def before_encode(self, messages: list[Message], session: Session) -> list[tuple[Message, Message | None]]:
        """What the template is to see, each beside the one of `messages` it was, or None for what the hook put in.

        The hook gets copies. What comes back as it was is the original still: what is known beside its dict goes with
        it. A copy that was changed is a new message in the place of the old one.
        """
        hook = self._hooks.get("before_encode")
        if hook is None:
            return [(m, m) for m in messages]
        copies = [dict(m) for m in messages]
        changed = _asked(hook, list(copies), session)
        if changed is None:
            return [(m, m) for m in messages]
        if not isinstance(changed, list | tuple):
            raise OptionError(f"the before_encode hook must return a list of messages or None, not {changed!r}")
        originals = {id(copy): message for copy, message in zip(copies, messages, strict=True)}
        seen: list[tuple[Message, Message | None]] = []
        for message in changed:
            original = originals.pop(id(message), None)
            seen.append((message if original is None or original != message else original, original))
        return seen

    def n_sink(self, session: Session, default: int, most: int) -> int:
        """Tokens behind the system text that an eviction leaves in the row."""
        hook = self._hooks.get("sink_fn")
        return default if hook is None else checked_int("what the sink_fn hook returns", _asked(hook, session), 0, most)

    def on_evict(self, dropped: Sequence[Message], session: Session, known: Sequence[Answer] = ()) -> Answer:
        """What is to stand for the messages that go: what it is `known` to have answered, else what it answers now. The
        hook gets the session's own dicts."""
        hook = self._hooks["on_evict"]
        answer = next((a for a in known if a.hook is hook and a.is_to(dropped)), None)
        if answer is not None:
            return answer
        self._evicting.now = True
        try:
            replacements = _asked(hook, list(dropped), session)
        finally:
            self._evicting.now = False
        if replacements is None:
            replacements = ()
        if not isinstance(replacements, list | tuple):
            raise OptionError(f"the on_evict hook must return a list of messages or None, not {replacements!r}")
        checked = [dict(check_message(m, f"message {i} of the on_evict hook")) for i, m in enumerate(replacements)]
        return Answer(hook, tuple(dropped), tuple(map(repr, dropped)), tuple(checked))

    @property
    def watches_evictions(self) -> bool:
        """Not from within itself: where a summary is written by a session that grows too long, that would not end."""
        return "on_evict" in self._hooks and not getattr(self._evicting, "now", False)

    def on_progress(self, done: int, total: int, session: Session) -> bool:
        """Whether to go on; only False itself says no."""
        hook = self._hooks.get("on_progress")
        return hook is None or _asked(hook, done, total, session) is not False

    @property
    def watches_progress(self) -> bool:
        return "on_progress" in self._hooks
