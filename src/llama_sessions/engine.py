"""`Engine`: one session at a time, answered whole or token by token."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from .errors import Cancelled, OptionError, StateError
from .generation import Generation
from .manager import ContextManager
from .options import SamplingOptions
from .prompts import message_list
from .report import Chunk, Reply
from .session import Session, check_message


class Stream(Iterator[Chunk]):
    """Iterates over the chunks of one reply. Nothing happens before the first `next`.

    Closing it early (`close`, leaving a `with`, or dropping it) ends the reply with what was said so far.
    """

    _state = "over"  # until __init__ is through: __del__ comes after an interrupted one too

    def __init__(self, cm: ContextManager, generation: Generation) -> None:
        self._cm = cm
        self._generation = generation
        self._inside = threading.Lock()
        self._stop = False
        self._state = "new"

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Chunk:
        if self._state == "over":
            raise StopIteration
        if self._inside.locked():
            raise StateError("the stream is being advanced already, by another thread or from within a hook")
        with self._inside:  # and not acquire and release: an interrupt between them would lock it for ever
            try:
                chunk = self._advance()
            except BaseException:
                try:
                    self._generation.fail()
                finally:
                    self._state = "over"
                raise
        if chunk.reply is not None:
            self._state = "over"
        return chunk

    def _advance(self) -> Chunk:
        generation = self._generation
        if self._state == "new":
            self._state = "running"
            generation.start()
        try:
            self._decode()
        except Cancelled:
            return Chunk("", None, generation.finish("cancelled"))
        return generation.chunk()

    def _decode(self) -> None:
        """Whatever the next chunk needs: the rest of the prompt, or the last token."""
        generation, n_batch = self._generation, self._cm.capabilities.n_batch
        pending = generation.pending
        if pending is not None:
            self._cm.ask_progress(pending)
        while (work := generation.work(n_batch)) is not None:
            self._check_stop()
            self._cm.step_one(work, holder=generation)
            if pending is not None:
                self._cm.ask_progress(pending)
                pending = generation.pending
        self._check_stop()

    def _check_stop(self) -> None:
        if self._stop:
            raise Cancelled("the stream was closed")

    @property
    def reply(self) -> Reply | None:
        """The finished reply; None while it is under way."""
        return self._generation.reply

    def close(self) -> None:
        """End the reply with what was said so far; again: nothing. While another thread, or a hook, is inside `next`,
        that `next` ends it after the step it is in."""
        if self._inside.locked():
            self._stop = True
            return
        with self._inside:
            if self._state == "running":
                self._generation.fail()
            self._state = "over"

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if self._state != "over":
            self.close()


class Engine:
    """Replies of one session at a time. Generation options: see `SamplingOptions`."""

    def __init__(self, cm: ContextManager) -> None:
        if not isinstance(cm, ContextManager):
            raise OptionError(f"Engine takes a ContextManager, not {cm!r}")
        self.cm = cm

    def stream(self, session: Session, text: str | None = None, **options: Any) -> Stream:
        """The reply as chunks, one a sampled token; the last carries the `Reply`. `text` None answers the session as
        it stands. Several streams of different sessions may be advanced in turn."""
        if not isinstance(session, Session):
            raise OptionError(f"a Session is wanted, not {session!r}")
        checked = SamplingOptions.build(options)
        return Stream(self.cm, Generation(self.cm, session, text, checked))

    def chat(self, session: Session, text: str | None = None, **options: Any) -> Reply:
        """The whole reply; it is appended to the session. Fails before its first token: the user's message is taken
        back."""
        with self.stream(session, text, **options) as stream:
            for _ in stream:
                pass
            if stream.reply is None:
                raise StateError("the stream ended without a reply")
            return stream.reply

    def complete(self, text: str, system: str | None = None, **options: Any) -> Reply:
        """A one-shot chat in a session of its own, released afterwards."""
        session = Session(system)
        try:
            return self.chat(session, text, **options)
        finally:
            self.cm.release(session)

    def regenerate(self, session: Session, **options: Any) -> Reply:
        """Answer the last user message anew. The old reply comes back if this fails before its first token."""
        messages = message_list(session)
        if not messages or check_message(messages[-1], "the last message")["role"] != "assistant":
            raise StateError("there is no reply to regenerate: the last message is not the assistant's")
        old = messages[-1]
        try:
            messages.pop()
            reply = self.chat(session, **options)
        except BaseException:
            if not messages or messages[-1].get("role") != "assistant":
                messages.append(old)
            raise
        if not reply.n_generated and reply.stop_reason == "cancelled":
            messages.append(old)
        return reply
