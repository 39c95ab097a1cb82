"""`ContextManager`: the one place where a Session meets a Row."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from .entry import Entry
from .errors import Cancelled, LlamaSessionsError, OptionError, StateError
from .evicting import Asking, Evictor
from .hooks import Hooks
from .integrity import check
from .kv.plan import NOTHING
from .kv.prefix import Prefix
from .kv.slots import Slots
from .kv.snapshot import Snapshots
from .kv.store import RowStore
from .loading import Parts, Untemplated, adopt_parts, borrow_parts, load_parts
from .options import LoadOptions, ManagerOptions, checked_bool, checked_int, checked_text
from .overview import Overview
from .parking import Parking
from .pending import NextToken, Pending, PromptChunk, Work
from .planner import check_length
from .preparing import Preparer
from .prompts import Prompter, said_of
from .render import Renderer
from .reply_format import ReplyFormat
from .report import Preview, Stats, StepReport, StepResult
from .seats import Seats
from .session import Session
from .stepper import Stepper
from .types import Capabilities, Constraint, FloatArray, Message, TokenArray

logger = logging.getLogger("llama_sessions")

T = TypeVar("T")

_NO_TOKENS = np.empty(0, np.int32)


class ContextManager:
    """Many sessions over one llama.cpp context.

    `ContextManager(ctx, vocab)` works over a `llama_context_p` and its `llama_vocab_p` of yours: it is cleared on entry
    and never freed here. `ContextManager.load(path)` makes a context with the right settings. With n_seq_max 1 there is
    no slot for the shared system prompt (it is remembered and rendered), with 2 one session beside it.

    Calls may come from any thread and run one at a time; `stats` and `describe` never wait for a decode.
    Options: see `ManagerOptions`.
    """

    def __init__(self, ctx: Any, vocab: Any, *, chat_template: str | None = None, **options: Any) -> None:
        checked = ManagerOptions.build(options)
        self._start(adopt_parts(ctx, vocab, chat_template), checked)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, chat_template: str | None = None, **options: Any) -> ContextManager:
        """Load a GGUF and make a context for `max_sessions` sessions.

        Options of the context (`LoadOptions`): `n_ctx` (the total shared by all sessions; default: the trained length,
        at most 8192), `max_sessions=8`, `n_batch=512`, `n_ubatch=512`, `n_threads`, `n_gpu_layers=-1`, `type_k`,
        `type_v` (ggml types; default f16), `flash_attn="auto"`, `swa_full=True`, `kv_unified=True`; the rest are
        `ManagerOptions`. Raises OptionError, ModelError, TemplateError; costs the load of the weights.
        """
        return cls._made(partial(load_parts, path), chat_template, options)

    @classmethod
    def from_llama(cls, llm: Any, *, chat_template: str | None = None, **options: Any) -> ContextManager:
        """A context of our own over the weights of a `llama_cpp.Llama`, which stays usable and is kept alive.

        Options as in `load`, but for `n_gpu_layers`: the weights are where they are. Raises OptionError, ModelError,
        TemplateError; costs a context, no second load.

        Close the manager before the `Llama`. A `llm.close()` frees the weights at once and waits for nobody: a call of
        this manager that another thread is in the middle of (a stream's `next`, a `prepare`) then reads freed memory,
        which may crash the process. So end those first. Calls that begin later, or were waiting for their turn, are a
        StateError; a stream keeps what was said.
        """
        if "n_gpu_layers" in options:
            raise OptionError("n_gpu_layers was decided when the Llama was loaded; leave it out here")
        return cls._made(partial(borrow_parts, llm), chat_template, options)

    @classmethod
    def _made(cls, make: Callable[..., Parts], chat_template: str | None, options: dict[str, Any]) -> ContextManager:
        load, rest = LoadOptions.split(options)
        checked = ManagerOptions.build(rest)
        if chat_template is not None:
            checked_text("chat_template", chat_template)
        return cls.over(make(load, chat_template, quiet=not checked.log), **rest)

    @classmethod
    def over(cls, parts: Parts, **options: Any) -> ContextManager:
        """A manager over ready-made parts: the door for `testing.fake_parts`, and for backends of your own."""
        self = cls.__new__(cls)
        self._start(parts, ManagerOptions.build(options))
        return self

    def _start(self, parts: Parts, options: ManagerOptions) -> None:
        caps = parts.context.capabilities
        self.options = options
        self.headroom = options.headroom_for(caps.n_ctx_seq)
        self._parts = parts
        n_reserved = min(2, caps.n_seq_max - 1)  # prefix, then scratch
        self._store = RowStore(parts.context, scratch=1 if n_reserved == 2 else None)
        self.slots = Slots(caps.n_seq_max, n_reserved)
        self.prefix = Prefix(self._store, 0 if n_reserved else None)
        self._snapshots = Snapshots(self._store, options.radix_options)
        self._seats = Seats(self._store, self.slots, self._snapshots)
        self._parking = Parking(self._store, self._seats, self.slots, self._snapshots, options.idle_park_after_s)
        self._hooks = Hooks()
        renderer = Renderer(
            parts.formatter, parts.vocab, no_think=options.no_think, system_fallback=options.system_fallback
        )
        raw = Renderer(Untemplated(), parts.vocab, trusts_all=True)
        self._prompter = Prompter(renderer, raw, self.prefix, self._hooks, caps.fingerprint)
        self._reply_format = ReplyFormat.of(getattr(parts.formatter, "text", ""))
        self._evictor = Evictor(self._store, options, self._prompter, self._hooks)
        self._preparer = Preparer(
            self._store, self._seats, self.prefix, self._prompter, self._snapshots, self._parking, self._evictor
        )
        self._stepper = Stepper(self._store, self._seats, self._parking)
        self._overview = Overview(
            self._store,
            self.slots,
            self.prefix,
            self._seats,
            self._preparer,
            self._parking,
            self._snapshots,
            options,
            self._evictor,
        )
        after = self._overview.publish if options.idle_park_after_s is None else self._sweep_and_publish
        self._entry = Entry(self._seats.drain, after, self._free, parts.is_gone, quiet=not options.log)

    def __enter__(self) -> ContextManager:
        self._entry.check()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- what it is

    @property
    def capabilities(self) -> Capabilities:
        return self._store.caps

    @property
    def is_closed(self) -> bool:
        return self._entry.closed

    @property
    def n_ctx_seq(self) -> int:
        """Tokens that one session can have."""
        return self._store.caps.n_ctx_seq

    @property
    def vocab(self) -> Any:
        """The vocabulary: `tokenize(text)`, `piece(token)`, `is_eog(token)`."""
        return self._parts.vocab

    @property
    def renderer(self) -> Renderer:
        """Messages to tokens, with this model's template and vocabulary."""
        return self._prompter.renderer

    @property
    def reply_format(self) -> ReplyFormat:
        """How the model marks thinking and tool calls, as far as its template tells."""
        return self._reply_format

    def grammar(self, gbnf: str) -> Constraint:
        """`gbnf` compiled for this vocabulary, for one reply. OptionError says where it is wrong."""
        with self._entry.reading():
            return self._parts.grammar(gbnf)

    # -- hooks and the system prompt

    def set_hook(self, name: str, fn: Callable[..., Any]) -> None:
        """Set `before_encode`, `on_evict`, `sink_fn` or `on_progress`; OptionError for another name."""
        with self._entry.gate(), self._entry.change:
            self._hooks.set(name, fn)

    def clear_hook(self, name: str) -> None:
        """Remove a hook; OptionError for an unknown name."""
        with self._entry.gate(), self._entry.change:
            self._hooks.clear(name)

    def set_system(self, text: str, *, keep_cache: bool = False) -> int:
        """Set the system text of every session that has none of its own; returns its tokens in the prefix slot.

        Decodes what differs from the last one. `""` clears it. A change clears the cache of saved KV, unless asked to
        keep it (then the old prompt goes in, too): it is found by whole runs of tokens, so it never misleads. Without
        a prefix slot the text is remembered and 0 is returned. Raises ContextOverflow and CapacityError; the old text
        then stays.
        """
        checked_text("the system text", text)
        checked_bool("keep_cache", keep_cache)
        with self._entry.gate(), self._entry.change:
            changes = (self.prefix.text or "") != text
            if changes and keep_cache and self.prefix.row is not None:
                self._snapshots.keep(self.prefix.row)
            n = self._encode_system(text)
            if changes and not keep_cache:
                self._snapshots.clear()
            return n

    def _encode_system(self, text: str) -> int:
        if not text:
            self.prefix.clear()
            return 0
        if not self.prefix.has_slot:
            return self.prefix.remember(text)
        tokens = self._prompter.renderer.stem(text)
        check_length(self._store, len(tokens), "the system prompt")
        return self.prefix.set(text, tokens, make_way=self._parking.make_way, park_one=self._parking.park_one)

    # -- prepare: begin, then steps

    def begin(
        self,
        session: Session,
        *,
        holder: object | None = None,
        continue_last: bool = False,
        reply: Sequence[int] = (),
    ) -> Pending:
        """`prepare` without the decoding: render, plan, evict, cut and share. `step` decodes the rest, chunk by chunk.

        `continue_last`: the prompt ends within the last message, which is the assistant's, instead of with a reply
        header. `reply`: tokens behind the prompt, said already; of these, too, the first may have to go. Nothing is
        touched before the plan is whole. Raises ContextOverflow (the session is too long, and nothing more can go),
        NoFreeSlot, CapacityError (cells), TemplateError, OptionError, and what a hook raises; row and window are then
        as before.
        """
        self._entry.check_may_change()
        self._seats.get(session, holder)
        return self._begin(session, holder, continue_last=continue_last, reply=reply, anew=bool(len(reply)))

    def _begin(
        self,
        session: Session,
        holder: object | None,
        *,
        continue_last: bool = False,
        reply: Sequence[int] = (),
        anew: bool = False,
    ) -> Pending:
        """Hooks may use the manager, so they run outside of the lock, and before the plan."""
        asking = self._asking(session, continue_last=continue_last, reply=reply, anew=anew)
        if self._evictor.has_to_report(session):
            asking = self._evictor.report(asking, session)
        while True:
            with self._entry.gate(), self._entry.change:
                answer = self._preparer.begin(session, asking, holder)
            if isinstance(answer, Pending):
                return answer
            asking = self._evictor.report(answer, session)

    def _asking(
        self, session: Session, *, continue_last: bool = False, reply: Sequence[int] = (), anew: bool = False
    ) -> Asking:
        window = session.window_state
        return Asking(
            self._prompter.conversation(session, window, continue_last=continue_last),
            window,
            self._evictor.n_sink(session),
            np.asarray(reply, np.int32),
            # A reply that goes on needs some room to go on into.
            max(self.headroom, self.n_ctx_seq // 8) if len(reply) else self.headroom,
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
        """`prepare`, and nothing approximate is left: what follows an eviction is decoded anew. Returns `n_past`."""
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
        """What `prepare` would do now. Renders and plans (and asks `before_encode`); no token is decoded or dropped."""
        self._entry.check()
        self._seats.get(session, reading=True)
        asking = self._asking(session)
        with self._entry.reading():
            return self._preparer.preview(session, asking)

    # -- step

    def step(self, work: Sequence[Work], *, holder: object | None = None) -> StepReport:
        """One `llama_decode` of any mix of prompt chunks and single tokens, each of another session.

        What cannot go in (no room in the row, no cells) gets its error in the report and is left out; the others are
        decoded. Raises OptionError for work that is none: an empty step, a session twice, more than `n_batch` tokens.
        """
        with self._entry.gate(), self._entry.change:
            work = self._stepper.checked(work)
            if not len(self._parking):
                return self._stepper.step(work, holder)
            sessions = [item.session for item in work]
            errors: dict[Session, StepResult] = {}
            for item in work:
                if isinstance(item, NextToken):
                    try:
                        self._bring_back(item.session, holder, wants_logits=False, but=sessions)
                    except LlamaSessionsError as e:
                        errors[item.session] = StepResult(0, False, e)
            left = tuple(i for i, session in zip(work, sessions, strict=True) if session not in errors)
            report = self._stepper.step(left, holder)
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
        if isinstance(session, Session) and self._parking.get(session) is not None:
            with self._entry.gate(), self._entry.change:
                self._bring_back(session, None, wants_logits=True)
                return self._copied_logits(session)
        with self._entry.reading():
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
            ids: TokenArray = _NO_TOKENS.copy() if seat is None else seat.row.tokens.copy()
        ids.flags.writeable = False
        return ids

    # -- rows as a whole

    def fork(self, session: Session) -> Session:
        """A branch: the same messages (deep copies) and the same row, its cells shared. Nothing is decoded.

        The branch has the parent's logits. Raises NoFreeSlot. A session without a row gives a branch without one, a
        parked one a branch that is parked.
        """
        with self._entry.gate(), self._entry.change:
            seat = self._seats.get(session, reading=True)
            twin, copies = session.copy_with_map()
            if self._parking.park_twin(session, twin, copies) or seat is None:
                return twin
            self._store.reconcile(seat.row)
            self._parking.make_way(NOTHING, with_slot=True, but=(session,))
            child = self._seats.take(twin)
            child.row.namespace = seat.row.namespace  # of the cells; the branch's own is looked at when it is prepared
            if seat.row.n and self._store.share(seat.row, child.row, 0, seat.row.n):
                if seat.row.logits is not None:
                    child.row.logits = self._store.logits(seat.row).copy()
                twin.n_past = child.row.n
                child.prompt = seat.prompt.of_copies(copies)  # half a prompt is half a prompt there, too
                twin.last_prepare = session.last_prepare
            return twin

    def release(self, session: Session) -> bool:
        """Drop the row and give the slot back; False if the session has none. Its messages stay its own.

        What the row held stays in the cache of saved KV, for whoever begins with it.
        """
        with self._entry.gate(), self._entry.change:
            seat = self._seats.get(session)
            was_parked = self._parking.forget(session)
            if seat is not None:
                self._snapshots.keep(seat.row)
                self._seats.leave(session, seat)
            session.n_past = 0
            session.forget_appended()
            return was_parked or seat is not None

    def park(self, session: Session, *, holder: object | None = None) -> bool:
        """Save the row's KV and give its slot back; False if the session has none.

        Whatever needs the row next (`prepare`, `append`, `logits`, `fork`) brings it back, into any slot, token for
        token. With `radix=False` nothing is saved, and it is decoded again. Raises StateError for a session that is
        generating.
        """
        with self._entry.gate(), self._entry.change:
            seat = self._seats.get(session, holder)
            if seat is not None:
                self._parking.park(session, seat)
            return seat is not None

    def flush(self, session: Session) -> int:
        """Save what the row holds and the cache does not yet; the row stays. Returns how many tokens were saved."""
        with self._entry.gate(), self._entry.change:
            seat = self._seats.get(session)
            return 0 if seat is None else self._snapshots.keep(seat.row)

    def pin(self, session: Session, on: bool = True) -> None:
        """Never park a session by itself; `on=False`: do so again."""
        with self._entry.gate(), self._entry.change:
            self._seats.get(session, reading=True)
            self._parking.pin(session, checked_bool("on", on))

    def is_pinned(self, session: Session) -> bool:
        """Whether a session is never parked by itself."""
        return self._parking.is_pinned(session)

    def n_room(self, session: Session) -> int:
        """Tokens that the session's row can still take, by its own length. Without a lock: a hint while others work."""
        seat = self._seats.get(session, reading=True)
        n = self._store.n_room(seat.row) if seat is not None else self._store.caps.n_row_max
        return 2**31 - 1 if n is None else n

    def make_room(self, session: Session, n_needed: int, *, holder: object | None = None) -> int:
        """Take at least `n_needed` tokens out of the row, or as many as can go; returns how many went.

        What goes is chosen as `prepare` does, and after all of that the beginning of the reply that is under way. By a
        shift, else a gap, else not at all (0): with `overflow="reprefill"`, where positions end, on memory that cannot,
        or if nothing is prepared. Nothing is rendered and no `on_evict` called: the messages that go leave the
        session's window, and the next `prepare` hands them to it. What follows the hole is approximate then.
        OptionError for a negative `n_needed`.
        """
        checked_int("n_needed", n_needed, 0)
        self._entry.check_may_change()
        self._seats.get(session, holder)
        n_sink = self._evictor.n_sink(session)
        with self._entry.gate(), self._entry.change:
            self._bring_back(session, holder, wants_logits=False)
            seat = self._seats.get(session, holder)
            if seat is None or not n_needed:
                return 0
            return self._preparer.make_room(session, seat, n_needed, n_sink)

    def clear_radix(self) -> None:
        """Forget saved KV, but for what one parked session alone owns."""
        with self._entry.gate(), self._entry.change:
            self._snapshots.clear()

    def hold(self, session: Session, holder: object) -> None:
        """Only `holder` may change the session's row until `let_go`. For engines and pools."""
        with self._entry.gate(), self._entry.change:
            self._seats.hold(session, holder)

    def is_held(self, session: Session) -> bool:
        """Whether somebody is generating in the session."""
        return self._seats.is_held(session)

    def note_reply(self, session: Session, message: Message) -> None:
        """The row's tail is what the assistant said: whoever takes that back drops something worth keeping."""
        seat = self._seats.get(session, reading=True)
        if seat is not None:
            seat.prompt = replace(seat.prompt, said=(*seat.prompt.said, said_of(message)))

    def let_go(self, session: Session, holder: object) -> None:
        """End a `hold`. Never waits, never raises: it may be called from a finaliser."""
        self._seats.let_go(session, holder)

    # -- looking at it

    def stats(self) -> Stats:
        """Counters; what a call under way does is counted at its end. Never waits for a decode."""
        self._entry.check()
        return self._overview.published

    def describe(self) -> str:
        """A printable map: slots, cells, a line for each row, and the cache. Never waits: the edges of a cache that
        changes at that very moment are left out."""
        self._entry.check()
        return self._overview.describe()

    def check_integrity(self) -> None:
        """Prove that rows, slots, cells and llama.cpp's own positions agree; StateError says what does not."""
        with self._entry.gate(), self._entry.change:
            self._seats.reclaim()
            for row in list(self._store.rows.values()):
                self._store.reconcile(row)
            self._store.sequences.clear_scratch()
            self._snapshots.settle()
            check(self._store, self.slots, self.prefix, self._seats.seats(), self._snapshots)

    def close(self) -> None:
        """Free what is ours: context and model of `load`. Sessions keep their messages. Again: nothing."""
        self._entry.close()

    def _sweep_and_publish(self) -> None:
        """At the end of each call that may have changed something, where idle sessions are parked."""
        self._parking.sweep()
        self._overview.publish()

    def _free(self) -> None:
        self._parking.disown()
        self._seats.disown()
        self._parts.close()
