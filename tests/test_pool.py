"""`Pool`: many at once, and each of them as if it were alone."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from conversations import Loader, assert_exact, is_seated, over_fake, said
from test_invariants import KINDS, Fault

from llama_sessions import (
    Cancelled,
    CapacityError,
    ContextManager,
    ContextOverflow,
    DecodeError,
    Engine,
    OptionError,
    Pool,
    QueueFull,
    Session,
    StateError,
    Ticket,
)
from llama_sessions.generation import Generation
from llama_sessions.llama.context import LlamaContext
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
        assert (got.tokens, got.text, got.stop_reason) == (reply.tokens, reply.text, reply.stop_reason)
        assert got.n_prompt == reply.n_prompt
        assert ticket.session.messages[-1] == {"role": "assistant", "content": reply.text}
        cm.prepare(ticket.session.copy())
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
    pool = Pool(cm)
    ticket = pool.submit(session, max_tokens=3, **ENDLESS)
    assert pool.step()
    assert ticket.n_generated == 1
    assert ticket.result().tokens == alone("Ready?", max_tokens=3, **ENDLESS)


# -- continuous batching


def test_who_comes_later_joins_and_who_is_through_leaves_at_once() -> None:
    cm = fake(max_sessions=2)
    pool = Pool(cm)
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

    def wide_alone(text: str, **options: Any) -> tuple[int, ...]:
        with wide() as cm:
            return Engine(cm).chat(Session(), text, **options).tokens

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
    for ticket, options in [
        (eight[0], {"max_tokens": 60}),
        (eight[7], {"max_tokens": 60}),
        (newcomer, {"max_tokens": 4}),
    ]:
        assert ticket.result().tokens == wide_alone(ticket.session.messages[0]["content"], **options, **plain)


def test_with_the_whole_share_a_prompt_fills_the_batch() -> None:
    pool = Pool(fake(n_batch=64), prefill_share=1.0)
    (talker,) = say(pool, "One?", max_tokens=50, **ENDLESS)
    step_until(pool, lambda: talker.n_generated > 2)
    (newcomer,) = say(pool, "x" * 200, max_tokens=1, **ENDLESS)
    before = talker.n_generated
    step_until(pool, lambda: newcomer.is_over)
    assert talker.n_generated - before == math.ceil(newcomer.result().n_prompt / 63)


@pytest.mark.parametrize("n_batch", [1, 2, 3, 5])
def test_more_talkers_than_a_batch_has_room_for_take_turns(n_batch: int) -> None:
    pool = Pool(fake(n_batch=n_batch), prefill_share=0.5)
    tickets = say(pool, *(f"{i}?" for i in range(5)), max_tokens=6, **ENDLESS)
    spread = 0
    while pool.step():
        talking = [t.n_generated for t in tickets if t.state == "running"]
        spread = max(spread, max(talking, default=0) - min(talking, default=0))
    assert_alone(tickets, max_tokens=6, **ENDLESS)
    if n_batch == 5:
        assert spread <= 5  # all the time that a prompt takes beside them


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
        pool = Pool(fake(n_batch=32))
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
    pool = Pool(fake(max_sessions=1))
    low = pool.submit(Session(), "low", priority=-1, max_tokens=1, **ENDLESS)
    n_before = 0
    while not low.is_over:
        for priority in (1, 2):
            pool.submit(Session(), "high", priority=priority, max_tokens=1, **ENDLESS)
        pool.step()
        n_before += 1
    assert 6 <= n_before <= 40
    pool.close()
    pool = Pool(fake(max_sessions=1))
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
    assert not late.messages
    assert not pool.cm.is_held(late)
    third = pool.submit(late, "3?", wait_s=60.0, max_tokens=3, **ENDLESS)  # steps the pool meanwhile
    pool.run()
    assert_alone([*tickets, third], max_tokens=3, **ENDLESS)


def test_to_wait_for_a_place_ends_with_its_time_or_with_the_pool() -> None:
    cm = fake(max_sessions=1, n_ctx=4000)
    with Pool(cm, max_waiting=1) as pool:
        runs, waits = say_one_after_another(pool)
        started = time.monotonic()
        with pytest.raises(QueueFull):
            pool.submit(Session(), "3?", wait_s=0.1, **ENDLESS)
        assert 0.09 <= time.monotonic() - started < 2.0
        errors: list[BaseException] = []

        def wait_long() -> None:
            try:
                pool.submit(Session(), "4?", wait_s=60.0, **ENDLESS)
            except StateError as e:
                errors.append(e)

        threads = [threading.Thread(target=wait_long) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.05)
        pool.close()
        for thread in threads:
            thread.join(5.0)
        assert len(errors) == 2
    assert runs.result().stop_reason == waits.result().stop_reason == "cancelled"


def say_one_after_another(pool: Pool) -> tuple[Ticket, Ticket]:
    """One that runs for long, one that waits."""
    (runs,) = say(pool, "1?", **ENDLESS)
    while runs.state == "waiting":
        time.sleep(0.001)
    (waits,) = say(pool, "2?", **ENDLESS)
    return runs, waits


def test_who_waits_for_a_place_gets_the_one_that_becomes_free_however_many_wait() -> None:
    with Pool(fake(max_sessions=1), max_waiting=1) as pool:
        tickets: list[Ticket] = []

        def ask(i: int) -> None:
            tickets.append(pool.submit(Session(), f"{i}?", wait_s=60.0, max_tokens=2, **ENDLESS))

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30.0)
        replies = [ticket.result(30.0) for ticket in tickets]
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
    monkeypatch.setattr("llama_sessions.batching._LOOK_AGAIN_S", 0.0)
    cm = fake(max_sessions=2)
    stream = Engine(cm).stream(Session(), "mine", **ENDLESS)
    next(stream)
    pool = Pool(cm)
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
        expected = [Engine(cm).chat(Session(), text, max_tokens=40, **GREEDY).tokens for text in texts]
    cm = load(name, n_batch=256)
    pool = Pool(cm, prefill_share=1.0)
    tickets = say(pool, *texts, max_tokens=40, **GREEDY)
    step_until(pool, lambda: all(t.n_generated > 4 for t in tickets[1:]))
    for ticket in tickets[1:]:
        pool._batcher._pause(ticket)
    assert [t.state for t in tickets[1:]] == ["paused", "paused"]
    pool.run()
    assert [ticket.result().tokens for ticket in tickets] == expected
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
    pool = Pool(cm)
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


@pytest.mark.parametrize("why", ["cancelled", "timeout"])
@pytest.mark.parametrize("stage", ["waiting", "prompt", "running", "paused"])
def test_a_request_ends_at_every_stage_within_one_step(stage: str, why: str) -> None:
    cm = fake(max_sessions=1 if stage == "waiting" else 3)
    pool = Pool(cm)
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
    pool = Pool(fake(max_sessions=1))
    first, second = say(pool, text, "2?", max_tokens=5, **ENDLESS)
    pool.step()
    assert first.state == stage
    first.cancel()
    pool.step()
    assert second.state != "waiting"
    pool.run()
    assert_alone([second], max_tokens=5, **ENDLESS)


def test_a_timeout_counts_from_the_submit() -> None:
    pool = Pool(fake(max_sessions=1))
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
        expected = [Engine(cm).chat(Session(), text, max_tokens=10, **GREEDY).tokens for text in texts]
    cm = load(name, n_batch=64, **options)
    pool = Pool(cm)
    tickets = say(pool, *texts[:2], max_tokens=10, **GREEDY)
    step_until(pool, lambda: all(t.n_generated > 1 for t in tickets))
    tickets += say(pool, texts[2], max_tokens=10, **GREEDY)
    fault = Fault(monkeypatch, LlamaContext, "decode").plant(code, when, at=2)
    pool.run()
    assert fault.n_hits == 1
    assert [ticket.result().tokens for ticket in tickets] == expected
    for ticket in tickets:
        cm.prepare(ticket.session)
        assert_exact_kind(cm, name, ticket.session)


def assert_exact_kind(cm: ContextManager, name: str, session: Session) -> None:
    cm.test_model = name  # type: ignore[attr-defined]
    assert_exact(cm, session)


@pytest.mark.parametrize("code", [-1, 2, -2, -3])
def test_the_one_whose_decode_always_fails_gets_the_error_alone(code: int) -> None:
    cm = fake()
    pool = Pool(cm)
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
    pool = Pool(cm)
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
        expected = [Engine(cm).chat(Session(), text, max_tokens=9, **GREEDY).tokens for text in texts]
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
    assert [ticket.result().tokens for ticket in tickets] == expected


def test_a_raising_sampler_ends_its_own_request() -> None:
    pool = Pool(fake())
    first, bad = say(pool, "1?", "2?", max_tokens=6, **ENDLESS)
    step_until(pool, lambda: bad.n_generated == 2)
    bad.generation._sampler.sample = lambda *_: 1 / 0  # type: ignore[method-assign]
    pool.run()
    with pytest.raises(ZeroDivisionError):
        bad.result()
    assert len(list(bad_chunks(bad))) == 2
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
    n_calls = 0
    choose = Generation.choose

    def interrupted(self: Generation, logits: FloatArray) -> int | None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == at:
            raise KeyboardInterrupt
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
    assert not pool._batcher._chosen


def bad_chunks(ticket: Ticket) -> list[int | None]:
    """What came before the error."""
    tokens = []
    while (chunk := ticket.take()) is not None:
        tokens.append(chunk.token)
    return tokens


def test_a_row_that_cannot_be_parked_ends_its_own_request() -> None:
    cm = fake()
    pool = Pool(cm)
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
    pool = Pool(cm)
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
    pool, engine, session = Pool(cm), Engine(cm), Session()
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


def test_after_close_everything_is_refused_and_nothing_lost() -> None:
    cm = fake()
    pool = Pool(cm)
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
    pool = Pool(cm)
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
    pool = Pool(cm)
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


def test_a_listener_that_raises_hurts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    pool = Pool(fake())
    tickets = say(pool, "1?", "2?", max_tokens=4, **ENDLESS)
    tickets[0].on_change(lambda: 1 / 0)
    pool.run()
    assert_alone(tickets, max_tokens=4, **ENDLESS)
    assert "what listens to a ticket raised" in caplog.text
