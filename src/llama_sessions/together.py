"""Several generations at once: each step is one `llama_decode` of whatever all of them want next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .errors import OptionError
from .generation import Generation
from .generation_options import GenerationOptions
from .manager import ContextManager
from .pending import PromptChunk, Work
from .reply import Branch
from .session import Session


class Together:
    """Holds the sessions of its generations, and drives them until all have their reply."""

    def __init__(self, cm: ContextManager, generations: Callable[[object], list[Generation]]) -> None:
        """`generations`: makes them, given who holds their sessions."""
        self._cm = cm
        self._running = generations(self)

    def run(self) -> None:
        """Until every reply is there. An error of one ends all of them with what they have said, and is raised."""
        try:
            for generation in self._running:
                generation.start()
            while self._running:
                self._step()
        except BaseException:
            for generation in self._running:
                generation.fail()
            raise

    def _step(self) -> None:
        for generation in self._running:
            if generation.is_late:
                generation.finish("timeout")
        self._running = [g for g in self._running if g.reply is None]
        left = self._cm.capabilities.n_batch
        work: list[Work] = []
        for generation in self._running:
            item = generation.work(left) if left else None
            if item is not None:
                work.append(item)
                left -= min(item.n_tokens, item.pending.n_left) if isinstance(item, PromptChunk) else 1
        if work:
            for result in self._cm.step(work, holder=self).results.values():
                if result.error is not None:
                    raise result.error
        for generation in self._running:
            if generation.work(1) is None:
                generation.chunks(self._cm.read_logits(generation.session, generation.choose, holder=self))
        self._running = [g for g in self._running if g.reply is None]


def branches(
    cm: ContextManager, session: Session, text: str | None, n: int, options: GenerationOptions
) -> list[Branch]:
    """`n` replies to one prompt, each in a fork of the session. On an error the session is as before, without forks."""
    user = None if text is None else session.add_user(text)
    forks: list[Session] = []
    was_pinned = cm.is_pinned(session)
    try:
        cm.pin(session)  # or one would be parked to make room for the next
        cm.prepare(session)
        for _ in range(n):
            forks.append(cm.fork(session))
            cm.pin(forks[-1])
        seeds = [options.seed if options.seed is None else (options.seed + i) % (2**32 - 1) for i in range(n)]
        made: list[Generation] = []

        def generations(holder: object) -> list[Generation]:
            made.extend(
                Generation(cm, fork, None, replace(options, seed=seed), holder=holder)
                for fork, seed in zip(forks, seeds, strict=True)
            )
            return list(made)

        Together(cm, generations).run()
        replies = [generation.reply for generation in made]
    except BaseException:
        for fork in forks:
            cm.release(fork)
        if user is not None and session.messages and session.messages[-1] is user:
            session.messages.pop()
        raise
    finally:
        for pinned in forks if was_pinned else [session, *forks]:
            cm.pin(pinned, False)
    return [Branch(fork, reply) for fork, reply in zip(forks, replies, strict=True) if reply is not None]


def check_branching(options: GenerationOptions) -> None:
    """OptionError for what several replies cannot have."""
    if options.continue_last:
        raise OptionError("several replies begin a message each; continue_last goes on with one that is there")
