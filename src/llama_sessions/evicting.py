"""What goes when a conversation is too long: the window over its messages moves, and the row is cut to match."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from .errors import CapacityError
from .hooks import Hooks
from .kv.alignment import Alignment, Ranges, ranges_of, without
from .kv.holes import Holes
from .kv.row import Row, common_prefix
from .kv.store import RowStore
from .layout import Layout, Part
from .notice import Notice
from .options import ManagerOptions
from .prompts import Conversation, Prompter
from .render import Rendered
from .seats import Seat
from .session import Session
from .stretches import NO_TOKENS
from .types import Message, TokenArray
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
    dropped: tuple[Message, ...] = ()  # messages of the session, in all


class Evictor:
    """Decides what goes. Changes no row but in `cut_out`."""

    def __init__(self, store: RowStore, options: ManagerOptions, prompter: Prompter, hooks: Hooks) -> None:
        self._store = store
        self._prompter = prompter
        self._hooks = hooks
        self._holes = Holes(store)
        self._n_sink = options.n_sink
        self._overflow = options.overflow
        self._strategy = options.eviction
        self._whole_turns = options.eviction == "fifo"
        self._instead = Notice()
        self.n_evictions = 0
        self.n_tokens = 0

    # -- asking, outside of the manager's lock

    def n_sink(self, session: Session) -> int:
        """Tokens behind the system text that stay; may call the `sink_fn` hook."""
        return self._hooks.n_sink(session, self._n_sink)

    def report(self, asking: Asking, session: Session) -> Asking:
        """Hand what went to `on_evict`, and look at the conversation through the new window."""
        window, gone = asking.window, list(asking.gone)
        dropped = [*asking.dropped, *(m for m in gone if not _is_in(m, window.replacements))]
        if self._hooks.watches_evictions:
            handed = [*window.replacements, *window.unreported]
            handed += [m for m in gone if not _is_in(m, handed)]
            replacements = self._hooks.on_evict(handed, session)
            window = window.without(session.messages, gone, reported=True, replacements=replacements)
        else:
            window = window.without(session.messages, gone, reported=True)
        conversation = self._prompter.conversation(session, window, continue_last=asking.conversation.continue_last)
        return replace(asking, window=window, conversation=conversation, gone=(), dropped=tuple(dropped))

    def has_to_report(self, session: Session) -> bool:
        """Whether `make_room` dropped what a hook wants to hear of."""
        return bool(session.window_state.unreported) and self._hooks.watches_evictions

    # -- what is wanted

    def layout(self, asking: Asking, rendered: Rendered, seat: Seat | None) -> tuple[Layout, Asking]:
        """How the row will lie in the prompt."""
        whole = np.concatenate([rendered.tokens, asking.reply]) if len(asking.reply) else rendered.tokens
        n = len(rendered.tokens)
        expected = asking.expected
        if expected is not None:
            if np.array_equal(whole, expected.alignment.whole):
                return expected, asking
            # The template wrote something else, or there are replacements: what follows is decoded anew.
            alignment = Alignment.straight(whole)
            if asking.n_reply_cut:
                alignment = alignment.cut_out([(n, n + asking.n_reply_cut)])
            asking = replace(asking, kept=None)
        elif seat is not None and seat.prompt.layout is not None and not asking.anew:
            alignment = self._of_row(seat.prompt.layout, seat.row).alignment.followed_by(whole)
        else:
            alignment = Alignment.straight(whole)
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

    def limit(self, asking: Asking) -> int | None:
        """Tokens above which something has to go; None: nothing ever has to."""
        most = self._store.caps.n_row_max
        return None if most is None else most - asking.headroom

    def narrowed(self, session: Session, asking: Asking, rendered: Rendered, layout: Layout) -> Asking | None:
        """What is asked once enough has gone to fit; None where nothing can go."""
        limit = self.limit(asking)
        n = len(layout.alignment.tokens)
        if limit is None or n <= limit:
            return None
        layout = replace(layout, parts=self._parts(asking.conversation, rendered))
        n_needed = n - limit
        if self._hooks.watches_evictions and asking.window.replacements:
            # They go in any case, and something of about their length comes back.
            n_needed += layout.n_tokens_of(asking.window.replacements)
        ranges, gone = self._choose(session, layout, n_needed, asking.n_sink, anew=asking.anew)
        if not ranges:
            return None
        stays = without(ranges, n)
        first = asking.kept if asking.expected is not None else Kept(layout.alignment.tokens, np.arange(n))
        reply0, reply1 = layout.reply
        return replace(
            asking,
            expected=layout.without(ranges, gone),
            kept=None if first is None or asking.anew else Kept(first.tokens, first.which[stays]),
            n_reply_cut=asking.n_reply_cut + int((~stays[reply0:reply1]).sum()),
            n_evicted=asking.n_evicted + int((~stays).sum()),
            gone=tuple(m for i in gone if (m := layout.parts[i].message) is not None),
        )

    def _choose(
        self, session: Session, layout: Layout, n_needed: int, n_sink: int, *, anew: bool
    ) -> tuple[Ranges, list[int]]:
        """The ranges of the row that go, and the numbers of the parts that go with them."""
        from .kv.eviction import STRATEGIES, plan_eviction  # here: most programs never get as far

        pinned = {id(m) for m in session.pinned_messages()}
        n_sink = 0 if anew else n_sink  # what is decoded anew needs none
        request = layout.request(n_needed, layout.n_head + n_sink, pinned)
        chosen = "message" if anew and self._whole_turns else self._strategy
        strategy = STRATEGIES[chosen] if isinstance(chosen, str) else chosen
        ranges: Ranges = plan_eviction(request, strategy) if request.n_kept < request.n_tokens else ()
        gone = layout.gone(request, ranges, whole_turns=self._whole_turns and not anew)
        if anew:  # by the message: what is begun goes whole
            touched = [p for p in request.pieces if not without(ranges, request.n_tokens)[p.p0 : p.p1].all()]
            gone = sorted({*gone, *(p.index for p in touched)})
            at = [request.pieces[i] for i in gone]
            ranges = ranges_of(~without([(p.p0, p.p1) for p in at], request.n_tokens))
        n_left = n_needed - sum(p1 - p0 for p0, p1 in ranges)
        return layout.extended(ranges, n_left), gone

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

    def cut_out(self, row: Row, holes: Ranges, make_way: Callable[[], bool]) -> bool:
        """Take `holes` out of a row in the best way there is; False: in none, and the row is as it was, or ends at the
        first hole. `make_way` parks idle sessions so that what follows the first hole has room once more."""
        ways = self.ways(row)
        if ways[:1] == ["shift"] and not self._holes.can_shift(row, holes):
            with suppress(CapacityError):
                make_way()
            if not self._holes.can_shift(row, holes):
                ways = ways[1:]
        way = ways[0] if ways else "reprefill"
        if way != self._overflow:
            why = self._store.caps.shift_refused_because or "there are no free cells to make shared ones its own"
            self._instead.say(logger, "overflow=%r cannot be had (%s): %r instead", self._overflow, why, way)
        return way != "reprefill" and self._holes.cut_out(row, holes, shift=way == "shift")

    def room_in(self, session: Session, seat: Seat, n_needed: int, n_sink: int) -> tuple[Ranges, Layout, list[int]]:
        """What goes from a row so that `n_needed` tokens are free in it: ranges, how it lies then, the parts gone."""
        prompt = seat.prompt
        n = 0 if prompt.rendered is None else len(prompt.rendered.tokens)
        layout = prompt.layout or Layout(Alignment.straight(seat.row.tokens[:n].copy()), n)
        if not layout.parts and prompt.rendered is not None and prompt.conversation is not None:
            layout = replace(layout, parts=self._parts(prompt.conversation, prompt.rendered))
        layout = self._of_row(layout, seat.row)
        ranges, gone = self._choose(session, layout, n_needed, n_sink, anew=False)
        return ranges, layout, gone

    def count(self, n_tokens: int) -> None:
        """Note an eviction."""
        if n_tokens:
            self.n_evictions += 1
            self.n_tokens += n_tokens


def _is_in(message: Message, messages: Sequence[Message]) -> bool:
    return any(message is m for m in messages)
