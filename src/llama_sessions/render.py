"""Messages to tokens: one render, control text apart from said text, replies with the ids they were sampled as.

llama.cpp splits text on control tokens first and tokenises the stretches in between on their own. So does this: each
stretch is tokenised once and kept, and what is left of a warm render is the template itself and a few lookups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from .errors import OptionError, TemplateError
from .kv.row import common_prefix
from .marks import Marker
from .messages import check_message
from .spans import ContentRange, Span, message_spans
from .spoken import SpokenReply
from .stretches import NO_TOKENS, TextStretch, split
from .tokenizing import StretchTokenizer, n_common
from .types import Formatter, Message, TokenArray, Vocab
from .writing import TemplateWriter


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt: (n,) int32 ids, what the template wrote, marks and all, and the stretches that was cut into.

    `replies`: what was known beside each message. `begun`: ids at its end which no stretch speaks of, those of a reply
    that goes on within its thinking, or right behind it.
    """

    tokens: TokenArray
    marked: str = ""
    stretches: Sequence[TextStretch] = ()
    replies: Sequence[SpokenReply | None] = ()
    begun: Sequence[int] = ()

    @property
    def text(self) -> str:
        """The plain text of the prompt, without `begun`. O(n)."""
        return "".join(text for stretch in self.stretches for text in (stretch.text, stretch.control_text))

    def tail(self, n: int) -> str:
        """The last `n` characters of `text`, or a few more."""
        found = ""
        for stretch in reversed(self.stretches):
            if len(found) >= n:
                break
            found = stretch.text + stretch.control_text + found
        return found

    @property
    def n_kept_replies(self) -> int:
        """Replies that have the ids they were sampled as."""
        return len({index for stretch in self.stretches for index in stretch.kept})


class Renderer:
    """Renders with one template and one vocabulary."""

    def __init__(
        self,
        formatter: Formatter,
        vocab: Vocab,
        *,
        no_think: bool = False,
        system_fallback: str | None = None,
        trusts_all: bool = False,
    ) -> None:
        """`trusts_all`: control-token text in whatever the user says is control."""
        self._vocab = vocab
        self._trusts_all = trusts_all
        self._marker = Marker(vocab.control)
        self._writer = TemplateWriter(formatter, self._marker, no_think=no_think, system_fallback=system_fallback)
        self._tokenizer = StretchTokenizer(vocab)
        self._control_arrays = {token: np.array([token], np.int32) for token in vocab.control.values()}
        self._tails: dict[str, list[int]] = {}

    def render(
        self,
        messages: Sequence[Message],
        replies: Sequence[SpokenReply | None] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        reply_header: bool = True,
        continue_last: bool = False,
        last: Rendered | None = None,
    ) -> Rendered:
        """The prompt for `messages`. `replies`: what is known beside each message (`Session.replies`).

        `continue_last`: it ends within the last message instead of with a reply header. `last`: an earlier prompt of
        this renderer; the stretches that both begin with are taken from it, so that a turn costs what is new in it
        (and the template). Raises OptionError for a message that is none, TemplateError where the template fails.
        """
        for i, message in enumerate(messages):
            check_message(message, f"message {i}")
        replies = replies if replies is not None else [None] * len(messages)
        trusted = {
            i
            for i, reply in enumerate(replies)
            if reply is not None and (reply.trusted or self._tokenizer.says_control(reply, self._marker))
        }
        if self._trusts_all:
            trusted |= {i for i, message in enumerate(messages) if message["role"] != "assistant"}
        begun: Sequence[int] = ()
        if continue_last and not messages[-1]["content"].strip():
            begun = self._begun(messages[-1], replies[-1])
            messages, continue_last = messages[:-1], False  # nothing of it was said yet: the reply header asks for it
        marked = self._writer.write(messages, trusted, tools, variables, reply_header and not continue_last)
        n_same = 0 if last is None else self._n_same(last, marked, replies)
        head = [] if last is None else list(last.stretches[:n_same])
        stretches = head + split(marked, self._marker, self._vocab, trusted, head[-1] if head else None)
        if continue_last:
            stretches = _open_ended(stretches, len(messages) - 1, messages[-1]["content"])
            n_same = min(n_same, len(stretches) - 1)
        before = NO_TOKENS if last is None or not n_same else last.tokens[: stretches[n_same - 1].n_tokens_until]
        tokens = self._assemble(before, stretches[n_same:], replies)
        if begun:
            tokens = np.concatenate([tokens, np.array(begun, np.int32)])
        return Rendered(tokens, marked, stretches, replies, begun)

    def _begun(self, message: Message, reply: SpokenReply | None) -> Sequence[int]:
        """The ids of a message that says nothing yet, but may have been thought about."""
        begun = () if reply is None else reply.begun
        if max(begun, default=0) >= self._vocab.n_tokens:  # a saved session may say anything
            begun = ()
        if not begun and message.get("reasoning_content"):
            raise OptionError(
                "the last message is nothing but reasoning_content, and the tokens it was thought in are not known "
                "(they are another model's, or it was edited or written by hand): continue_last cannot go on within "
                "it; take the message out and answer anew, as regenerate does"
            )
        return begun

    def _n_same(self, last: Rendered, marked: str, replies: Sequence[SpokenReply | None]) -> int:
        """Stretches of `last` that `marked` begins with too, tokens and all, up to one where it can be cut."""
        known = sum(1 for _ in takewhile(lambda pair: pair[0] is pair[1], zip(last.replies, replies, strict=False)))
        # A control token is the longest that fits, so what follows it has to be the same as well.
        n_chars = n_common(last.marked, marked) - self._marker.n_longest
        n_same = 0
        for i, stretch in enumerate(last.stretches):
            if stretch.end is None:
                continue
            if stretch.end > n_chars:
                break
            n_same = i + 1
        if known < len(last.replies):
            touched = (i for i in range(n_same) if any(region.index >= known for region in last.stretches[i].regions))
            n_same = next(touched, n_same)
            while n_same and last.stretches[n_same - 1].end is None:
                n_same -= 1
        return n_same

    def stem(
        self,
        system: str | None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> TokenArray:
        """The tokens that every conversation with this system text begins with.

        The longest common prefix of whole renders that differ in the first user message: rendering the system message
        alone gives wrong text on most templates. Several, as the first letters of a text may be one token with what
        stands before it.
        """
        head: list[Message] = [{"role": "system", "content": system}] if system else []
        first, *others = (
            self.render([*head, {"role": "user", "content": text}], tools=tools, variables=variables).tokens
            for text in ("A", "B", "hello", "the", "1")
        )
        return first[: min(common_prefix(first, other) for other in others)]

    def spans(self, rendered: Rendered, messages: Sequence[Message]) -> tuple[Span, ...]:
        """The tokens of each message, frame included; see `message_spans`."""
        contents = []
        for stretch in rendered.stretches:
            ends = self._tokenizer.token_at(stretch, [c for region in stretch.regions for c in (region.a, region.b)])
            for region, p0, p1 in zip(stretch.regions, ends[::2], ends[1::2], strict=True):
                contents.append(ContentRange(region.index, p0, p1))
        roles = [m["role"] for m in messages]
        for role in set(roles):
            self._learn_tail(role)
        return message_spans(contents, roles, self._tails, self._control_arrays.keys(), rendered.tokens.tolist())

    def _assemble(
        self, before: TokenArray, stretches: Sequence[TextStretch], replies: Sequence[SpokenReply | None]
    ) -> TokenArray:
        """The ids of the prompt: `before`, then those of `stretches`, which learn their own here."""
        arrays: list[TokenArray] = [before]
        n = len(before)
        for stretch in stretches:
            stretch.n_tokens_before = n
            stretch.tokens, stretch.kept = self._tokenizer.tokens(stretch, replies)
            if len(stretch.tokens):
                arrays.append(stretch.tokens)
                n += len(stretch.tokens)
            if stretch.control is not None:
                arrays.append(self._control_arrays[stretch.control])
                n += 1
        joined = np.concatenate(arrays)
        fixed = self._one_bos(joined)
        moved = len(fixed) - len(joined)
        if moved:
            for stretch in stretches:
                stretch.n_tokens_before = max(0, stretch.n_tokens_before + moved)
        if not len(fixed):
            raise TemplateError("the chat template rendered to nothing")
        return fixed

    def _one_bos(self, tokens: TokenArray) -> TokenArray:
        """Exactly one BOS where the vocabulary adds one, whether the template writes none, one or two."""
        if not self._vocab.adds_bos:
            return tokens
        bos = self._vocab.bos
        n = 0
        while n < len(tokens) and tokens[n] == bos:
            n += 1
        if n == 1:
            return tokens
        return np.concatenate([np.array([bos], np.int32), tokens[n:]])

    def _learn_tail(self, role: str) -> None:
        """Which tokens the template writes after a content of `role`, from a render that ends with one."""
        if role in self._tails:
            return
        user: Message = {"role": "user", "content": "A"}
        probe = {"user": [user], "assistant": [user, {"role": "assistant", "content": "A"}]}.get(role)
        if probe is None:
            return
        try:
            rendered = self.render(probe, reply_header=False)
        except TemplateError:
            return
        ends = [
            end
            for stretch in rendered.stretches
            for end in self._tokenizer.token_at(stretch, [r.b for r in stretch.regions if r.index == len(probe) - 1])
        ]
        if ends:
            self._tails[role] = rendered.tokens[ends[-1] :].tolist()


def _open_ended(stretches: list[TextStretch], index: int, content: str) -> list[TextStretch]:
    """The prompt up to the end of the content of message `index`, without what the template writes behind it."""
    for i in range(len(stretches) - 1, -1, -1):
        stretch = stretches[i]
        region = next((region for region in reversed(stretch.regions) if region.index == index), None)
        if region is not None:
            # White space at the end of a content stands outside its region, or was cut off by the template.
            text = stretch.text[: region.b] + content[len(content.rstrip()) :]
            regions = stretch.regions[: stretch.regions.index(region) + 1]
            return [*stretches[:i], TextStretch(text, regions, None)]
    raise TemplateError("the chat template does not write the last message, so there is nothing to continue")
