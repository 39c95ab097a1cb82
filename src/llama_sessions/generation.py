"""One reply as a state machine: it says what to decode next, takes what came of it, and gives out chunks.

It decodes nothing itself, so that one loop can drive one of them and another many. A chunk is given out before its
token is decoded: between two steps anything may happen to other sessions.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from .course import Course
from .errors import CapacityError, ContextOverflow, OptionError, StateError
from .generation_options import GenerationOptions
from .llama.sampler import Sampler
from .manager import ContextManager
from .messages import check_message
from .options import checked_text
from .prompts import check_partial, message_list
from .reply import CUT_SHORT, Chunk, Reply, TokenLogprob, logprobs_of, reply_fields
from .reply_parser import Part, ReplyParser, of_one_kind
from .session import Session
from .speech import Speech
from .thinking import Thinking
from .types import Constraint, FloatArray, Message

_TAIL = 256  # characters of the prompt in which a reply header is looked for


class Generation(Course):
    """A reply of one session. Call `start`; then, until `reply` is there: `work`, a step of it, and `chunks` of what
    `choose` makes of the logits.

    Whatever ends it (`finish`, `fail`) leaves the session with what was said, and lets its row go.
    """

    def __init__(
        self,
        cm: ContextManager,
        session: Session,
        text: str | None,
        options: GenerationOptions,
        *,
        holder: object | None = None,
        anew: bool = False,
    ) -> None:
        """`holder`: who holds the session meanwhile, and steps it; None: the generation itself. `anew`: the last
        message is a reply, and this one comes in its place."""
        _check_question(_asked(session, anew), text, options)
        super().__init__(cm, session, holder, continues=options.continue_last)
        self._anew = anew
        self._old: Message | None = None  # the reply in whose place this one comes
        self.reply: Reply | None = None
        self._vocab = cm.vocab
        self.timeout_s = options.timeout_s
        self._text = text
        self._options = options
        self._sampler = Sampler(options, cm.capabilities.n_vocab)
        self._grammar = _form(cm, options)
        self._may_be_forced = options.think_budget is not None or self._grammar is not None
        self._on_end: Callable[[], None] | None = None
        self._speech = Speech(ReplyParser(None, tools=False))
        self._thinking = self._thinking_of(self._speech)
        self._logprobs: list[TokenLogprob] = []
        self._user: Message | None = None
        self._asked: Message | None = None
        self._partial: str | None = None  # what the message to continue said before
        self._opened_by_prompt = False  # the thinking, which no grammar is about
        self._thought = ""  # what the message to continue had thought before
        self._before: list[int] = []  # ids that spell what a partial message said
        self._started: float | None = None
        self._first_token_s = 0.0

    def move_to(self, session: Session, on_end: Callable[[], None]) -> None:
        """Before `start`: answer in a session that says the same. `on_end` is called once, when it is let go."""
        self.session, self._on_end = session, on_end

    @property
    def is_new(self) -> bool:
        """Whether `start` is still to come."""
        return self._started is None

    @property
    def is_late(self) -> bool:
        """Whether `timeout_s` is over."""
        most = self.timeout_s
        return most is not None and not self.is_new and self.seconds >= most

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return 0.0 if self._started is None else time.perf_counter() - self._started

    def start(self, seconds_ago: float = 0.0, *, may_wait: bool = False) -> bool:
        """Add the user's message, hold the session, begin the prompt. On an error everything is as before.

        `seconds_ago`: how long the call of which it is a part has been going on. `may_wait`: where there is no slot, or
        no cells, now, return False instead of raising; it may be started again, and the session stays held.
        """
        self._started = time.perf_counter() - seconds_ago
        session = self.session
        self._cm.hold(session, self.holder)
        had_row = session.n_past > 0
        try:
            self._open()
        except BaseException as e:  # an interrupt, too: the session must not stay held, with a question nobody asked
            if may_wait and isinstance(e, CapacityError) and not isinstance(e, ContextOverflow):
                self._take_back()
                self._started = self._pending = self._user = self._old = None
                return False
            self.fail()
            if not had_row:  # nothing of its own is decoded yet, and what it shares can be shared again
                self._release()
            raise
        return True

    def _open(self) -> None:
        """Ask the question and begin the prompt."""
        session, options = self.session, self._options
        _check_question(_asked(session, self._anew), self._text, options)  # it may have changed since
        if self._anew:
            self._old = session.messages[-1]
            session.messages.pop()
        if self._text is not None:
            self._user = {"role": "user", "content": self._text}
            session.messages.append(self._user)
        self._asked = session.messages[-1]
        if options.continue_last:
            self._partial = check_partial(session.messages)["content"]
        self.begin_prompt()
        if not self.begun().wants_logits:
            raise OptionError("there is nothing to answer: only a system text; pass a text, or add a user message")
        if self._partial:
            self._before = self._spelling_before(self._partial)
        self._sampler.begin(self.begun().tokens)
        self._speech = Speech(self._parser())
        self.tokens = self._speech.tokens
        self._thinking = self._thinking_of(self._speech, self._go_on())
        self._opened_by_prompt = self._speech.is_thinking

    def _parser(self) -> ReplyParser:
        """What takes the reply apart. A raw session's is text. One bound by a schema calls no tools, and one bound by a
        grammar only in a format whose opening tag stands in that grammar: JSON that was asked for is no call."""
        session, options, known = self.session, self._options, self._cm.reply_format
        if session.is_raw:
            return ReplyParser(None, tools=False, stops=options.stops)
        bound = options.grammar if options.json_schema is None else ""
        formats = tuple(f for f in known.tool_formats if bound is None or f.opener in bound)
        return ReplyParser(
            replace(known, tool_formats=formats),
            tools=bool(session.tools),
            thinking_open=known.starts_thinking(self.begun().rendered.tail(_TAIL)),
            stops=options.stops,
        )

    def _thinking_of(self, speech: Speech, n_thought: int = 0) -> Thinking:
        closing, budget = self._cm.reply_format.think_close, self._options.think_budget
        return Thinking(self._vocab, speech, closing, budget, n_thought)

    def _go_on(self) -> int:
        """Take up what was thought of the message to continue; returns how many tokens that was."""
        speech, begun = self._speech, self.begun().rendered.begun
        n_thought = speech.go_on([self._vocab.piece(token) for token in begun])
        self._thought = speech.thinking
        if begun and speech.text:
            raise OptionError(
                "the prompt does not begin the reply as it did when the last message was thought, so continue_last "
                "cannot go on within its thinking; set the session's tools and template_kwargs as they were, or take "
                "the message out and answer anew, as regenerate does"
            )
        return n_thought

    def chunks(self, token: int | None) -> list[Chunk]:
        """What a chosen token gives: a chunk, and one more for each further kind of text in it. Ends the reply where
        that token does."""
        if not self._first_token_s:
            self._first_token_s = self.seconds
        if token is None and self._grammar is not None:
            return self._last_chunks(None, [], "grammar_dead_end")
        if token is None:
            raise OptionError(
                "no token can be sampled: no logit is finite; allow more tokens in logit_bias, or lower what is added "
                "(if nothing is banned, the model itself gives no finite logits)"
            )
        vocab, speech = self._vocab, self._speech
        if vocab.is_eog(token):
            return self._last_chunks(token, [], "stop")
        parts = speech.push(token, vocab.piece(token))
        if self._options.stop is not None and speech.stopped:
            return self._last_chunks(token, parts, "stop_string")
        if len(speech.tokens) >= self._options.max_tokens or not self.has_room():
            return self._last_chunks(token, parts, "length")
        return self._as_chunks(token, parts)

    def choose(self, logits: FloatArray) -> int | None:
        """The next token, by force or by the sampler, noted with its log-probability; for `chunks`."""
        options, sampler, thinking = self._options, self._sampler, self._thinking
        is_free = self._opened_by_prompt and self._speech.is_thinking  # no grammar is about it
        rule = None if is_free else self._grammar
        token = thinking.forced(rule) if self._may_be_forced else None
        if token is None:
            token = sampler.sample(logits, rule)
            if token is not None and is_free and self._grammar is not None:
                token = thinking.instead_of(token)
        if token is not None:
            sampler.accept(token, rule)
        if token is not None and options.logprobs is not None:
            own, best = logprobs_of(logits, token, options.logprobs)
            piece = self._vocab.piece
            top = tuple(TokenLogprob(t, piece(t), p) for t, p in best)
            self._logprobs.append(TokenLogprob(token, piece(token), own, top))
        return token

    def _as_chunks(self, token: int | None, parts: list[Part], reply: Reply | None = None) -> list[Chunk]:
        """A chunk for each part; the first has the token, the last the reply."""
        if len(parts) != 1:
            parts = of_one_kind(parts) or [Part("thinking" if self._speech.is_thinking else "content", "")]
        logprob = self._logprobs[-1] if self._logprobs and token is not None else None
        chunks = []
        last = len(parts) - 1
        for i, part in enumerate(parts):
            chunks.append(Chunk(part.text, token, reply if i == last else None, part.kind, part.tool_call, logprob))
            token = logprob = None
        return chunks

    def cut_short(self, stop_reason: str, seconds_ago: float = 0.0) -> list[Chunk]:
        """End the reply here: chunks of what was held back, and the reply. `seconds_ago`: see `start`, for one that was
        not started yet."""
        if self._started is None:
            self._started = time.perf_counter() - seconds_ago
        return self._last_chunks(None, [], stop_reason)

    def _last_chunks(self, token: int | None, parts: list[Part], stop_reason: str) -> list[Chunk]:
        parts = parts + self._end_speech(stop_reason)
        return self._as_chunks(token, parts, self.finish(stop_reason))

    def _end_speech(self, stop_reason: str) -> list[Part]:
        """What was held back; only where the model itself has stopped, half a character, too."""
        return self._speech.end(cut=stop_reason != "stop")

    def finish(self, stop_reason: str) -> Reply:
        """End the reply; what was said goes into the session. Before the first token nothing was: the user's message
        goes back."""
        if self.reply is not None:
            return self.reply
        said_something = self._keep_what_was_said(stop_reason)
        if not said_something:
            self._leave_an_empty_row()
        pending, speech = self._pending, self._speech
        tokens = speech.tokens
        n_prompt, n_reused = (0, 0) if pending is None else (pending.n_tokens, pending.n_reused)
        n_done = n_prompt if said_something else 0 if pending is None else pending.row.n
        self.reply = Reply(
            text=speech.text,
            tokens=tuple(tokens),
            stop_reason=stop_reason,
            n_prompt=n_prompt,
            n_reused=n_reused,
            n_decoded=max(0, min(n_done, n_prompt) - n_reused),
            n_generated=len(tokens),
            first_token_s=self._first_token_s,
            total_s=self.seconds,
            thinking=speech.thinking[len(self._thought) :],
            tool_calls=tuple(speech.tool_calls),
            logprobs=tuple(self._logprobs[: len(tokens)]),
        )
        self.leave_prompt()
        return self.reply

    def abandon(self) -> None:
        """End it in a finaliser, as `fail` does, but without a reply and without waiting for anybody: where nothing was
        said, the row stays until its slot is wanted."""
        if self.reply is None:
            self._keep_what_was_said("cancelled")

    def _keep_what_was_said(self, stop_reason: str) -> bool:
        """Put it into the session, and let that go; where nothing was said, take the question back. Whether there was
        something."""
        self._end_speech(stop_reason)
        said_something = bool(self._speech.tokens) or stop_reason not in CUT_SHORT
        try:
            if said_something:
                self._add_to_session()
            else:
                self._take_back()
        finally:
            self.leave()
        return said_something

    def leave(self) -> None:
        """Let the session go, and say so to whoever waits for it."""
        self._cm.let_go(self.session, self.holder)
        if self._on_end is not None:
            on_end, self._on_end = self._on_end, None
            on_end()

    def _add_to_session(self) -> None:
        """What was said, once: an interrupted `finish` may have got as far as the session."""
        session, speech, asked = self.session, self._speech, self._asked
        model = self._cm.capabilities.fingerprint
        ids = speech.ids_spelling(speech.text)
        fields = reply_fields(speech.thinking, speech.tool_calls)
        only_thought = speech.only_thought and not (self._partial or "").strip()
        begun = [*self.begun().rendered.begun, *speech.tokens] if only_thought else []
        if self._partial is not None:
            if asked is not None and asked["content"] == self._partial:
                spelled = self._before + ids if self._before or not self._partial else []
                said = self._partial + speech.text
                session.extend_reply(asked, said, spelled, model=model, begun=begun, **fields)
            return
        last = session.messages[-1] if session.messages else None
        if last is None or last is asked or last != {"role": "assistant", "content": speech.text, **fields}:
            message = session.add_reply(speech.text, ids, model=model, behind=asked, begun=begun, **fields)
            self._cm.note_reply(session, message)

    def _spelling_before(self, text: str) -> list[int]:
        """The last ids of the prompt, as far as they spell `text`; empty if they do not."""
        data, spelled, ids = text.encode(), b"", list[int]()
        for token in reversed(self.begun().tokens.tolist()):
            if len(spelled) >= len(data):
                break
            spelled = self._vocab.piece(token) + spelled
            ids.insert(0, token)
        return ids if spelled == data else []

    def _leave_an_empty_row(self) -> None:
        """A session that got nowhere must not keep a slot from others."""
        with suppress(StateError):
            if not len(self._cm.tokens(self.session)):
                self._release()

    def _release(self) -> None:
        with suppress(StateError):
            self._cm.release(self.session)

    def fail(self) -> None:
        """An error ends it: keep what was said, or take the user's message back if nothing was."""
        if self.reply is None:
            self.finish("cancelled")

    def _take_back(self) -> None:
        messages = self.session.messages
        if self._user is not None and messages and messages[-1] is self._user:
            messages.pop()
        if self._old is not None and all(message is not self._old for message in messages):
            messages.append(self._old)


def _form(cm: ContextManager, options: GenerationOptions) -> Constraint | None:
    """What the options ask a reply to be, compiled for this vocabulary."""
    if options.json_schema is not None:
        from .llama.schema import gbnf_of_schema  # here: reading it is a fifth of the package's import

        return cm.grammar(gbnf_of_schema(options.json_schema))
    return None if options.grammar is None else cm.grammar(options.grammar)


def _asked(session: Session, anew: bool) -> list[Message]:
    """What is to be answered: the messages, `anew` without the reply at their end. StateError where there is none."""
    messages = message_list(session)
    if not anew:
        return messages
    if not messages or check_message(messages[-1], "the last message")["role"] != "assistant":
        raise StateError("there is no reply to regenerate: the last message is not the assistant's")
    return messages[:-1]


def _check_question(messages: list[Message], text: str | None, options: GenerationOptions) -> None:
    """OptionError where there is nothing to answer, or nothing to continue."""
    if options.continue_last:
        if text is not None:
            raise OptionError("continue_last goes on with the last message; it takes no text")
        check_partial(messages)
    elif text is not None:
        checked_text("the user's text", text)
    elif not messages:
        raise OptionError("there is nothing to answer: the session has no messages; pass a text")
    elif check_message(messages[-1], "the last message")["role"] == "assistant":
        raise OptionError(
            "the last message is the assistant's already; pass a text, use regenerate, or continue_last=True"
        )
