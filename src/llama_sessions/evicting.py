"""What goes when a conversation is too long: the window over its messages moves, and the row is cut to match."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from .errors import CapacityError
from .hooks import Answer, Hooks
from .kv.alignment import Alignment, Ranges, ranges_of, size_of, without
from .kv.holes import Cut, Holes
from .kv.row import Row, common_prefix, end_of
from .kv.store import RowStore
from .layout import Layout, Part
from .notice import Notice
from .options import ManagerOptions, default_headroom
from .prompts import Conversation, Prompter
from .render import Rendered
from .seats import Prompt, Seat
from .session import Session
from .stretches import NO_TOKENS
from .types import MemoryKind, Message, TokenArray
from .window import Window

logger = logging.getLogger("llama_sessions")


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """What of a row is to stay: `tokens` are those it was to have before anything went, `which` the numbers of those
    that are left."""

    tokens: TokenArray
    which: npt.NDArray[np.int64]

    def n_left(self, row: Row) -> int:
        """How many of the row's tokens stay: as far as it holds these, those that are left."""
        return int(np.searchsorted(self.which, common_prefix(row.tokens, self.tokens)))

    def n_of(self, row: Row) -> int:
        """The length of the row up to the last of them."""
        n = self.n_left(row)
        return int(self.which[n - 1]) + 1 if n else 0

    def holes(self, row: Row) -> Ranges:
        """What has to go from between them."""
        goes = np.ones(self.n_of(row), np.bool_)
        goes[self.which[: self.n_left(row)]] = False
        return ranges_of(goes)


@dataclass(frozen=True, slots=True, eq=False)
class Asking:
    """What a session asks for: its conversation through a window that may still have to move.

    `reply`: tokens of the reply that were said already. After an eviction `expected` is what the prompt comes to if the
    template leaves out no more than went; `kept` what the row keeps then; `n_reply_cut` tokens of the reply are gone.
    `anew`: nothing approximate is to be left.
    """

    conversation: Conversation
    window: Window
    n_sink: int
    reply: TokenArray = field(default_factory=lambda: NO_TOKENS)
    headroom: int = 0
    anew: bool = False
    expected: Layout | None = None
    kept: Kept | None = None
    n_reply_cut: int = 0
    n_evicted: int = 0
    gone: tuple[Message, ...] = ()  # since the hook was asked last
    fresh: tuple[Message, ...] = ()  # what it answered then
    answers: tuple[Answer, ...] = ()  # all of them, and those to an earlier try for which there was no room
    dropped: tuple[Message, ...] = ()  # messages of the session, in all


class Evictor:
    """Decides what goes. Changes no row but in `cut_out`."""

    def __init__(self, store: RowStore, options: ManagerOptions, prompter: Prompter, hooks: Hooks) -> None:
        self._store = store
        self._prompter = prompter
        self._hooks = hooks
        self._holes = Holes(store)
        self._n_sink = options.n_sink_for(store.caps.n_ctx_seq)
        self._overflow = options.overflow
        self._strategy = options.eviction
        self._whole_turns = options.eviction == "fifo"
        self._instead = Notice()
        self._too_long_for_model = Notice()
        self._answers: weakref.WeakKeyDictionary[Session, tuple[Answer, ...]] = weakref.WeakKeyDictionary()
        self.n_evictions = 0
        self.n_tokens = 0

    # -- asking, outside of the manager's lock

    def n_sink(self, session: Session) -> int:
        """Tokens behind the system text that stay; may call the `sink_fn` hook."""
        return self._hooks.n_sink(session, self._n_sink, self._store.caps.n_ctx_seq - 1)

    def report(self, asking: Asking, session: Session, *, asks_hook: bool = True) -> Asking:
        """Hand what went to `on_evict`, and look at the conversation through the new window."""
        window, gone, answers = asking.window, list(asking.gone), asking.answers
        if not gone and not (self._hooks.watches_evictions and window.is_unheard(session.messages)):
            return asking
        dropped = [*asking.dropped, *(m for m in gone if not _is_in(m, window.replacements))]
        fresh: Sequence[Message] = ()
        if self._hooks.watches_evictions:
            if asks_hook:
                handed = window.handed(session.messages, gone)
                answer = self._hooks.on_evict(handed, session, answers)
                fresh = answer.messages
                answers = (*(a for a in answers if a is not answer), answer)
            window = window.without(session.messages, gone, reported=True, replacements=fresh)
        else:
            window = window.without(session.messages, gone, reported=True)
        conversation = self._prompter.conversation(session, window, continue_last=asking.conversation.continue_last)
        return replace(
            asking,
            window=window,
            conversation=conversation,
            gone=(),
            fresh=tuple(fresh),
            answers=answers,
            dropped=tuple(dropped),
        )

    def remember(self, session: Session, asking: Asking) -> None:
        """There was no room for it now: what the hook answered counts for the next try, too."""
        if asking.answers:
            self._answers[session] = asking.answers

    def remembered(self, session: Session) -> tuple[Answer, ...]:
        """What the hook answered to the last try, if there was no room for that; it is forgotten with this."""
        return self._answers.pop(session, ())

    # -- what is wanted

    def layout(
        self, session: Session, asking: Asking, rendered: Rendered, row: Row | None, prompt: Prompt
    ) -> tuple[Layout, Asking]:
        """How the row will lie in the prompt. `row`: what the session has, asked for `prompt` last."""
        whole = np.concatenate([rendered.tokens, asking.reply]) if len(asking.reply) else rendered.tokens
        n = len(rendered.tokens)
        straight = Layout(Alignment.straight(whole), n)
        if row is not None and row.namespace != session.namespace:
            row = None
        expected, kept = asking.expected, asking.kept
        if expected is not None:
            is_there = kept is None or (row is not None and bool(kept.holes(row)))
            if is_there and np.array_equal(whole, expected.alignment.whole):
                return expected, asking
            # The template wrote something else, there are replacements, or the row went: what follows is decoded anew.
            if asking.n_reply_cut:
                straight = replace(straight, alignment=straight.alignment.cut_out([(n, n + asking.n_reply_cut)]))
            return straight, replace(asking, kept=None)
        if row is None or prompt.layout is None or asking.anew or asking.fresh:
            return straight, asking
        alignment = self._of_row(prompt.layout, row).alignment.followed_by(whole)
        n_tokens = len(alignment.tokens)
        caps = self._store.caps
        n_end = row.offset + n_tokens + min(asking.headroom, max(0, caps.n_ctx_seq - n_tokens))
        runs_out = row.offset > 0 and n_end > caps.n_ctx_train
        if runs_out or (self._n_over(asking, n_tokens) and not self.ways(row)):
            return straight, asking
        return Layout(alignment, n), asking

    @staticmethod
    def _of_row(layout: Layout, row: Row) -> Layout:
        """The layout, with what was added to the row since."""
        alignment = layout.alignment.first(row.n)
        return replace(layout, alignment=alignment.grown(row.tokens[len(alignment.tokens) :]))

    def _parts(self, conversation: Conversation, rendered: Rendered) -> tuple[Part, ...]:
        spans = self._prompter.spans(conversation, rendered)
        return tuple(
            Part(owner, message["role"], span.p0, span.p1)
            for owner, message, span in zip(conversation.owners, conversation.messages, spans, strict=True)
        )

    def _n_over(self, asking: Asking, n_tokens: int) -> int:
        """How many of so many tokens have to go."""
        most = self._store.caps.n_row_max
        return 0 if most is None else max(0, n_tokens - (most - asking.headroom))

    def narrowed(
        self,
        session: Session,
        asking: Asking,
        rendered: Rendered,
        layout: Layout,
        row: Row | None,
        who_goes: Callable[[Cut], object],
    ) -> Asking | None:
        """What is asked once enough has gone to fit; None where nothing can go. `who_goes` raises CapacityError where
        no cells can be had for a cut."""
        n_needed = self._n_over(asking, len(layout.alignment.tokens))
        if not n_needed:
            return None
        layout = replace(layout, parts=self._parts(asking.conversation, rendered))
        kept = None if row is None else self._kept(session, asking, layout, n_needed, row, who_goes)
        if kept is not None:
            return kept
        # Where the row does not go on behind a hole, all that follows is decoded anew.
        if asking.expected is None:
            layout = replace(layout, alignment=Alignment.straight(layout.alignment.whole))
            n_needed = self._n_over(asking, len(layout.alignment.whole))
            if not n_needed:  # there were more sinks than holes
                return replace(asking, expected=layout)
        ranges, gone = self._choose(session, asking, layout, n_needed, anew=True)
        return self._without(asking, layout, ranges, gone, None)

    def _kept(
        self,
        session: Session,
        asking: Asking,
        layout: Layout,
        n_needed: int,
        row: Row,
        who_goes: Callable[[Cut], object],
    ) -> Asking | None:
        """What is asked if holes can be cut into the row; None where they cannot."""
        kept, n = asking.kept, len(layout.alignment.tokens)
        if asking.expected is None and not asking.anew:
            kept = Kept(layout.alignment.tokens, np.arange(n))
        if kept is None or row.namespace != session.namespace or not self.ways(row):
            return None
        ranges, gone = self._choose(session, asking, layout, n_needed, anew=False)
        left = Kept(kept.tokens, kept.which[without(ranges, n)])
        holes = left.holes(row)
        n_stays = len(left.which)
        n_more, n_free = n_stays - left.n_left(row), min(asking.headroom, max(0, self._store.caps.n_ctx_seq - n_stays))
        if not holes or not any(True for _ in self._open(row, left.n_of(row), holes, n_more, n_free, who_goes)):
            return None
        return self._without(asking, layout, ranges, gone, left)

    def _without(
        self, asking: Asking, layout: Layout, ranges: Ranges, gone: Sequence[int], kept: Kept | None
    ) -> Asking | None:
        """What is asked when these ranges and parts go; None where that gets nowhere."""
        leaving = tuple(m for i in gone if (m := layout.parts[i].message) is not None)
        if not ranges or (leaving and all(_is_in(m, asking.fresh) for m in leaving)):
            return None
        goes = ~without(ranges, len(layout.alignment.tokens))
        reply0, reply1 = layout.reply
        return replace(
            asking,
            expected=layout.without(ranges, gone),
            kept=kept,
            n_reply_cut=asking.n_reply_cut + int(goes[reply0:reply1].sum()),
            n_evicted=asking.n_evicted + int(goes.sum()),
            gone=leaving,
        )

    def _choose(
        self, session: Session, asking: Asking, layout: Layout, n_needed: int, *, anew: bool
    ) -> tuple[Ranges, list[int]]:
        """The ranges of the row that go, and the numbers of the parts that go with them."""
        if self._hooks.watches_evictions:
            # They go in any case, and something of about their length comes back.
            n_needed += layout.n_tokens_of(asking.window.replacements)
        return self._chosen(session, layout, n_needed, asking.n_sink, asking.window, anew=anew)

    def _chosen(
        self, session: Session, layout: Layout, n_needed: int, n_sink: int, window: Window, *, anew: bool
    ) -> tuple[Ranges, list[int]]:
        from .kv.eviction import STRATEGIES, earlier_steps, plan_eviction, units  # here: most programs never come here

        pinned = {id(m) for m in session.pinned_messages()}
        n_sink = 0 if anew else n_sink  # what is decoded anew needs none
        stand_ins = {id(m) for m in window.replacements}
        request = layout.request(n_needed, layout.n_head + n_sink, pinned, stand_ins)
        chosen = "message" if anew and self._whole_turns else self._strategy
        strategy = STRATEGIES[chosen] if isinstance(chosen, str) else chosen
        n = request.n_tokens
        ranges: Ranges = plan_eviction(request, strategy) if request.n_kept < n else ()
        if anew:  # by the message, a call with its results: what is begun goes whole
            stays = without(ranges, n)
            begun = (unit for unit in units(request.pieces) if not all(stays[p.p0 : p.p1].all() for p in unit))
            ranges = ranges_of(~without([(p.p0, p.p1) for unit in begun for p in unit if not p.is_pinned], n))
        n_left = n_needed - size_of(ranges)
        if n_left > 0:
            ranges = ranges_of(~without([*ranges, *earlier_steps(request, n_left)], n))
        gone = layout.gone(request, ranges, whole_turns=self._whole_turns and not anew)
        return layout.extended(ranges, n_needed - size_of(ranges)), gone

    # -- doing it

    def ways(self, row: Row) -> list[str]:
        """How the middle of this row can be taken out, the wanted way first."""
        caps = self._store.caps
        possible = {
            "shift": caps.can_have_holes and caps.can_shift,
            "gap": caps.can_have_holes and row.end < caps.n_ctx_train and caps.n_ctx_seq < caps.n_ctx_train,
        }
        order = {"shift": ("shift", "gap"), "gap": ("gap",), "reprefill": ()}[self._overflow]
        return [way for way in order if possible[way]]

    def _open(
        self, row: Row, n: int, holes: Ranges, n_more: int, n_free: int, find_cells: Callable[[Cut], object]
    ) -> Iterator[tuple[str, Cut]]:
        """Of these the ones in which the holes can be cut into the row's first `n` tokens now, and what each takes:
        `n_more` tokens come behind them at once, and `n_free` more are to find a position."""
        for way in self.ways(row):
            shift = way == "shift"
            if not shift and end_of(row.jumps, n) + n_more + n_free > self._store.caps.n_ctx_train:
                continue
            if not self._holes.is_possible(row, n, holes, shift=shift):
                continue
            cut = self._holes.demand(row, n, holes, n_more, shift=shift)
            with suppress(CapacityError):
                find_cells(cut)
                yield way, cut

    def cut_out(self, row: Row, holes: Ranges, n_more: int, make_way: Callable[[Cut], object]) -> bool:
        """Take `holes` out of a row in the best way there is, so that `n_more` tokens have cells; False: in none, and
        the row is as it was, or ends at the first hole. `make_way` parks idle sessions for what a way needs."""
        ways = self._open(row, row.n, holes, n_more, 0, make_way)
        way = next((way for way, cut in ways if not cut.n_to_copy or self._holes.can_copy()), "reprefill")
        self._say_instead(way)
        return way != "reprefill" and self._holes.cut_out(row, holes, shift=way == "shift")

    def say_if_uncut(self, row: Row) -> None:
        """That what stays of a row is decoded anew, because its middle cannot be taken out."""
        if self._store.caps.n_row_max is not None and not self.ways(row):
            self._say_instead("reprefill")

    def say_if_untrained(self, n_tokens: int) -> None:
        """That a prompt is longer than anything the model has seen: nothing evicts before `n_ctx` is full."""
        caps = self._store.caps
        n_trained = caps.n_ctx_train
        if n_tokens > n_trained and caps.kind is not MemoryKind.RECURRENT:
            headroom = caps.n_ctx_seq - n_trained + default_headroom(n_trained)
            self._too_long_for_model.say(
                logger,
                "a prompt of %d tokens is longer than the %d that the model was trained for, so it may make no sense "
                "to it; headroom=%d lets every session evict before that",
                n_tokens, n_trained, headroom,
            )  # fmt: skip

    def _say_instead(self, way: str) -> None:
        """Which way is taken, where that is not the wanted one; once."""
        if way != self._overflow:
            caps = self._store.caps
            why = caps.shift_refused_because if self._overflow == "shift" or not caps.can_have_holes else ""
            why = why or "neither cells nor positions are free for it"
            self._instead.say(logger, "overflow=%r cannot be had (%s): %r instead", self._overflow, why, way)

    def room_in(self, session: Session, seat: Seat, n_needed: int, n_sink: int) -> tuple[Ranges, Layout, list[int]]:
        """What goes from a row so that `n_needed` tokens are free in it: ranges, how it lies then, the parts gone."""
        prompt, row = seat.prompt, seat.row
        rendered, conversation, layout = prompt.rendered, prompt.conversation, prompt.layout
        if rendered is None or conversation is None:
            return (), Layout(Alignment.straight(row.tokens), 0), []
        if layout is None:
            layout = Layout(Alignment.straight(rendered.tokens), len(rendered.tokens))
        if not layout.parts:
            layout = replace(layout, parts=self._parts(conversation, rendered))
        n = min(row.n, len(layout.alignment.tokens))
        if not np.array_equal(row.tokens[:n], layout.alignment.tokens[:n]):
            return (), layout, []  # an interrupt came when it had been cut, and before that was noted
        layout = self._of_row(layout, row)
        ranges, gone = self._chosen(session, layout, n_needed, n_sink, session.window_state, anew=False)
        return ranges, layout, gone

    @staticmethod
    def n_evicted(asking: Asking, layout: Layout | None) -> int:
        """How many tokens go that were there until now. `layout`: how the row lay in the prompt before."""
        n_before = 0 if layout is None else layout.n_cut_of(asking.reply)
        return asking.n_evicted - min(n_before, asking.n_reply_cut)

    def count(self, n_tokens: int) -> None:
        """Note an eviction."""
        if n_tokens:
            self.n_evictions += 1
            self.n_tokens += n_tokens


def _is_in(message: Message, messages: Sequence[Message]) -> bool:
    return any(message is m for m in messages)
