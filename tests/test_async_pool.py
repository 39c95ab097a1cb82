"""`AsyncPool`: a pool for asyncio."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

from conversations import over_fake

from llama_sessions import AsyncPool, ContextManager, Session, Ticket

# Of the fake vocabulary letters alone: a reply never ends by itself.
ENDLESS: dict[str, Any] = {
    "temperature": 0.0,
    "logit_bias": dict.fromkeys((t for t in range(259) if not 97 <= t < 123), -math.inf),
    "max_tokens": 100_000,
}


class Watched(AsyncPool):
    """Remembers its tickets."""

    def __init__(self, cm: ContextManager) -> None:
        super().__init__(cm)
        self.tickets: list[Ticket] = []

    async def submit(self, *args: Any, **options: Any) -> Ticket:
        self.tickets.append(await super().submit(*args, **options))
        return self.tickets[-1]


def running(test: Callable[[Watched], Any]) -> None:
    """Run a test over a pool of its own."""

    async def main() -> None:
        with over_fake(n_ctx=1200, max_sessions=4) as cm:
            async with Watched(cm) as pool:
                await test(pool)
            cm.check_integrity()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_a_cancelled_ticket_gives_its_last_chunks_and_its_reply() -> None:
    async def cancel(pool: Watched) -> None:
        ticket = await pool.submit(Session(), "Count.", **ENDLESS)
        chunks = []
        async for chunk in pool.chunks(ticket):
            chunks.append(chunk)
            if len(chunks) == 3:
                ticket.cancel()
        reply = chunks[-1].reply
        assert reply is not None
        assert (reply.stop_reason, reply.text) == ("cancelled", "".join(chunk.text for chunk in chunks))
        assert reply.n_generated >= 3

    running(cancel)


def test_who_leaves_a_stream_has_cancelled_it_then() -> None:
    async def leave(pool: Watched) -> None:
        stream = pool.stream(Session(), "Count.", **ENDLESS)
        async for _ in stream:
            break
        assert not pool.tickets[0].is_cancelled
        await stream.aclose()
        assert pool.tickets[0].is_cancelled

    running(leave)


def test_who_leaves_the_chunks_of_a_ticket_cancels_it() -> None:
    async def leave(pool: Watched) -> None:
        chunks = pool.chunks(await pool.submit(Session(), "Count.", **ENDLESS))
        await anext(chunks)
        await chunks.aclose()
        assert pool.tickets[0].is_cancelled

    running(leave)
