"""`Engine`: one session at a time, answered whole or token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from .errors import OptionError, StateError
from .generation import Generation
from .generation_options import GenerationOptions
from .manager import ContextManager
from .options import checked_int
from .reply import Branch, Reply
from .session import Session, check_session
from .stateless import Conversations
from .stream import Stream
from .types import Message

if TYPE_CHECKING:
    from .tool_loop import Functions


class Engine:
    """Replies of one session at a time. Generation options: see `GenerationOptions`."""

    def __init__(self, cm: ContextManager) -> None:
        if not isinstance(cm, ContextManager):
            raise OptionError(f"Engine takes a ContextManager, not {cm!r}")
        self.cm = cm
        self._conversations = Conversations()

    def stream(
        self,
        session: Session | None = None,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Stream:
        """The reply as chunks, one a sampled token; the last carries the `Reply`. `text` None answers the session as
        it stands. Several streams of different sessions may be advanced in turn.

        `messages` (and `tools`) instead of a session: a stateless call with the whole conversation, of which only what
        is new since an earlier call is decoded.
        """
        checked = GenerationOptions.build(options)
        if messages is not None:
            if session is not None or text is not None:
                raise OptionError("pass a session (and a text), or messages; not both")
            return self._stateless(messages, tools, checked)
        if tools is not None:
            raise OptionError("tools go with messages; a session has its own: Session(tools=...)")
        return Stream(self.cm, Generation(self.cm, check_session(session), text, checked))

    def _stateless(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, options: GenerationOptions
    ) -> Stream:
        """The session is this stream's alone until its reply is finished."""
        if options.continue_last:
            raise OptionError("continue_last goes on with a session's message; pass the session")
        asking = self._conversations.saying(messages, tools)
        generation = Generation(self.cm, asking, None, options)  # what is wrong is said before a known one is touched
        session = self._conversations.take(asking)
        generation.move_to(session, partial(self._conversations.give_back, session))
        return Stream(self.cm, generation)

    def chat(
        self,
        session: Session | None = None,
        text: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Reply:
        """The whole reply; it is appended to the session. Fails before its first token: the user's message is taken
        back. `messages`: see `stream`."""
        return _whole(self.stream(session, text, messages=messages, tools=tools, **options))

    def complete(self, text: str, system: str | None = None, **options: Any) -> Reply:
        """A one-shot chat in a session of its own, released afterwards."""
        session = Session(system)
        try:
            return self.chat(session, text, **options)
        finally:
            with suppress(StateError):  # closed meanwhile: there is nothing to release, and the reply is whole
                self.cm.release(session)

    def regenerate(self, session: Session, **options: Any) -> Reply:
        """Answer the last user message anew. The old reply comes back if this fails before its first token."""
        checked = GenerationOptions.build(options)
        return _whole(Stream(self.cm, Generation(self.cm, check_session(session), None, checked, anew=True)))

    def replies(self, session: Session, text: str | None = None, *, n: int = 4, **options: Any) -> list[Branch]:
        """`n` replies to the same prompt, decoded together: the prompt is decoded once, each step samples a token for
        all of them.

        Each is in a fork of its own (`branch.session`), to go on with or to release; `session` itself keeps the
        question and gets no answer. A `seed` is that of the first, the next one's is one more. Takes `n` slots more.
        Nobody else may use the session meanwhile. `timeout_s` is for all of it, the prompt included. On an error the
        session is as before; so it is where this is cancelled (`on_progress`) or timed out before the first token: then
        there are `n` replies with nothing but that stop reason, in copies of the session that take no slots.
        """
        from .together import branches, check_branching  # here, as below: not everybody's import has to pay for it

        checked = GenerationOptions.build(options)
        check_branching(checked)
        check_session(session)
        return branches(self.cm, session, text, checked_int("n", n, 1, self.cm.capabilities.n_batch), checked)

    def run_tools(
        self,
        session: Session,
        functions: Functions,
        text: str | None = None,
        *,
        max_rounds: int = 8,
        **options: Any,
    ) -> Reply:
        """Chat, run what the model calls, tell it the results, and so on until it answers in words.

        `functions`: by name, or a list of functions that have the names. An error of theirs goes to the model as the
        result. After `max_rounds` rounds of calls the last reply is returned as it is, its calls unanswered; so is one
        that was cancelled or timed out (`timeout_s` is each reply's own). An interrupt within a function is raised: its
        call, and those behind it, then have an error as their result, and `chat(session)` goes on from there.
        """
        from .tool_loop import answer_calls, checked_functions

        named = checked_functions(functions)
        check_session(session)
        if not session.tools:
            raise OptionError("the session offers no tools to the model; make it with Session(tools=[...])")
        n_rounds = checked_int("max_rounds", max_rounds, 1)
        reply = self.chat(session, text, **options)
        options.pop("continue_last", None)
        for _ in range(n_rounds):
            if not reply.tool_calls or reply.is_cut_short:
                break
            answer_calls(session, reply.tool_calls, named)
            reply = self.chat(session, **options)
        return reply


def _whole(stream: Stream) -> Reply:
    """A stream to its end."""
    with stream:
        for _ in stream:
            pass
        if stream.reply is None:
            raise StateError("the stream ended without a reply")
        return stream.reply
