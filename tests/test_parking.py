"""Saved KV and more sessions than slots: what is kept, when, how it comes back, and that it is exact."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from conversations import Loader, assert_exact, over_fake, prepared, said, sources
from interrupting import interrupted_behind
from scripted import only_text

from llama_sessions import (
    CapacityError,
    ContextManager,
    ContextOverflow,
    Engine,
    NextToken,
    NoFreeSlot,
    OptionError,
    PromptChunk,
    RadixOptions,
    Session,
    SnapshotError,
    StateError,
)
from llama_sessions.kv import snapshot
from llama_sessions.kv.costs import Costs
from llama_sessions.kv.radix import RadixTree
from llama_sessions.kv.sequences import Sequences
from llama_sessions.kv.snapshot import Snapshots
from llama_sessions.llama.context import LlamaContext
from llama_sessions.planner import Planner
from llama_sessions.testing import FakeContext, fake_parts, fresh_logits

KINDS = {
    "full": ("llama-bpe", {}),
    "v transposed": ("llama-bpe", {"flash_attn": False}),
    "streams": ("llama-bpe", {"kv_unified": False, "n_ctx": 2048}),
    "window": ("gemma3", {}),
    "narrow window": ("gemma3", {"swa_full": False}),
    "recurrent": ("mamba", {}),
    "hybrid": ("hybrid", {}),
}
ROWS = ("full", "v transposed", "streams")  # of which any first part can be used


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def open_kind(load: Loader, kind: str, **options: Any) -> ContextManager:
    model, settings = KINDS[kind]
    cm = load(model, **{**settings, **options})
    cm.test_model = model  # type: ignore[attr-defined]
    return cm


# -- parking


def test_a_parked_session_comes_back_exactly_into_another_slot(load: Loader, kind: str) -> None:
    cm = open_kind(load, kind)
    session, other = said("Who are you? " * 6), said("I am somebody else. " * 4)
    cm.prepare(session)
    slot = cm._seats.get(session).row.seq_id  # type: ignore[union-attr]
    tokens = cm.tokens(session)
    assert cm.park(session) is True
    assert (cm.stats().n_parked, cm.stats().slots_free) == (1, 4)
    assert cm.is_parked(session)
    cm.prepare(other)
    assert not cm.is_parked(other)
    before = cm.logits(other).copy()
    np.testing.assert_array_equal(cm.tokens(session), tokens)
    n_decoded = cm.stats().n_tokens_decoded
    assert_exact(cm, session)
    assert cm._seats.get(session).row.seq_id != slot  # type: ignore[union-attr]
    assert cm.stats().n_tokens_decoded - n_decoded <= 1
    assert cm.stats().n_parked == 0
    assert not cm.is_parked(session)
    np.testing.assert_array_equal(cm.logits(other), before)
    session.add_assistant("I am.")
    session.add_user("Are you?")
    cm.prepare(session)
    assert_exact(cm, session)


def test_the_next_turn_of_a_parked_session_decodes_only_what_is_new(load: Loader, kind: str) -> None:
    cm = open_kind(load, kind)
    engine, session = Engine(cm), Session()
    engine.chat(session, "Who are you? " * 6, max_tokens=5, logit_bias=only_text(cm))
    n_row = session.n_past
    cm.park(session)
    reply = engine.chat(session, "And now?", max_tokens=3, logit_bias=only_text(cm))
    assert sources(session) == ["cache", "decode"]
    assert reply.n_reused == n_row
    session.add_user("x")
    cm.prepare(session)
    assert_exact(cm, session)


def test_append_goes_on_where_a_parked_row_ended(load: Loader, kind: str) -> None:
    cm = open_kind(load, kind)
    session = said("Who are you? " * 4)
    cm.prepare(session)
    cm.append(session, 65)
    tokens = cm.tokens(session)
    cm.park(session)
    n_decoded = cm.stats().n_tokens_decoded
    cm.append(session, 66)
    assert cm.stats().n_tokens_decoded == n_decoded + 1
    assert cm.tokens(session).tolist() == [*tokens, 66]
    assert_exact(cm, session)
    session.add_assistant("AB")
    session.add_user("x")
    cm.prepare(session)
    assert_exact(cm, session)


def test_a_branch_of_a_parked_session_is_parked_and_costs_nothing(load: Loader) -> None:
    cm = load()
    session = said("Who are you? " * 4)
    cm.prepare(session)
    cm.park(session)
    n = cm.stats().n_native_operations
    twin = cm.fork(session)
    assert cm.stats().n_native_operations == n
    assert cm.stats().n_parked == 2
    np.testing.assert_array_equal(cm.tokens(twin), cm.tokens(session))
    twin.add_assistant("I am.")
    twin.add_user("More.")
    cm.prepare(twin)
    assert_exact(cm, twin)
    assert_exact(cm, session)


def test_when_slots_run_out_the_least_recently_used_idle_session_is_parked(load: Loader) -> None:
    cm = load(max_sessions=3)
    sessions = prepared(cm, *(f"{i} is my number. " * 3 for i in range(3)))
    cm.prepare(sessions[0])  # used again
    fourth = said("I am the fourth.")
    cm.prepare(fourth)
    assert [cm._seats.get(s) is None for s in sessions] == [False, True, False]
    for session in [*sessions, fourth]:
        assert_exact(cm, session)


def test_neither_a_pinned_nor_a_generating_session_is_parked_by_itself(load: Loader) -> None:
    cm = load(max_sessions=2)
    pinned, streaming = said("pinned"), said("streaming")
    cm.prepare(pinned)
    cm.pin(pinned)
    stream = Engine(cm).stream(streaming, max_tokens=20, logit_bias=only_text(cm))
    next(stream)
    with pytest.raises(NoFreeSlot):
        cm.prepare(said("third"))
    with pytest.raises(StateError, match="the session is generating"):
        cm.park(streaming)
    cm.pin(pinned, False)
    cm.prepare(said("third"))
    assert cm.stats().n_parked == 1
    list(stream)


def test_when_cells_run_out_idle_sessions_are_parked(load: Loader) -> None:
    cm = load(n_ctx=512, max_sessions=4)
    sessions = prepared(cm, *(f"{i} and on and on. " * 8 for i in range(6)))
    assert cm.stats().n_parked > 0
    for session in sessions:
        assert_exact(cm, session)
    engine = Engine(cm)
    long = Session()
    reply = engine.chat(long, "go", max_tokens=350, logit_bias=only_text(cm))
    assert reply.n_generated == 350  # the others made room in the middle of it
    for session in sessions:
        assert_exact(cm, session)


class Clock:
    """The clock by which sessions are idle; it stands still unless it is put forward."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_idle_sessions_are_parked_after_a_while(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    cm = load(idle_park_after_s=5.0)
    clock = Clock(monkeypatch)
    idle, busy = said("idle"), said("busy")
    cm.prepare(idle)
    clock.now += 4.0
    cm.prepare(busy)
    assert cm.stats().n_parked == 0
    clock.now += 4.0
    cm.append(busy, 65)
    assert cm.stats().n_parked == 1
    assert cm._seats.get(busy) is not None
    assert_exact(cm, idle)


def test_sixty_four_sessions_take_turns_over_eight_slots(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Costs, "is_worth_restoring", lambda *_: True)  # a few tokens of a tiny model may not be
    cm = load(n_ctx=4096, max_sessions=8, radix=RadixOptions(max_bytes=64 * 2**20))
    cm.set_system("Be brief. " * 5)
    engine = Engine(cm)
    sessions = [Session() for _ in range(64)]
    rows = dict.fromkeys(range(64), cm.prefix.n_tokens)
    plain = only_text(cm)
    for turn in range(3):
        for i, session in enumerate(sessions):
            reply = engine.chat(session, f"This is turn {turn} of {i}.", max_tokens=3, logit_bias=plain)
            assert reply.n_reused >= rows[i], (turn, i, session.last_prepare)
            rows[i] = session.n_past
    for session in sessions[::9]:
        session.add_user("x")
        cm.prepare(session)
        assert_exact(cm, session)


def test_without_a_cache_a_parked_session_is_decoded_again(load: Loader) -> None:
    cm = load(radix=False)
    session = said("Who are you? " * 4)
    n = cm.prepare(session)
    cm.park(session)
    assert cm.stats().radix.n_bytes == 0
    before = cm.stats().n_tokens_decoded
    assert_exact(cm, session)
    assert cm.stats().n_tokens_decoded - before == n
    assert cm.flush(session) == 0


@pytest.mark.parametrize("thing", [None, "text", 5])
def test_only_sessions_are_parked_or_pinned(thing: Any) -> None:
    cm, _ = fake()
    for ask in (cm.park, cm.flush, cm.pin, cm.is_parked, cm.is_pinned, cm.logits):
        with pytest.raises(OptionError, match="a Session is wanted"):
            ask(thing)


def test_release_of_a_parked_session_forgets_it(load: Loader) -> None:
    cm = load()
    session = said("Who are you?")
    cm.prepare(session)
    cm.park(session)
    assert cm.release(session) is True
    assert (cm.stats().n_parked, session.n_past, len(cm.tokens(session))) == (0, 0, 0)
    assert cm.release(session) is False
    assert cm.park(session) is False


def test_a_parked_session_that_is_dropped_is_forgotten(load: Loader) -> None:
    cm = load()
    session = said("Who are you?")
    cm.prepare(session)
    cm.park(session)
    del session
    gc.collect()
    cm.clear_radix()
    assert cm.stats().n_parked == 0


# -- what is kept


def test_a_turn_that_loses_nothing_saves_nothing(load: Loader) -> None:
    cm = load()
    engine, session = Engine(cm), Session()
    for i in range(4):
        engine.chat(session, f"turn {i}", max_tokens=4, logit_bias=only_text(cm))
        assert cm.stats().radix.n_bytes == 0
    assert sources(session) == ["row", "decode"]


def test_what_a_changed_history_drops_is_kept_and_comes_back(load: Loader) -> None:
    cm = load()
    session = said("Who are you? " * 3, "I am. " * 3, "What? " * 3)
    n = cm.prepare(session)
    session.messages[1]["content"] = "Nobody."
    cm.prepare(session)
    assert cm.stats().radix.n_tokens == n
    session.messages[1]["content"] = "I am. " * 3
    cm.prepare(session)
    assert "cache" in sources(session)
    assert session.last_prepare is not None
    assert session.last_prepare.n_decoded == 1
    assert_exact(cm, session)


STRIPS = (
    "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}{{ '<|im_start|>' + m.role + '\n' + m.content"
    " + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_what_only_the_template_rewrote_is_not_kept(load: Loader) -> None:
    cm = load(chat_template=STRIPS)
    engine, session = Engine(cm), Session()
    engine.chat(session, "Who are you?", max_tokens=6, logit_bias=only_text(cm))
    engine.chat(session, "And now?", max_tokens=6, logit_bias=only_text(cm))
    assert session.last_prepare is not None
    assert session.last_prepare.n_reused < session.last_prepare.n_tokens - 5  # the reply went
    assert cm.stats().radix.n_bytes == 0


def test_flush_saves_and_the_row_stays(load: Loader, kind: str) -> None:
    cm = open_kind(load, kind)
    session = said("Who are you? " * 4)
    n = cm.prepare(session)
    before = cm.logits(session).copy()
    assert cm.flush(session) == n
    assert cm.flush(session) == 0
    assert cm.stats().radix.n_tokens == n
    np.testing.assert_array_equal(cm.logits(session), before)
    cm.append(session, 65)
    assert_exact(cm, session)


def test_a_session_that_is_dropped_leaves_its_kv_to_others(load: Loader) -> None:
    cm = load()
    session = said("Who are you? " * 4)
    n = cm.prepare(session)
    del session
    gc.collect()
    again = said("Who are you? " * 4)
    cm.prepare(again)
    assert again.last_prepare is not None
    assert again.last_prepare.n_reused == n - 1
    assert_exact(cm, again)


def test_ten_turns_and_four_branches_store_each_token_once(load: Loader) -> None:
    cm = load(n_ctx=4096, max_sessions=6)
    engine, session = Engine(cm), Session()
    plain = only_text(cm)
    for i in range(10):
        engine.chat(session, f"turn {i} of many", max_tokens=4, logit_bias=plain)
    branches = [session, *(cm.fork(session) for _ in range(4))]
    for i, branch in enumerate(branches):
        engine.chat(branch, f"way {i}", max_tokens=6, logit_bias=plain)
    rows = [tuple(cm.tokens(branch).tolist()) for branch in branches]
    unique = {row[: i + 1] for row in rows for i in range(len(row))}
    for branch in branches:
        cm.release(branch)
    radix = cm.stats().radix
    assert radix.n_tokens == len(unique)
    assert radix.n_bytes <= 1.05 * len(unique) * (cm.capabilities.kv_bytes_per_token + 12)
    n_decoded = cm.stats().n_tokens_decoded
    for branch in branches:
        branch.add_user("x")
        cm.prepare(branch)
        assert_exact(cm, branch)
        branch.messages.pop()
    assert cm.stats().n_tokens_decoded > n_decoded


# -- how it comes back


def test_part_of_an_edge_is_restored(load: Loader, kind: str) -> None:
    cm = open_kind(load, kind)
    session = said("Who are you? " * 5, "I am. " * 5, "What? " * 5)
    cm.prepare(session)
    cm.release(session)
    other = said("Who are you? " * 5, "I am. " * 5, "Other!")
    cm.prepare(other)
    if kind in ROWS:
        assert sources(other) == ["cache", "decode"]
        assert other.last_prepare is not None
        assert other.last_prepare.n_reused > 60
    assert_exact(cm, other)


def test_two_branches_under_one_stem_are_both_there(load: Loader) -> None:
    cm = load()
    stem = "The stem of both. " * 5
    rows = [said(stem, "Yes. " * 4, "one " * 6), said(stem, "Yes. " * 4, "two " * 6)]
    for session in rows:
        cm.prepare(session)
        cm.release(session)
    assert cm.stats().radix.n_nodes == 3
    for session in rows:
        n = cm.prepare(session)
        assert session.last_prepare is not None
        assert session.last_prepare.n_reused == n - 1
        assert_exact(cm, session)
        cm.release(session)


def test_live_cells_come_before_copies(load: Loader) -> None:
    cm = load()
    cm.set_system("Be brief. " * 6)
    first = said("Who are you? " * 3, "I am. " * 8, "What?")
    cm.prepare(first)
    cm.release(first)
    n_cells = cm.stats().n_cells_unique
    second = said("Who are you? " * 3, "I am. " * 8, "What?")
    n = cm.prepare(second)
    assert sources(second) == ["prefix", "cache", "decode"]
    assert cm.stats().n_cells_unique - n_cells == n - cm.prefix.n_tokens  # the prefix is still shared
    assert_exact(cm, second)


def test_a_hundred_requests_with_one_stem_decode_it_once(load: Loader) -> None:
    cm = load(n_ctx=2048, max_sessions=2)
    engine = Engine(cm)
    stem = "A long document that everybody asks about. " * 20
    n_stem = cm.preview(said(stem)).n_tokens
    for i in range(100):
        session = Session("")
        engine.chat(session, f"{stem} Question {i}", max_tokens=2)
        cm.release(session)
    assert cm.stats().n_tokens_decoded < n_stem + 100 * 40


def test_namespaces_never_share_what_is_saved(load: Loader, kind: str) -> None:
    cm = open_kind(load, kind)
    first = said("Who are you? " * 5, namespace="a")
    n = cm.prepare(first)
    cm.release(first)
    other = said("Who are you? " * 5, namespace="b")
    cm.prepare(other)
    assert sources(other) == ["decode"]
    hits = cm.stats().radix.n_hit_tokens
    again = said("Who are you? " * 5, namespace="a")
    cm.prepare(again)
    assert sources(again)[0] in ("cache", "decode")
    assert cm.stats().radix.n_hit_tokens - hits == (
        0 if kind in ("recurrent", "hybrid") and sources(again) == ["decode"] else again.last_prepare.n_reused
    )  # type: ignore[union-attr]
    assert n
    assert_exact(cm, again)


def test_hits_and_misses_are_counted_in_tokens(load: Loader) -> None:
    cm = load()
    session = said("Who are you? " * 5)
    n = cm.prepare(session)
    assert (cm.stats().radix.n_hit_tokens, cm.stats().radix.n_miss_tokens) == (0, n)
    cm.release(session)
    cm.prepare(session)
    assert (cm.stats().radix.n_hit_tokens, cm.stats().radix.n_miss_tokens) == (n - 1, n + 1)


def test_a_change_of_the_system_text_clears_the_cache_unless_asked_to_keep_it(load: Loader) -> None:
    cm = load()
    first, second = "The first rules. " * 4, "Others. " * 4
    n = cm.set_system(first)
    session = said("Who?")
    cm.prepare(session)
    cm.release(session)
    cm.set_system(second, keep_cache=True)
    assert cm.stats().radix.n_tokens > n
    kept = Session(first)
    kept.add_user("Who?")
    cm.prepare(kept)
    assert "cache" in sources(kept)
    assert_exact(cm, kept)
    cm.set_system(first)
    assert cm.stats().radix.n_bytes == 0


# -- what goes wrong


def test_a_restore_that_fails_is_decoded_instead(load: Loader, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    cm = load()
    cm.set_system("Be brief. " * 4)
    session = said("Who are you? " * 5)
    cm.prepare(session)
    cm.release(session)

    def fails(self: LlamaContext, seq_id: int, blob: Any) -> None:
        raise SnapshotError("llama_state_seq_set_data_ext", 0, "no cells")

    monkeypatch.setattr(LlamaContext, "load_state", fails)
    with caplog.at_level(logging.WARNING, "llama_sessions"):
        cm.prepare(session)
    assert "decoded instead" in caplog.text
    assert sources(session) == ["prefix", "decode"]
    cm.check_integrity()
    assert_exact(cm, session)


def test_a_save_that_fails_loses_only_what_it_would_have_kept(
    load: Loader, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    cm = load()
    session = said("Who are you? " * 5)
    cm.prepare(session)

    def fails(self: LlamaContext, seq_id: int, out: Any) -> None:
        raise SnapshotError("llama_state_seq_get_data_ext", 0, "no luck")

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "llama_sessions"):
        patched.setattr(LlamaContext, "save_state", fails)
        assert cm.flush(session) == 0
        assert cm.park(session)
    assert "could not be saved" in caplog.text
    cm.check_integrity()
    assert cm.stats().radix.n_bytes == 0
    assert_exact(cm, session)


def test_a_policy_that_raises_says_so_and_the_row_stays(load: Loader) -> None:
    def bad(usage: Any) -> float:
        raise ZeroDivisionError("oops")

    cm = load(radix=RadixOptions(max_bytes=60_000, policy=bad))
    sessions = [said(f"{i} says something long. " * 12) for i in range(4)]
    with pytest.raises(OptionError, match="the policy bad raised ZeroDivisionError"):  # noqa: PT012
        for session in sessions:
            cm.prepare(session)
            cm.park(session)
    assert cm._seats.get(session) is not None
    for each in sessions:
        if len(cm.tokens(each)):
            assert_exact(cm, each)


def test_a_cache_that_is_too_small_says_no_and_nothing_breaks(load: Loader) -> None:
    cm = load(radix=RadixOptions(max_bytes=1000))
    session = said("Who are you? " * 10)
    cm.prepare(session)
    assert cm.flush(session) == 0
    cm.park(session)
    assert cm.stats().radix.n_bytes == 0
    assert_exact(cm, session)


def test_a_budget_is_kept_and_old_kv_goes_first(load: Loader) -> None:
    cm = load(max_sessions=2)
    bytes_per_token = cm.capabilities.kv_bytes_per_token + 12
    cm = load(max_sessions=2, radix=RadixOptions(max_bytes=200 * bytes_per_token))
    sessions = [said(f"{i}. " + "Who are you? " * 6) for i in range(8)]
    for session in sessions:
        cm.prepare(session)
        cm.park(session)
        assert cm.stats().radix.n_bytes <= 200 * bytes_per_token
    assert cm.stats().radix.n_tokens_evicted > 0
    cm.prepare(sessions[-1])
    assert "cache" in sources(sessions[-1])
    cm.prepare(sessions[0])
    assert sources(sessions[0])[-1] == "decode"
    for session in sessions:
        assert_exact(cm, session)


def test_without_a_scratch_whole_rows_are_kept(load: Loader) -> None:
    import llama_cpp

    cm = load(max_sessions=1)
    bare = llama_cpp.llama_context_default_params()
    bare.n_ctx, bare.n_batch, bare.n_ubatch, bare.n_seq_max, bare.n_threads = 512, 128, 128, 2, 1
    ctx = llama_cpp.llama_init_from_model(cm._parts.context.model.handle, bare)  # type: ignore[attr-defined]
    try:
        small = ContextManager(ctx, llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(ctx)))
        assert small.stats().radix.kind == "row"
        session = said("Who are you? " * 5)
        n = small.prepare(session)
        small.park(session)
        other = said("Who are you? " * 5 + "Other")
        small.prepare(other)
        assert sources(other) == ["cache", "decode"]
        assert_exact(small, other)
        small.park(other)
        small.prepare(session)
        assert session.last_prepare is not None
        assert session.last_prepare.n_reused == n - 1
        assert_exact(small, session)
        small.close()
    finally:
        llama_cpp.llama_free(ctx)


# -- what a review found


def fake(**options: Any) -> tuple[ContextManager, FakeContext]:
    cm = over_fake(**options)
    assert isinstance(cm._store.context, FakeContext)
    return cm, cm._store.context


def test_an_interrupted_return_loses_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    cm, _ = fake()
    session = said("hi")
    cm.prepare(session)
    for i in range(100):
        cm.append(session, 65 + i % 20)
    tokens = cm.tokens(session).tolist()
    cm.park(session)
    cm.clear_radix()
    real, calls = FakeContext.decode, iter(range(100))

    def interrupted(self: FakeContext, runs: Any) -> int:
        if next(calls) == 1:  # in the middle of the row
            raise KeyboardInterrupt
        return real(self, runs)

    with monkeypatch.context() as patched:
        patched.setattr(FakeContext, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cm.append(session, 90)
    assert cm.tokens(session).tolist() == tokens
    cm.append(session, 90)
    assert cm.tokens(session).tolist() == [*tokens, 90]
    assert_exact(cm, session)


def test_a_session_is_not_parked_at_the_end_of_its_own_long_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    cm, _ = fake(idle_park_after_s=2.0)
    clock = Clock(monkeypatch)
    real = FakeContext.decode

    def slow(self: FakeContext, runs: Any) -> int:
        clock.now += 4.0
        return real(self, runs)

    monkeypatch.setattr(FakeContext, "decode", slow)
    session = said("hi " * 60)
    assert cm.prepare(session) == session.n_past
    assert cm.stats().n_sessions == 1


def test_a_prompt_stays_done_when_its_session_is_parked() -> None:
    cm, _ = fake()
    third = said("c")
    first, second = prepared(cm, "a", "b")
    pending = cm.begin(first)
    assert pending.done
    cm.prepare(third)
    cm.prepare(second)
    assert pending.done
    assert len(cm.logits(first))


def test_a_return_within_a_step_hurts_nobody_else_in_it() -> None:
    cm, _ = fake()
    parked, live, other = prepared(cm, "parked", "live", "other")  # the first is parked for the third
    cm.pin(other)
    report = cm.step([NextToken(live, 65), NextToken(parked, 66)])
    assert report.results[live].error is None
    assert isinstance(report.results[parked].error, NoFreeSlot)
    assert cm.tokens(live)[-1] == 65
    cm.pin(other, False)
    report = cm.step([NextToken(live, 65), NextToken(parked, 66)])
    assert all(result.error is None for result in report.results.values())
    assert_exact(cm, parked)


def test_what_a_prompt_restores_is_not_pushed_out_by_what_it_drops(load: Loader) -> None:
    cm = load(n_ctx=2048, n_batch=512, radix=RadixOptions(max_bytes=268 * 440))
    small, first, second = prepared(cm, "charlie", "bravo " * 40 + "~" * 150, "alpha " * 40 + "#" * 150)
    cm.release(small)
    cm.release(first)
    second.messages[0]["content"] = first.messages[0]["content"]
    cm.prepare(second)
    assert "cache" in sources(second)
    assert_exact(cm, second)


def test_an_interrupt_between_a_copy_of_streams_and_its_note_stays_exact(load: Loader) -> None:
    cm = load(kv_unified=False, n_ctx=2048)
    first, second = said("Who are you? " * 8), said("Something else altogether. " * 5)
    cm.prepare(second)
    cm.park(second)
    cm.prepare(first)
    with interrupted_behind(Sequences, "copy"):
        cm.fork(first)
    gc.collect()
    cm.prepare(second)
    assert_exact(cm, second)
    cm.check_integrity()


@pytest.mark.parametrize("change", ["pop", "edit"])
def test_a_reply_that_is_taken_back_is_kept(load: Loader, change: str) -> None:
    cm = load()
    session = Session()
    Engine(cm).chat(session, "Who are you?", max_tokens=30, logit_bias=only_text(cm))
    n = session.n_past
    if change == "pop":
        taken = session.messages.pop()
    else:
        taken = dict(session.messages[1])
        session.messages[1]["content"] = "otherwise"
        session.add_user("x")
    cm.prepare(session)
    assert cm.stats().radix.n_tokens == n
    session.messages[1:] = [taken, {"role": "user", "content": "And?"}]
    cm.prepare(session)
    assert session.last_prepare is not None
    assert session.last_prepare.n_reused >= n
    assert_exact(cm, session)


@pytest.mark.parametrize("kind", ["window", "hybrid"])
def test_a_whole_row_for_which_there_are_no_cells_is_decoded_behind_what_is_shared(load: Loader, kind: str) -> None:
    cm = open_kind(load, kind, n_ctx=512, max_sessions=2)
    cm.set_system("Be brief and be kind. " * 7)
    neighbour, session = said("~" * 40), said("Who are you? " * 8)
    cm.prepare(session)
    cm.park(session)
    cm.prepare(neighbour)
    cm.pin(neighbour)
    free = 512 - cm.stats().n_cells_unique
    while free > len(cm.tokens(session)) - 30:  # less than the whole row, more than what the prefix leaves of it
        cm.append(neighbour, 65)
        free = 512 - cm.stats().n_cells_unique
    cm.prepare(session)
    assert "cache" not in sources(session)
    assert_exact(cm, session)


def test_an_interrupt_at_the_hold_leaves_no_lock(load: Loader) -> None:
    cm = load()
    session = said("Who are you? " * 5)
    cm.prepare(session)
    cm.park(session)
    with interrupted_behind(Snapshots, "hold"):
        cm.prepare(session)
    cm.check_integrity()
    cm.clear_radix()
    assert cm.stats().radix.n_bytes == 0


def test_what_other_template_variables_drop_is_kept(load: Loader) -> None:
    cm = load(chat_template="{{ tone or '' }}{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}")
    session = said("Who are you? " * 5)
    n = cm.prepare(session)
    session.template_kwargs["tone"] = "Kindly. "
    cm.prepare(session)
    assert cm.stats().radix.n_tokens == n
    assert_exact(cm, session)


def test_a_turn_with_a_call_only_grows(load: Loader) -> None:
    cm = load()
    session = said("Who are you? " * 5)
    cm.prepare(session)
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    session.messages.append({"role": "assistant", "content": "so", "tool_calls": [call]})
    session.add_tool_result("1", "a")
    cm.prepare(session)
    assert cm.stats().radix.n_bytes == 0


# -- who goes when something is short


def crowded(load: Loader) -> tuple[ContextManager, Session, Session]:
    """A narrow window full of cells that two rows share: llama.cpp reuses none of them while both have them."""
    cm = open_kind(load, "narrow window", n_ctx=2048, n_batch=64, n_ubatch=64)
    first = said("~" * 430)
    cm.prepare(first)
    return cm, first, cm.fork(first)


@pytest.mark.parametrize("wants", ["prompt", "system"])
def test_where_llama_cpp_finds_no_room_an_idle_session_is_parked_and_it_is_tried_again(
    load: Loader, wants: str
) -> None:
    cm, first, twin = crowded(load)
    other = said("#" * 200)
    if wants == "system":
        assert cm.set_system("#" * 200) > 200
    cm.prepare(other)
    assert [cm._seats.get(s) is None for s in (first, twin)] == [True, False]  # one was enough, the older one
    for session in (other, twin, first):
        assert_exact(cm, session)


@pytest.mark.parametrize("wants", ["prompt", "system"])
def test_where_nobody_may_be_parked_for_it_the_error_has_the_numbers(load: Loader, wants: str) -> None:
    cm, first, twin = crowded(load)
    cm.pin(first)
    cm.pin(twin)
    with pytest.raises(CapacityError, match=r"no room for 64 tokens where \d+ of 2048 .* swa_full=True") as e:
        cm.prepare(said("#" * 200)) if wants == "prompt" else cm.set_system("#" * 200)
    assert (e.value.needed, e.value.unit) == (64, "cells")
    assert cm.stats().n_parked == 0
    cm.pin(first, False)
    other = said("#" * 200)
    cm.prepare(other)
    assert_exact(cm, other)


def shared_by_two() -> tuple[ContextManager, Session, Session]:
    """Two idle rows with the same 150 of 300 cells: parking one of them frees none."""
    cm = ContextManager.over(fake_parts(n_ctx=300, max_sessions=4))
    first = said("~" * 100)
    for i in range(150 - cm.prepare(first)):
        cm.append(first, 65 + i % 20)
    return cm, first, cm.fork(first)


def with_a_pinned(cm: ContextManager) -> int:
    """A session that never goes, and shares with nobody; its cells."""
    pinned = said("pinned " * 8, namespace="apart")
    n = cm.prepare(pinned)
    cm.pin(pinned)
    cm.kept = pinned  # type: ignore[attr-defined]
    return n


def test_a_preview_counts_a_shared_cell_once() -> None:
    cm, first, twin = shared_by_two()
    most = 300 - with_a_pinned(cm)
    fitting, too_long = said("#" * 190, namespace="b"), said("#" * 240, namespace="b")
    assert cm.preview(fitting).n_tokens < most < cm.preview(too_long).n_tokens < 300
    assert cm.preview(too_long).fits is False
    assert cm.preview(fitting).fits is True
    cm.prepare(fitting)
    assert cm.stats().n_parked == 2  # its last owner had to go, too
    assert cm._seats.get(first) is cm._seats.get(twin) is None


@pytest.mark.parametrize("wants", ["prompt", "system"])
def test_what_parking_cannot_make_possible_parks_nobody(wants: str) -> None:
    cm, *idle = shared_by_two()
    most = 300 - with_a_pinned(cm)
    too_long = said("#" * 240, namespace="b")
    n = cm.preview(too_long).n_tokens
    with pytest.raises(CapacityError) as e:
        cm.prepare(too_long) if wants == "prompt" else cm.set_system("#" * 240)
    assert e.value.available == most
    if wants == "prompt":
        assert e.value.needed == n
    assert cm.stats().n_parked == 0
    assert all(cm._seats.get(session) for session in idle)


def test_a_step_parks_for_what_can_be_had_and_for_nothing_else() -> None:
    cm, first, twin = shared_by_two()
    small, big = cm.begin(said("?" * 20)), cm.begin(said("#" * 30))
    while cm.stats().n_cells_unique < 300 - 5:
        cm.append(twin, 65)
    cm.pin(twin)
    report = cm.step([PromptChunk(big, 30), PromptChunk(small, 3)])
    error = report.results[big.session].error
    assert isinstance(error, CapacityError)
    assert (error.needed, error.available) == (30, 5)
    assert report.results[small.session].error is None
    assert cm.stats().n_parked == 0  # all that the first one has is the twin's, too
    assert cm._seats.get(first) is not None
    cm.pin(twin, False)
    report = cm.step([PromptChunk(big, 30), PromptChunk(small, 3)])
    assert all(result.error is None for result in report.results.values())
    assert cm.stats().n_parked == 2


def test_the_row_that_a_prompt_shares_may_go_for_it() -> None:
    """What is shared stays while its new owner has it: only the rest of the row is free by parking it."""
    cm = ContextManager.over(fake_parts(n_ctx=300, max_sessions=4), headroom=0)
    source = said("~" * 100, "I am. ", "-" * 80)
    cm.prepare(source)
    session = said("~" * 100, "I am. ", "+" * 80)
    assert cm.preview(session).fits is True
    cm.prepare(session)
    assert cm.stats().n_parked == 1
    assert_exact(cm, session)


def test_a_free_slot_is_taken_with_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    cm, _ = fake()
    plans: list[object] = []
    real = Planner.plan
    monkeypatch.setattr(Planner, "plan", lambda *args, **named: plans.append(args) or real(*args, **named))
    cm.prepare(said("one"))
    assert len(plans) == 1


def test_a_change_of_namespace_touches_nothing_before_the_plan_is_whole(load: Loader) -> None:
    cm = load(n_ctx=256, max_sessions=2)
    session, pinned = said("Who are you? " * 4, namespace="a"), said("~" * 100, namespace="c")
    cm.prepare(session)
    cm.prepare(pinned)
    cm.pin(pinned)
    before, logits = cm.tokens(session), cm.logits(session).copy()
    n = cm.stats().n_native_operations
    session.namespace = "b"
    for too_long, error in (("~" * 300, ContextOverflow), ("~" * 180, CapacityError)):
        session.messages[0]["content"] = too_long
        with pytest.raises(error):
            cm.prepare(session)
        assert cm.preview(session).fits is False
    assert cm.stats().n_native_operations == n
    np.testing.assert_array_equal(cm.tokens(session), before)
    np.testing.assert_array_equal(cm.logits(session), logits)
    session.messages[0]["content"] = "Who are you? " * 4
    cm.prepare(session)
    assert sources(session) == ["decode"]  # nothing of the other namespace
    assert_exact(cm, session)
    assert cm.stats().radix.n_tokens == len(before)  # what the change dropped is kept, under its own name
    again = said("Who are you? " * 4, namespace="a")
    cm.prepare(again)
    assert sources(again) == ["cache", "decode"]


# -- what is said about a session is true


def test_closing_forgets_only_what_is_here() -> None:
    here, there = fake()[0], fake()[0]
    seated, parked, own = said("seated"), said("parked"), said("own")
    for session in (seated, parked, own):
        here.prepare(session)
        here.park(session)
    twin = here.fork(own)
    there.prepare(seated)
    there.prepare(parked)
    there.park(parked)
    assert twin.n_past > 0
    here.close()
    assert (own.n_past, twin.n_past) == (0, 0)
    for session in (seated, parked):
        assert session.n_past == len(there.tokens(session)) > 0
    there.close()
    assert (seated.n_past, parked.n_past) == (0, 0)


@pytest.mark.parametrize("deed", ["append", "logits"])
def test_a_return_is_no_prepare(load: Loader, deed: str) -> None:
    cm = load()
    session = said("Who are you? " * 4)
    cm.prepare(session)
    report = session.last_prepare
    for cached in (True, False):
        cm.append(session, 65)
        cm.park(session)
        if not cached:
            cm.clear_radix()
        if deed == "append":
            cm.append(session, 66)
        else:
            cm.logits(session)
        assert session.last_prepare is report


@pytest.mark.parametrize("parks", [False, True])
def test_a_branch_of_half_a_prompt_waits_for_the_other_half(parks: bool) -> None:
    cm, _ = fake()
    session = said("Who are you? " * 8)
    pending = cm.begin(session)
    cm.step([PromptChunk(pending, 40)])
    twin = cm.fork(session)
    assert len(cm.tokens(twin)) == 40
    if parks:
        cm.park(twin)
    with pytest.raises(StateError, match=f"only 40 of the prompt's {pending.n_tokens} tokens"):
        cm.append(twin, 65)
    assert len(cm.tokens(twin)) == 40
    cm.prepare(twin)
    cm.append(twin, 65)
    np.testing.assert_array_equal(cm.logits(twin), fresh_logits(cm.capabilities, cm.tokens(twin)))


def test_a_branch_takes_tokens_where_its_parent_did() -> None:
    cm, _ = fake()
    session = said("Who?")
    cm.prepare(session)
    cm.append(session, 65)
    twin = cm.fork(session)
    cm.append(twin, 66)
    assert cm.tokens(twin).tolist() == [*cm.tokens(session), 66]


def test_what_is_restored_in_pieces_passes_through_a_buffer_with_a_bound(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "_LEAST_JOINED", 4096)
    cm = load(n_ctx=2048, radix=RadixOptions(max_bytes=240_000))
    session = said("The stem of all. " * 8)
    for i in range(6):  # an edge, and a blob, each
        cm.prepare(session)
        cm.flush(session)
        session.add_assistant(f"{i} " * 10)
        session.add_user("And? " * 6)
    cm.prepare(session)
    cm.park(session)
    assert len(cm._snapshots._joined) == 0
    loads: list[int] = []
    real = LlamaContext.load_state
    monkeypatch.setattr(LlamaContext, "load_state", lambda s, i, blob: loads.append(len(blob)) or real(s, i, blob))
    n = len(cm.tokens(session))
    n_decoded = cm.stats().n_tokens_decoded
    assert_exact(cm, session)
    assert cm.stats().n_tokens_decoded == n_decoded + 1
    assert max(loads) <= 240_000 // 8 == cm._snapshots._most_joined
    assert len(loads) == -(-sum(loads) // (240_000 // 8)) > 1
    assert 0 < len(cm._snapshots._joined) <= 240_000 // 8
    assert cm._store.caps.kv_bytes_per_token * n > 2 * (240_000 // 8)
    cm.clear_radix()
    assert len(cm._snapshots._joined) == 0


def test_what_a_restore_in_pieces_did_before_it_failed_is_reused(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshot, "_LEAST_JOINED", 4096)
    cm = load(radix=RadixOptions(max_bytes=200_000))
    session = said("Who are you? " * 20)
    cm.prepare(session)
    cm.release(session)
    session.messages[0]["content"] += "x"  # so that the edge is used in part
    real, calls = LlamaContext.load_state, iter(range(100))

    def fails(self: LlamaContext, seq_id: int, blob: Any) -> None:
        if next(calls) == 1:
            raise SnapshotError("llama_state_seq_set_data_ext", 0, "no cells")
        real(self, seq_id, blob)

    monkeypatch.setattr(LlamaContext, "load_state", fails)
    n = cm.prepare(session)
    report = session.last_prepare
    assert report is not None
    assert [(s.source, s.p0) for s in report.stretches] == [("cache", 0), ("decode", report.n_reused)]
    assert report.stretches[0].p1 == report.n_reused > 0
    assert report.n_reused + report.n_decoded == n
    assert_exact(cm, session)


def test_a_lock_that_is_left_on_saved_kv_does_not_add_up(load: Loader) -> None:
    cm = load()
    session = said("Who are you? " * 4)
    cm.prepare(session)
    cm.flush(session)
    match = cm._snapshots.match(None, cm.tokens(session))
    cm._snapshots._cache.lock(match)  # type: ignore[union-attr]
    with pytest.raises(StateError, match="1 locks are left on saved KV"):
        cm.check_integrity()
    cm._snapshots._cache.unlock(match)  # type: ignore[union-attr]
    cm.check_integrity()


@pytest.mark.parametrize("during", ["prepare", "flush"])
@pytest.mark.parametrize("mended_by", ["check", "clear", "prepare"])
def test_an_interrupt_on_the_way_to_unlock_leaves_no_lock(
    load: Loader, monkeypatch: pytest.MonkeyPatch, during: str, mended_by: str
) -> None:
    cm = load()
    session = said("Who are you? " * 4)
    cm.prepare(session)
    cm.flush(session)
    for i in range(20):
        cm.append(session, 65 + i)

    def interrupted(self: RadixTree[Any], node: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RadixTree, "unlock", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cm.flush(session) if during == "flush" else cm.prepare(said("Who are you? " * 4, "I am."))
    assert cm._snapshots.problems() == ["1 locks are left on saved KV"]
    if mended_by == "check":
        cm.check_integrity()
    elif mended_by == "clear":
        cm.clear_radix()
        assert cm.stats().radix.n_bytes == 0
    else:
        cm.prepare(session)
    assert cm._snapshots.problems() == []


def test_that_the_budget_keeps_nothing_is_said_once(load: Loader, caplog: pytest.LogCaptureFixture) -> None:
    cm = load(radix=RadixOptions(max_bytes=1000), max_sessions=2)
    with caplog.at_level(logging.DEBUG, "llama_sessions"):
        for i in range(5):
            cm.prepare(said(f"{i} is my number. " * 3))
    kept = [(r.levelname, r.getMessage()) for r in caplog.records if "tokens of KV are not kept" in r.getMessage()]
    assert [level for level, _ in kept[:3]] == ["WARNING", "DEBUG", "DEBUG"]
    assert "max_bytes=1000" in kept[0][1]


def test_that_too_few_tokens_are_not_kept_is_no_warning(load: Loader, caplog: pytest.LogCaptureFixture) -> None:
    cm = load(radix=RadixOptions(min_tokens=500))
    session = said("Who are you?")
    cm.prepare(session)
    with caplog.at_level(logging.DEBUG, "llama_sessions"):
        cm.park(session)
    assert [r.levelname for r in caplog.records if "not kept" in r.getMessage()] == ["DEBUG"]


def test_that_an_idle_session_cannot_be_parked_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    def bad(usage: Any) -> float:
        raise ZeroDivisionError("oops")

    cm, _ = fake(idle_park_after_s=0.0, radix=RadixOptions(max_bytes=1500, policy=bad))
    sessions = [said(f"{i} says something. " * 2) for i in range(2)]
    with caplog.at_level(logging.DEBUG, "llama_sessions"):
        for session in sessions:
            cm.prepare(session)
        for _ in range(3):
            cm.flush(said("nothing"))
    levels = [r.levelname for r in caplog.records if "could not be parked" in r.getMessage()]
    assert levels[0] == "WARNING"
    assert set(levels[1:]) == {"DEBUG"}


# -- whole rows, and the prefix again


def without_scratch(load: Loader) -> Iterator[ContextManager]:
    """A context of two sequences: the prefix, and one session; ranges cannot be saved there."""
    import llama_cpp

    donor = load(max_sessions=1)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max, params.n_threads = 512, 128, 128, 2, 1
    params.kv_unified = True
    ctx = llama_cpp.llama_init_from_model(donor._parts.context.model.handle, params)  # type: ignore[attr-defined]
    try:
        with ContextManager(ctx, llama_cpp.llama_model_get_vocab(llama_cpp.llama_get_model(ctx))) as cm:
            yield cm
            cm.check_integrity()
    finally:
        llama_cpp.llama_free(ctx)


def window_with_prefix(load: Loader) -> Iterator[ContextManager]:
    yield open_kind(load, "window")


def narrow_window_with_prefix(load: Loader) -> Iterator[ContextManager]:
    yield open_kind(load, "narrow window")


@pytest.fixture(params=[without_scratch, window_with_prefix, narrow_window_with_prefix])
def whole(request: pytest.FixtureRequest, load: Loader) -> Iterator[ContextManager]:
    """Memory of which whole rows are saved, with a system prompt of some length in its slot."""
    with contextmanager(request.param)(load) as cm:
        cm.set_system("Be brief and kind. " * 10)
        assert cm.prefix.n_tokens > 70
        yield cm


def returned(cm: ContextManager, session: Session) -> None:
    """Parked, its neighbours gone, and back."""
    cm.prepare(session)
    cm.park(session)
    cm.prepare(session)


def test_the_prefix_is_shared_again_after_a_whole_row_came_back(whole: ContextManager) -> None:
    session = said("Who?")
    returned(whole, session)
    assert sources(session) == ["prefix", "cache", "decode"]
    assert session.last_prepare is not None
    assert session.last_prepare.n_decoded == 1
    assert whole.stats().n_cells_unique == session.n_past  # all but the prefix's own are one session's
    whole.check_integrity()
    assert_exact(whole, session)
    for text in ("Me.", "And you?", "You.", "And now?"):
        session.add("user" if text.endswith("?") else "assistant", text)
    whole.prepare(session)
    assert_exact(whole, session)
    del session.messages[1:]
    whole.prepare(session)
    assert_exact(whole, session)


@pytest.mark.parametrize("kind", ["window", "narrow window"])
def test_a_window_that_does_not_reach_the_prefix_is_not_torn(load: Loader, kind: str) -> None:
    """Between the prefix and the window there would be a hole, which llama.cpp does not know of."""
    cm = open_kind(load, kind)
    cm.set_system("Be brief. ")
    session = said("Who are you? " * 8, "I am. " * 3, "What? " * 6)
    returned(cm, session)
    assert sources(session) == ["cache", "decode"]
    assert_exact(cm, session)
    session.messages[2]["content"] = "What? " * 2 + "No."
    cm.prepare(session)
    assert_exact(cm, session)


def test_a_whole_row_that_cannot_be_restored_leaves_the_prefix_shared(
    whole: ContextManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = said("Who?")
    whole.prepare(session)
    whole.park(session)

    def fails(self: LlamaContext, seq_id: int, blob: Any) -> None:
        raise SnapshotError("llama_state_seq_set_data_ext", 0, "no cells")

    monkeypatch.setattr(LlamaContext, "load_state", fails)
    n_hit, n_miss = whole.stats().radix.n_hit_tokens, whole.stats().radix.n_miss_tokens
    whole.prepare(session)
    assert sources(session) == ["prefix", "decode"]
    assert session.last_prepare is not None
    assert session.last_prepare.n_reused == whole.prefix.n_tokens
    radix = whole.stats().radix
    assert (radix.n_hit_tokens - n_hit, radix.n_miss_tokens - n_miss) == (0, session.last_prepare.n_decoded)
    assert_exact(whole, session)


@pytest.mark.parametrize("call", ["remove", "copy"])
def test_an_interrupt_while_the_prefix_is_shared_again_stays_exact(
    whole: ContextManager, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    session = said("Who?")
    whole.prepare(session)
    whole.park(session)
    real, hit = getattr(Sequences, call), []

    def interrupted(self: Sequences, *args: Any) -> Any:
        done = real(self, *args)
        if args[-2:] == (0, whole.prefix.n_tokens):
            hit.append(args)
            raise KeyboardInterrupt
        return done

    with monkeypatch.context() as patched:
        patched.setattr(Sequences, call, interrupted)
        with pytest.raises(KeyboardInterrupt):
            whole.prepare(session)
    assert hit
    whole.check_integrity()
    whole.prepare(session)
    assert_exact(whole, session)


def test_a_return_for_which_llama_cpp_has_no_room_parks_nobody_of_the_same_step() -> None:
    cm, context = fake()
    live, parked = said("live"), said("parked")
    cm.prepare(live)
    cm.prepare(parked)
    cm.park(parked)
    cm.clear_radix()
    tokens = cm.tokens(parked).tolist()
    context.codes.append(1)
    report = cm.step([NextToken(live, 65), NextToken(parked, 66)])
    assert report.results[live].error is None
    assert isinstance(report.results[parked].error, CapacityError)
    assert cm.tokens(parked).tolist() == tokens
    cm.append(parked, 66)
    np.testing.assert_array_equal(cm.logits(parked), fresh_logits(cm.capabilities, cm.tokens(parked)))
