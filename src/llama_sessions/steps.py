"""Prompts and single tokens: begun, decoded step by step, read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from .errors import Cancelled, CapacityError, ContextOverflow, LlamaSessionsError, StateError
from .evicting import Asking
from .house import House
from .options import checked_int
from .pending import NextToken, Pending, PromptChunk, Work
from .report import Preview, StepReport, StepResult
from .session import Session
from .stretches import NO_TOKENS
from .types import FloatArray, TokenArray

T = TypeVar("T")


class Steps(House):
    """What is decoded for whom, one call at a time."""

    # -- prepare: begin, then steps

    def begin(
        self,
        session: Session,
        *,
        holder: object | None = None,
        continue_last: bool = False,
        reply: Sequence[int] = (),
        n_free: int = 0,
    ) -> Pending:
        """`prepare` without the decoding: render, plan, evict, cut and share. `step` decodes the rest, chunk by chunk.

        `continue_last`: the prompt ends within the last message, which is the assistant's, instead of with a reply
        header. `reply`: tokens behind the prompt, said already; of these, too, the first may have to go. `n_free`: how
        many more are to fit then, where that is more than the headroom. Nothing is touched before the plan is whole.
        Raises ContextOverflow (the session is too long, and nothing more can go), NoFreeSlot, CapacityError (cells),
        TemplateError, OptionError, and what a hook raises; row and window are then as before.
        """
        self._entry.check_may_change()
        self._seats.get(session, holder)
        return self._begin(
            session, holder, continue_last=continue_last, reply=reply, n_free=n_free, anew=bool(len(reply))
        )

    def _begin(
        self,
        session: Session,
        holder: object | None,
        *,
        continue_last: bool = False,
        reply: Sequence[int] = (),
        n_free: int = 0,
        anew: bool = False,
    ) -> Pending:
        """Hooks may use the manager, so they run outside of the lock, and before the plan."""
        asking = self._asking(session, continue_last=continue_last, reply=reply, n_free=n_free, anew=anew)
        asking = replace(asking, answers=self._evictor.remembered(session))
        asking = self._evictor.report(asking, session)
        while True:
            try:
                with self._entry.gate(), self._entry.change:
                    answer = self._preparer.begin(session, asking, holder)
            except CapacityError as e:
                if not isinstance(e, ContextOverflow):
                    self._evictor.remember(session, asking)
                raise
            if isinstance(answer, Pending):
                return answer
            asking = self._evictor.report(answer, session)

    def _asking(
        self,
        session: Session,
        *,
        continue_last: bool = False,
        reply: Sequence[int] = (),
        n_free: int = 0,
        anew: bool = False,
    ) -> Asking:
        window = session.window_state
        return Asking(
            self._prompter.conversation(session, window, continue_last=continue_last),
            window,
            self._evictor.n_sink(session),
            np.asarray(reply, np.int32),
            max(self.headroom, n_free),
            anew or self.options.overflow == "reprefill",
        )

    def prepare(self, session: Session) -> int:
        """Bring the row to exactly system prompt + history + reply header, with fresh logits; returns `n_past`.

        Decodes only tokens that neither this row nor another of its namespace holds, in chunks of `n_batch`, asking
        `on_progress` in between (False raises Cancelled; what was decoded stays). An empty conversation leaves the
        prefix. Sets `session.n_past` and `session.last_prepare`. Raises what `begin` raises, and DecodeError.
        """
        return self._prepare(session)

    def rebuild(self, session: Session) -> int:
        """`prepare`, and nothing approximate is left: what follows an eviction is decoded anew. Returns `n_past`.

        The window stays as it is (`Session.reset_window` widens it), but for messages of which only a part was left
        and which do not fit whole any more. Costs the decoding of all tokens behind the first hole, less what the cache
        of saved KV has of them. Raises what `prepare` raises.
        """
        return self._prepare(session, anew=True)

    def _prepare(self, session: Session, *, anew: bool = False) -> int:
        self._entry.check_may_change()
        self._seats.get(session)
        with self._entry.reading():
            turn = self._seats.turn(session)
        with turn:
            pending = self._begin(session, None, anew=anew)
            self.ask_progress(pending)
            while not pending.done:
                self.step_one(PromptChunk(pending, self._store.caps.n_batch))
                self.ask_progress(pending)
            return session.n_past

    def ask_progress(self, pending: Pending) -> None:
        """Call `on_progress`; Cancelled if it says no while there is still work."""
        if not self._hooks.watches_progress:
            return
        done, total = pending.row.n, pending.n_tokens
        with self._entry.only_reading():
            go_on = self._hooks.on_progress(done, total, pending.session)
        if not go_on and done < total:
            raise Cancelled(f"on_progress returned False at {done} of {total} tokens; prepare again to go on")

    def preview(self, session: Session) -> Preview:
        """What `prepare` would do now, without what an `on_evict` hook might put in. Renders and plans (and asks
        `before_encode`); no token is decoded or dropped."""
        self._entry.check()
        self._seats.get(session, reading=True)
        asking = self._asking(session)
        while True:
            with self._entry.reading():
                answer = self._preparer.preview(session, asking)
            if isinstance(answer, Preview):
                return answer
            asking = self._evictor.report(answer, session, asks_hook=False)

    # -- step

    def step(
        self,
        work: Sequence[Work],
        *,
        holder: object | None = None,
        read: Callable[[Session, FloatArray], object] | None = None,
    ) -> StepReport:
        """One `llama_decode` of any mix of prompt chunks and single tokens, each of another session.

        What cannot go in (no room in the row, no cells) gets its error in the report and is left out; the others are
        decoded. `read`: called for each session that has logits now, as by `read_logits`, but within this call: the
        way through the door once a step. What it raises is raised; all rows are booked by then. Raises OptionError for
        work that is none: an empty step, a session twice, more than `n_batch` tokens.
        """
        with self._entry.gate(), self._entry.change:
            work = self._stepper.checked(work)
            if not len(self._parking):
                return self._stepper.step(work, holder, read)
            sessions = [item.session for item in work]
            errors: dict[Session, StepResult] = {}
            for item in work:
                if isinstance(item, NextToken):
                    try:
                        self._bring_back(item.session, holder, wants_logits=False, but=sessions)
                    except LlamaSessionsError as e:
                        errors[item.session] = StepResult(0, False, e)
            left = tuple(i for i, session in zip(work, sessions, strict=True) if session not in errors)
            report = self._stepper.step(left, holder, read)
            return StepReport({**errors, **report.results}, report.n_tokens, report.seconds)

    def begin_return(self, session: Session, *, holder: object | None = None) -> Pending | None:
        """Begin to bring a parked session's row back, token for token; None for one that is not parked.

        `step` decodes what is left, as of a prompt. Raises NoFreeSlot, CapacityError; it then stays parked.
        """
        with self._entry.gate(), self._entry.change:
            self._seats.get(session, holder)
            parked = self._parking.get(session)
            if parked is None:
                return None
            return self._preparer.resume(session, parked, holder, wants_logits=False)

    def begin_again(self, session: Session, tokens: Sequence[int], *, holder: object | None = None) -> Pending:
        """Begin to make the row hold exactly (n,) `tokens` again, with fresh logits: after a decode that failed in the
        middle of them. Raises NoFreeSlot, CapacityError."""
        with self._entry.gate(), self._entry.change:
            return self._preparer.begin_again(session, np.asarray(tokens, np.int32), holder)

    def _bring_back(
        self, session: Session, holder: object | None, *, wants_logits: bool, but: Sequence[Session] = ()
    ) -> None:
        """Give a parked session its row again; nothing for others. Called under the lock.

        It stays parked until all of its tokens are there: an error or an interrupt on the way loses none.
        """
        parked = self._parking.get(session)
        self._seats.get(session, holder, reading=holder is None)
        if parked is None:
            return
        try:
            pending = self._preparer.resume(session, parked, holder, wants_logits=wants_logits, but=but)
            while not pending.done:
                self._stepper.step_one(PromptChunk(pending, self._store.caps.n_batch), holder, but)
        finally:
            session.n_past = len(parked.tokens)

    def step_one(self, item: Work, *, holder: object | None = None) -> StepResult:
        """A step of one piece of work; raises its error."""
        (result,) = self.step((item,), holder=holder).results.values()
        if result.error is not None:
            raise result.error
        return result

    def step_and_read(self, item: NextToken, read: Callable[[FloatArray], T], *, holder: object | None = None) -> T:
        """`step_one` and then `read_logits`, as one call: half the way through the door, once a token."""
        with self._entry.gate(), self._entry.change:
            return read(self._store.logits(self._stepper.step_one(item, holder)))

    def append(self, session: Session, token: int) -> None:
        """Decode one token at `n_past`. No room: ContextOverflow (own length) or CapacityError (cells); row unchanged.

        Appended ids stand for the next `session.add_assistant` whose text they spell.
        """
        self.step_one(NextToken(session, checked_int("token", token, 0, self._store.caps.n_vocab - 1)))

    # -- reading a row

    def logits(self, session: Session) -> FloatArray:
        """(n_vocab,) float32, read-only: the logits after the row's last token, until *that* row changes.

        A parked session gets its row back for this, and its last token is decoded again.
        """
        with self._entry.reading():  # asked within: whoever was inside before may have parked it
            if not isinstance(session, Session) or self._parking.get(session) is None:
                return self._copied_logits(session)
        with self._entry.gate(), self._entry.change:
            self._bring_back(session, None, wants_logits=True)
            return self._copied_logits(session)

    def _copied_logits(self, session: Session) -> FloatArray:
        seat = self._seats.get(session, reading=True)
        if seat is None or seat.row.suspect is not None:
            raise StateError("the session has no row that is ready; call prepare first")
        view = self._store.logits(seat.row)
        if not len(seat.logits):
            seat.logits = np.empty(len(view), np.float32)
        np.copyto(seat.logits, view)
        out: FloatArray = seat.logits.view()
        out.flags.writeable = False
        return out

    def read_logits(self, session: Session, read: Callable[[FloatArray], T], *, holder: object | None = None) -> T:
        """What `read` makes of the session's (n_vocab,) float32 logits, which are not copied and not to be kept."""
        with self._entry.gate(), self._entry.use:
            return self._read(session, read, holder)

    def _read(self, session: Session, read: Callable[[FloatArray], T], holder: object | None) -> T:
        seat = self._seats.get(session, holder)
        if seat is None:
            raise StateError("the session has no row; call prepare first")
        self._store.reconcile(seat.row)
        return read(self._store.logits(seat.row))

    def tokens(self, session: Session) -> TokenArray:
        """(n_past,) int32, read-only copy of the row's token ids, appended ones included; also of a parked session."""
        with self._entry.reading():
            seat, parked = self._seats.get(session, reading=True), self._parking.get(session)
            if parked is not None:
                return parked.tokens
            ids: TokenArray = NO_TOKENS.copy() if seat is None else seat.row.tokens.copy()
        ids.flags.writeable = False
        return ids
