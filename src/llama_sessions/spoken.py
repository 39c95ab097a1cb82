"""What is known about replies beside their messages: the ids they were sampled as, and whether they are trusted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from .types import Message


@dataclass(frozen=True, slots=True, eq=False)
class SpokenReply:
    """What is known about an assistant message beside its dict: the ids that spelled it, or that it is trusted.

    `ids` empty: no ids are known. `model`: the fingerprint of the model whose ids they are. `trusted`: special-token
    text in it is control, not text. `thought`: of a reply without text. `begun`: all ids of one that ended in its
    thinking, or right behind it, to go on with.
    """

    message: Message
    text: str
    ids: tuple[int, ...] = ()
    trusted: bool = False
    model: str = ""
    thought: str = ""
    begun: tuple[int, ...] = ()

    @property
    def said(self) -> tuple[str, str]:
        """What a message has to say for it to be this one: see `words_of`."""
        return self.text, self.thought


class SpokenReplies:
    """Replies, one a message, found by its dict, or by what they say. Neither is asked of all of them each time."""

    def __init__(self, replies: Iterable[SpokenReply] = ()) -> None:
        self._by_dict: dict[int, SpokenReply] = {}  # by the `id` of a message that is held
        self._by_said: dict[tuple[str, str], SpokenReply] = {}
        for reply in replies:
            self.add(reply)

    def __reduce__(self) -> tuple[type[SpokenReplies], tuple[list[SpokenReply]]]:
        """Copies and pickles know their own dicts."""
        return SpokenReplies, (list(self),)

    def __iter__(self) -> Iterator[SpokenReply]:
        return iter(self._by_dict.values())

    def __len__(self) -> int:
        return len(self._by_dict)

    def add(self, reply: SpokenReply) -> None:
        """What is known about one more message."""
        self._by_dict[id(reply.message)] = reply
        if not reply.trusted and any(reply.said):
            self._by_said[reply.said] = reply

    def of(self, message: object) -> SpokenReply | None:
        """What is known beside an assistant's message: by its dict, else by its text (it may be a copy). Trust goes
        with the dict alone: another's text may be the same."""
        if not self._by_dict or not isinstance(message, dict) or message.get("role") != "assistant":
            return None
        said = words_of(message)
        reply = self._by_dict.get(id(message))
        return reply if reply is not None and reply.said == said else self._by_said.get(said)


def words_of(message: Message) -> tuple[str, str]:
    """What tells a reply from others: its text, or where it has none what it thought."""
    text = message.get("content")
    thought = "" if text else message.get("reasoning_content")
    return text if isinstance(text, str) else "", thought if isinstance(thought, str) else ""
