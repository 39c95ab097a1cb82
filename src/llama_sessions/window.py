"""What of a session's messages the model sees, once some had to go. The messages themselves stay where they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import OptionError
from .messages import check_message
from .options import checked_int, checked_list
from .types import Message


@dataclass(frozen=True, slots=True)
class Window:
    """What of a session's messages the model sees: all but those that are out.

    `out`: by identity (dicts of the session's list), in order of the list. `replacements`: what `on_evict` returned for
    them; they stand where the first of them stood. `unreported`: those of `out` that no `on_evict` has been handed yet
    (`make_room` dropped them).

    Never changed, only exchanged for another: an interrupt cannot leave half a window. A dict that was taken out of the
    list is held until the next one is made.
    """

    out: tuple[Message, ...] = ()
    replacements: tuple[Message, ...] = ()
    unreported: tuple[Message, ...] = ()

    def seen(self, messages: Sequence[Message]) -> list[Message]:
        """The messages the model sees, a new list of the very dicts. Replacements go with the last they stand for."""
        out = _ids(self.out)
        shown: list[Message] = []
        stand_in = self.replacements
        for message in messages:
            if id(message) not in out:
                shown.append(message)
            else:
                shown.extend(stand_in)
                stand_in = ()
        return shown

    def without(
        self,
        messages_list: Sequence[Message],
        gone: Sequence[Message],
        *,
        reported: bool,
        replacements: Sequence[Message] | None = None,
    ) -> Window:
        """The window over the session's list from which `gone`, its messages or earlier replacements, are out as well.

        `reported`: an `on_evict` has been handed them. `replacements`: what it returned, in place of all earlier ones;
        with that, nothing is unreported any more. What the list does not hold any more is forgotten.
        """
        was_out, leaving = _ids(self.out), _ids(gone)
        unreported: list[Message] = []
        if replacements is None:
            # Where all they stood for is deleted they go too, or they would come back in place of something else.
            stay = self.replacements and among(messages_list, self.out)
            replacements = [m for m in self.replacements if id(m) not in leaving] if stay else []
            if reported:
                unreported = [m for m in self.unreported if id(m) not in leaving]
            else:  # what was out already goes as a replacement now: it had been reported
                unreported = [*self.unreported, *(m for m in gone if id(m) not in was_out)]
        out = among(messages_list, [*self.out, *gone])
        return Window(out, tuple(replacements) if out else (), among(messages_list, unreported))

    def copied(self, twins: Mapping[int, Message]) -> Window:
        """The same window over copies. `twins`: the copy of each message and replacement, by the original's id."""
        parts = (self.out, self.replacements, self.unreported)
        return Window(*(tuple(twins[id(m)] for m in part if id(m) in twins) for part in parts))

    def to_dict(self, messages: Sequence[Message]) -> dict[str, Any]:
        """As JSON-able data: messages by their indices in the session's list."""
        out = places(messages, self.out)
        replacements = copy.deepcopy(list(self.replacements)) if out else []
        return {"out": out, "replacements": replacements, "unreported": places(messages, self.unreported)}

    @classmethod
    def from_dict(cls, data: object, messages: Sequence[Message]) -> Window:
        """The window over `messages` that `to_dict` wrote down; OptionError for what it did not write."""
        if not isinstance(data, Mapping):
            raise OptionError(f"'window' must be a dict, not {type(data).__name__}")
        out = checked_places("'out' of the window", data.get("out", []), messages)
        unreported = checked_places("'unreported' of the window", data.get("unreported", []), messages)
        strays = set(places(messages, unreported)) - set(places(messages, out))
        if strays:
            raise OptionError(f"'unreported' of the window has message {min(strays)}, which is not in its 'out'")
        replacements = checked_list("'replacements' of the window", data.get("replacements", []))
        if replacements and not out:
            raise OptionError(f"the window has {len(replacements)} replacements for messages that are out, but none is")
        checked = tuple(check_message(m, f"replacement {i} of the window") for i, m in enumerate(replacements))
        return cls(out, checked, unreported)


def among(messages: Sequence[Message], some: Sequence[Message]) -> tuple[Message, ...]:
    """Those of `messages` that are in `some`, by identity: in order, each once."""
    if not some:
        return ()
    wanted = _ids(some)
    return tuple({id(m): m for m in messages if id(m) in wanted}.values())


def places(messages: Sequence[Message], some: Sequence[Message]) -> list[int]:
    """Where in `messages` those in `some` stand, by identity; all places of one that stands there twice, since what is
    read again is two."""
    wanted = _ids(some)
    return [i for i, message in enumerate(messages) if id(message) in wanted]


def checked_places(where: str, data: object, messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages that stand at the places which `places` wrote down, else OptionError naming `where`."""
    named = checked_list(where, data)
    if named and not messages:
        raise OptionError(f"{where} has {len(named)} indices of messages, but there are no messages")
    return among(messages, [messages[checked_int(f"an index in {where}", i, 0, len(messages) - 1)] for i in named])


def _ids(messages: Sequence[Message]) -> set[int]:
    return {id(message) for message in messages}
