"""Several generations at once: each step is one `llama_decode` of whatever all of them want next."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from .errors import Cancelled, CapacityError, OptionError, StateError
from .generation import Generation
from .generation_options import GenerationOptions
from .manager import ContextManager
from .pending import PromptChunk, Work
from .reply import Branch
from .session import Session
from .stream import reach_logits


class Together:
    """Holds the sessions of its generations, and drives them until all have their reply."""

    def __init__(self, cm: ContextManager) -> None:
        self._cm = cm
        self._running: list[Generation] = []

    def add(self, session: Session, options: GenerationOptions, *, seconds_ago: float = 0.0) -> Generation:
        """Begin a reply to a session as it stands. `seconds_ago`: how long its call has been going on."""
        generation = Generation(self._cm, session, None, options, holder=self)
        self._running.append(generation)  # first: whatever happens then, `fail` lets its session go
        with suppress(Cancelled):  # a hook's word; its reply says so
            generation.start(seconds_ago)
        return generation

    def run(self) -> None:
        """Until every reply is there."""
        while self._running:
            self._step()

    def fail(self) -> None:
        """An error ends all that are under way, with what they have said."""
        for generation in self._running:
            generation.fail()

    def _step(self) -> None:
        for generation in self._running:
            why = self._why_stop(generation)
            if why is not None:
                generation.finish(why)
        self._running = [g for g in self._running if g.reply is None]
        left = self._cm.capabilities.n_batch
        work: list[Work] = []
        for generation in self._running:
            item = generation.work(left) if left else None
            if item is not None:
                work.append(item)
                left -= min(item.n_tokens, item.pending.n_left) if isinstance(item, PromptChunk) else 1
        if work:
            results = self._cm.step(work, holder=self).results
            for generation in self._running:
                result = results.get(generation.session)
                if result is None or result.error is None:
                    continue
                if not isinstance(result.error, CapacityError) or not generation.gives_way():
                    raise result.error
        for generation in self._running:
            if generation.work(1) is None:
                generation.chunks(self._cm.read_logits(generation.session, generation.choose, holder=self))
        self._running = [g for g in self._running if g.reply is None]

    def _why_stop(self, generation: Generation) -> str | None:
        if generation.is_late:
            return "timeout"
        try:
            if generation.pending is not None:
                self._cm.ask_progress(generation.pending)
        except Cancelled:
            return "cancelled"
        return None


def branches(
    cm: ContextManager, session: Session, text: str | None, n: int, options: GenerationOptions
) -> list[Branch]:
    """`n` replies to one prompt, each in a fork of the session. On an error the session is as before, without forks;
    and so it is where all of them got nowhere, but for replies that say why."""
    lead = Generation(cm, session, text, options)  # it asks, and holds the session; the forks answer
    together = Together(cm)
    forks: list[Session] = []
    try:
        why = reach_logits(cm, lead, lambda: "timeout" if lead.is_late else None)
        if why is None:
            made = []
            for i in range(n):
                forks.append(cm.fork(session))
                seed = None if options.seed is None else (options.seed + i) % (2**32 - 1)
                made.append(together.add(forks[-1], replace(options, seed=seed), seconds_ago=lead.seconds))
            together.run()
            replies = [generation.reply for generation in made if generation.reply is not None]
            if not all(reply.got_nowhere for reply in replies):
                lead.leave()
                return [Branch(fork, reply) for fork, reply in zip(forks, replies, strict=True)]
            why = replies[0].stop_reason
            _drop(cm, forks)
        nothing = lead.finish(why)
    except BaseException:
        lead.fail()
        together.fail()
        _drop(cm, forks)
        raise
    return [Branch(session.copy(), nothing) for _ in range(n)]


def _drop(cm: ContextManager, forks: list[Session]) -> None:
    for fork in forks:
        with suppress(StateError):  # the manager may be closed
            cm.release(fork)


def check_branching(options: GenerationOptions) -> None:
    """OptionError for what several replies cannot have."""
    if options.continue_last:
        raise OptionError("several replies begin a message each; continue_last goes on with one that is there")
