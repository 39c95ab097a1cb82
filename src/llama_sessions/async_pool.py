"""`AsyncPool`: a pool for asyncio. Its worker decodes; the event loop only hands over what came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from functools import partial
from types import TracebackType
from typing import Any

from .errors import QueueFull, StateError
from .manager import ContextManager
from .options import checked_float
from .pool import Pool
from .pool_stats import PoolStats
from .reply import Chunk, Reply
from .session import Session
from .ticket import Ticket

_LOOK_AGAIN_S = 0.01  # while the queue is full


class AsyncPool:
    """`async with AsyncPool(cm) as pool:`, then `async for chunk in pool.stream(session, text)` or
    `await pool.chat(session, text)`. Options as of `Pool`.

    To cancel the task, or to leave the `async for`, cancels the generation. The event loop never waits for a decode:
    what needs the manager's lock happens in a thread.
    """

    def __init__(self, cm: ContextManager, **options: Any) -> None:
        self.pool = Pool(cm, **options)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="llama-sessions-submit")

    async def __aenter__(self) -> AsyncPool:
        self.pool.__enter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.close(drain=kind is None)

    async def close(self, *, drain: bool = False) -> None:
        """As of `Pool.close`."""
        try:
            await asyncio.to_thread(self.pool.close, drain=drain)
        finally:
            self._threads.shutdown(wait=False)

    async def submit(
        self, session: Session, text: str | None = None, *, wait_s: float | None = None, **options: Any
    ) -> Ticket:
        """As of `Pool.submit`; waits for a place in the queue without blocking anybody."""
        until = time.monotonic() + (0.0 if wait_s is None else checked_float("wait_s", wait_s, 0.0))
        loop = asyncio.get_running_loop()
        while True:
            while self.pool.is_full and time.monotonic() < until:
                await asyncio.sleep(_LOOK_AGAIN_S)
            self.pool.check_takes()
            if not self.pool.has_worker:
                raise StateError("nobody drives this pool: use `async with AsyncPool(cm) as pool:`")
            submitted = loop.run_in_executor(self._threads, partial(self.pool.submit, session, text, **options))
            try:
                return await asyncio.shield(submitted)
            except asyncio.CancelledError:
                submitted.add_done_callback(_cancel_what_came)
                raise
            except QueueFull:
                if time.monotonic() >= until:
                    raise

    async def stream(
        self, session: Session, text: str | None = None, *, wait_s: float | None = None, **options: Any
    ) -> AsyncGenerator[Chunk, None]:
        """The reply as chunks, as of `Engine.stream`."""
        ticket = await self.submit(session, text, wait_s=wait_s, **options)
        async with aclosing(self.chunks(ticket)) as chunks:  # or who leaves early leaves it to the garbage collector
            async for chunk in chunks:
                yield chunk

    async def chunks(self, ticket: Ticket) -> AsyncGenerator[Chunk, None]:
        """What comes of a ticket of this pool; raises what ended it. To leave it cancels the ticket; `ticket.cancel()`
        ends it with its last chunks."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with suppress(RuntimeError):  # the loop may be closed by now
                loop.call_soon_threadsafe(changed.set)

        ticket.on_change(tell)
        try:
            while True:
                changed.clear()
                was_over = ticket.is_over  # asked first: what came before the end is there then
                chunk = ticket.take()
                while chunk is not None:
                    yield chunk
                    chunk = ticket.take()
                if was_over:
                    break
                if not ticket.is_over:
                    await changed.wait()
            if ticket.error is not None:
                raise ticket.error
        finally:
            ticket.on_change(None)
            if not ticket.is_over:
                ticket.cancel()

    async def chat(
        self, session: Session, text: str | None = None, *, wait_s: float | None = None, **options: Any
    ) -> Reply:
        """The whole reply, as of `Engine.chat`."""
        reply = None
        async for chunk in self.stream(session, text, wait_s=wait_s, **options):
            reply = chunk.reply or reply
        if reply is None:
            raise StateError("the request ended without a reply")
        return reply

    def stats(self) -> PoolStats:
        """As of `Pool.stats`."""
        return self.pool.stats()

    def metrics(self) -> str:
        """As of `Pool.metrics`."""
        return self.pool.metrics()


def _cancel_what_came(submitted: asyncio.Future[Ticket]) -> None:
    """Nobody waits for it any more."""
    if not submitted.cancelled() and submitted.exception() is None:
        submitted.result().cancel()
