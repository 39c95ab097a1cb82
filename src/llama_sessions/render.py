"""Messages to tokens: one render, control text apart from said text, replies with the ids they were sampled as.

llama.cpp splits text on control tokens first and tokenises the stretches in between on their own. So does this: each
stretch is tokenised once and kept, and what is left of a warm render is the template itself and a few lookups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from .errors import OptionError, TemplateError
from .kv.row import common_prefix
from .marks import Marker, Said
from .session import SpokenReply, check_message
from .spans import ContentRange, Span, message_spans
from .types import Formatter, Message, TokenArray, Vocab

K = TypeVar("K")
V = TypeVar("V")

_WHITE = " \t\n\v\f\r"  # C's isspace: what a control token with lstrip or rstrip swallows
_RESERVED = frozenset({"messages", "tools", "functions", "function_call", "tool_choice", "add_generation_prompt",
                       "reply_header", "bos_token", "eos_token", "raise_exception", "strftime_now"})  # fmt: skip


class Memo(dict[K, V], Generic[K, V]):
    """A dict that forgets its older half when it outgrows `limit` entries."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    def __setitem__(self, key: K, value: V) -> None:
        if len(self) >= self.limit:
            for old in list(self)[: self.limit // 2]:
                del self[old]
        super().__setitem__(key, value)


@dataclass(frozen=True, slots=True)
class Region:
    """Characters `[a, b)` of a stretch come from message `index`, `start` characters into its content."""

    index: int
    start: int
    a: int
    b: int


@dataclass(slots=True)
class TextStretch:
    """Text between two control tokens; `control` is the one that ends it (None: the end of the prompt)."""

    text: str
    regions: list[Region]
    control: int | None
    n_tokens_before: int = 0
    tokens: TokenArray = field(default_factory=lambda: np.empty(0, np.int32))


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt: (n,) int32 ids, its plain text, and the stretches it was made of."""

    tokens: TokenArray
    text: str
    stretches: tuple[TextStretch, ...]
    n_kept_replies: int


class Renderer:
    """Renders with one template and one vocabulary; remembers the tokens of stretches it has seen."""

    def __init__(
        self, formatter: Formatter, vocab: Vocab, *, no_think: bool = False, system_fallback: str | None = None
    ) -> None:
        self._formatter = formatter
        self._vocab = vocab
        self._variables: dict[str, Any] = {"enable_thinking": False} if no_think else {}
        self._system_fallback = system_fallback
        self._marker = Marker(vocab.control)
        self._control_arrays = {token: np.array([token], np.int32) for token in vocab.control.values()}
        self._control_text = {token: text for text, token in vocab.control.items()}
        self._tokens: Memo[str, TokenArray] = Memo(16384)
        self._safe: Memo[tuple[bool, str], str] = Memo(16384)
        self._spelled: Memo[SpokenReply, tuple[TokenArray, list[int]] | None] = Memo(4096)
        self._tails: dict[str, int] = {}
        self._refuses_system: bool | None = None
        self.tracks = self._probe_marks()

    # -- the public questions

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
        safe = self._fold_system(self._safe_messages(messages, replies))
        marked = self._format(safe, tools, variables, reply_header)
        stretches = self._split(marked)
        return self._assemble(stretches, replies)

    def stem(
        self,
        system: str | None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> TokenArray:
        """The tokens that every conversation with this system text begins with.

        The longest common prefix of two whole renders that differ in the first user message: rendering the system
        message alone gives wrong text on most templates.
        """
        head: list[Message] = [{"role": "system", "content": system}] if system else []
        a, b = (
            self.render([*head, {"role": "user", "content": text}], tools=tools, variables=variables).tokens
            for text in ("A", "B")
        )
        return a[: common_prefix(a, b)]

    def spans(self, rendered: Rendered, messages: Sequence[Message]) -> tuple[Span, ...]:
        """The tokens of each message, frame included; see `message_spans`."""
        contents, control_at = [], []
        for stretch in rendered.stretches:
            for region in stretch.regions:
                p0, p1 = (self._token_at(stretch, c) for c in (region.a, region.b))
                contents.append(ContentRange(region.index, p0, p1))
            if stretch.control is not None:
                control_at.append(stretch.n_tokens_before + len(stretch.tokens))
        roles = [m["role"] for m in messages]
        for role in set(roles):
            self._learn_tail(role)
        return message_spans(contents, roles, self._tails, control_at, len(rendered.tokens))

    # -- before the template

    def _safe_messages(
        self, messages: Sequence[Message], replies: Sequence[SpokenReply | None]
    ) -> list[dict[str, Any]]:
        """Copies that the template may see: control text defused, contents marked with where they come from."""
        safe = []
        for i, (message, reply) in enumerate(zip(messages, replies, strict=True)):
            content = message.get("content")
            trusted = reply is not None and reply.trusted
            copy = {k: v if k in ("role", "content") else self._marker.defuse_all(v) for k, v in message.items()}
            if content is not None:
                text = self._safe.get((trusted, content))
                if text is None:
                    text = self._safe[(trusted, content)] = self._marker.defuse(content, trusted=trusted)
                copy["content"] = Said(text, i) if self.tracks and text else text
            safe.append(copy)
        return safe

    def _fold_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Where the template refuses a system message: into the first user message, if the user said so."""
        if not messages or messages[0]["role"] != "system" or not self._template_refuses_system():
            return messages
        if self._system_fallback != "user":
            raise TemplateError(
                "the chat template refuses the system role; pass system_fallback='user' to put the system text into "
                "the first user message, or use no system text"
            )
        system, *rest = messages
        first = next((i for i, m in enumerate(rest) if m["role"] == "user"), None)
        if first is None:
            return [{"role": "user", "content": system["content"]}, *rest]
        folded = str.__add__(str.__add__("".join((system["content"],)), "\n\n"), "".join((rest[first]["content"],)))
        rest[first] = {**rest[first], "content": folded}
        return rest

    def _template_refuses_system(self) -> bool:
        if self._refuses_system is None:
            user = {"role": "user", "content": "A"}
            try:
                self._formatter.render([{"role": "system", "content": "S"}, user], **self._variables)
                self._refuses_system = False
            except TemplateError:
                self._formatter.render([user], **self._variables)  # if this fails too, it is not about the system
                self._refuses_system = True
        return self._refuses_system

    def _format(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
        reply_header: bool,
    ) -> str:
        clash = _RESERVED & set(variables or ())
        if clash:
            raise OptionError(f"template_kwargs must not set {', '.join(sorted(clash))}: the renderer does")
        given = {**self._variables, **(variables or {})}
        if tools is not None:
            given["tools"] = self._marker.defuse_all(tools)
        return self._formatter.render(messages, reply_header=reply_header, **given)

    def _probe_marks(self) -> bool:
        """Whether marks pass through this template without changing what it writes."""
        messages: list[Message] = [
            {"role": "user", "content": " one\n"},
            {"role": "assistant", "content": "two "},
            {"role": "user", "content": "three"},
        ]
        marked = [{**m, "content": Said(m["content"], i)} for i, m in enumerate(messages)]
        try:
            plain = self._formatter.render(messages, **self._variables)
            read = "".join(self._text_of(self._formatter.render(marked, **self._variables)))
        except TemplateError:
            return True  # a template that fails on this says so at its first use
        return read == plain

    def _text_of(self, marked: str) -> str:
        """The plain text: marks taken out, literals put back."""
        return self._marker.scan.sub(
            lambda m: m[0] if m.lastgroup is None else self._marker.literal(m["literal"]) if m["literal"] else "",
            marked,
        )

    # -- after the template

    def _split(self, marked: str) -> list[TextStretch]:
        """Cut at control tokens; note which characters come from which message."""
        vocab = self._vocab
        out: list[TextStretch] = []
        parts: list[str] = []
        regions: list[Region] = []
        length = at = 0
        swallow = False
        opened: tuple[int, int, int] | None = None
        for m in self._marker.scan.finditer(marked):
            text = marked[at : m.start()]
            at = m.end()
            if swallow:
                text = text.lstrip(_WHITE)
                swallow = not text and m.lastgroup is not None
            parts.append(text)
            length += len(text)
            if m.lastgroup == "start":
                opened = (int(m["index"]), int(m["start"]), length)
            elif m.lastgroup == "close":
                if opened is not None:
                    regions.append(Region(*opened, length))
                    opened = None
            elif m.lastgroup == "literal":
                literal = self._marker.literal(m["literal"])
                parts.append(literal)
                length += len(literal)
                swallow = False
            else:
                token = vocab.control[m[0]]
                strips_left, swallow = vocab.strips(token)
                joined = "".join(parts)
                if opened is not None:
                    # Trusted content with a control token in it goes on in the next stretch.
                    regions.append(Region(*opened, length))
                    opened = (opened[0], opened[1] + length - opened[2] + len(m[0]), 0)
                out.append(TextStretch(joined.rstrip(_WHITE) if strips_left else joined, regions, token))
                parts, regions, length = [], [], 0
        rest = marked[at:]
        parts.append(rest.lstrip(_WHITE) if swallow else rest)
        out.append(TextStretch("".join(parts), regions, None))
        return out

    def _assemble(self, stretches: list[TextStretch], replies: Sequence[SpokenReply | None]) -> Rendered:
        arrays: list[TokenArray] = []
        texts: list[str] = []
        n = n_kept = 0
        for stretch in stretches:
            stretch.n_tokens_before = n
            tokens, kept = self._stretch_tokens(stretch, replies)
            stretch.tokens = tokens
            n_kept += kept
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
        return Rendered(fixed, "".join(texts), tuple(stretches), n_kept)

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

    def _stretch_tokens(self, stretch: TextStretch, replies: Sequence[SpokenReply | None]) -> tuple[TokenArray, int]:
        """Ids of a stretch, and how many replies kept their own in it."""
        text = stretch.text
        if not text:
            return np.empty(0, np.int32), 0
        cuts: list[tuple[int, int, TokenArray]] = []
        for region in stretch.regions:
            reply = replies[region.index] if region.index < len(replies) else None
            if reply is not None and reply.ids:
                cut = self._standing(region, text, reply, cuts[-1][1] if cuts else 0)
                if cut is not None:
                    cuts.append(cut)
        if cuts:
            pieces: list[TokenArray] = []
            at = 0
            for a, b, ids in [*cuts, (len(text), len(text), None)]:
                fresh = self._fresh_tokens(text, at, a)
                if fresh is None:
                    break
                pieces.append(fresh)
                if ids is not None:
                    pieces.append(ids)
                at = b
            else:
                return np.concatenate(pieces), len(cuts)
        return self._tokenize(text), 0

    def _fresh_tokens(self, text: str, a: int, b: int) -> TokenArray | None:
        """Ids for `text[a:b]` as it stands behind `text[:a]`; None where no token border falls on `a`."""
        if a == b:
            return np.empty(0, np.int32)
        if a == 0 or not self._vocab.adds_space_prefix:
            return self._tokenize(text[a:b])
        # An SPM vocabulary puts a space before every text it is given: take the ids out of the longer text instead.
        before, missing = self._tokenize(text[:b]), len(text[a:b].encode())
        first = len(before)
        while missing > 0 and first > 0:
            first -= 1
            missing -= len(self._vocab.piece(int(before[first])))
        return before[first:] if missing == 0 else None

    def _tokenize(self, text: str) -> TokenArray:
        tokens = self._tokens.get(text)
        if tokens is None:
            tokens = self._tokens[text] = self._vocab.tokenize(text)
        return tokens

    def _standing(self, region: Region, text: str, reply: SpokenReply, low: int) -> tuple[int, int, TokenArray] | None:
        """Where in the stretch a reply stands with its own ids: whole, or the part the template left of it."""
        spelled = self._spell(reply)
        if spelled is None:
            return None
        ids, borders = spelled
        a, content = region.a - region.start, reply.text
        if a >= low and text[a : a + len(content)] == content:
            return a, a + len(content), ids
        part = text[region.a : region.b]
        if region.a < low or content[region.start : region.start + len(part)] != part:
            return None
        try:
            i, j = borders.index(region.start), borders.index(region.start + len(part))
        except ValueError:
            return None
        return region.a, region.b, ids[i:j]

    def _spell(self, reply: SpokenReply) -> tuple[TokenArray, list[int]] | None:
        """A reply's ids, and the character that each token border falls on (-1: within one); None if they do not
        spell its text."""
        if reply not in self._spelled:
            ids = list(reply.ids)
            while ids and self._vocab.is_eog(ids[-1]):
                ids.pop()
            pieces = [self._vocab.piece(t) for t in ids]
            data = b"".join(pieces)
            result = None
            if ids and data == reply.text.encode():
                borders, at, n_chars = [0], 0, 0
                for piece in pieces:
                    n_chars += sum(byte & 0xC0 != 0x80 for byte in piece)
                    at += len(piece)
                    whole = at == len(data) or data[at] & 0xC0 != 0x80
                    borders.append(n_chars if whole else -1)
                result = np.array(ids, np.int32), borders
            self._spelled[reply] = result
        return self._spelled[reply]

    # -- spans

    def _token_at(self, stretch: TextStretch, char: int) -> int:
        """Index in the prompt of the first token that begins at or after a character of the stretch."""
        target = len(stretch.text[:char].encode())
        at = -1 if self._vocab.adds_space_prefix and len(stretch.tokens) else 0
        for i, token in enumerate(stretch.tokens):
            if at >= target:
                return stretch.n_tokens_before + i
            at += len(self._vocab.piece(int(token)))
        return stretch.n_tokens_before + len(stretch.tokens)

    def _learn_tail(self, role: str) -> None:
        """How many tokens the template writes after a content of `role`, from a render that ends with one."""
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
            self._token_at(stretch, region.b)
            for stretch in rendered.stretches
            for region in stretch.regions
            if region.index == len(probe) - 1
        ]
        if ends:
            self._tails[role] = len(rendered.tokens) - ends[-1]
