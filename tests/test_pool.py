"""`Pool`: many at once, and each of them as if it were alone."""

from __future__ import annotations

import gc
import json
import math
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from conversations import Loader, assert_as_alone, assert_exact, is_seated, over_fake, said
from gate import LONG_S, Gate, wait_until
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from interrupting import interrupted_everywhere
from test_invariants import KINDS, Fault

from llama_sessions import (
    Cancelled,
    CapacityError,
    Chunk,
    ContextManager,
    ContextOverflow,
    DecodeError,
    Engine,
    OptionError,
    Pool,
    QueueFull,
    Reply,
    Session,
    StateError,
    Ticket,
)
from llama_sessions.generation import Generation
from llama_sessions.llama.context import LlamaContext
from llama_sessions.pool_stats import percentile
from llama_sessions.testing import FakeContext
from llama_sessions.types import FloatArray

GREEDY: dict[str, Any] = {"temperature": 0.0}
# Of the fake vocabulary letters alone: a reply is readable, and has exactly `max_tokens` tokens.
ENDLESS: dict[str, Any] = {
    "temperature": 0.0,
    "logit_bias": dict.fromkeys((t for t in range(259) if not 97 <= t < 123), -math.inf),
}


def fake(**options: Any) -> ContextManager:
    return over_fake(**{"n_ctx": 1200, "max_sessions": 8, **options})


def context_of(cm: ContextManager) -> FakeContext:
    context = cm._store.context
    assert isinstance(context, FakeContext)
    return context


def alone(text: str, load: Callable[..., ContextManager] = fake, **options: Any) -> tuple[int, ...]:
    """What a session says that has a context to itself."""
    with load(max_sessions=1, n_ctx=2048) as cm:
        return Engine(cm).chat(Session(), text, **options).tokens


def say(pool: Pool, *texts: str, **options: Any) -> list[Ticket]:
    """A ticket of a new session for each."""
    return [pool.submit(Session(), text, **options) for text in texts]


def step_until(pool: Pool, is_so: Callable[[], bool], most: int = 500) -> None:
    for _ in range(most):
        if is_so():
            return
        pool.step()
    raise AssertionError("it never came to that")


def assert_alone(tickets: list[Ticket], **options: Any) -> None:
    """They said what they would have said alone, by the fake context's oracle."""
    for ticket in tickets:
        question = ticket.session.messages[0]["content"]
        assert ticket.result(0.0).tokens == alone(question, **options), question


# -- the same words as alone


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_the_engine_alone(load: Loader, kind: str) -> None:
    name, options = KINDS[kind]
    texts = [f"Question {i}: " + "and so on " * (3 * i) for i in range(4)]
    with load(name, **options) as cm:
        expected = [Engine(cm).chat(Session(), text, max_tokens=12, **GREEDY) for text in texts]
    cm = load(name, n_batch=64, **options)
    pool = Pool(cm)
    tickets = say(pool, *texts, max_tokens=12, **GREEDY)
    pool.run()
    for ticket, reply in zip(tickets, expected, strict=True):
        got = ticket.result()
        assert_as_alone(cm, ticket.session, got, reply, name)
        assert got.n_prompt == reply.n_prompt
        assert ticket.session.messages[-1] == {"role": "assistant", "content": got.text}
    assert pool.stats().n_steps < sum(reply.n_generated for reply in expected)


def test_a_seed_is_of_the_session_whoever_else_runs(load: Loader) -> None:
    options = {"max_tokens": 15, "temperature": 1.2, "seed": 7}
    expected = Engine(load()).chat(Session(), "Who are you?", **options).tokens
    pool = Pool(load())
    others = say(pool, "One.", "Two, and three.", max_tokens=9, temperature=2.0)
    pool.step()
    (mine,) = say(pool, "Who are you?", **options)
    pool.run()
    assert mine.result().tokens == expected
    assert all(ticket.result().n_generated for ticket in others)


def test_the_next_turn_decodes_itself_alone() -> None:
    cm = fake()
    pool, session = Pool(cm), Session()
    first = pool.submit(session, "One?", max_tokens=5, **ENDLESS).result()
    second = pool.submit(session, "Two?", max_tokens=5, **ENDLESS).result()
    assert second.n_reused >= first.n_prompt + 4
    engine, twin = Engine(fake()), Session()
    assert engine.chat(twin, "One?", max_tokens=5, **ENDLESS).tokens == first.tokens
    assert engine.chat(twin, "Two?", max_tokens=5, **ENDLESS).tokens == second.tokens
    assert twin.messages == session.messages


def test_a_prompt_whose_logits_are_ready_is_sampled_at_once() -> None:
    cm = fake()
    session = said("Ready?")
    cm.prepare(session)
    pool = Pool(cm, prefill_share=1.0)
    ticket = pool.submit(session, max_tokens=3, **ENDLESS)
    assert pool.step()
    assert ticket.n_generated == 1
    assert ticket.result().tokens == alone("Ready?", max_tokens=3, **ENDLESS)


# -- continuous batching


def test_who_comes_later_joins_and_who_is_through_leaves_at_once() -> None:
    cm = fake(max_sessions=2)
    pool = Pool(cm, prefill_share=1.0)
    first, second, third = say(pool, "One?", "Two?", "Three?", max_tokens=100, **ENDLESS)
    step_until(pool, lambda: first.n_generated == 5)
    assert third.state == "waiting"
    second.cancel()
    pool.step()
    assert second.is_over
    assert third.state in ("prompt", "running")  # in the very step
    step_until(pool, lambda: third.n_generated > 0)
    assert not first.is_over
    assert [chunk.token for chunk in first] == list(first.result().tokens)
    pool.run()
    assert_alone([first, third], max_tokens=100, **ENDLESS)


def test_a_long_newcomer_takes_no_step_from_those_who_talk(load: Loader) -> None:
    def wide(**options: Any) -> ContextManager:
        return load(**{"n_ctx": 8192, "max_sessions": 10, "n_batch": 512, **options})

    def wide_alone(text: str, **options: Any) -> Reply:
        with wide() as cm:
            return Engine(cm).chat(Session(), text, **options)

    cm = wide()
    plain = {**GREEDY, "logit_bias": dict.fromkeys((t for t in range(640) if cm.vocab.is_eog(t)), -math.inf)}
    long = "A long story, " * 150
    pool = Pool(cm)
    eight = say(pool, *(f"Question {i}?" for i in range(8)), max_tokens=60, **plain)
    step_until(pool, lambda: all(t.n_generated > 3 for t in eight))
    (newcomer,) = say(pool, long, max_tokens=4, **plain)
    n_steps = 0
    while not newcomer.n_generated:
        before = [t.n_generated for t in eight]
        pool.step()
        n_steps += 1
        assert all(t.is_over or t.n_generated == n + 1 for t, n in zip(eight, before, strict=True))
    assert newcomer.generation._n_prompt > 1500
    assert n_steps > 2
    pool.run()
    for ticket, n in [(eight[0], 60), (eight[7], 60), (newcomer, 4)]:
        reply = wide_alone(ticket.session.messages[0]["content"], max_tokens=n, **plain)
        assert_as_alone(cm, ticket.session, ticket.result(), reply)


def test_with_the_whole_share_a_prompt_fills_the_batch() -> None:
    pool = Pool(fake(n_batch=64), prefill_share=1.0)
    (talker,) = say(pool, "One?", max_tokens=50, **ENDLESS)
    step_until(pool, lambda: talker.n_generated > 2)
    (newcomer,) = say(pool, "x" * 200, max_tokens=1, **ENDLESS)
    before = talker.n_generated
    step_until(pool, lambda: newcomer.is_over)
    assert talker.n_generated - before == math.ceil(newcomer.result().n_prompt / 63)
    pool.close()


def test_a_prompt_goes_on_beside_a_talker_where_a_batch_has_one_token() -> None:
    pool = Pool(fake(n_batch=1))
    (talker,) = say(pool, "1?", max_tokens=1000, **ENDLESS)
    step_until(pool, lambda: talker.n_generated == 3)
    (newcomer,) = say(pool, "2?" * 20, max_tokens=3, **ENDLESS)
    step_until(pool, lambda: newcomer.is_over, most=200)
    assert talker.n_generated - 3 == pytest.approx(newcomer.result().n_decoded + 2, abs=2)
    assert_alone([newcomer], max_tokens=3, **ENDLESS)
    pool.close()


@pytest.mark.parametrize("n_batch", [1, 2, 3, 5])
def test_more_talkers_than_a_batch_has_room_for_take_turns(n_batch: int) -> None:
    pool = Pool(fake(n_batch=n_batch), prefill_share=0.5)
    tickets = say(pool, *(f"{i}?" for i in range(5)), max_tokens=20, **ENDLESS)
    said_at, longest = dict.fromkeys(tickets, (0, 0)), 0
    step = 0
    while pool.step():
        step += 1
        for ticket in tickets:
            if ticket.n_generated > said_at[ticket][0]:
                said_at[ticket] = ticket.n_generated, step
            elif ticket.state == "running":
                longest = max(longest, step - said_at[ticket][1])
    assert_alone(tickets, max_tokens=20, **ENDLESS)
    assert longest <= 6


@pytest.mark.parametrize("n_batch", [1, 2, 3, 4])
def test_of_more_talkers_than_a_batch_has_room_for_each_says_as_much(n_batch: int) -> None:
    pool = Pool(fake(n_batch=n_batch))
    tickets = say(pool, *(f"{i}?" for i in range(5)), max_tokens=1000, **ENDLESS)
    step_until(pool, lambda: all(t.n_generated for t in tickets), most=2000)
    before = [t.n_generated for t in tickets]
    for _ in range(10):
        pool.step()
    assert [t.n_generated - n for t, n in zip(tickets, before, strict=True)] == [2 * n_batch] * 5
    pool.close()


def n_decoded(cm: ContextManager) -> int:
    return cm._store.n_tokens_decoded


def test_a_common_stem_that_nobody_has_seen_is_decoded_once() -> None:
    cm = fake(n_batch=32)
    stem = "You are a careful librarian. " * 5
    pool = Pool(cm)
    tickets = [pool.submit(Session(stem), f"{i}?", max_tokens=1, **ENDLESS) for i in range(6)]
    pool.run()
    n_prompt = tickets[0].result().n_prompt
    n_own = n_prompt - len(f"<|im_start|>system\n{stem}<|im_end|>\n<|im_start|>user\n")
    assert n_decoded(cm) <= n_prompt + 5 * (n_own + 40)
    for i, ticket in enumerate(tickets):
        assert ticket.result().tokens == Engine(fake()).chat(Session(stem), f"{i}?", max_tokens=1, **ENDLESS).tokens


def test_a_longer_stem_of_some_is_shared_as_well() -> None:
    cm = fake(n_batch=32, n_ctx=2000)
    short, long = "s" * 60, "l" * 200
    texts = [short + "1", short + long + "2", short + long + "3", short + long + "4"]
    pool = Pool(cm)
    tickets = say(pool, *texts, max_tokens=1, **ENDLESS)
    pool.run()
    assert n_decoded(cm) < 60 + 200 + 4 * 60
    assert_alone(tickets, max_tokens=1, **ENDLESS)


def test_who_waits_for_a_stem_goes_on_when_its_decoder_is_gone_or_gave_way() -> None:
    for deed in ("cancel", "pause", "back"):
        pool = Pool(fake(n_batch=32), prefill_share=1.0)
        stem = "stem " * 30
        first, second = say(pool, stem + "1", stem + "2", max_tokens=4, **ENDLESS)
        pool.step()
        assert second.waits_for is not None
        if deed == "cancel":
            first.cancel()
        else:
            pool._batcher._pause(first)
            if deed == "back":  # at once: neither is to wait for the other
                pool._batcher._refused = None
        pool.run()
        assert_alone([second] if deed == "cancel" else [first, second], max_tokens=4, **ENDLESS)


def test_two_who_gave_way_and_have_a_stem_in_common_come_back_in_the_middle_of_their_replies() -> None:
    pool = Pool(fake(n_batch=32, radix=False), prefill_share=1.0)
    stem = "stem " * 30
    tickets = say(pool, stem + "1", stem + "2", max_tokens=12, **ENDLESS)
    step_until(pool, lambda: all(t.n_generated > 2 for t in tickets))
    for ticket in tickets:
        pool._batcher._pause(ticket)
    pool.run()
    assert_alone(tickets, max_tokens=12, **ENDLESS)


def test_a_stem_is_not_shared_across_namespaces() -> None:
    cm = fake(n_batch=32)
    pool = Pool(cm)
    tickets = [pool.submit(Session(namespace=n), "the same " * 20, max_tokens=1, **ENDLESS) for n in "ab"]
    pool.run()
    assert n_decoded(cm) == sum(ticket.result().n_prompt for ticket in tickets)


# -- admission and fairness


def order_of_admission(tickets: list[Ticket], pool: Pool) -> list[Ticket]:
    order: list[Ticket] = []
    while pool.step():
        order += [t for t in tickets if t.state not in ("waiting",) and t not in order]
    return order + [t for t in tickets if t not in order]


def test_higher_priority_first_and_else_who_came_first() -> None:
    pool = Pool(fake(max_sessions=1))
    tickets = [pool.submit(Session(), f"{i}?", priority=p, max_tokens=2, **ENDLESS) for i, p in enumerate([0, 0, 5, 5])]
    assert [t.session.messages[0]["content"] for t in order_of_admission(tickets, pool)] == ["2?", "3?", "0?", "1?"]


def test_nobody_is_passed_over_for_ever_and_a_refusal_is_no_passing_over() -> None:
    pool = Pool(fake(max_sessions=1), prefill_share=1.0)
    low = pool.submit(Session(), "low", priority=-1, max_tokens=1, **ENDLESS)
    n_before = 0
    while not low.is_over:
        for priority in (1, 2):
            pool.submit(Session(), "high", priority=priority, max_tokens=1, **ENDLESS)
        pool.step()
        n_before += 1
    assert 6 <= n_before <= 40
    pool.close()
    pool = Pool(fake(max_sessions=1), prefill_share=1.0)
    (runs,) = say(pool, "I run", max_tokens=40, **ENDLESS)
    pool.step()
    low = pool.submit(Session(), "low", max_tokens=1, **ENDLESS)
    for _ in range(20):  # each is asked, and refused
        say(pool, "low too", max_tokens=1, **ENDLESS)
        pool.step()
    high = pool.submit(Session(), "high", priority=1, max_tokens=1, **ENDLESS)
    runs.cancel()
    step_until(pool, lambda: high.is_over)
    assert low.state == "waiting"
    pool.run()
    assert low.result().n_generated == 1


def test_of_those_who_were_passed_over_for_long_the_first_is_next() -> None:
    pool = Pool(fake(max_sessions=1))
    low, high = (pool.submit(Session(), "?", priority=priority, **ENDLESS) for priority in (-1, 1))
    assert pool._batcher._next_in_line() is high
    low.n_passed_over = high.n_passed_over = 8
    assert pool._batcher._next_in_line() is low
    pool.close()


def test_a_prompt_that_began_anew_for_want_of_cells_may_still_give_way() -> None:
    pool = Pool(fake())
    (ticket,) = say(pool, "p" * 150, max_tokens=4, **ENDLESS)
    pool.step()
    assert ticket.generation.makes_room()
    pool.step()
    pool._batcher._pause(ticket)
    pool.run()
    assert_alone([ticket], max_tokens=4, **ENDLESS)


def test_the_queue_is_bounded() -> None:
    with pytest.raises(OptionError, match="max_waiting"):
        Pool(fake(), max_waiting=0)
    pool = Pool(fake(max_sessions=1), max_waiting=2)
    tickets = say(pool, "1?", "2?", max_tokens=3, **ENDLESS)
    late = Session()
    assert pool.is_full
    with pytest.raises(QueueFull) as e:
        pool.submit(late, "3?", **ENDLESS)
    assert (e.value.waiting, e.value.limit) == (2, 2)
    assert str(e.value) == "the queue is full: 2 waiting, limit 2; wait with wait_s, or raise max_waiting"
    assert not late.messages
    assert not pool.cm.is_held(late)
    third = pool.submit(late, "3?", wait_s=60.0, max_tokens=3, **ENDLESS)  # steps the pool meanwhile
    pool.run()
    assert_alone([*tickets, third], max_tokens=3, **ENDLESS)


def test_to_wait_for_a_place_ends_with_its_time_or_with_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    cm = fake(max_sessions=1)
    gate = Gate(monkeypatch, 3)
    with Pool(cm, max_waiting=1) as pool:
        (runs,) = say(pool, "1?", **ENDLESS)
        gate.wait()
        (waits,) = say(pool, "2?", **ENDLESS)
        started = time.monotonic()
        with pytest.raises(QueueFull):
            pool.submit(Session(), "3?", wait_s=0.1, **ENDLESS)
        assert time.monotonic() - started >= 0.09
        errors: list[BaseException] = []

        def wait_long() -> None:
            try:
                pool.submit(Session(), "4?", wait_s=LONG_S, **ENDLESS)
            except StateError as e:
                errors.append(e)

        threads = [threading.Thread(target=wait_long) for _ in range(2)]
        for thread in threads:
            thread.start()
        wait_until(lambda: len(pool._batcher.changed._waiters) == 2)  # type: ignore[attr-defined]
        closing = threading.Thread(target=pool.close)
        closing.start()
        for thread in threads:
            thread.join(LONG_S)
        assert len(errors) == 2  # though a decode is under way
        assert closing.is_alive()
        gate.open()
        closing.join(LONG_S)
    assert runs.result().stop_reason == waits.result().stop_reason == "cancelled"


def test_who_waits_for_a_place_gets_the_one_that_becomes_free_however_many_wait() -> None:
    with Pool(fake(max_sessions=1), max_waiting=1) as pool:
        tickets: list[Ticket] = []

        def ask(i: int) -> None:
            tickets.append(pool.submit(Session(), f"{i}?", wait_s=60.0, max_tokens=2, **ENDLESS))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LONG_S)
        replies = [ticket.result(LONG_S) for ticket in tickets]
    assert len(replies) == 8
    assert_alone(tickets, max_tokens=2, **ENDLESS)


def test_idle_sessions_outside_of_the_pool_are_parked_for_it() -> None:
    cm = fake(max_sessions=2, n_ctx=300)
    idle = [said("idle " * 10), said("idle too " * 10)]
    for session in idle:
        cm.prepare(session)
    pool = Pool(cm)
    tickets = say(pool, "1?", "2?", max_tokens=5, **ENDLESS)
    pool.run()
    assert_alone(tickets, max_tokens=5, **ENDLESS)
    assert is_seated(cm, *idle) == [False, False]
    assert_exact(cm, idle[0])


def test_what_never_fits_fails_alone() -> None:
    cm = fake(n_ctx=300, max_sessions=4)
    pool = Pool(cm)
    session = Session()
    tickets = say(pool, "1?", "2?", max_tokens=5, **ENDLESS)
    never = pool.submit(session, "x" * 400, max_tokens=5, **ENDLESS)
    pool.run()
    with pytest.raises(ContextOverflow):
        never.result()
    assert (never.state, session.messages, cm.is_held(session)) == ("failed", [], False)
    assert_alone(tickets, max_tokens=5, **ENDLESS)


def test_what_others_hold_outside_of_the_pool_is_a_clear_error_and_no_busy_loop() -> None:
    cm = fake(max_sessions=1)
    stream = Engine(cm).stream(Session(), "mine", **ENDLESS)
    next(stream)
    pool = Pool(cm)
    (ticket,) = say(pool, "1?", **ENDLESS)
    pool.run()
    with pytest.raises(CapacityError, match="no free slot"):
        ticket.result()
    stream.close()
    (ticket,) = say(pool, "1?", max_tokens=3, **ENDLESS)
    pool.run()
    assert_alone([ticket], max_tokens=3, **ENDLESS)


def test_room_made_outside_of_the_pool_is_seen_while_others_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_sessions.batching._LOOK_AGAIN_S", -1.0)
    cm = fake(max_sessions=2)
    stream = Engine(cm).stream(Session(), "mine", **ENDLESS)
    next(stream)
    pool = Pool(cm, prefill_share=1.0)
    first, second = say(pool, "1?", "2?", max_tokens=30, **ENDLESS)
    for _ in range(3):
        pool.step()
    assert second.state == "waiting"
    stream.close()
    pool.step()
    assert second.state != "waiting"
    assert not first.is_over
    pool.close()


# -- preemption


@pytest.mark.parametrize("kind", ["full", "window", "recurrent"])
def test_who_gives_way_comes_back_and_says_what_it_would_have_said(load: Loader, kind: str) -> None:
    name, _ = KINDS[kind]
    texts = [f"Question {i}: " + "so it goes " * 8 for i in range(3)]
    with load(name, n_ctx=2048) as cm:
        expected = [Engine(cm).chat(Session(), text, max_tokens=40, **GREEDY) for text in texts]
    cm = load(name, n_batch=256)
    pool = Pool(cm, prefill_share=1.0)
    tickets = say(pool, *texts, max_tokens=40, **GREEDY)
    step_until(pool, lambda: all(t.n_generated > 4 for t in tickets[1:]))
    for ticket in tickets[1:]:
        pool._batcher._pause(ticket)
    assert [t.state for t in tickets[1:]] == ["paused", "paused"]
    pool.run()
    for ticket, reply in zip(tickets, expected, strict=True):
        assert_as_alone(cm, ticket.session, ticket.result(), reply, name)
    assert pool.stats().n_preemptions == 2


def test_when_cells_run_out_the_youngest_gives_way_and_nobody_fails() -> None:
    cm = fake(n_ctx=300, max_sessions=4)
    pool = Pool(cm, prefill_share=1.0)
    tickets = say(pool, *(f"{i}? " + "y" * 30 for i in range(4)), max_tokens=60, **ENDLESS)
    paused: set[int] = set()
    while pool.step():
        paused |= {i for i, t in enumerate(tickets) if t.state == "paused"}
    assert paused
    assert 0 not in paused
    assert pool.stats().n_preemptions >= len(paused)
    assert_alone(tickets, max_tokens=60, **ENDLESS)


def test_who_comes_in_meanwhile_does_not_make_them_take_back_what_they_gave() -> None:
    cm = fake(n_ctx=300, max_sessions=6)
    pool = Pool(cm, prefill_share=1.0)
    tickets = say(pool, *(f"{i}? " + "y" * 30 for i in range(3)), max_tokens=60, **ENDLESS)
    step_until(pool, lambda: any(t.state == "paused" for t in tickets))
    n = pool.stats().n_preemptions
    for i in range(10):
        tickets += say(pool, f"late {i}", max_tokens=2, **ENDLESS)
        pool.step()
    assert pool.stats().n_preemptions <= n + 1
    pool.run()
    assert_alone(tickets[:3], max_tokens=60, **ENDLESS)
    assert_alone(tickets[3:], max_tokens=2, **ENDLESS)


def test_a_prompt_gives_way_half_done_and_goes_on_from_there() -> None:
    cm = fake(n_ctx=400, max_sessions=3, n_batch=32)
    pool = Pool(cm, prefill_share=1.0)
    (first,) = say(pool, "1?", max_tokens=10, **ENDLESS)
    (second,) = say(pool, "p" * 150, max_tokens=5, **ENDLESS)
    step_until(pool, lambda: second.generation.pending is not None and second.generation.pending.row.n > 20)
    n = n_decoded(cm)
    pool._batcher._pause(second)
    assert second.state == "paused"
    pool.run()
    assert n_decoded(cm) - n < 150 + 20
    assert_alone([first], max_tokens=10, **ENDLESS)
    assert_alone([second], max_tokens=5, **ENDLESS)


@pytest.mark.parametrize("n", [20, 21])
def test_the_logits_of_who_gives_way_for_a_prompt_are_used_first(n: int) -> None:
    cm = fake(n_ctx=300, max_sessions=3, n_batch=64)
    pool = Pool(cm, prefill_share=0.01)  # a prompt token a step
    talker = pool.submit(Session(), "t" * n, priority=-1, max_tokens=200, **ENDLESS)
    step_until(pool, lambda: talker.n_generated == 2)
    (prompt,) = say(pool, "p" * 190, max_tokens=5, **ENDLESS)
    step_until(pool, lambda: talker.state == "paused")
    assert prompt.generation.pending is not None  # cells ran out for it, when the talker had got its token, or not
    assert talker.generation._row.n == 0
    pool.run()
    assert_alone([talker], max_tokens=200, **ENDLESS)
    assert_alone([prompt], max_tokens=5, **ENDLESS)


# -- cancelled, or out of time, at every stage


def at_stage(pool: Pool, stage: str) -> Ticket:
    """A ticket that has got there."""
    if stage == "waiting":
        say(pool, "someone", max_tokens=6, **ENDLESS)
        (ticket,) = say(pool, "w" * 30, max_tokens=90, **ENDLESS)
        pool.step()
    elif stage == "prompt":
        (ticket,) = say(pool, "p" * 200, max_tokens=90, **ENDLESS)
        pool.step()
    else:
        (ticket,) = say(pool, "r" * 30, max_tokens=90, timeout_s=1e9, **ENDLESS)
        step_until(pool, lambda: ticket.n_generated == 5)
        if stage == "paused":
            pool._batcher._pause(ticket)
    assert ticket.state == stage
    return ticket


@pytest.mark.parametrize("driver", ["pool", "engine"])
def test_a_prompt_that_was_cancelled_half_done_leaves_its_slot_to_others(driver: str) -> None:
    cm = fake(max_sessions=1)
    session = Session()
    cm.set_hook("on_progress", lambda done, total, asked: asked is not session or not done)
    if driver == "pool":
        kept: Any = Pool(cm).submit(session, "p" * 200, **ENDLESS)
        assert kept.result().stop_reason == "cancelled"
    else:
        kept = Engine(cm).stream(session, "p" * 200, **ENDLESS)
        assert list(kept)[-1].reply.stop_reason == "cancelled"
    assert 0 < len(cm.tokens(session)) < 200
    cm.prepare(said("Me."))
    assert is_seated(cm, session) == [False]
    assert kept.reply is not None


@pytest.mark.parametrize("why", ["cancelled", "timeout"])
@pytest.mark.parametrize("stage", ["waiting", "prompt", "running", "paused"])
def test_a_request_ends_at_every_stage_within_one_step(stage: str, why: str) -> None:
    cm = fake(max_sessions=1 if stage == "waiting" else 3)
    pool = Pool(cm, prefill_share=1.0)
    ticket = at_stage(pool, stage)
    others = [t for t in pool._batcher.tickets if t is not ticket]
    if stage != "waiting":
        others = say(pool, "other?", max_tokens=6, **ENDLESS)
    if why == "cancelled":
        ticket.cancel()
    else:
        ticket._timeout_s = 0.0
    pool.step()
    reply = ticket.result(0.0)
    assert reply.stop_reason == why
    *_, last = list(ticket)
    assert last.reply is reply
    said_something = stage in ("running", "paused")
    assert reply.tokens == (alone("r" * 30, max_tokens=5, **ENDLESS) if said_something else ())
    roles = [message["role"] for message in ticket.session.messages]
    assert roles == (["user", "assistant"] if said_something else [])
    assert not cm.is_held(ticket.session)
    assert ticket not in pool._batcher.tickets
    pool.run()
    assert_alone(others, max_tokens=6, **ENDLESS)
    stats = pool.stats()
    assert (stats.n_cancelled, stats.n_done) == ((1, 1) if why == "cancelled" else (0, 2))
    if said_something:  # and its next turn goes on from its row
        assert Engine(cm).chat(ticket.session, "more?", max_tokens=3, **ENDLESS).n_reused > 30


@pytest.mark.parametrize(("text", "stage"), [("1?", "running"), ("1" * 200, "prompt")])
def test_a_cancelled_one_gives_its_slot_to_who_waits_within_one_step(text: str, stage: str) -> None:
    pool = Pool(fake(max_sessions=1), prefill_share=1.0)
    first, second = say(pool, text, "2?", max_tokens=5, **ENDLESS)
    pool.step()
    assert first.state == stage
    first.cancel()
    pool.step()
    assert second.state != "waiting"
    pool.run()
    assert_alone([second], max_tokens=5, **ENDLESS)


def test_a_timeout_counts_from_the_submit() -> None:
    pool = Pool(fake(max_sessions=1), prefill_share=1.0)
    (first,) = say(pool, "1?", max_tokens=3, **ENDLESS)
    (late,) = say(pool, "2?", timeout_s=0.05, **ENDLESS)
    pool.step()
    time.sleep(0.06)
    pool.run()
    assert late.result().stop_reason == "timeout"
    assert late.session.messages == []
    assert_alone([first], max_tokens=3, **ENDLESS)


# -- failures stay where they are


CODES = [1, -1, 2, -2, -3]


@pytest.mark.parametrize("when", ["prompt", "running", "newcomer"])
@pytest.mark.parametrize("code", CODES)
def test_after_a_batch_that_failed_once_everybody_says_what_they_would_have_said(code: int, when: str) -> None:
    cm = fake()
    pool = Pool(cm, prefill_share=1.0)
    tickets = say(pool, "1? " + "x" * 70, "2?", "3? " + "z" * 40, max_tokens=12, **ENDLESS)
    step_until(pool, lambda: pool.stats().n_steps == 1 if when == "prompt" else all(t.n_generated > 1 for t in tickets))
    if when == "newcomer":
        tickets += say(pool, "4? " + "u" * 100, max_tokens=12, **ENDLESS)
    context_of(cm).codes.append(code)
    pool.run()
    assert not context_of(cm).codes
    assert_alone(tickets, max_tokens=12, **ENDLESS)
    for ticket in tickets:
        cm.prepare(ticket.session)
        assert_exact(cm, ticket.session)


@pytest.mark.parametrize(("code", "when"), [(2, "half"), (-2, "half"), (-3, "after"), (-1, "before"), (2, "before")])
@pytest.mark.parametrize("kind", ["full", "window", "recurrent", "hybrid"])
def test_a_decode_that_did_half_of_its_work_leaves_everybody_right(
    load: Loader, monkeypatch: pytest.MonkeyPatch, kind: str, code: int, when: str
) -> None:
    name, options = KINDS[kind]
    texts = ["One? " * 4, "Two? " * 5, "Three? " * 30]
    with load(name, **options) as cm:
        expected = [Engine(cm).chat(Session(), text, max_tokens=10, **GREEDY) for text in texts]
    cm = load(name, n_batch=64, **options)
    pool = Pool(cm, prefill_share=1.0)
    tickets = say(pool, *texts[:2], max_tokens=10, **GREEDY)
    step_until(pool, lambda: all(t.n_generated > 1 for t in tickets))
    tickets += say(pool, texts[2], max_tokens=10, **GREEDY)
    fault = Fault(monkeypatch, LlamaContext, "decode").plant(code, when, at=2)
    pool.run()
    assert fault.n_hits == 1
    cm.test_model = name  # type: ignore[attr-defined]
    for ticket, reply in zip(tickets, expected, strict=True):
        assert_as_alone(cm, ticket.session, ticket.result(), reply, name)
        cm.prepare(ticket.session)
        assert_exact(cm, ticket.session)


@pytest.mark.parametrize("code", [-1, 2, -2, -3])
def test_the_one_whose_decode_always_fails_gets_the_error_alone(code: int) -> None:
    cm = fake()
    pool = Pool(cm, prefill_share=1.0)
    tickets = say(pool, "1?", "2?", "3?", max_tokens=12, **ENDLESS)
    step_until(pool, lambda: all(t.n_generated > 1 for t in tickets))
    bad, context = tickets[1], context_of(cm)
    seq_id, decode = cm._seats.get(bad.session, reading=True).row.seq_id, context.decode  # type: ignore[union-attr]

    def faulty(runs: Any) -> int:
        return code if any(run.seq_id == seq_id for run in runs) else decode(runs)

    FakeContext.decode, original = lambda self, runs: faulty(runs), FakeContext.decode  # type: ignore[method-assign]
    decode = original.__get__(context)
    try:
        pool.run()
    finally:
        FakeContext.decode = original  # type: ignore[method-assign]
    with pytest.raises(DecodeError) as e:
        bad.result()
    assert e.value.code == code
    assert bad.session.messages[-1]["content"] == bad.reply.text  # type: ignore[union-attr]
    assert bad.reply.tokens == alone("2?", max_tokens=12, **ENDLESS)[: len(bad.reply.tokens)]  # type: ignore[union-attr]
    assert_alone([tickets[0], tickets[2]], max_tokens=12, **ENDLESS)
    assert (pool.stats().n_failed, pool.stats().n_done) == (1, 2)


def test_a_context_that_is_broken_ends_everybody_and_no_loop_goes_on_for_ever() -> None:
    cm = fake()
    pool = Pool(cm, prefill_share=1.0)
    tickets = say(pool, "1?", "2?", "3?", max_tokens=12, **ENDLESS)
    step_until(pool, lambda: all(t.n_generated > 1 for t in tickets))
    context_of(cm).codes.extend([-3] * 50)
    pool.run()
    assert all(isinstance(ticket.error, DecodeError) for ticket in tickets)


def raising_hook(name: str, bad: Session, error: BaseException, ok: Any) -> Callable[..., Any]:
    def hook(*args: Any) -> Any:
        if args[-1] is bad:
            raise error
        return args[0] if name == "before_encode" else ok

    return hook


def test_who_waits_for_cells_asks_on_evict_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_sessions.batching._LOOK_AGAIN_S", 0.0)
    cm = fake(n_ctx=600)
    asked: list[list[Any]] = []
    tried: list[Session] = []

    def summarise(dropped: list[Any], session: Session) -> list[Any]:
        asked.append(dropped)
        return [{"role": "user", "content": "a summary"}]

    cm.set_hook("on_evict", summarise)
    cm.set_hook("sink_fn", lambda session: tried.append(session) or 0)
    pool = Pool(cm)
    talks = pool.submit(Session(), "x" * 300, max_tokens=60, **ENDLESS)
    step_until(pool, lambda: talks.state == "running")
    long = said(*("y" * 60 for _ in range(10)))
    waits = pool.submit(long, "And now?", max_tokens=3, **ENDLESS)
    step_until(pool, lambda: talks.reply is not None)
    assert len([session for session in tried if session is long]) > 5
    # The summary takes room as well, so with it more went: that is asked anew, in each try the same.
    assert [len(dropped) for dropped in asked] == [4, 3]
    step_until(pool, lambda: waits.reply is not None)
    assert len(asked) == 2
    assert [m["content"] for m in long.window][:1] == ["a summary"]
    assert_exact(cm, long)


@pytest.mark.parametrize("name", ["before_encode", "on_progress"])
def test_a_hook_that_raises_ends_its_own_request(name: str) -> None:
    cm = fake()
    pool = Pool(cm)
    first, bad, third = say(pool, "1?", "2? " * 40, "3?", max_tokens=8, **ENDLESS)
    cm.set_hook(name, raising_hook(name, bad.session, ZeroDivisionError("of the hook"), True))
    pool.run()
    with pytest.raises(ZeroDivisionError, match="of the hook"):
        bad.result()
    assert bad.session.messages == []
    assert_alone([first, third], max_tokens=8, **ENDLESS)


@pytest.mark.parametrize("why", ["cancelled", "timeout"])
def test_who_waited_in_vain_hears_for_how_long(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(fake(max_sessions=1))
    (talks,) = say(pool, "1?", max_tokens=100, **ENDLESS)
    pool.step()
    waits = pool.submit(Session(), "2?", timeout_s=50.0 if why == "timeout" else None)
    pool.step()
    monkeypatch.setattr(waits, "_asked", waits._asked - 60.0)
    if why == "cancelled":
        waits.cancel()
    pool.step()
    reply = waits.result()
    assert (reply.stop_reason, reply.n_generated) == (why, 0)
    assert 60.0 <= reply.total_s < 1000.0
    assert talks.n_generated
    pool.close()


def test_progress_is_told_to_its_end_and_its_no_cancels_that_one() -> None:
    cm = fake()
    pool = Pool(cm)
    told: list[tuple[int, int]] = []
    first, bad = say(pool, "1? " * 40, "2? " * 40, max_tokens=3, **ENDLESS)

    def on_progress(done: int, total: int, session: Session) -> bool:
        told.append((done, total))
        return session is not bad.session or not done

    cm.set_hook("on_progress", on_progress)
    pool.run()
    assert bad.result().stop_reason == "cancelled"
    assert bad.session.messages == []
    total = first.result().n_prompt
    assert (total, total) in told
    cm.clear_hook("on_progress")
    assert_alone([first], max_tokens=3, **ENDLESS)


def test_a_hook_that_raises_cancelled_cancels() -> None:
    cm = fake()
    pool = Pool(cm)
    first, bad = say(pool, "1?", "2?", max_tokens=3, **ENDLESS)
    cm.set_hook("before_encode", raising_hook("before_encode", bad.session, Cancelled("no"), True))
    pool.run()
    assert bad.result().stop_reason == "cancelled"
    cm.clear_hook("before_encode")
    assert_alone([first], max_tokens=3, **ENDLESS)


def test_a_bias_that_bans_all_and_a_grammar_that_ends_concern_their_own_request(load: Loader) -> None:
    texts = ["1?", "4?"]
    with load() as cm:
        expected = [Engine(cm).chat(Session(), text, max_tokens=9, **GREEDY) for text in texts]
    cm = load()
    pool = Pool(cm)
    banned = dict.fromkeys(range(cm.capabilities.n_vocab), -math.inf)
    tickets = say(pool, texts[0], max_tokens=9, **GREEDY)
    (nothing,) = say(pool, "2?", logit_bias=banned, **GREEDY)
    (bound,) = say(pool, "3?", grammar='root ::= "yes" | "no"', **GREEDY)
    tickets += say(pool, texts[1], max_tokens=9, **GREEDY)
    with pytest.raises(OptionError, match="grammar"):
        say(pool, "5?", grammar="root ::= (")
    pool.run()
    with pytest.raises(OptionError, match="no token can be sampled"):
        nothing.result()
    assert bound.result().text in ("yes", "no")
    for ticket, reply in zip(tickets, expected, strict=True):
        assert_as_alone(cm, ticket.session, ticket.result(), reply)


def test_a_raising_sampler_ends_its_own_request() -> None:
    pool = Pool(fake(), prefill_share=1.0)
    first, bad = say(pool, "1?", "2?", max_tokens=6, **ENDLESS)
    step_until(pool, lambda: bad.n_generated == 2)
    bad.generation._sampler.sample = lambda *_: 1 / 0  # type: ignore[method-assign]
    pool.run()
    with pytest.raises(ZeroDivisionError):
        bad.result()
    assert len(chunks_so_far(bad)) == 2
    assert bad.session.messages[-1]["role"] == "assistant"
    assert_alone([first], max_tokens=6, **ENDLESS)


@pytest.mark.parametrize("at", [1, 2, 3])
def test_what_was_chosen_before_an_interrupt_is_said_and_not_chosen_again(
    monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """A sampler has drawn, a grammar has gone on: both would be wrong a second time."""
    options = {**ENDLESS, "temperature": 1.0, "seed": 5, "max_tokens": 12}
    pool = Pool(fake())
    tickets = say(pool, "One?", "Two?", "Three?", **options)
    step_until(pool, lambda: all(t.n_generated >= 3 for t in tickets))
    n_before = {t.generation: t.n_generated for t in tickets}
    n_chosen: dict[Generation, int] = {}
    n_calls = 0
    choose = Generation.choose

    def interrupted(self: Generation, logits: FloatArray) -> int | None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == at:
            raise KeyboardInterrupt
        n_chosen[self] = n_chosen.get(self, 0) + 1
        return choose(self, logits)

    monkeypatch.setattr(Generation, "choose", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.step()
    pool.run()
    hit = tickets.pop(at - 1)
    assert hit.state == "failed"
    with pytest.raises(KeyboardInterrupt):
        hit.result()
    assert_alone(tickets, **options)
    assert [n_chosen[t.generation] for t in tickets] == [12 - n_before[t.generation] for t in tickets]
    assert not pool._batcher._chosen


def test_a_row_that_cannot_be_parked_ends_its_own_request() -> None:
    cm = fake()
    pool = Pool(cm, prefill_share=1.0)
    first, bad = say(pool, "1?", "2?", max_tokens=6, **ENDLESS)
    step_until(pool, lambda: bad.n_generated == 2)
    cm.park = lambda *_, **__: 1 / 0  # type: ignore[method-assign,assignment]
    context_of(cm).codes.append(1)
    pool.run()
    with pytest.raises(ZeroDivisionError):
        bad.result()
    assert_alone([first], max_tokens=6, **ENDLESS)


def test_a_stem_that_is_no_more_to_be_had_makes_who_waited_for_it_give_way() -> None:
    cm = fake(n_ctx=400, n_batch=32, max_sessions=3)
    pool = Pool(cm, prefill_share=1.0)
    stem = "s" * 150
    first, second = say(pool, stem + "1", stem + "2", max_tokens=4, **ENDLESS)
    pool.step()
    assert second.waits_for is not None
    begin, calls = second.generation.begin_prompt, []

    def refused_once() -> None:
        calls.append(second.state)
        if len(calls) == 1:
            raise CapacityError("no cells", needed=1, available=0, unit="cells")
        begin()

    second.generation.begin_prompt = refused_once  # type: ignore[method-assign]
    pool.run()
    assert len(calls) == 2
    assert pool.stats().n_preemptions == 1
    assert_alone([first, second], max_tokens=4, **ENDLESS)


# -- bad input


def test_engine_and_pool_refuse_each_others_sessions() -> None:
    cm = fake()
    pool, engine, session = Pool(cm, prefill_share=1.0), Engine(cm), Session()
    (ticket,) = [pool.submit(session, "1?", max_tokens=4, **ENDLESS)]
    for _ in range(3):
        with pytest.raises(StateError, match="generating"):
            engine.chat(session, "me too")
        for deed in (cm.prepare, cm.release, cm.park):
            with pytest.raises(StateError, match="generating"):
                deed(session)
        pool.step()
    assert cm.fork(session).messages == session.messages
    pool.run()
    assert_alone([ticket], max_tokens=4, **ENDLESS)
    stream = engine.stream(session, "now", **ENDLESS)
    next(stream)
    with pytest.raises(StateError, match="generating"):
        pool.submit(session, "me too")
    stream.close()
    assert pool.submit(session, "now", max_tokens=4, **ENDLESS).result().n_generated == 4


def test_what_is_wrong_with_a_request_is_said_at_once_and_holds_nothing() -> None:
    cm, other = fake(), fake()
    pool, mine, theirs = Pool(cm), Session(), said("Theirs.")
    other.prepare(theirs)
    first = pool.submit(mine, "1?", max_tokens=3, **ENDLESS)
    for message, error, session, options in [
        ("in the pool already", StateError, mine, {}),
        ("another manager", StateError, theirs, {}),
        ("temprature", OptionError, Session(), {"temprature": 1.0}),
        ("priority", OptionError, Session(), {"priority": 1.5}),
        ("wait_s", OptionError, Session(), {"wait_s": -1}),
        ("timeout_s", OptionError, Session(), {"timeout_s": -1.0}),
        ("Session", OptionError, "text", {}),
    ]:
        with pytest.raises(error, match=message):
            pool.submit(session, "x", **options)  # type: ignore[arg-type]
        assert not isinstance(session, Session) or session is mine or not cm.is_held(session)
    with pytest.raises(OptionError, match="no messages"):
        pool.submit(Session())
    assert len(pool._batcher.waiting) == 1
    pool.run()
    assert_alone([first], max_tokens=3, **ENDLESS)
    for wrong in ({"prefill_share": 0}, {"prefill_share": 1.5}, {"max_waiting": -1}):
        with pytest.raises(OptionError):
            Pool(cm, **wrong)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="ContextManager"):
        Pool(None)  # type: ignore[arg-type]
    with pytest.raises(TimeoutError):
        pool.submit(Session(), "x", **ENDLESS).result(timeout=0.0)
    pool.close()


def test_after_close_everything_is_refused_and_nothing_lost() -> None:
    cm = fake()
    pool = Pool(cm, prefill_share=1.0)
    first, second = say(pool, "1?", "2?", **ENDLESS)
    step_until(pool, lambda: first.n_generated == 3)
    pool.close()
    pool.close()
    for call in (pool.run, pool.step, pool.__enter__, lambda: say(pool, "3?")):
        with pytest.raises(StateError, match="closed"):
            call()
    assert first.result().tokens == alone("1?", max_tokens=3, **ENDLESS)
    assert (first.result().stop_reason, second.result().stop_reason) == ("cancelled", "cancelled")
    assert pool.stats().n_cancelled == 2
    assert Engine(cm).chat(first.session, "go on", max_tokens=3, **ENDLESS).n_reused > 10


def test_close_with_drain_ends_all_first() -> None:
    pool = Pool(fake())
    tickets = say(pool, "1?", "2?", max_tokens=4, **ENDLESS)
    pool.close(drain=True)
    assert_alone(tickets, max_tokens=4, **ENDLESS)


def test_a_manager_closed_under_the_pool_ends_everybody_with_what_was_said() -> None:
    cm = fake()
    pool = Pool(cm, prefill_share=1.0)
    first, second = say(pool, "1?", "2? " * 60, **ENDLESS)
    step_until(pool, lambda: first.n_generated == 3)
    cm.close()
    with pytest.raises(StateError, match="the manager is closed"):
        pool.run()
    for ticket in (first, second):
        with pytest.raises(StateError, match="the manager is closed"):
            ticket.result()
    assert first.session.messages[-1]["role"] == "assistant"
    pool.close()


def test_a_hook_that_waits_for_the_pool_is_refused_and_one_that_closes_it_is_heard() -> None:
    cm = fake()
    pool = Pool(cm, prefill_share=1.0)
    (first,) = say(pool, "1?", max_tokens=5, **ENDLESS)
    pool.step()
    (second,) = say(pool, "2?", max_tokens=5, **ENDLESS)
    asked: list[str] = []

    def hook(messages: Any, session: Session) -> Any:
        for call in (pool.step, pool.run, first.result, lambda: next(first), lambda: first.result(1.0)):
            first.take()
            with pytest.raises(StateError, match="in the middle of a step"):
                call()
            asked.append("refused")
        pool.close()
        return messages

    cm.set_hook("before_encode", hook)
    pool.run()
    assert asked == ["refused"] * 5
    assert first.result().stop_reason == second.result().stop_reason == "cancelled"


@pytest.mark.parametrize("has_worker", [False, True])
def test_who_is_told_of_an_end_and_waits_for_the_pool_is_refused(
    has_worker: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = Pool(fake())
    gate = Gate(monkeypatch, 3)
    first, second = say(pool, "1?", "2?", max_tokens=1000, **ENDLESS)
    heard: list[str] = []

    def listener() -> None:
        if first.is_over:
            pool.close()
            with pytest.raises(StateError, match="in the middle of a step"):
                second.result()
            heard.append("refused")

    first.on_change(listener)
    if has_worker:
        pool.__enter__()
        gate.wait()
        opened_by_the_end(pool, gate)
    else:
        for _ in range(3):
            pool.step()
    closing = threading.Thread(target=pool.close, daemon=True)
    closing.start()
    closing.join(LONG_S / 4)
    assert not closing.is_alive()
    assert heard == ["refused"]
    assert first.result().stop_reason == second.result().stop_reason == "cancelled"


def test_a_step_whose_end_was_interrupted_does_not_count_as_one_under_way() -> None:
    pool = Pool(fake())
    (ticket,) = say(pool, "1?", max_tokens=4, **ENDLESS)
    pool._stepper = threading.get_ident()  # as it is left where Ctrl-C comes right before it is taken back
    pool.run()
    assert_alone([ticket], max_tokens=4, **ENDLESS)


def test_a_listener_that_raises_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(fake())
    tickets = say(pool, "1?", "2?", max_tokens=4, **ENDLESS)
    tickets[0].on_change(lambda: 1 / 0)
    pool.run()
    assert_alone(tickets, max_tokens=4, **ENDLESS)
    assert "what listens to a ticket raised" in caplog.text


# -- threads


def test_threads_submit_and_wait_while_the_worker_drives() -> None:
    texts = [f"{i}? " + "w" * (5 * i) for i in range(12)]
    replies: dict[str, Reply] = {}
    with Pool(fake(max_sessions=3, n_ctx=500)) as pool:

        def ask(text: str) -> None:
            replies[text] = pool.submit(Session(), text, max_tokens=8, **ENDLESS).result(LONG_S)

        threads = [threading.Thread(target=ask, args=(text,)) for text in texts]
        for thread in threads:
            thread.start()
        with pytest.raises(StateError, match="worker drives it"):
            pool.run()
        for thread in threads:
            thread.join(LONG_S)
    assert {text: reply.tokens for text, reply in replies.items()} == {
        text: alone(text, max_tokens=8, **ENDLESS) for text in texts
    }


def test_submit_cancel_stats_and_close_of_others_never_wait_for_a_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(fake())
    (first,) = say(pool, "1?", max_tokens=4, **ENDLESS)
    gate = Gate(monkeypatch)
    with pool:
        gate.wait()
        (second,) = say(pool, "2?", max_tokens=4, **ENDLESS)
        first.cancel()
        assert pool.stats().n_waiting == 1
        assert "llama_sessions_waiting 1" in pool.metrics()
        with pytest.raises(TimeoutError, match="no reply within"):
            second.result(timeout=0.0)
        assert not second.is_over
        assert gate.inside.is_set()  # the decode is still inside
        assert pool.stats().n_steps == 0
        gate.open()
        assert first.result(LONG_S).stop_reason == "cancelled"
    assert_alone([second], max_tokens=4, **ENDLESS)


def test_to_submit_a_grammar_does_not_wait_for_a_decode(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    cm = load()
    gate = Gate(monkeypatch, of=LlamaContext)
    with Pool(cm) as pool:
        say(pool, "1?", max_tokens=4, **GREEDY)
        gate.wait()
        (yes,) = say(pool, "2?", grammar='root ::= "yes" | "no"', **GREEDY)
        (a_is,) = say(pool, "3?", json_schema=schema, **GREEDY)
        with pytest.raises(OptionError, match="grammar"):
            say(pool, "4?", grammar="root ::= (")
        assert gate.inside.is_set()
        gate.open()
        assert yes.result(LONG_S).text in ("yes", "no")
        assert set(json.loads(a_is.result(LONG_S).text)) == {"a"}
    cm.close()
    with pytest.raises(StateError, match="the manager is closed"):
        cm.grammar('root ::= "a"')


def test_whoever_waits_for_a_result_does_not_turn_in_circles(monkeypatch: pytest.MonkeyPatch) -> None:
    cm = fake()
    gate = Gate(monkeypatch, 2)
    with Pool(cm) as pool:
        (ticket,) = say(pool, "1?", max_tokens=20, **ENDLESS)
        waits, wait = [], ticket._changed.wait

        def counted_wait(*args: Any) -> bool:
            waits.append(args)
            gate.open()  # now it waits, and the rest may come
            return wait(*args)

        ticket._changed.wait = counted_wait  # type: ignore[method-assign]
        looked: list[Any] = []
        monkeypatch.setattr(Pool, "wait_for", counted(Pool.wait_for, looked))
        gate.wait()
        ticket.result(LONG_S)
    assert 1 <= len(looked) <= 2
    assert 1 <= len(waits) <= 60


def counted(function: Callable[..., Any], calls: list[Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        calls.append(args)
        return function(*args, **options)

    return call


def opened_by_the_end(pool: Pool, gate: Gate) -> None:
    """Whoever closes the pool opens the gate: when nobody comes in any more, and before it waits for the decode."""
    notify_all = pool._batcher.changed.notify_all

    def notify_all_and_open() -> None:
        notify_all()
        if pool._drains:
            gate.open()

    pool._batcher.changed.notify_all = notify_all_and_open  # type: ignore[method-assign]


@pytest.mark.parametrize("drain", [True, False])
def test_the_end_of_the_worker_loses_no_session(drain: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cm = fake(max_sessions=2)
    gate = Gate(monkeypatch, 10)
    pool = Pool(cm)
    with pool:
        tickets = say(pool, *(f"{i}? " + "w" * 20 for i in range(5)), max_tokens=30, **ENDLESS)
        gate.wait()
        opened_by_the_end(pool, gate)
        pool.close(drain=drain)
        assert all(ticket.is_over for ticket in tickets)
        with pytest.raises(StateError, match="closed"):
            say(pool, "late")
    for ticket in tickets:
        reply = ticket.result(0.0)
        whole = alone(
            ticket.session.messages[0]["content"] if ticket.session.messages else "", max_tokens=30, **ENDLESS
        )
        if drain:
            assert reply.tokens == whole
        else:
            assert reply.stop_reason in ("cancelled", "length")
            assert reply.tokens == whole[: len(reply.tokens)]
        assert not cm.is_held(ticket.session)
    assert drain or any(ticket.result().stop_reason == "cancelled" for ticket in tickets)


def test_an_error_in_the_with_ends_what_is_under_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(fake())
    gate = Gate(monkeypatch, 5)
    (ticket,) = say(pool, "1?", max_tokens=1000, **ENDLESS)
    opened_by_the_end(pool, gate)
    with pytest.raises(ZeroDivisionError), pool:
        raise ZeroDivisionError
    assert ticket.result(0.0).stop_reason == "cancelled"


def test_a_manager_closed_under_the_worker_ends_everybody() -> None:
    cm = fake()
    at_work, closed = threading.Event(), threading.Event()

    def stop_between_two_steps() -> None:
        if tickets[0].n_generated == 3:
            at_work.set()
            assert closed.wait(LONG_S)

    pool = Pool(cm)
    tickets = say(pool, "1?", "2?", max_tokens=1000, **ENDLESS)
    tickets[0].on_change(stop_between_two_steps)
    with pool:
        assert at_work.wait(LONG_S)
        cm.close()
        closed.set()
        for ticket in tickets:
            with pytest.raises(StateError, match="closed"):
                ticket.result(LONG_S)
        with pytest.raises(StateError, match="closed"):
            say(pool, "3?")
    assert tickets[0].session.messages[-1]["role"] == "assistant"


def test_a_worker_that_is_hit_by_anything_at_all_tells_everybody() -> None:
    with Pool(fake()) as pool:
        pool._batcher.step = lambda: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        (ticket,) = say(pool, "1?", **ENDLESS)
        with pytest.raises(ZeroDivisionError):
            ticket.result(LONG_S)
        with pytest.raises(StateError, match="closed"):
            say(pool, "2?")


def test_the_next_turn_may_be_asked_for_as_soon_as_the_reply_is_seen() -> None:
    with Pool(fake()) as pool:
        session = Session()
        for i in range(30):
            for chunk in pool.submit(session, f"{i}?", max_tokens=1, **ENDLESS):
                if chunk.reply is not None:
                    break
    assert len(session.messages) == 60


@pytest.mark.parametrize("has_worker", [True, False])
def test_several_threads_iterate_over_one_ticket(has_worker: bool) -> None:
    pool = Pool(fake())
    if has_worker:
        pool.__enter__()
    (ticket,) = say(pool, "1?", max_tokens=60, **ENDLESS)
    got: list[int | None] = []
    threads = [threading.Thread(target=lambda: got.extend(c.token for c in ticket)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LONG_S)
        assert not thread.is_alive()
    assert sorted(t for t in got if t is not None) == sorted(ticket.result().tokens)
    assert len(got) == 60
    pool.close()


def test_close_while_another_thread_waits_without_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = Pool(fake())
    gate = Gate(monkeypatch, 4)
    (ticket,) = say(pool, "1?", max_tokens=1000, **ENDLESS)
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(ticket.result()))
    thread.start()
    gate.wait()
    opened_by_the_end(pool, gate)
    pool.close()
    thread.join(LONG_S)
    assert [reply.stop_reason for reply in replies] == ["cancelled"]


def test_submits_and_closes_that_meet_leave_nobody_waiting() -> None:
    for i in range(30):
        cm = fake()
        pool = Pool(cm).__enter__()
        tickets: list[Ticket] = []

        def ask(pool: Pool = pool, tickets: list[Ticket] = tickets) -> None:
            try:
                while True:
                    tickets.append(pool.submit(Session(), "1?", max_tokens=1, **ENDLESS))
            except (StateError, QueueFull):
                pass

        thread = threading.Thread(target=ask)
        thread.start()
        wait_until(lambda: tickets)  # noqa: B023 - of this turn of the loop
        pool.close(drain=i % 2 == 0)
        thread.join(LONG_S)
        assert not thread.is_alive()
        for ticket in tickets:
            assert ticket.is_over
            assert i % 2 or ticket.result(0.0).n_generated == 1
        assert pool._batcher.is_idle


# -- who is dropped, and what is kept


def test_a_ticket_that_its_user_drops_goes_on_and_nothing_of_it_is_kept() -> None:
    cm = fake()
    pool = Pool(cm)
    session = Session()
    pool.submit(session, "1?", max_tokens=5, **ENDLESS)
    pool.run()
    assert session.messages[-1]["role"] == "assistant"
    ticket = pool.submit(Session(), "2?", max_tokens=5, **ENDLESS)
    waited = pool.submit(Session(), "2?" * 30, max_tokens=5, **ENDLESS)
    pool.run()
    gone = [weakref.ref(ticket), weakref.ref(ticket.session), weakref.ref(ticket.generation)]
    del ticket
    gc.collect()
    assert [ref() for ref in gone] == [None, None, None]
    assert waited.is_over
    assert not pool._batcher._by_session
    cm.check_integrity()
    assert cm.slots.n_free == 8 - 2


def test_a_session_in_the_pool_lives_though_nobody_else_has_it() -> None:
    pool = Pool(fake())
    ticket = pool.submit(Session(), "1?", max_tokens=5, **ENDLESS)
    gc.collect()
    pool.run()
    assert_alone([ticket], max_tokens=5, **ENDLESS)


def test_a_pool_that_is_dropped_under_way_keeps_what_was_said_and_waits_for_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cm = fake(n_batch=64)
    sessions = [Session(namespace=name) for name in (None, None, "stem", "stem", None)]
    talks, gave_way, in_prompt, for_stem, waits = sessions

    def begin() -> tuple[str, str]:
        pool = Pool(cm, prefill_share=1.0)
        talker = pool.submit(talks, "1?", max_tokens=100, **ENDLESS)
        pauses = pool.submit(gave_way, "2?", max_tokens=100, **ENDLESS)
        step_until(pool, lambda: pauses.n_generated == 4)
        for session in (in_prompt, for_stem):
            pool.submit(session, "p" * 200, **ENDLESS)
        pool.step()
        pool._batcher._pause(pauses)
        pool.submit(waits, "4?", **ENDLESS)
        states = [ticket.state for ticket in pool._batcher.tickets]
        assert states == ["running", "prompt", "prompt", "paused", "waiting"]
        assert 0 < len(cm.tokens(in_prompt)) < 200
        assert len(cm.tokens(for_stem)) == 0
        return "".join(chunk.text for chunk in chunks_so_far(talker)), "".join(c.text for c in chunks_so_far(pauses))

    texts = begin()
    gate = Gate(monkeypatch)
    with Pool(cm) as other:
        (ticket,) = say(other, "5?", max_tokens=4, **ENDLESS)
        gate.wait()
        with pytest.warns(ResourceWarning, match="dropped with 5 requests under way"):
            gc.collect()
        assert gate.inside.is_set()  # a decode was under way all the while
        assert not any(cm.is_held(session) for session in sessions)
        assert [session.messages[-1]["content"] for session in (talks, gave_way)] == list(texts)
        assert all(texts)
        assert not any(session.messages for session in (in_prompt, for_stem, waits))
        gate.open()
    assert_alone([ticket], max_tokens=4, **ENDLESS)
    cm.check_integrity()
    engine = Engine(cm)
    assert engine.chat(talks, "more?", max_tokens=3, **ENDLESS).n_reused > 21  # its prompt's
    for session in sessions:
        assert engine.chat(session, "so?", max_tokens=3, **ENDLESS).n_generated == 3
    for i in range(8):  # half a prompt and an empty row make way
        cm.prepare(said(f"{i}"))


def chunks_so_far(ticket: Ticket) -> list[Chunk]:
    chunks = []
    while (chunk := ticket.take()) is not None:
        chunks.append(chunk)
    return chunks


def test_an_idle_pool_is_dropped_in_silence() -> None:
    pool = Pool(fake())
    (ticket,) = say(pool, "1?", max_tokens=3, **ENDLESS)
    pool.run()
    gone = weakref.ref(pool)
    del pool, ticket
    gc.collect()
    assert gone() is None


def test_memory_stays_flat_over_many_requests() -> None:
    pool = Pool(fake(max_sessions=4))
    pool._batcher._tally._first = type(pool._batcher._tally._first)(maxlen=10)

    def n_objects() -> int:
        for _ in range(100):
            say(pool, "1?", max_tokens=1, **ENDLESS)
        pool.run()
        gc.collect()
        return len(gc.get_objects())

    n_objects()
    before = n_objects()
    assert n_objects() - before < 100


def test_forks_and_edits_of_sessions_in_the_pool_hurt_nobody() -> None:
    cm = fake()
    pool = Pool(cm, prefill_share=1.0)
    first, second, third = say(pool, "1?", "2? " * 10, "3?", max_tokens=12, **ENDLESS)
    step_until(pool, lambda: first.n_generated == 4 and third.n_generated > 0)
    fork = cm.fork(first.session)
    second.session.messages.append({"role": "user", "content": "and this?"})
    third.session.messages.clear()
    pool.run()
    assert first.result().tokens == alone("1?", max_tokens=12, **ENDLESS)
    assert second.result().tokens == alone("2? " * 10, max_tokens=12, **ENDLESS)
    assert third.result().tokens == alone("3?", max_tokens=12, **ENDLESS)
    assert fork.messages == [{"role": "user", "content": "1?"}]
    cm.prepare(fork)
    assert_exact(cm, fork)
    more = pool.submit(fork, max_tokens=12, **ENDLESS).result()
    assert more.tokens == first.result().tokens
    for ticket in (first, second, third):
        cm.prepare(ticket.session)
        assert_exact(cm, ticket.session)


def test_eight_sessions_talk_past_their_context_over_a_common_prefix(load: Loader) -> None:
    cm = load(n_ctx=256, max_sessions=8, n_batch=256)
    cm.set_system("You are a clock that never stops.")
    endless = {
        "logit_bias": dict.fromkeys((t for t in range(640) if cm.vocab.is_eog(t)), -math.inf),
        "temperature": 1.0,
    }
    pool = Pool(cm, prefill_share=1.0)
    n = 20 * 256 // 8  # all together twenty times what there is room for
    tickets = [pool.submit(Session(), f"{i}?", max_tokens=n, seed=i, **endless) for i in range(8)]
    n_steps = 0
    while pool.step():
        n_steps += 1
        if n_steps % 500 == 0:
            cm.check_integrity()
        assert n_steps < 20 * n
    assert [ticket.result().n_generated for ticket in tickets] == [n] * 8
    assert cm.stats().n_evictions > 0
    assert pool.stats().n_preemptions > 0


# -- interrupts


@pytest.mark.parametrize("what", ["before", "half", "after"])
@pytest.mark.parametrize("kind", ["full", "recurrent"])
def test_an_interrupt_in_a_decode_is_raised_and_everybody_goes_on(
    load: Loader, monkeypatch: pytest.MonkeyPatch, kind: str, what: str
) -> None:
    name, _ = KINDS[kind]
    texts = ["One? " * 4, "Two? " * 5, "Three? " * 30]
    with load(name) as cm:
        expected = [Engine(cm).chat(Session(), text, max_tokens=10, **GREEDY) for text in texts]
    cm = load(name, n_batch=64)
    pool = Pool(cm, prefill_share=1.0)
    tickets = say(pool, *texts[:2], max_tokens=10, **GREEDY)
    step_until(pool, lambda: all(t.n_generated > 1 for t in tickets))
    tickets += say(pool, texts[2], max_tokens=10, **GREEDY)
    Fault(monkeypatch, LlamaContext, "decode").plant(KeyboardInterrupt(), what, at=2)
    with pytest.raises(KeyboardInterrupt):
        pool.run()
    pool.run()
    for ticket, reply in zip(tickets, expected, strict=True):
        assert_as_alone(cm, ticket.session, ticket.result(), reply, name)


def test_an_interrupt_anywhere_in_a_step_loses_nobody() -> None:
    texts = ["1?", "2? " + "x" * 40, "2? " + "x" * 40 + "y"]
    expected = [alone(text, max_tokens=4, **ENDLESS) for text in texts]

    def start() -> tuple[Pool, list[Ticket]]:
        pool = Pool(fake(n_ctx=170, n_batch=24, max_sessions=3, radix=False), prefill_share=1.0)
        tickets = say(pool, *texts, max_tokens=4, **ENDLESS)
        return pool, tickets

    def act(thing: tuple[Pool, list[Ticket]]) -> None:
        thing[0].run()

    n_interrupted = 0

    def check(thing: tuple[Pool, list[Ticket]]) -> None:
        nonlocal n_interrupted
        pool, tickets = thing
        pool.run()
        assert pool._batcher.is_idle
        assert not pool._batcher._by_session
        for ticket, tokens in zip(tickets, expected, strict=True):
            assert not pool.cm.is_held(ticket.session)
            if isinstance(ticket.error, KeyboardInterrupt):
                n_interrupted += 1
                said = ticket.reply.tokens if ticket.reply is not None else ()
                assert said == tokens[: len(said)]
            else:
                assert ticket.result().tokens == tokens
            roles = [message["role"] for message in ticket.session.messages]
            assert roles in ([], ["user", "assistant"])
        pool.cm.check_integrity()
        pool.cm.close()

    n = interrupted_everywhere(start, act, check, step=15013)
    assert n > 20
    assert 0 < n_interrupted < n


# -- anything at all


Operation = tuple[str, int, int, int]
OPERATIONS = st.tuples(
    st.sampled_from(["submit", "submit", "step", "steps", "cancel", "fault", "idle", "release", "pause"]),
    st.integers(0, 8),
    st.integers(1, 40),
    st.integers(-1, 1),
)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    slots=st.integers(1, 4),
    n_ctx=st.sampled_from([None, 180, 250, 400]),
    n_batch=st.sampled_from([3, 16, 64]),
    radix=st.booleans(),
    share=st.sampled_from([0.1, 0.5, 1.0]),
    operations=st.lists(OPERATIONS, min_size=3, max_size=30),
)
@example(  # one gives way while its row is on the way back from a step that failed
    slots=2, n_ctx=None, n_batch=16, radix=False, share=0.1, operations=[
        *[("submit", 0, 1, 0)] * 3, ("submit", 0, 3, 0), ("submit", 0, 1, 0), ("steps", 0, 20, 0), ("fault", 2, 1, 0),
        ("submit", 0, 1, 1), ("fault", 0, 1, 0),
    ],
)  # fmt: skip
def test_whatever_comes_everybody_says_what_they_would_have_said_alone(
    slots: int, n_ctx: int | None, n_batch: int, radix: bool, share: float, operations: list[Operation]
) -> None:
    cm = fake(
        n_ctx=n_ctx or 180 * (slots + 2), n_batch=n_batch, max_sessions=slots, unified=n_ctx is not None, radix=radix
    )
    pool = Pool(cm, prefill_share=share, max_waiting=6)
    tickets: list[Ticket] = []
    idle: list[Session] = []
    n_tokens: list[int] = []
    for what, which, n, priority in operations:
        running = pool._batcher.running
        match what:
            case "submit" if not pool.is_full:
                text = ("", "a stem of many. " * 3, "b")[which % 3] + "xyz"[which // 3 % 3] * n
                n_tokens.append(1 + n % 12)
                tickets += say(pool, text, priority=priority, max_tokens=n_tokens[-1], **ENDLESS)
            case "step":
                pool.step()
            case "steps":
                for _ in range(n // 2):
                    pool.step()
            case "cancel" if tickets:
                tickets[which % len(tickets)].cancel()
            case "fault":
                context_of(cm).codes.append([*CODES, *CODES][which % 10])
            case "idle":
                idle.append(said("idle " * which))
                with suppress(CapacityError, DecodeError):
                    cm.prepare(idle[-1])
            case "release" if idle:
                cm.release(idle.pop())
            case "pause" if len(running) > 1:
                pool._batcher._pause(running[which % len(running)])
        cm.check_integrity()
    n_steps = 0
    while pool.step():
        n_steps += 1
        assert n_steps < 3000
    context_of(cm).codes.clear()
    for ticket, n in zip(tickets, n_tokens, strict=True):
        if ticket.error is not None:  # a fault that hit it while it was alone
            assert isinstance(ticket.error, DecodeError | CapacityError), ticket.error
            continue
        reply = ticket.result(0.0)
        if cm.stats().n_evictions or reply.got_nowhere:  # somebody was alone when llama.cpp said that there is no room
            continue
        text = ticket.session.messages[0]["content"]
        whole = alone(text, max_tokens=n, **ENDLESS)
        assert reply.tokens == whole[: len(reply.tokens)]
        if not ticket.is_cancelled:
            assert reply.tokens == whole
            cm.prepare(ticket.session)
            assert_exact(cm, ticket.session)


# -- what it says of itself


def test_stats_and_metrics_are_true() -> None:
    pool = Pool(fake(max_sessions=2, n_batch=64), prefill_share=1.0)
    assert pool.stats() == type(pool.stats())(*[0] * 10, *[0.0] * 9)
    first, second, third = say(pool, "1?", "2? " + "x" * 80, "3?", max_tokens=6, **ENDLESS)
    pool.step()
    stats = pool.stats()
    assert (stats.n_waiting, stats.n_running, stats.n_steps) == (1, 2, 1)
    assert stats.n_prompt_tokens == 64
    assert stats.batch_fill == 1.0
    pool.run()
    (bad,) = say(pool, "4?", **ENDLESS)
    (gone,) = say(pool, "5?", **ENDLESS)
    bad.generation._sampler.sample = lambda *_: 1 / 0  # type: ignore[method-assign]
    gone.cancel()
    pool.run()
    stats = pool.stats()
    tickets = [first, second, third]
    assert (stats.n_waiting, stats.n_running, stats.n_paused) == (0, 0, 0)
    assert (stats.n_done, stats.n_failed, stats.n_cancelled, stats.n_preemptions) == (3, 1, 1, 0)
    assert stats.n_generated_tokens == sum(ticket.result().n_generated for ticket in tickets) == 18
    assert bad.reply is not None
    assert stats.n_prompt_tokens == sum(ticket.result().n_decoded for ticket in tickets) + bad.reply.n_decoded
    assert stats.batch_fill == pytest.approx((stats.n_prompt_tokens + 15) / (64 * stats.n_steps))
    assert stats.prompt_tokens_per_s == pytest.approx(stats.n_prompt_tokens / stats.step_seconds)
    assert stats.generated_tokens_per_s == pytest.approx(18 / stats.step_seconds)
    assert 0 < stats.between_tokens_p50_s <= stats.between_tokens_p95_s
    assert 0 < stats.first_token_p50_s <= stats.first_token_p95_s
    assert third.result().first_token_s <= stats.first_token_p95_s + 1e-3
    assert stats.own_seconds > 0
    lines = dict(line.rsplit(" ", 1) for line in pool.metrics().splitlines() if not line.startswith("#"))
    assert lines["llama_sessions_waiting"] == "0"
    assert float(lines["llama_sessions_batch_fill"]) == stats.batch_fill > 0
    assert lines["llama_sessions_done_total"] == "3"
    assert lines["llama_sessions_generated_tokens_total"] == "18"
    assert float(lines['llama_sessions_first_token_seconds{quantile="0.95"}']) == stats.first_token_p95_s
    kinds = dict(line.split()[2:4] for line in pool.metrics().splitlines() if line.startswith("# TYPE"))
    assert {name.split("{")[0] for name in lines} == set(kinds)
    assert {kinds[name] for name in kinds if name.endswith("_total")} == {"counter"}


def test_a_failed_decode_counts_no_tokens() -> None:
    pool = Pool(fake(), prefill_share=1.0)
    tickets = say(pool, "1?", "2?", max_tokens=4, **ENDLESS)
    step_until(pool, lambda: all(t.n_generated for t in tickets))
    before = pool.stats()
    context_of(pool.cm).codes.append(-1)
    pool.step()
    after = pool.stats()
    n_tokens = [s.batch_fill * s.n_steps * 64 for s in (before, after)]
    assert n_tokens[0] == pytest.approx(n_tokens[1])
    pool.run()
    assert_alone(tickets, max_tokens=4, **ENDLESS)


@pytest.mark.parametrize(("values", "percent", "expected"), [([], 50, 0.0), ([3.0], 95, 3.0), ([2.0, 1.0], 50, 1.0)])
def test_a_percentile_is_the_value_that_so_many_are_at_or_below(
    values: list[float], percent: int, expected: float
) -> None:
    assert percentile(values, percent) == expected
    many = list(np.random.default_rng(0).permutation(100).astype(float))
    assert (percentile(many, 50), percentile(many, 95)) == (49.0, 94.0)
