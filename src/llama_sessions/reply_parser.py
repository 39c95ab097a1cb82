"""A reply taken apart while it streams: what is said, what is thought, which tools are called.

Nothing the model wrote is lost. What may be the start of a tag waits until that is decided, a call until it is whole;
what turns out to be no call is content, tags and all. Not shown are tags, and the white space directly around them;
where a call stands between two texts, the white space before it (or else behind it) keeps them apart.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from .errors import StateError
from .json_scan import SPACE
from .reply_format import ReplyFormat, ToolFormat
from .stops import StopFilter, n_begun

if TYPE_CHECKING:
    from .call_reader import CallReader, ToolCallDelta

Kind: TypeAlias = Literal["content", "thinking", "tool_call"]

_ID_ALPHABET = string.ascii_letters + string.digits


@dataclass(slots=True)  # not frozen, for the same reason as `Run`
class Part:
    """A stretch of a reply: `text` of one kind, or (`kind` "tool_call", no text) news of a tool call."""

    kind: Kind
    text: str = ""
    tool_call: ToolCallDelta | None = None


class ReplyParser:
    """Feed it text, cut anywhere; it gives out parts as soon as they are certain.

    `reply_format` None: nothing is marked in it, all is content. `tools`: whether calls are looked for; else they are
    content. `thinking_open`: the prompt ends inside the thinking (`ReplyFormat.starts_thinking`). `stops`: texts at
    which it ends, looked for in all that stands behind the thinking and the white space there. `id_seed`: the same seed
    draws the same ids of calls, so use another for every reply; None draws random ones. The cost in all is linear in
    the reply's length.

    Thinking stands at the start of a reply only. Calls of Llama 3 are the whole reply (behind the thinking), others
    may stand anywhere behind the thinking. `tool_calls`: those that are whole, in OpenAI's form; before the final push
    all of `content`, `thinking` and `tool_calls` are what is certain so far.
    """

    def __init__(
        self,
        reply_format: ReplyFormat | None,
        *,
        tools: bool,
        thinking_open: bool = False,
        stops: Sequence[str] = (),
        id_seed: int | None = None,
    ) -> None:
        self.tool_calls: list[dict[str, Any]] = []
        self._format = ReplyFormat(tool_formats=()) if reply_format is None else reply_format
        self._thinking_open = thinking_open
        formats = self._format.tool_formats if tools else ()
        self._openers = {known.opener: known for known in formats if known is not ToolFormat.LLAMA3}
        self._opener = re.compile("|".join(map(re.escape, self._openers))) if self._openers else None
        self._whole_reply_calls = ToolFormat.LLAMA3 in formats
        # Mistral's templates refuse ids that are not nine letters or digits; others take any.
        self._random: random.Random = random.SystemRandom() if id_seed is None else random.Random(id_seed)

        # "start", "thinking" and the "gap" behind it; then "head" (of what is said), "content", "call"
        self._state = "start" if reply_format is not None else "content"
        self._stops = StopFilter(stops)
        self._stops_count = reply_format is None  # from here on
        self.has_thought = False  # whether a thinking was begun
        self._reader: CallReader | None = None
        self._text, self._at, self._final = "", 0, False
        self._over = False
        # White space that is shown if text follows; around a tag only between two texts of one kind.
        self._space: list[str] = []
        self._at_tag = False
        self._takes_space = True
        self._said: dict[Kind, list[str]] = {"content": [], "thinking": []}
        self._parts: list[Part] = []
        self._run: list[str] = []
        self._run_kind: Kind = "content"

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next is thought: a tag, or the prompt, has opened the thinking."""
        return self._state == "thinking" or (self._state == "start" and self._thinking_open)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found. Nothing behind it counts."""
        return self._stops.stopped

    @property
    def n_closed(self) -> int:
        """While it is thinking: characters of the tag that closes it which are there already."""
        return n_begun(self._text, self._at, (self._format.think_close,))

    def said_behind(self, text: str) -> str:
        """While it is thinking: what would be said behind it, if `text` came next."""
        return (self._text[self._at :] + text).partition(self._format.think_close)[2].strip(SPACE)

    @property
    def content(self) -> str:
        """What was said. Costs its length."""
        return "".join(self._said["content"])

    @property
    def thinking(self) -> str:
        """What was thought. Costs its length."""
        return "".join(self._said["thinking"])

    def push(self, text: str, final: bool = False) -> list[Part]:
        """What `text` makes certain. `final`: nothing will follow, so nothing is held back.

        Raises StateError for text behind the final one.
        """
        if self._over:
            if text:
                raise StateError(f"the reply has ended; {len(text)} characters came behind its final text")
            return []
        if self._stops_count:
            text = self._stops.push(text, final=final)
        if self._state == "content" and self._opener is None and not self._at_tag and not self._space:
            # Nothing can follow but content: a token of a plain reply passes through.
            self._over = final
            self._text, self._at = "", 0
            if not text:
                return []
            self._said["content"].append(text)
            return [Part("content", text)]
        self._text, self._at, self._final, self._over = self._text[self._at :] + text, 0, final, final
        steps = {
            "start": self._read_start,
            "thinking": self._read_thinking,
            "gap": self._read_gap,
            "head": self._read_head,
            "content": self._read_content,
            "call": self._read_call,
        }
        while steps[self._state]():
            pass
        self._end_run()
        parts, self._parts = self._parts, []
        return parts

    # -- states: each reads on from `_at` and says whether another has to

    def _read_start(self) -> bool:
        """White space, then perhaps the tag that opens the thinking."""
        self._skip_space()
        found = self._stands_here(self._format.think_open)
        if found is None:
            return False
        if found:
            self._at += len(self._format.think_open)
        if found or self._thinking_open:
            self._pass_tag()
            self._state, self.has_thought = "thinking", True
        else:
            self._begin_answer("".join(self._space))
            self._space.clear()
        return True

    def _read_thinking(self) -> bool:
        close = self._format.think_close
        end = self._text.find(close, self._at)
        if end < 0:
            self._say_rest("thinking", (close,))
            return False
        self._say("thinking", end)
        self._at = end + len(close)
        self._pass_tag()
        self._state = "gap"
        return True

    def _read_gap(self) -> bool:
        """White space behind the thinking, which is never shown."""
        self._skip_space()
        if self._at == len(self._text):
            return False
        self._begin_answer("")
        return True

    def _begin_answer(self, space: str) -> None:
        """Stop strings count from here on, `space` before it included."""
        self._stops_count = True
        rest = space + self._text[self._at :]
        self._text, self._at = self._stops.push(rest, final=self._final), 0
        self._state = "head"

    def _read_head(self) -> bool:
        """White space, then perhaps calls that are the whole reply."""
        self._skip_space()
        self._state = "content"
        if not self._whole_reply_calls:
            return True
        tag = ToolFormat.LLAMA3.opener
        found = self._stands_here(tag)
        if found is None:
            self._state = "head"
            return False
        if found or self._text.startswith("{", self._at):
            self._begin_call(ToolFormat.LLAMA3, tag if found else "")
        return True

    def _read_content(self) -> bool:
        found = self._opener.search(self._text, self._at) if self._opener else None
        if found is None:
            self._say_rest("content", tuple(self._openers))
            return False
        self._say("content", found.start())
        self._begin_call(self._openers[found[0]], found[0])
        return True

    def _read_call(self) -> bool:
        reader = self._reader
        assert reader is not None
        self._at = reader.push(self._text, self._at, final=self._final)
        deltas = reader.take_deltas()
        if deltas:
            self._end_run()
        self._parts += [Part("tool_call", tool_call=delta) for delta in deltas]
        if reader.outcome is None:
            return False
        self._state = "content"
        if reader.outcome:
            self.tool_calls += reader.tool_calls
            self._pass_tag()
        else:
            self._take_back(reader.raw)
        self._reader = None
        return True

    # -- tags

    def _stands_here(self, tag: str) -> bool | None:
        """Whether `tag` comes next; None: what is there may still become it."""
        if self._text.startswith(tag, self._at):
            return True
        rest = self._text[self._at : self._at + len(tag)]
        return None if not self._final and tag.startswith(rest) else False

    def _pass_tag(self) -> None:
        """White space behind a tag counts only where none stands before it."""
        self._at_tag = True
        self._takes_space = not self._space

    def _begin_call(self, tool_format: ToolFormat, opener: str) -> None:
        from .call_reader import CallReader  # here: most replies call nothing, and reading it takes import time

        self._at += len(opener)
        self._reader = CallReader(tool_format, opener, len(self.tool_calls), self._new_id)
        self._state = "call"

    def _new_id(self) -> str:
        return "".join(self._random.choices(_ID_ALPHABET, k=9))

    def _take_back(self, raw: str) -> None:
        """What was taken for a call is content, but its last characters may begin a tag: those are read again."""
        n_again = n_begun(raw, 0, tuple(self._openers))
        self._add("content", raw[: len(raw) - n_again])
        if n_again <= self._at:
            self._at -= n_again
        else:  # they came with an earlier push
            self._text, self._at = raw[len(raw) - n_again :] + self._text[self._at :], 0

    # -- text

    def _skip_space(self) -> None:
        start = self._at
        while self._at < len(self._text) and self._text[self._at] in SPACE:
            self._at += 1
        self._hold_space(self._text[start : self._at])

    def _hold_space(self, space: str) -> None:
        if space and self._takes_space:
            self._space.append(space)

    def _say(self, kind: Kind, end: int) -> None:
        """The text up to `end` is of this kind."""
        self._add(kind, self._text[self._at : end])
        self._at = end

    def _say_rest(self, kind: Kind, tags: Sequence[str]) -> None:
        """All there is is of this kind, but for what one of `tags` may begin with."""
        n_held = 0 if self._final else n_begun(self._text, self._at, tags)
        self._say(kind, len(self._text) - n_held)
        if (self._final or not tags) and not self._at_tag:
            self._put(kind, "".join(self._space))
            self._space.clear()

    def _add(self, kind: Kind, text: str) -> None:
        """Show `text`, and the white space before it; the white space at its end waits."""
        body = text.lstrip(SPACE)
        self._hold_space(text[: len(text) - len(body)])
        if not body:
            return
        if self._said[kind] or not self._at_tag:
            self._put(kind, "".join(self._space))
        shown = body.rstrip(SPACE)
        self._put(kind, shown)
        self._space.clear()
        self._at_tag, self._takes_space = False, True
        self._hold_space(body[len(shown) :])

    def _put(self, kind: Kind, text: str) -> None:
        if not text:
            return
        if kind != self._run_kind:
            self._end_run()
            self._run_kind = kind
        self._run.append(text)
        self._said[kind].append(text)

    def _end_run(self) -> None:
        if self._run:
            self._parts.append(Part(self._run_kind, "".join(self._run)))
            self._run = []


def of_one_kind(parts: list[Part]) -> list[Part]:
    """Texts of the same kind that follow each other put together."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if last is not None and last.kind == part.kind and part.tool_call is None and last.tool_call is None:
            joined[-1] = Part(part.kind, last.text + part.text)
        else:
            joined.append(part)
    return joined
