"""One reply as a state machine: it says what to decode next, takes what came of it, and gives out chunks.

It decodes nothing itself, so that one loop can drive one of them and another many. A chunk is given out before its
token is decoded: between two steps anything may happen to other sessions.
"""

from __future__ import annotations

import time
from contextlib import suppress

from .errors import OptionError, StateError
from .llama.sampler import Sampler
from .manager import ContextManager
from .options import SamplingOptions, checked_text
from .pending import NextToken, Pending, PromptChunk, Work
from .prompts import message_list
from .report import Chunk, Reply
from .session import Session, check_message
from .text_stream import TextStream
from .types import Message


class Generation:
    """A reply of one session. Call `start`; then, until `reply` is there: `work`, a step of it, `chunk`.

    Whatever ends it (`finish`, `fail`) leaves the session with what was said, and lets its row go.
    """

    def __init__(self, cm: ContextManager, session: Session, text: str | None, options: SamplingOptions) -> None:
        messages = message_list(session)
        if text is not None:
            checked_text("the user's text", text)
        elif not messages:
            raise OptionError("there is nothing to answer: the session has no messages; pass a text")
        elif check_message(messages[-1], "the last message")["role"] == "assistant":
            raise OptionError("the last message is the assistant's already; pass a text, or use regenerate")
        self.session = session
        self.reply: Reply | None = None
        self._cm = cm
        self._text = text
        self._options = options
        self._sampler = Sampler(options, cm.capabilities.n_vocab)
        self._stream = TextStream(options.stops)
        self._tokens: list[int] = []
        self._pieces: list[bytes] = []
        self._user: Message | None = None
        self._asked: Message | None = None
        self._pending: Pending | None = None
        self._started = 0.0
        self._first_token_s = 0.0

    @property
    def pending(self) -> Pending | None:
        """The prompt under way, or None before `start` and once it is decoded."""
        return self._pending if self._pending is not None and not self._pending.done else None

    def start(self) -> None:
        """Add the user's message, hold the session, begin the prompt. On an error everything is as before."""
        self._started = time.perf_counter()
        cm, session = self._cm, self.session
        cm.hold(session, self)
        try:
            if self._text is not None:
                self._user = {"role": "user", "content": self._text}
                session.messages.append(self._user)
            self._asked = session.messages[-1]
            self._pending = cm.begin(session, holder=self)
            if not self._pending.wants_logits:
                raise OptionError("there is nothing to answer: only a system text; pass a text, or add a user message")
            self._sampler.begin(self._pending.tokens)
        except BaseException:
            self.fail()
            raise

    def work(self, n_tokens: int) -> Work | None:
        """What to decode before the next chunk, at most `n_tokens`; None: logits are ready."""
        pending = self._begun()
        if not pending.done:
            return PromptChunk(pending, n_tokens)
        n_decoded = pending.row.n - pending.n_tokens
        return NextToken(self.session, self._tokens[n_decoded]) if n_decoded < len(self._tokens) else None

    def _begun(self) -> Pending:
        if self._pending is None:
            raise StateError("the generation was not started")
        return self._pending

    def chunk(self) -> Chunk:
        """Sample a token from the logits that are ready; ends the reply where that token does."""
        cm, options = self._cm, self._options
        sampled = cm.sample(self.session, self._sampler, holder=self)
        if not self._tokens and not self._first_token_s:
            self._first_token_s = time.perf_counter() - self._started
        if sampled is None:
            raise OptionError(
                "no token can be sampled: no logit is finite; allow more tokens in logit_bias, or lower what is added "
                "(if nothing is banned, the model itself gives no finite logits)"
            )
        token = sampled.token
        if sampled.ends:
            return Chunk(self._stream.push(b"", final=True), token, self.finish("stop"))
        self._pieces.append(sampled.piece)  # first: an interrupt in between leaves a piece for every token
        self._tokens.append(token)
        shown = self._stream.push(sampled.piece)
        if self._stream.stopped:
            return Chunk(shown, token, self.finish("stop_string"))
        most = cm.capabilities.n_row_max
        at_the_wall = most is not None and self._begun().row.n >= most
        if len(self._tokens) >= options.max_tokens or at_the_wall:
            shown += self._stream.push(b"", final=True)
            return Chunk(shown, token, self.finish("stop_string" if self._stream.stopped else "length"))
        return Chunk(shown, token)

    def finish(self, stop_reason: str) -> Reply:
        """End the reply; what was said goes into the session. Before the first token nothing was: the user's message
        goes back."""
        if self.reply is not None:
            return self.reply
        self._stream.push(b"", final=True)
        text, pending = self._stream.text, self._pending
        try:
            if not self._tokens and stop_reason != "stop":
                self._take_back()
            elif not self._is_said(text):
                self.session.add_reply(text, self._ids_spelling(text), behind=self._asked)
        finally:
            self._cm.let_go(self.session, self)
        if not self._tokens and stop_reason != "stop":
            self._leave_an_empty_row()
        n_prompt, n_reused = (0, 0) if pending is None else (pending.n_tokens, pending.n_reused)
        n_done = n_prompt if self._tokens or stop_reason == "stop" else 0 if pending is None else pending.row.n
        self.reply = Reply(
            text=text,
            tokens=tuple(self._tokens),
            stop_reason=stop_reason,
            n_prompt=n_prompt,
            n_reused=n_reused,
            n_decoded=max(0, min(n_done, n_prompt) - n_reused),
            n_generated=len(self._tokens),
            first_token_s=self._first_token_s,
            total_s=time.perf_counter() - self._started,
        )
        return self.reply

    def _leave_an_empty_row(self) -> None:
        """A session that got nowhere must not keep a slot from others."""
        with suppress(StateError):
            if not len(self._cm.tokens(self.session)):
                self._cm.release(self.session)

    def fail(self) -> None:
        """An error ends it: keep what was said, or take the user's message back if nothing was."""
        if self.reply is None:
            self.finish("cancelled")

    def _is_said(self, text: str) -> bool:
        """Whether an interrupted `finish` got as far as the session."""
        last = self.session.messages[-1] if self.session.messages else None
        return last is not None and last is not self._asked and last == {"role": "assistant", "content": text}

    def _take_back(self) -> None:
        messages = self.session.messages
        if self._user is not None and messages and messages[-1] is self._user:
            messages.pop()

    def _ids_spelling(self, text: str) -> list[int]:
        """The sampled ids as far as they spell the text (a stop string at the end is cut off both)."""
        data, spelled = text.encode(), b""
        for n in range(len(self._tokens)):
            if spelled == data:
                return self._tokens[:n]
            spelled += self._pieces[n]
        return self._tokens if spelled == data else []
