"""Several replies to one prompt: each in a fork of its own, all of them in one pool."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from .errors import OptionError, StateError
from .generation import Generation
from .generation_options import GenerationOptions
from .manager import ContextManager
from .pool import Pool
from .reply import Branch, Reply
from .session import Session
from .stream import reach_logits
from .ticket import Ticket


def branches(
    cm: ContextManager, session: Session, text: str | None, n: int, options: GenerationOptions
) -> list[Branch]:
    """`n` replies to one prompt, each in a fork of the session. On an error the session is as before, without forks;
    and so it is where all of them got nowhere, but for replies that say why."""
    lead = Generation(cm, session, text, options)  # it asks, and holds the session; the forks answer
    pool = Pool(cm, prefill_share=1.0, max_waiting=n)
    forks: list[Session] = []
    try:
        why = reach_logits(cm, lead, lambda: "timeout" if lead.is_late else None)
        if why is None:
            tickets = []
            for i in range(n):
                forks.append(cm.fork(session))
                seed = None if options.seed is None else (options.seed + i) % (2**32 - 1)
                tickets.append(pool.add(forks[-1], None, replace(options, seed=seed), seconds_ago=lead.seconds))
            replies = _replies(pool, tickets)
            if not all(reply.got_nowhere for reply in replies):
                lead.leave()
                return [Branch(fork, reply) for fork, reply in zip(forks, replies, strict=True)]
            why = replies[0].stop_reason
            _drop(cm, forks)
        nothing = lead.finish(why)
    except BaseException:  # an interrupt, too: forks that nobody knows of would keep their slots
        lead.fail()
        pool.close()
        _drop(cm, forks)
        raise
    return [Branch(session.copy(), nothing) for _ in range(n)]


def _replies(pool: Pool, tickets: list[Ticket]) -> list[Reply]:
    """Step until all are there; raises the first error of any."""
    while pool.step():
        for ticket in tickets:
            if ticket.error is not None:
                raise ticket.error
    return [ticket.result() for ticket in tickets]


def _drop(cm: ContextManager, forks: list[Session]) -> None:
    for fork in forks:
        with suppress(StateError):  # the manager may be closed
            cm.release(fork)


def check_branching(options: GenerationOptions) -> None:
    """OptionError for what several replies cannot have."""
    if options.continue_last:
        raise OptionError("several replies begin a message each; continue_last goes on with one that is there")
