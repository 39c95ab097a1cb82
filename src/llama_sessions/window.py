"""What of a session's messages the model sees, once some had to go. The messages themselves stay where they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from operator import is_
from typing import Any

from .errors import OptionError
from .messages import check_message
from .options import checked_int, checked_list
from .types import Message

_STAND_INS = "replacements", "withdrawn"  # of what is saved: no messages of the session's


@dataclass(frozen=True, slots=True)
class Window:
    """What of a session's messages the model sees: all but those that are out.

    `out`: by identity (dicts of the session's list), in order of the list. `replacements`: what `on_evict` returned for
    them; they stand where the first of them stood. What `make_room` dropped, and no `on_evict` has been handed since:
    `unreported`, of `out`, and `withdrawn`, which were replacements.

    Never changed, only exchanged for another: an interrupt cannot leave half a window. A dict that was taken out of the
    list is held until the next one is made.
    """

    out: tuple[Message, ...] = ()
    replacements: tuple[Message, ...] = ()
    unreported: tuple[Message, ...] = ()
    withdrawn: tuple[Message, ...] = ()
    _ids: frozenset[int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ids", _ids(self.out))

    def __reduce__(self) -> tuple[type[Window], tuple[tuple[Message, ...], ...]]:
        """Copies and pickles know their own dicts."""
        return Window, (self.out, self.replacements, self.unreported, self.withdrawn)

    def hides(self, message: object) -> bool:
        """Whether a message, by identity, is out."""
        return id(message) in self._ids

    def seen(self, messages: Sequence[Message]) -> list[Message]:
        """The messages the model sees, a new list of the very dicts. Replacements go with the last they stand for.

        O(n), of which those that are out still stand where they did cost next to nothing.
        """
        ids = self._ids
        first = next((i for i, m in enumerate(messages) if id(m) in ids), None) if ids else None
        if first is None:
            return list(messages)
        same = list(map(is_, messages[first:], self.out))
        n = first + (same.index(False) if False in same else len(same))
        return [*messages[:first], *self.replacements, *(m for m in messages[n:] if id(m) not in ids)]

    def is_unheard(self, messages: Sequence[Message]) -> bool:
        """Whether an `on_evict` is still to be handed something: not what was deleted, or stood for that alone."""
        return bool(among(messages, self.unreported) or (self.withdrawn and among(messages, self.out)))

    def handed(self, messages: Sequence[Message], gone: Sequence[Message]) -> tuple[Message, ...]:
        """What an `on_evict` is to be handed when `gone` go: replacements, what it was not handed yet, and these; each
        once, and nothing that was deleted."""
        stand_ins = (*self.withdrawn, *self.replacements) if among(messages, self.out) else ()
        handed = (*stand_ins, *among(messages, self.unreported), *gone)
        return tuple({id(m): m for m in handed}.values())

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
        leaving = _ids(gone)
        unreported: list[Message] = []
        withdrawn: tuple[Message, ...] = ()
        if replacements is None:
            # Where all they stood for is deleted they go too, or they would come back in place of something else.
            stay = (self.replacements or self.withdrawn) and among(messages_list, self.out)
            before, withdrawn = (self.replacements, self.withdrawn) if stay else ((), ())
            replacements = [m for m in before if id(m) not in leaving]
            if reported:
                unreported = [m for m in self.unreported if id(m) not in leaving]
            else:
                withdrawn += tuple(m for m in before if id(m) in leaving)
                # What was out already goes as a replacement now: it had been reported.
                unreported = [*self.unreported, *(m for m in gone if not self.hides(m))]
        out = among(messages_list, [*self.out, *gone])
        if not out:
            return Window()
        return Window(out, tuple(replacements), among(messages_list, unreported), withdrawn)

    def copied(self, twins: Mapping[int, Message]) -> Window:
        """The same window over copies. `twins`: the copy of each message and replacement, by the original's id."""
        parts = (self.out, self.replacements, self.unreported, self.withdrawn)
        return Window(*(tuple(twins[id(m)] for m in part if id(m) in twins) for part in parts))

    def to_dict(self, messages: Sequence[Message]) -> dict[str, Any]:
        """As JSON-able data: messages by their indices in the session's list."""
        out = places(messages, self.out)
        kept = {name: copy.deepcopy(list(getattr(self, name))) if out else [] for name in _STAND_INS}
        return {"out": out, **kept, "unreported": places(messages, self.unreported)}

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
        stand_ins = [checked_list(f"{name!r} of the window", data.get(name, [])) for name in _STAND_INS]
        n = sum(map(len, stand_ins))
        if n and not out:
            raise OptionError(f"the window has {n} replacements for messages that are out, but none is")
        replacements, withdrawn = (
            tuple(check_message(m, f"replacement {i} of the window") for i, m in enumerate(some)) for some in stand_ins
        )
        return cls(out, replacements, unreported, withdrawn)


def among(messages: Sequence[Message], some: Sequence[Message]) -> tuple[Message, ...]:
    """Those of `messages` that are in `some`, by identity: in order, each once."""
    if not some:
        return ()
    wanted = _ids(some)
    found = list(compress(messages, map(wanted.__contains__, map(id, messages))))
    return tuple(dict(zip(map(id, found), found, strict=True)).values())


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


def _ids(messages: Sequence[Message]) -> frozenset[int]:
    return frozenset(map(id, messages))
