"""`AsyncPool`: many tasks, one worker, and an event loop that waits for no decode."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from conversations import assert_as_alone, over_fake
from gate import LONG_S, Gate
from test_pool import ENDLESS, alone, fake

from llama_sessions import (
    AsyncPool,
    Chunk,
    ContextManager,
    Engine,
    OptionError,
    QueueFull,
    Reply,
    Session,
    StateError,
    Ticket,
)
from llama_sessions.llama.context import LlamaContext

Loader = Callable[..., Any]


async def until(is_so: Callable[[], bool]) -> None:
    latest = time.monotonic() + LONG_S  # asyncio.timeout is of Python 3.11
    while not is_so():
        assert time.monotonic() < latest
        await asyncio.sleep(0.001)


async def gathered(pool: AsyncPool, session: Session, text: str, **options: Any) -> list[Chunk]:
    return [chunk async for chunk in pool.stream(session, text, **options)]


def test_a_stream_and_a_chat_say_what_they_would_have_said_alone() -> None:
    async def main() -> tuple[list[Chunk], Reply]:
        async with AsyncPool(fake()) as pool:
            streamed = asyncio.create_task(gathered(pool, Session(), "1?", max_tokens=8, **ENDLESS))
            reply = await pool.chat(Session(), "2?", max_tokens=8, **ENDLESS)
            chunks = await streamed
            assert pool.stats().n_done == 2
            assert "llama_sessions_done_total 2" in pool.metrics()
            return chunks, reply

    chunks, reply = asyncio.run(main())
    assert tuple(chunk.token for chunk in chunks) == alone("1?", max_tokens=8, **ENDLESS)
    assert "".join(chunk.text for chunk in chunks) == chunks[-1].reply.text  # type: ignore[union-attr]
    assert reply.tokens == alone("2?", max_tokens=8, **ENDLESS)


def test_two_hundred_streams_over_eight_slots_all_end_and_memory_stays_flat() -> None:
    cm = over_fake(n_ctx=1200, max_sessions=8)
    expected = {i: alone(f"{i}?", max_tokens=3, **ENDLESS) for i in range(10)}

    async def one(pool: AsyncPool, i: int) -> bool:
        chunks = await gathered(pool, Session(), f"{i % 10}?", max_tokens=3, **ENDLESS)
        return tuple(chunk.token for chunk in chunks) == expected[i % 10]

    async def main() -> list[int]:
        counts = []
        async with AsyncPool(cm, prefill_share=1.0) as pool:
            for _ in range(3):
                assert all(await asyncio.gather(*(one(pool, i) for i in range(200))))
                assert pool.pool._batcher.is_idle
                gc.collect()
                counts.append(len(gc.get_objects()))
        return counts

    _, second, third = asyncio.run(main())
    assert third - second < 1000  # five for each stream that left something behind would be as many
    assert cm.stats().slots_total == 8


def test_a_cancelled_task_cancels_its_generation_and_frees_the_slot_within_a_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cm = fake(max_sessions=1)
    gate = Gate(monkeypatch, 4)

    async def main() -> None:
        async with AsyncPool(cm) as pool:
            session, next_one = Session(), Session()
            task = asyncio.create_task(gathered(pool, session, "1?", max_tokens=800, **ENDLESS))
            await until(gate.inside.is_set)
            waits = asyncio.create_task(pool.chat(next_one, "2?", max_tokens=5, **ENDLESS))
            await until(lambda: pool.stats().n_waiting == 1)
            before = pool.stats()
            assert before.n_generated_tokens > 2
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            gate.let(1)  # the step that was under way
            await until(gate.inside.is_set)
            stats = pool.stats()
            assert (stats.n_waiting, stats.n_running, stats.n_cancelled) == (0, 1, 1)
            assert stats.n_steps == before.n_steps + 1
            gate.open()
            reply = await waits
            assert reply.tokens == alone("2?", max_tokens=5, **ENDLESS)
            assert session.messages[-1]["role"] == "assistant"
            assert not cm.is_held(session)

    asyncio.run(main())


@pytest.mark.parametrize("stage", ["waiting", "submitting", "chat"])
def test_a_task_cancelled_at_any_stage_leaves_nothing_behind(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cm = fake(max_sessions=1)
    gate = Gate(monkeypatch, 2)

    async def main() -> None:
        async with AsyncPool(cm, max_waiting=1) as pool:
            runs = asyncio.create_task(pool.chat(Session(), "1?", max_tokens=1000, **ENDLESS))
            await until(gate.inside.is_set)
            session = Session()
            if stage == "submitting":
                filler = asyncio.create_task(pool.chat(Session(), "fill", max_tokens=2, **ENDLESS))
                await until(lambda: pool.stats().n_waiting == 1)
            task = asyncio.create_task(pool.chat(session, "2?", wait_s=60.0, max_tokens=800, **ENDLESS))
            if stage == "submitting":
                await asyncio.sleep(0)  # now it waits for a place
                assert not cm.is_held(session)
            else:
                await until(lambda: pool.stats().n_waiting == 1)
            if stage == "chat":
                runs.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await runs
                gate.let(3)  # the step that was under way, and two of the next one's
                await until(gate.inside.is_set)
                assert pool.stats().n_running == 1
                assert len(session.messages) == 1
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            runs.cancel()
            gate.open()
            if stage == "submitting":
                assert (await filler).n_generated == 2
            await until(lambda: pool.pool._batcher.is_idle)
            assert not cm.is_held(session)
            assert len(session.messages) == (2 if stage == "chat" else 0)

    asyncio.run(main())


def test_to_leave_the_loop_cancels(monkeypatch: pytest.MonkeyPatch) -> None:
    cm = fake()
    gate = Gate(monkeypatch, 3)

    async def main() -> None:
        async with AsyncPool(cm) as pool:
            session = Session()
            async for chunk in pool.stream(session, "1?", max_tokens=800, **ENDLESS):
                if chunk.text:
                    break
            gate.open()
            await until(lambda: pool.pool._batcher.is_idle)
            assert pool.stats().n_cancelled == 1
            assert (await pool.chat(session, "2?", max_tokens=3, **ENDLESS)).n_generated == 3

    asyncio.run(main())


def test_the_event_loop_never_waits_for_a_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were it to wait for one, nobody would let that through."""
    cm = fake()
    gate = Gate(monkeypatch)

    async def main() -> None:
        async with AsyncPool(cm) as pool:
            first = asyncio.create_task(pool.chat(Session(), "1?", max_tokens=4, **ENDLESS))
            await until(gate.inside.is_set)
            for n in range(3):
                second = asyncio.create_task(gathered(pool, Session(), "2?", max_tokens=50, **ENDLESS))
                third = asyncio.create_task(pool.chat(Session(), "3?", max_tokens=2, **ENDLESS))
                await until(lambda: pool.stats().n_waiting == 2)
                pool.metrics()
                second.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await second
                assert pool.stats().n_steps == n
                gate.let(1)
                await until(gate.inside.is_set)
                third.cancel()
            gate.open()
            assert (await first).tokens == alone("1?", max_tokens=4, **ENDLESS)

    asyncio.run(main())


def test_a_pool_that_nobody_drives_is_said_and_not_waited_for() -> None:
    async def main() -> None:
        session, pool = Session(), AsyncPool(fake())
        with pytest.raises(StateError, match="async with AsyncPool"):
            await pool.chat(session, "1?")
        assert not pool.pool.cm.is_held(session)
        async with pool:
            assert (await pool.chat(session, "1?", max_tokens=2, **ENDLESS)).n_generated == 2

    asyncio.run(main())


def test_an_error_is_raised_where_the_reply_is_awaited_and_the_others_go_on() -> None:
    cm = fake(n_ctx=300)

    async def main() -> None:
        async with AsyncPool(cm) as pool:
            ok = asyncio.create_task(pool.chat(Session(), "1?", max_tokens=6, **ENDLESS))
            with pytest.raises(OptionError, match="temprature"):
                await pool.chat(Session(), "x", temprature=1.0)
            with pytest.raises(ValueError, match="wait_s"):
                await pool.chat(Session(), "x", wait_s=-1.0)
            session = Session()
            with pytest.raises(Exception, match="do not fit"):
                await pool.chat(session, "x" * 400)
            assert session.messages == []
            assert (await ok).tokens == alone("1?", max_tokens=6, **ENDLESS)

    asyncio.run(main())


def test_a_full_queue_is_said_at_once_or_waited_for_without_blocking(monkeypatch: pytest.MonkeyPatch) -> None:
    cm = fake(max_sessions=1)
    gate = Gate(monkeypatch)

    async def main() -> None:
        async with AsyncPool(cm, max_waiting=1) as pool:
            first = asyncio.create_task(pool.chat(Session(), "1?", max_tokens=60, **ENDLESS))
            await until(gate.inside.is_set)
            second = asyncio.create_task(pool.chat(Session(), "2?", max_tokens=2, **ENDLESS))
            await until(lambda: pool.stats().n_waiting == 1)
            with pytest.raises(QueueFull):
                await pool.chat(Session(), "3?")
            third = asyncio.create_task(pool.chat(Session(), "3?", wait_s=LONG_S, max_tokens=2, **ENDLESS))
            await asyncio.sleep(0)  # now it waits for a place
            assert not third.done()
            gate.open()
            assert (await third).tokens == alone("3?", max_tokens=2, **ENDLESS)
            assert (await first).n_generated == 60
            assert (await second).n_generated == 2

    asyncio.run(main())


def test_after_close_everything_is_refused_and_close_again_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    cm = fake()
    gate = Gate(monkeypatch, 4)

    async def main() -> None:
        pool = AsyncPool(cm)
        async with pool:
            task = asyncio.create_task(pool.chat(Session(), "1?", max_tokens=800, **ENDLESS))
            await until(gate.inside.is_set)
            closing = asyncio.create_task(pool.close())
            await until(lambda: pool.pool._closed)
            gate.open()
            await closing
            assert (await task).stop_reason == "cancelled"
            with pytest.raises(StateError, match="closed"):
                await pool.chat(Session(), "2?")
            await pool.close()
        await pool.close()
        with pytest.raises(StateError, match="closed"):
            await pool.chat(Session(), "2?")

    asyncio.run(main())


def test_close_with_drain_ends_what_is_under_way_first() -> None:
    async def main() -> Reply:
        async with AsyncPool(fake()) as pool:
            task = asyncio.create_task(pool.chat(Session(), "1?", max_tokens=9, **ENDLESS))
            await until(lambda: pool.stats().n_generated_tokens > 0)
        return await task

    assert asyncio.run(main()).tokens == alone("1?", max_tokens=9, **ENDLESS)


def test_a_loop_that_is_closed_before_its_replies_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    cm = fake()
    pool = AsyncPool(cm)
    pool.pool.__enter__()
    session = Session()

    async def leave() -> None:
        stream = pool.stream(session, "1?", max_tokens=300, **ENDLESS)
        await anext(stream)
        leave.stream = stream  # type: ignore[attr-defined]

    asyncio.run(leave())
    other = pool.pool.submit(Session(), "2?", max_tokens=5, **ENDLESS)
    assert other.result(20.0).tokens == alone("2?", max_tokens=5, **ENDLESS)
    pool.pool.close()
    asyncio.run(pool.close())
    assert not cm.is_held(session)
    assert "raised" not in caplog.text


def test_tasks_on_a_real_model(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: set[int] = set()
    real = LlamaContext.decode

    def decode(this: Any, runs: Any) -> int:
        threads.add(threading.get_ident())
        return real(this, runs)

    sessions = [Session() for _ in range(12)]

    async def main(cm: Any) -> list[Reply]:
        async with AsyncPool(cm) as pool:
            asked = (pool.chat(s, f"{i}?", max_tokens=8, temperature=0.0) for i, s in enumerate(sessions))
            return list(await asyncio.gather(*asked))

    with load() as cm:
        expected = [Engine(cm).chat(Session(), f"{i}?", max_tokens=8, temperature=0.0) for i in range(12)]
    cm = load()
    monkeypatch.setattr(LlamaContext, "decode", decode)
    for session, reply, one in zip(sessions, asyncio.run(main(cm)), expected, strict=True):
        assert_as_alone(cm, session, reply, one)
    assert len(threads) == 1
    assert threading.get_ident() not in threads


# -- tickets


class Watched(AsyncPool):
    """Remembers its tickets."""

    def __init__(self, cm: ContextManager) -> None:
        super().__init__(cm)
        self.tickets: list[Ticket] = []

    async def submit(self, *args: Any, **options: Any) -> Ticket:
        self.tickets.append(await super().submit(*args, **options))
        return self.tickets[-1]


def over_gate(monkeypatch: pytest.MonkeyPatch, test: Callable[[Watched, Gate], Any]) -> None:
    """Run a test over a pool of its own, of whose first reply three tokens come before the gate is opened."""
    cm = over_fake(n_ctx=1200, max_sessions=4)
    gate = Gate(monkeypatch, 3)

    async def main() -> None:
        async with Watched(cm) as pool:
            await test(pool, gate)
            gate.open()

    asyncio.run(asyncio.wait_for(main(), LONG_S))


def test_a_cancelled_ticket_gives_its_last_chunks_and_its_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    async def cancel(pool: Watched, gate: Gate) -> None:
        ticket = await pool.submit(Session(), "Count.", max_tokens=1000, **ENDLESS)
        chunks = []
        async for chunk in pool.chunks(ticket):
            chunks.append(chunk)
            if len(chunks) == 3:
                await until(gate.inside.is_set)
                ticket.cancel()
                gate.open()
        reply = chunks[-1].reply
        assert reply is not None
        assert (reply.stop_reason, reply.text) == ("cancelled", "".join(chunk.text for chunk in chunks))
        assert reply.n_generated == 4  # a step was under way

    over_gate(monkeypatch, cancel)


def test_who_leaves_a_stream_has_cancelled_it_then(monkeypatch: pytest.MonkeyPatch) -> None:
    async def leave(pool: Watched, _: Gate) -> None:
        stream = pool.stream(Session(), "Count.", max_tokens=1000, **ENDLESS)
        async for _chunk in stream:
            break
        assert not pool.tickets[0].is_cancelled
        await stream.aclose()
        assert pool.tickets[0].is_cancelled

    over_gate(monkeypatch, leave)


def test_who_leaves_the_chunks_of_a_ticket_cancels_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def leave(pool: Watched, _: Gate) -> None:
        chunks = pool.chunks(await pool.submit(Session(), "Count.", max_tokens=1000, **ENDLESS))
        await anext(chunks)
        await chunks.aclose()
        assert pool.tickets[0].is_cancelled

    over_gate(monkeypatch, leave)
