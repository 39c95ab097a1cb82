"""`Batcher`: who waits, who talks, who gave way; and the step that decodes once for all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

from .errors import Cancelled, CapacityError, ContextOverflow, DecodeError, StateError
from .kv.row import common_prefix
from .manager import ContextManager
from .pace import Pace
from .pending import NextToken, PromptChunk, Work
from .pool_stats import PoolStats, Tally
from .reply import Chunk
from .report import StepResult
from .session import Session
from .ticket import Ticket
from .types import FloatArray

_STEM = 16  # tokens of a common stem from which on it is worth waiting for whoever decodes it
_PATIENCE = 8  # times that others may go first
_LOOK_AGAIN_S = 0.2  # sessions outside of the pool may have made room, and nobody says so


class Batcher:
    """Holds the sessions of a pool. `submit` and `stats` from any thread; one thread at a time may `step`.

    What goes wrong for one session is its ticket's. An interrupt in a step is raised as well; whoever was in it goes on
    with the next one from what is then known to be true.
    """

    def __init__(self, cm: ContextManager, share: float) -> None:
        self.cm = cm
        self.changed = threading.Condition()
        """Guards the lists below; told when one of them changes, or somebody asked for something."""
        self.waiting: list[Ticket] = []
        self.running: list[Ticket] = []  # in the order in which they were admitted
        self.paused: list[Ticket] = []  # gave way; the oldest first
        self._by_session: dict[Session, Ticket] = {}
        self._pace = Pace(share)
        self._tally = Tally(cm.capabilities.n_batch)
        self._chosen: dict[Ticket, int | None] = {}  # tokens that are still to be said, after an interrupt too
        self._refused: Ticket | None = None  # the next in line, for whom there was no room when it was last asked
        self._refused_at = 0.0
        self._n_turns = 0  # of talkers, where not all go into a batch

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.running or self.paused)

    @property
    def tickets(self) -> list[Ticket]:
        return [*self.running, *self.paused, *self.waiting]

    def check_is_new(self, session: Session) -> None:
        """StateError for a session that is here already."""
        if session in self._by_session:
            raise StateError("the session is in the pool already; wait for its reply, or cancel it")

    def add(self, ticket: Ticket) -> None:
        """Let it wait. Called with `changed` held; StateError for a session that somebody else holds."""
        self.check_is_new(ticket.session)
        self.cm.hold(ticket.session, self)
        self._by_session[ticket.session] = ticket
        self.waiting.append(ticket)
        self.changed.notify_all()

    def stats(self) -> PoolStats:
        return self._tally.stats(len(self.waiting), len(self.running), len(self.paused))

    # -- a step

    def step(self) -> None:
        """One decode for everybody. Raises only what concerns all of them."""
        started, decoded = time.perf_counter(), self._tally.step_seconds
        self._end_who_is_over()
        if self._admit():
            self._end_who_is_over()  # hooks may take their time
        packed = self._packed()
        is_short = self._decode(packed) if packed else False
        n_running = len(self.running)
        self._sample()  # first: whoever gives way now has used its logits, which are not kept
        if is_short and len(self.running) == n_running:
            self._give_way()
        elif not self.running:
            self._fail_who_never_fits()
        self._tally.own_seconds += time.perf_counter() - started - (self._tally.step_seconds - decoded)

    def _end_who_is_over(self) -> None:
        for ticket in self.tickets:
            if ticket.error is not None or ticket.reply is not None:  # an interrupt came in between
                self.end(ticket, ticket.error)
            elif ticket.is_cancelled:
                self.cut_short(ticket, "cancelled")
            elif ticket.is_late:
                self.cut_short(ticket, "timeout")

    def cut_short(self, ticket: Ticket, why: str) -> None:
        """End it with what was said."""
        with self._blaming(ticket):
            self.end(ticket, chunks=ticket.generation.cut_short(why, ticket.seconds))

    def end(self, ticket: Ticket, error: BaseException | None = None, chunks: Sequence[Chunk] = ()) -> None:
        """It is over, with a reply or an error; the others do not notice. Its session is free before it says so."""
        ticket.error = error
        if error is not None:
            with suppress(Exception):  # the first error is the one that counts
                ticket.generation.fail()
        try:
            with self.changed:
                if self._by_session.get(ticket.session) is ticket:
                    self.cm.let_go(ticket.session, self)
                    del self._by_session[ticket.session]
                    self._tally.note_end(error, ticket.reply)
                for tickets in (self.waiting, self.running, self.paused):
                    if ticket in tickets:
                        tickets.remove(ticket)
                self._chosen.pop(ticket, None)
                self._refused = None
                self.changed.notify_all()
        finally:
            ticket.end(chunks)

    def abandon(self) -> int:
        """In a finaliser: all sessions keep what was said. Returns how many there were. Waits for nobody, and tells
        nobody: whoever has a ticket has the pool."""
        tickets = self.tickets
        for ticket in tickets:
            with suppress(Exception):  # one that cannot be kept takes nothing from the others
                ticket.generation.abandon()
        return len(tickets)

    @contextmanager
    def _blaming(self, ticket: Ticket) -> Iterator[None]:
        """Whatever goes wrong in here ends this one; an interrupt is raised as well."""
        try:
            yield
        except BaseException as e:  # whatever it was: the others go on
            self._blame(ticket, e)

    def _blame(self, ticket: Ticket, error: BaseException) -> None:
        if isinstance(error, Cancelled):  # a hook's word; its reply says so
            self.cut_short(ticket, "cancelled")
            return
        self.end(ticket, error)
        if not isinstance(error, Exception):
            raise error

    # -- who comes in

    def _admit(self) -> bool:
        """Bring back who gave way, then admit who waits, as long as there is room for what is needed now; whether
        anybody was looked at."""
        if not self.paused and time.perf_counter() - self._refused_at > _LOOK_AGAIN_S:
            self._refused = None  # not for who gave way: it would take back what it gave
        is_anybody = False
        while (ticket := self._next_in_line()) is not None and ticket is not self._refused:
            self._bring_in(ticket, may_wait=True)
            is_anybody = True
        return is_anybody

    def _next_in_line(self) -> Ticket | None:
        """Who is admitted next: the highest priority, then who came first; but nobody is passed over for ever."""
        if self.paused:
            return self.paused[0]
        return max(self.waiting, key=_claim, default=None)

    def _bring_in(self, ticket: Ticket, *, may_wait: bool) -> None:
        with self._blaming(ticket):
            if not self._begins(ticket, may_wait=may_wait):
                if not self._park_who_waits(ticket):
                    self._refuse(ticket)
                return
            with self.changed:
                if ticket in self.paused:
                    self.paused.remove(ticket)
                else:
                    self.waiting.remove(ticket)
                    for other in self.waiting:
                        other.n_passed_over += other.submitted < ticket.submitted
                self.running.append(ticket)
                ticket.state = "prompt"
                self.changed.notify_all()
            self._share_stem(ticket)

    def _begins(self, ticket: Ticket, *, may_wait: bool) -> bool:
        """Whether there is room for its prompt, or for the row that it gave up; that is then begun."""
        generation = ticket.generation
        if ticket.state == "waiting":
            return generation.start(ticket.seconds, may_wait=may_wait)
        try:
            if not ticket.is_torn:
                generation.come_back()
            self._mend(ticket)
        except CapacityError as e:
            if not may_wait or isinstance(e, ContextOverflow):
                raise
            return False
        return True

    def _refuse(self, ticket: Ticket) -> None:
        self._refused, self._refused_at = ticket, time.perf_counter()

    def _park_who_waits(self, but: Ticket) -> bool:
        """Park the row of a session that waits, too, the last in line; whether there was one."""
        return any(self.cm.park(t.session, holder=self) for t in reversed(self.waiting) if t is not but)

    def _share_stem(self, ticket: Ticket) -> None:
        """Let it wait for whoever is decoding the longest stem that both begin with, and waits for nobody."""
        mine = ticket.generation.pending
        if mine is None or ticket.n_generated or self.cm.capabilities.keeps_state:
            return  # a reply under way comes back as it was, and is not planned anew
        longest = mine.row.n + _STEM - 1
        for other in self.running:
            theirs = other.generation.pending
            if other is ticket or theirs is None or other.waits_for is not None:
                continue
            if other.session.namespace != ticket.session.namespace:
                continue
            n = min(common_prefix(mine.tokens, theirs.tokens), mine.n_tokens - 1)
            if n > longest and theirs.row.n < n:
                ticket.waits_for, longest = (other, n), n

    def _still_waits(self, ticket: Ticket) -> bool:
        """Whether the stem that it is to share is still being decoded; if not, its prompt is planned anew."""
        if ticket.waits_for is None:
            return False
        other, n = ticket.waits_for
        theirs = other.generation.pending
        if theirs is not None and other in self.running and theirs.row.n < n:
            return True
        ticket.generation.begin_prompt()
        ticket.waits_for = None
        self._share_stem(ticket)  # the next longest
        return ticket.waits_for is not None

    def _mend(self, ticket: Ticket) -> None:
        """Let a row that a step left as nobody knows become again what it was to be."""
        if ticket.is_torn:
            ticket.generation.begin_again()
            ticket.is_torn = False

    # -- what is decoded

    def _packed(self) -> list[tuple[Ticket, Work]]:
        """The next token of everybody who talks, then prompts, the oldest first."""
        alone = next((t for t in self.running if t.goes_alone), None)
        talk: list[tuple[Ticket, Work]] = []
        prompts: list[Ticket] = []
        for ticket in [*self.running] if alone is None else [alone]:
            try:  # no `with`: that is two calls more, once a token
                if (ticket.is_torn or ticket.waits_for is not None) and not self._is_ready(ticket):
                    continue
                if ticket.generation.pending is not None:
                    prompts.append(ticket)
                elif (item := ticket.generation.work(1)) is not None:
                    talk.append((ticket, item))
            except BaseException as e:  # as of `_blaming`
                self._blame(ticket, e)
        n_batch = self.cm.capabilities.n_batch
        if len(talk) + bool(prompts) > n_batch:  # in turn, and a prompt goes on as well
            talk.sort(key=lambda pair: pair[0].last_turn)
            talk = talk[: n_batch - bool(prompts) or self._tally.n_steps % 2]  # of one token: every other step
            for ticket, _ in talk:
                self._n_turns = ticket.last_turn = self._n_turns + 1  # not a time of the step, in which some are first
        left = self._pace.n_prompt(len(talk), n_batch - len(talk))
        return talk + self._packed_prompts(prompts, left)

    def _is_ready(self, ticket: Ticket) -> bool:
        """Whether it may be in the next step; without room for what that takes it gives way."""
        try:
            self._mend(ticket)
            return not self._still_waits(ticket)
        except CapacityError as e:
            if isinstance(e, ContextOverflow):
                raise
            self._pause(ticket)
            return False

    def _packed_prompts(self, prompts: list[Ticket], left: int) -> list[tuple[Ticket, Work]]:
        packed: list[tuple[Ticket, Work]] = []
        for ticket in prompts:
            pending = ticket.generation.pending
            if pending is None or left <= 0:
                break
            with self._blaming(ticket):
                self.cm.ask_progress(pending)
                item = ticket.generation.work(left)
                if item is not None:
                    packed.append((ticket, item))
                    left -= min(left, pending.n_left)
        return packed

    def _decode(self, packed: list[tuple[Ticket, Work]]) -> bool:
        """One step of these; whether cells were short for somebody."""
        for ticket, _ in packed:
            ticket.is_torn = True  # until it is known what came of it: an interrupt leaves it so
        report = self.cm.step([item for _, item in packed], holder=self, read=self._choose)
        n_next = n_prompt = n_errors = 0
        is_short = False
        for ticket, item in packed:
            result = report.results[ticket.session]
            if isinstance(item, NextToken):
                n_next += result.n_decoded
            else:
                n_prompt += result.n_decoded
            if result.error is None:
                ticket.is_torn = ticket.goes_alone = False
                if isinstance(item, PromptChunk) and item.pending.done:
                    with self._blaming(ticket):
                        self.cm.ask_progress(item.pending)
                continue
            n_errors += 1
            is_short = self._settle(ticket, result, is_alone=len(packed) == 1) or is_short
        self._tally.note_step(n_next, n_prompt, report.seconds)
        if not n_errors:
            self._pace.note(n_next, n_prompt, report.seconds)
        return is_short

    def _settle(self, ticket: Ticket, result: StepResult, *, is_alone: bool) -> bool:
        """What an error of a step means for one of them; whether somebody has to give way for it."""
        error = result.error
        if isinstance(error, CapacityError) and not isinstance(error, ContextOverflow):
            ticket.is_torn = False
            return True
        if not isinstance(error, DecodeError) or ticket.goes_alone or is_alone:
            self.end(ticket, error)
            return False
        # The batch failed as a whole. Everybody in it goes on alone from what its row truly holds: whose fault it was
        # shows then. By 1 and -1 llama.cpp says that it has done nothing; else some of it may have been done.
        ticket.goes_alone = True
        ticket.is_torn = error.code not in (1, -1)
        return False

    # -- what is said

    def _choose(self, session: Session, logits: FloatArray) -> None:
        """The next token of a session, for `_sample`: this is within a call of the manager, where no reply can end."""
        ticket = self._by_session[session]
        try:
            self._chosen[ticket] = ticket.generation.choose(logits)
        except BaseException as e:  # of a grammar, say: it ends this one, once the step is through
            ticket.error = e
            if not isinstance(e, Exception):
                raise

    def _choose_without_step(self, ticket: Ticket) -> None:
        """Where the logits were there already, or a step was interrupted before they were read."""
        generation = ticket.generation
        if not ticket.is_torn and generation.pending is None and generation.work(1) is None:
            self.cm.read_logits(ticket.session, partial(self._choose, ticket.session), holder=self)

    def _sample(self) -> None:
        """A token for everybody whose logits are ready."""
        chosen = self._chosen
        for ticket in [*self.running]:
            generation = ticket.generation
            try:
                if ticket not in chosen:
                    self._choose_without_step(ticket)
                if ticket.error is not None:
                    self.end(ticket, ticket.error)
                if ticket not in chosen:
                    continue
                chunks = generation.chunks(chosen.pop(ticket))
                ticket.state = "running"
                ticket.last_token_at = self._tally.note_token(ticket.submitted, ticket.last_token_at)
                if generation.reply is None:
                    ticket.put(chunks)
                else:
                    self.end(ticket, chunks=chunks)
            except BaseException as e:  # as of `_blaming`
                self._blame(ticket, e)

    # -- who gives way

    def _give_way(self) -> None:
        """Cells ran out: the youngest of those who run gives up its row, to go on later; one alone its own past."""
        if not self.running:
            return
        ticket = min(self.running, key=lambda t: (t.priority, -self.running.index(t)))
        with self._blaming(ticket):
            if len(self.running) > 1:
                self._pause(ticket)
            elif not ticket.generation.gives_way():
                raise self._no_cells()

    def _pause(self, ticket: Ticket) -> None:
        """Park its row; it comes back as soon as somebody else is through."""
        ticket.generation.give_up_row()
        self._tally.n_preemptions += 1
        with self.changed:
            self.running.remove(ticket)
            ticket.state, ticket.waits_for, ticket.goes_alone = "paused", None, False
            self.paused.append(ticket)
            self.paused.sort(key=lambda t: t.submitted)
            self._refuse(self.paused[0])  # or it would take back at once what it gave

    def _no_cells(self) -> CapacityError:
        stats = self.cm.stats()
        n_total = stats.n_cells_total or 0
        return CapacityError(
            f"{stats.n_cells_unique} of {n_total} cells are held, by sessions outside of the pool too; release a "
            "session or raise n_ctx",
            needed=1,
            available=n_total - stats.n_cells_unique,
            unit="cells",
        )

    def _fail_who_never_fits(self) -> None:
        """Nobody runs, and still there is no room: what is missing is held by sessions outside of the pool."""
        ticket = self._next_in_line()
        if ticket is not None and ticket is self._refused:
            self._bring_in(ticket, may_wait=False)


def _claim(ticket: Ticket) -> tuple[bool, int, float]:
    """Of all who wait, the one with the highest is next. Whoever was passed over often enough comes in its turn."""
    is_patient = ticket.n_passed_over >= _PATIENCE
    return is_patient, 0 if is_patient else ticket.priority, -ticket.submitted
