"""Messages to tokens: one render, control text apart from said text, replies with the ids they were sampled as.

llama.cpp splits text on control tokens first and tokenises the stretches in between on their own. So does this: each
stretch is tokenised once and kept, and what is left of a warm render is the template itself and a few lookups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .errors import TemplateError
from .kv.row import common_prefix
from .marks import Marker
from .session import SpokenReply, check_message
from .spans import ContentRange, Span, message_spans
from .stretches import TextStretch, split
from .tokenizing import StretchTokenizer
from .types import Formatter, Message, TokenArray, Vocab
from .writing import TemplateWriter


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt: (n,) int32 ids, its plain text, and the stretches it was made of."""

    tokens: TokenArray
    text: str
    stretches: tuple[TextStretch, ...]
    n_kept_replies: int


class Renderer:
    """Renders with one template and one vocabulary."""

    def __init__(
        self, formatter: Formatter, vocab: Vocab, *, no_think: bool = False, system_fallback: str | None = None
    ) -> None:
        self._vocab = vocab
        self._marker = Marker(vocab.control)
        self._writer = TemplateWriter(formatter, self._marker, no_think=no_think, system_fallback=system_fallback)
        self._tokenizer = StretchTokenizer(vocab)
        self._control_arrays = {token: np.array([token], np.int32) for token in vocab.control.values()}
        self._control_text = {token: text for text, token in vocab.control.items()}
        self._tails: dict[str, list[int]] = {}

    def render(
        self,
        messages: Sequence[Message],
        replies: Sequence[SpokenReply | None] | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
        reply_header: bool = True,
    ) -> Rendered:
        """The prompt for `messages`. `replies`: what is known beside each message (`Session.replies`).

        Raises OptionError for a message that is none, TemplateError where the template fails.
        """
        for i, message in enumerate(messages):
            check_message(message, f"message {i}")
        replies = replies if replies is not None else [None] * len(messages)
        trusted = {
            i
            for i, reply in enumerate(replies)
            if reply is not None and (reply.trusted or self._tokenizer.says_control(reply, self._marker))
        }
        marked = self._writer.write(messages, trusted, tools, variables, reply_header)
        return self._assemble(split(marked, self._marker, self._vocab, trusted), replies)

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
        return message_spans(contents, roles, self._tails, self._control_text.keys(), rendered.tokens.tolist())

    def _assemble(self, stretches: list[TextStretch], replies: Sequence[SpokenReply | None]) -> Rendered:
        arrays: list[TokenArray] = []
        texts: list[str] = []
        n = 0
        all_kept: set[int] = set()
        for stretch in stretches:
            stretch.n_tokens_before = n
            tokens, kept = self._tokenizer.tokens(stretch, replies)
            stretch.tokens = tokens
            all_kept |= kept
            texts.append(stretch.text)
            if len(tokens):
                arrays.append(tokens)
                n += len(tokens)
            if stretch.control is not None:
                arrays.append(self._control_arrays[stretch.control])
                texts.append(self._control_text[stretch.control])
                n += 1
        joined = np.concatenate(arrays) if arrays else np.empty(0, np.int32)
        fixed = self._one_bos(joined)
        moved = len(fixed) - len(joined)
        if moved:
            for stretch in stretches:
                stretch.n_tokens_before = max(0, stretch.n_tokens_before + moved)
        if not len(fixed):
            raise TemplateError("the chat template rendered to nothing")
        return Rendered(fixed, "".join(texts), tuple(stretches), len(all_kept))

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
