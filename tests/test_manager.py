"""The manager's contract, call by call: slots, steps, previews, rows, hooks, threads, processes, the end."""

from __future__ import annotations

import ctypes
import gc
import logging
import sys
import threading
import time
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import llama_cpp
import numpy as np
import pytest
from child import run_child
from conversations import said
from gate import LONG_S, Gate
from models import model_path
from oracle import oracle_for

from llama_sessions import (
    Cancelled,
    CapacityError,
    ContextManager,
    ContextOverflow,
    DecodeError,
    Engine,
    NextToken,
    NoFreeSlot,
    OptionError,
    PromptChunk,
    Session,
    StateError,
)
from llama_sessions.kv.radix import RadixTree
from llama_sessions.llama.context import LlamaContext
from llama_sessions.types import FloatArray

Loader = Callable[..., ContextManager]


@pytest.fixture
def cm(load: Loader) -> ContextManager:
    return load(max_sessions=3)


def prepared(cm: ContextManager, *texts: str, **options: Any) -> Session:
    session = said(*(texts or ("Who are you?",)), **options)
    cm.prepare(session)
    return session


def assert_exact(cm: ContextManager, session: Session) -> None:
    oracle_for(model_path("llama-bpe")).assert_exact(cm.logits(session), cm.tokens(session))


def text_of(cm: ContextManager, session: Session) -> str:
    return oracle_for(model_path("llama-bpe")).detokenize(cm.tokens(session)).decode()


# -- slots


def test_a_slot_is_taken_by_the_first_prepare_and_not_before(cm: ContextManager) -> None:
    session = said("Who are you?")
    cm.preview(session)
    assert cm.stats().slots_free == cm.slots.capacity == 3
    cm.prepare(session)
    assert (cm.stats().slots_free, cm.stats().n_sessions) == (2, 1)
    cm.prepare(session)
    assert cm.stats().slots_free == 2


def test_where_no_slot_is_free_the_error_says_so_and_nothing_happens(cm: ContextManager) -> None:
    sessions = [prepared(cm, f"{i}?") for i in range(3)]
    for session in sessions:
        cm.pin(session)
    before = cm.stats()
    with pytest.raises(NoFreeSlot, match="no free slot: 3 of 3 in use; raise max_sessions, release or park") as e:
        cm.prepare(said("And me?"))
    assert (e.value.needed, e.value.available, e.value.unit) == (1, 0, "slots")
    with pytest.raises(NoFreeSlot):
        cm.fork(sessions[0])
    assert cm.stats().n_decodes == before.n_decodes
    cm.release(sessions[1])
    cm.prepare(said("And me?"))


def test_release_gives_the_slot_and_the_cells_back_once(cm: ContextManager) -> None:
    session = prepared(cm)
    n_messages = len(session.messages)
    assert cm.stats().n_cells_unique == session.n_past > 0
    assert cm.release(session) is True
    assert (cm.stats().slots_free, cm.stats().n_cells_unique, session.n_past) == (3, 0, 0)
    assert len(session.messages) == n_messages
    assert cm.release(session) is False
    assert cm.release(said("never seen")) is False
    assert cm.stats().slots_free == 3
    cm.prepare(session)
    assert_exact(cm, session)


def test_a_session_that_is_gone_gives_its_slot_back_at_the_next_call(cm: ContextManager) -> None:
    for i in range(10):
        prepared(cm, f"Session number {i}")
    gc.collect()
    cm.clear_radix()  # any call that may change something; no slot had to be wanted
    assert (cm.stats().slots_free, cm.stats().n_cells_unique, cm.stats().n_sessions) == (3, 0, 0)


def test_the_manager_keeps_no_session_alive(cm: ContextManager) -> None:
    session = prepared(cm)
    cm.append(session, 65)
    cm.logits(session)
    cm.preview(session)
    ref = weakref.ref(session)
    del session
    gc.collect()
    assert ref() is None


def test_a_session_that_dies_in_a_finaliser_of_another_thread_is_noticed(cm: ContextManager) -> None:
    box = [prepared(cm)]
    thread = threading.Thread(target=box.clear)
    thread.start()
    thread.join()
    gc.collect()
    prepared(cm, "next")
    assert cm.stats().n_sessions <= 1


def test_the_slot_of_an_interrupted_call_is_not_taken_from_its_next_owner(
    cm: ContextManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late note of the first owner's finaliser must not empty the second owner's row."""
    first = said("Who are you?")

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(type(cm._store), "add", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cm.prepare(first)
    cm.check_integrity()
    assert cm.slots.n_free == 3
    others = [prepared(cm, f"{i}?") for i in range(3)]
    del first
    gc.collect()
    for other in others:
        assert_exact(cm, other)
        cm.append(other, 65)
    cm.check_integrity()


def test_slots_reserved_for_prefix_and_scratch_are_never_handed_out(cm: ContextManager) -> None:
    sessions = [prepared(cm, f"{i}?") for i in range(3)]
    assert cm.slots.is_reserved(0)
    assert cm.slots.is_reserved(1)
    assert not cm.slots.is_reserved(2)
    assert sorted(seat.row.seq_id for _, seat in cm._seats.items()) == [2, 3, 4]
    assert len(sessions) == cm.slots.capacity == cm.stats().slots_total
    with pytest.raises(StateError, match="reserved"):
        cm.slots.release(0)


# -- begin and step


def test_begin_does_not_decode_and_step_finishes_it_like_prepare(cm: ContextManager) -> None:
    cm.set_system("Be brief.")
    session = said("Who are you, and what is your name?")
    n_decodes = cm.stats().n_decodes
    pending = cm.begin(session)
    assert cm.stats().n_decodes == n_decodes
    assert pending.n_tokens == pending.n_reused + pending.n_left
    assert session.n_past == pending.n_reused == cm.prefix.n_tokens
    assert session.last_prepare is None
    with pytest.raises(StateError, match="call prepare first"):
        cm.logits(session)
    first = cm.step([PromptChunk(pending, 5)])
    assert first.n_tokens == 5
    assert (first.results[session].n_decoded, first.results[session].done, pending.done) == (5, False, False)
    assert session.last_prepare is None
    second = cm.step([PromptChunk(pending, 10_000)])
    assert second.results[session].done
    assert pending.done
    assert session.n_past == pending.n_tokens
    assert session.last_prepare is not None
    assert [s.source for s in session.last_prepare.stretches] == ["prefix", "decode"]
    assert session.last_prepare.n_decoded == pending.n_tokens - pending.n_reused
    assert_exact(cm, session)


def test_a_step_mixes_prompts_and_tokens_of_several_sessions_in_one_decode(cm: ContextManager) -> None:
    talking = prepared(cm, "What time is it?")
    n_talking = talking.n_past
    long, short = said("Who are you? " * 10), said("Where?")
    begun, other = cm.begin(long), cm.begin(short)
    work = [PromptChunk(begun, 20), NextToken(talking, 65), PromptChunk(other, 999)]
    n_decodes = cm.stats().n_decodes
    report = cm.step(work)
    assert cm.stats().n_decodes == n_decodes + 1
    results = report.results
    assert [results[s].n_decoded for s in (long, talking, short)] == [20, 1, short.n_past - other.n_reused]
    assert [results[s].done for s in (long, talking, short)] == [False, True, True]
    assert report.n_tokens == sum(r.n_decoded for r in results.values())
    assert talking.n_past == n_talking + 1
    assert_exact(cm, talking)
    assert_exact(cm, short)
    cm.step([PromptChunk(begun, 256)])
    assert_exact(cm, long)


def test_a_step_hands_out_the_logits_of_those_who_have_some_now(load: Loader) -> None:
    cm = load(max_sessions=4)
    talking, full = prepared(cm, "What time is it?"), prepared(cm, "Who?")
    half, whole = said("Who are you? " * 10), said("Where?")
    work = [PromptChunk(cm.begin(half), 20), NextToken(talking, 65), PromptChunk(cm.begin(whole), 999)]
    read: dict[Session, FloatArray] = {}

    def note(session: Session, logits: FloatArray) -> None:
        read[session] = logits.copy()

    holder = Engine(cm)
    cm.hold(full, holder)  # so it is refused, and nobody may read what it had before
    report = cm.step([*work, NextToken(full, 65)], read=note)
    assert isinstance(report.results[full].error, StateError)
    assert list(read) == [talking, whole]
    for session, logits in read.items():
        assert np.array_equal(logits, cm.logits(session))


def test_who_reads_within_a_step_gets_logits_while_somebody_is_parked(cm: ContextManager) -> None:
    one, back, away = prepared(cm, "One?"), prepared(cm, "Two?"), prepared(cm, "Three?")
    for session in (back, away):
        cm.park(session)
    got: dict[Session, FloatArray] = {}
    cm.step(
        [NextToken(one, 65), NextToken(back, 66)], read=lambda session, logits: got.update({session: logits.copy()})
    )
    assert set(got) == {one, back}
    assert cm.is_parked(away)
    for session, logits in got.items():
        np.testing.assert_array_equal(logits, cm.logits(session))
        assert_exact(cm, session)


def test_a_decode_that_failed_gives_nobody_logits_to_read(cm: ContextManager, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = prepared(cm, "One?"), prepared(cm, "Two?")
    monkeypatch.setattr(LlamaContext, "decode", lambda self, runs: -1)
    report = cm.step([NextToken(one, 65), NextToken(two, 66)], read=lambda *_: pytest.fail("there is nothing to read"))
    assert all(isinstance(result.error, DecodeError) for result in report.results.values())


def test_an_error_of_who_reads_comes_when_the_step_is_booked(cm: ContextManager) -> None:
    one, two = prepared(cm, "One?"), prepared(cm, "Two?")
    n_past = one.n_past, two.n_past

    def fail(session: Session, logits: FloatArray) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cm.step([NextToken(one, 65), NextToken(two, 66)], read=fail)
    assert (one.n_past, two.n_past) == (n_past[0] + 1, n_past[1] + 1)
    cm.check_integrity()
    assert_exact(cm, one)
    assert_exact(cm, two)


def test_a_pending_is_void_once_its_session_is_begun_again(cm: ContextManager) -> None:
    session = said("Who are you? " * 4)
    old = cm.begin(session)
    cm.step([PromptChunk(old, 4)])
    new = cm.begin(session)
    assert new.n_reused == 4
    report = cm.step([PromptChunk(old, 4)])
    assert isinstance(report.results[session].error, StateError)
    assert "void" in str(report.results[session].error)
    assert session.n_past == 4
    cm.step([PromptChunk(new, 999)])
    assert_exact(cm, session)


@pytest.mark.parametrize("deed", ["release", "prepare", "release and begin"])
def test_a_pending_is_void_once_its_row_went_another_way(cm: ContextManager, deed: str) -> None:
    session = said("Who are you? " * 4)
    pending = cm.begin(session)
    cm.step([PromptChunk(pending, 4)])
    if deed == "prepare":
        cm.prepare(session)
    else:
        cm.release(session)
        if deed != "release":
            cm.begin(session)
    report = cm.step([PromptChunk(pending, 4)])
    assert isinstance(report.results[session].error, StateError)
    cm.prepare(session)
    assert_exact(cm, session)


def test_a_token_behind_half_a_prompt_is_refused_and_the_prompt_goes_on(cm: ContextManager) -> None:
    session = said("Who are you? " * 4)
    pending = cm.begin(session)
    cm.step([PromptChunk(pending, 4)])
    with pytest.raises(StateError, match=r"only 4 of the prompt's \d+ tokens are decoded; call prepare first"):
        cm.append(session, 65)
    cm.step([PromptChunk(pending, 999)])
    assert pending.done
    assert_exact(cm, session)


def test_a_void_pending_is_never_done(cm: ContextManager) -> None:
    session = said("Who?")
    old = cm.begin(session)
    session.messages[0]["content"] = "Somebody else altogether?"
    cm.prepare(session)
    assert session.n_past >= old.n_tokens
    assert old.is_void
    assert not old.done


def test_a_fork_keeps_the_namespace_of_its_cells(cm: ContextManager) -> None:
    session = Session(namespace="a")
    session.add_user("a secret of a")
    cm.prepare(session)
    session.namespace = "b"
    twin = cm.fork(session)
    other = Session(namespace="b")
    other.add_user("a secret of a")
    cm.prepare(other)
    assert other.last_prepare is not None
    assert [s.source for s in other.last_prepare.stretches] == ["decode"]
    cm.prepare(twin)
    assert_exact(cm, twin)


def test_a_noop_before_encode_hook_changes_nothing(cm: ContextManager) -> None:
    session = said("x")
    session.add_assistant("<|im_end|>", trusted=True)
    session.add_user("y")
    n = cm.prepare(session)
    cm.set_hook("before_encode", lambda messages, session: messages)
    assert cm.prepare(session) == n
    cm.clear_hook("before_encode")


def test_three_threads_may_prepare_one_session(cm: ContextManager) -> None:
    session = said("Who are you? " * 30)
    errors: list[Exception] = []

    def work() -> None:
        try:
            cm.prepare(session)
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_exact(cm, session)


def test_close_and_calls_from_a_signal_handler_wait_for_the_call_they_interrupt() -> None:
    run_child(
        """
        import os, signal
        from models import model_path
        from llama_sessions import ContextManager, Session, StateError
        from llama_sessions.kv.store import RowStore

        cm = ContextManager.load(model_path("llama-bpe"), n_ctx=512, n_threads=1)
        refused = []

        def handler(*_):
            try:
                cm.release(session)
            except StateError as e:
                refused.append(str(e))
            cm.close()

        signal.signal(signal.SIGTERM, handler)
        real = RowStore.apply

        def apply(self, row, plan):
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):
                pass
            return real(self, row, plan)

        RowStore.apply = apply
        session = Session()
        session.add_user("hello " * 50)
        cm.begin(session)
        assert len(refused) == 1 and "in the middle of a call" in refused[0], refused
        assert cm.is_closed
        """
    )


def test_the_vocabulary_of_a_closed_manager_is_a_state_error(load: Any) -> None:
    cm = load()
    vocab = cm.vocab
    with pytest.raises(OptionError):
        vocab.text(10**6)
    cm.close()
    for call in (lambda: vocab.tokenize("x" * 500), lambda: vocab.is_eog(3), lambda: vocab.text(3)):
        with pytest.raises(StateError, match="closed"):
            call()


def test_a_hook_that_closes_over_the_manager_does_not_free_the_weights_first(monkeypatch: Any) -> None:
    import conftest

    from llama_sessions.llama import context, model

    freed: list[str] = []

    monkeypatch.setattr(context.llama_cpp, "llama_free", lambda handle: freed.append("context"))
    monkeypatch.setattr(model.llama_cpp, "llama_model_free", lambda handle: freed.append("model"))
    for _ in range(3):
        cm = ContextManager.load(model_path("llama-bpe"), n_ctx=256, max_sessions=1, n_threads=1)
        cm.set_hook("on_progress", lambda done, total, session, cm=cm: None)
        conftest.opened.remove(cm)
        del cm
        gc.collect()
    assert freed == ["context", "model"] * 3


def test_a_finished_pending_has_nothing_left_to_step(cm: ContextManager) -> None:
    session = said("Who?")
    pending = cm.begin(session)
    cm.step([PromptChunk(pending, 999)])
    report = cm.step([PromptChunk(pending, 1)])
    assert "nothing is left" in str(report.results[session].error)
    assert report.n_tokens == 0


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda cm, s, p: [], "at least one"),
        (lambda cm, s, p: None, "a step takes a list"),
        (lambda cm, s, p: 5, "a step takes a list"),
        (lambda cm, s, p: ["x"], "a step takes"),
        (lambda cm, s, p: [PromptChunk(p, 0)], "n_tokens must be at least 1"),
        (lambda cm, s, p: [PromptChunk(None, 4)], "a step takes"),  # type: ignore[arg-type]
        (lambda cm, s, p: [NextToken("x", 4)], "a step takes"),  # type: ignore[arg-type]
        (lambda cm, s, p: [NextToken(s, 640)], "token must be from 0 to 639"),
        (lambda cm, s, p: [NextToken(s, -1)], "token must be from 0 to 639"),
        (lambda cm, s, p: [NextToken(s, 1), NextToken(s, 2)], "only once"),
        (lambda cm, s, p: [PromptChunk(p, 4), NextToken(p.session, 2)], "only once"),
        (lambda cm, s, p: [PromptChunk(p, 256), NextToken(s, 2)], "more than n_batch=256"),
    ],
)
def test_work_that_is_none_is_refused_as_a_whole(cm: ContextManager, make: Any, match: str) -> None:
    session = prepared(cm)
    pending = cm.begin(said("a b c d " * 80))
    before = cm.stats()
    with pytest.raises(OptionError, match=match):
        cm.step(make(cm, session, pending))
    after = cm.stats()
    assert (after.n_decodes, after.n_native_operations) == (before.n_decodes, before.n_native_operations)
    assert_exact(cm, session)


def test_a_step_takes_work_from_a_generator(cm: ContextManager) -> None:
    session = prepared(cm)
    report = cm.step(NextToken(s, 65) for s in (session,))  # type: ignore[arg-type]
    assert report.n_tokens == 1


def test_what_cannot_go_into_a_step_is_left_out_and_the_others_go_on(load: Loader) -> None:
    cm = load(n_ctx=256, max_sessions=3)
    full = prepared(cm, "x")
    for _ in range(256 - full.n_past - 40):
        cm.append(full, 65)
    other = prepared(cm, "y")
    unseated = said("never prepared")
    n_other = other.n_past
    while cm.stats().n_cells_unique < 256 - 1:
        cm.append(full, 65)
    report = cm.step([NextToken(unseated, 65), NextToken(other, 66), NextToken(full, 65)])
    assert isinstance(report.results[unseated].error, StateError)
    assert report.results[other].done
    assert isinstance(report.results[full].error, CapacityError)
    assert report.n_tokens == 1
    assert other.n_past == n_other + 1
    assert_exact(cm, other)


# -- preview


@pytest.mark.parametrize("situation", ["new", "next turn", "edited", "unchanged", "shared", "empty"])
def test_preview_says_what_prepare_then_does(cm: ContextManager, situation: str) -> None:
    cm.set_system("Be brief.")
    session = said("Who are you?", "A clock.", "What time is it?")
    if situation == "shared":
        prepared(cm, "x", "y", "z")
        twin = prepared(cm, "Who are you?", "A clock.", "What time is it?")
        session.add_assistant("Late.")
        session.add_user("How late?")
        assert twin.n_past
    elif situation == "empty":
        session = Session()
    elif situation != "new":
        cm.prepare(session)
        if situation == "next turn":
            session.add_assistant("Late.")
            session.add_user("How late?")
        elif situation == "edited":
            session.messages[0]["content"] = "Who is there?"
    before = cm.stats()
    preview = cm.preview(session)
    assert cm.preview(session) == preview
    after = cm.stats()
    assert (after.n_decodes, after.n_native_operations, after.slots_free) == (
        before.n_decodes,
        before.n_native_operations,
        before.slots_free,
    )
    n_past = cm.prepare(session)
    assert session.last_prepare is not None
    assert preview.fits
    assert preview.n_tokens == n_past
    assert preview.n_to_decode == session.last_prepare.n_decoded
    assert preview.n_free == cm.n_ctx_seq - n_past
    assert preview.n_to_decode < preview.n_tokens


def test_preview_of_what_is_too_long_says_that_it_does_not_fit(cm: ContextManager) -> None:
    preview = cm.preview(said("~" * 2000))
    assert not preview.fits
    assert preview.n_tokens > cm.n_ctx_seq
    assert preview.n_free == 0


# -- logits, tokens, append


def test_logits_are_a_read_only_copy(cm: ContextManager) -> None:
    session = prepared(cm)
    logits = cm.logits(session)
    assert (logits.shape, logits.dtype) == ((640,), np.float32)
    with pytest.raises(ValueError, match="read-only"):
        logits[0] = 1.0


def test_logits_survive_what_others_do_until_their_own_row_changes(cm: ContextManager) -> None:
    session = prepared(cm)
    logits = cm.logits(session)
    kept = logits.copy()
    other = prepared(cm, "What time is it?")
    cm.append(other, 65)
    cm.fork(other)
    cm.set_system("Be brief.")
    cm.release(other)
    np.testing.assert_array_equal(logits, kept)
    np.testing.assert_array_equal(cm.logits(session), kept)
    cm.append(session, 65)
    assert not np.array_equal(cm.logits(session), kept)


def test_logits_are_gone_once_a_begin_has_cut_their_row(cm: ContextManager) -> None:
    session = prepared(cm, "Who are you?", "A clock.", "Since when?")
    del session.messages[1:]
    pending = cm.begin(session)
    with pytest.raises(StateError, match="no logits"):
        cm.logits(session)
    cm.step([PromptChunk(pending, 256)])
    assert_exact(cm, session)


def test_logits_of_a_released_session_stay_what_they_were(cm: ContextManager) -> None:
    session = prepared(cm)
    logits = cm.logits(session)
    kept = logits.copy()
    cm.release(session)
    prepared(cm, "What time is it?")
    np.testing.assert_array_equal(logits, kept)
    with pytest.raises(StateError, match="call prepare first"):
        cm.logits(session)


def test_without_a_decode_there_are_no_logits(cm: ContextManager) -> None:
    cm.set_system("Be brief.")
    empty = Session()
    assert cm.prepare(empty) == cm.prefix.n_tokens
    assert empty.last_prepare is not None
    assert [s.source for s in empty.last_prepare.stretches] == ["prefix"]
    with pytest.raises(StateError, match="no logits"):
        cm.logits(empty)
    with pytest.raises(StateError, match="call prepare first"):
        cm.logits(Session())


def test_a_fork_begins_with_its_parents_logits(cm: ContextManager) -> None:
    parent = prepared(cm)
    cm.append(parent, 65)
    child = cm.fork(parent)
    kept = cm.logits(parent).copy()
    np.testing.assert_array_equal(cm.logits(child), kept)
    cm.append(parent, 66)
    np.testing.assert_array_equal(cm.logits(child), kept)
    assert child.n_past == len(cm.tokens(child)) == parent.n_past - 1


def test_a_fork_copies_messages_deeply_and_takes_a_slot_of_its_own(cm: ContextManager) -> None:
    parent = said("Who are you?", namespace="a", system="Be brief.", tools=[{"type": "function"}])
    parent.messages[0]["meta"] = {"list": [1]}
    cm.prepare(parent)
    child = cm.fork(parent)
    assert (child.messages, child.system, child.namespace) == (parent.messages, "Be brief.", "a")
    child.messages[0]["meta"]["list"].append(2)
    assert parent.messages[0]["meta"] == {"list": [1]}
    assert cm.stats().slots_free == 1
    assert cm.stats().n_cells_used == 2 * cm.stats().n_cells_unique


def test_a_fork_of_a_session_without_a_row_has_none_either(cm: ContextManager) -> None:
    child = cm.fork(said("Who are you?"))
    assert cm.stats().slots_free == 3
    assert child.n_past == 0
    cm.prepare(child)
    assert_exact(cm, child)


def test_appended_ids_of_a_fork_stand_for_its_own_reply(cm: ContextManager) -> None:
    parent = prepared(cm)
    ids = [int(t) for t in cm.vocab.tokenize(" a clock")]
    for token in ids:
        cm.append(parent, token)
    child = cm.fork(parent)
    for session in (parent, child):
        n = session.n_past
        session.add_assistant(" a clock")
        session.add_user("Really?")
        cm.prepare(session)
        assert session.last_prepare is not None
        assert session.last_prepare.n_reused >= n


def test_tokens_are_a_read_only_copy_of_the_row(cm: ContextManager) -> None:
    session = prepared(cm)
    ids = cm.tokens(session)
    assert ids.dtype == np.int32
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1
    cm.append(session, 65)
    assert len(cm.tokens(session)) == len(ids) + 1 == session.n_past
    assert cm.tokens(session)[-1] == 65
    assert len(cm.tokens(said("never seen"))) == 0
    cm.release(session)
    assert len(cm.tokens(session)) == 0


def test_append_decodes_one_token_at_n_past(cm: ContextManager) -> None:
    session = prepared(cm)
    n = session.n_past
    before = cm.stats()
    cm.append(session, np.int32(65))  # type: ignore[arg-type]
    after = cm.stats()
    assert after.n_decodes - before.n_decodes == after.n_tokens_decoded - before.n_tokens_decoded == 1
    assert session.n_past == n + 1
    assert_exact(cm, session)


@pytest.mark.parametrize("token", [-1, 640, 2**40, 1.0, "a", None, True])
def test_append_refuses_what_is_no_token_of_the_vocabulary(cm: ContextManager, token: Any) -> None:
    session = prepared(cm)
    with pytest.raises(OptionError, match="token must be"):
        cm.append(session, token)
    assert_exact(cm, session)


def test_append_needs_a_prepared_session(cm: ContextManager) -> None:
    with pytest.raises(StateError, match="call prepare first"):
        cm.append(said("x"), 65)
    empty = Session()
    cm.prepare(empty)
    with pytest.raises(StateError, match="call prepare first"):
        cm.append(empty, 65)


def test_append_without_room_leaves_the_row_and_its_logits(load: Loader) -> None:
    cm = load(n_ctx=256, max_sessions=2)
    session, other = prepared(cm, "x"), prepared(cm, "y")
    cm.pin(other)
    while cm.stats().n_cells_unique < 256:
        cm.append(session, 65)
    n, logits = session.n_past, cm.logits(session).copy()
    with pytest.raises(CapacityError) as e:
        cm.append(session, 65)
    assert (e.value.needed, e.value.available, e.value.unit) == (1, 0, "cells")
    assert not isinstance(e.value, ContextOverflow)
    assert session.n_past == n == len(cm.tokens(session))
    np.testing.assert_array_equal(cm.logits(session), logits)
    cm.release(other)
    cm.append(session, 65)
    assert session.n_past == n + 1


def test_make_room_has_nothing_to_remove_yet_and_checks_its_argument(cm: ContextManager) -> None:
    session = prepared(cm)
    assert cm.make_room(session, 0) == 0
    assert cm.make_room(said("never seen"), 5) == 0
    with pytest.raises(OptionError, match="n_needed must be at least 0"):
        cm.make_room(session, -1)


# -- hooks


def test_before_encode_changes_what_is_rendered_and_not_the_session(cm: ContextManager) -> None:
    seen: list[Any] = []

    def shout(messages: list[Any], session: Session) -> list[Any]:
        seen.append((session, [dict(m) for m in messages]))
        for m in messages:
            m["content"] = m["content"].upper()
        return messages

    cm.set_hook("before_encode", shout)
    session = prepared(cm, "who are you?", system="be brief.")
    assert "WHO ARE YOU?" in text_of(cm, session)
    assert "BE BRIEF." in text_of(cm, session)
    assert session.messages == [{"role": "user", "content": "who are you?"}]
    assert seen == [
        (session, [{"role": "system", "content": "be brief."}, {"role": "user", "content": "who are you?"}])
    ]
    cm.clear_hook("before_encode")
    cm.prepare(session)
    assert "who are you?" in text_of(cm, session)
    assert len(seen) == 1


def test_before_encode_returning_none_leaves_the_messages_even_if_it_changed_its_copies(cm: ContextManager) -> None:
    def vandal(messages: list[Any], session: Session) -> None:
        messages[0]["content"] = "changed"
        messages.clear()

    cm.set_hook("before_encode", vandal)
    session = prepared(cm, "who are you?")
    assert "who are you?" in text_of(cm, session)
    assert session.messages[0]["content"] == "who are you?"


def test_before_encode_may_use_the_manager(cm: ContextManager) -> None:
    """The plan is made after it: what it changes is seen."""
    helper, old = said("who are you?", "a clock", "since when?"), prepared(cm, "something else")
    session = said("who are you?", "a clock", "since when?", "long ago", "how long?")

    def busy(messages: list[Any], which: Session) -> None:
        if which is session:
            cm.prepare(helper)
            cm.release(old)
            cm.release(session)
            cm.set_system("")

    cm.set_hook("before_encode", busy)
    cm.prepare(session)
    assert session.last_prepare is not None
    assert session.last_prepare.stretches[0].source == "live"
    assert_exact(cm, session)


def test_before_encode_that_raises_changes_nothing(cm: ContextManager) -> None:
    session = prepared(cm)
    logits = cm.logits(session).copy()
    before = cm.stats()

    def broken(messages: list[Any], session: Session) -> None:
        raise ZeroDivisionError("mine")

    cm.set_hook("before_encode", broken)
    session.add_assistant("A clock.")
    session.add_user("Really?")
    for call in (cm.prepare, cm.preview, cm.begin):
        with pytest.raises(ZeroDivisionError, match="mine"):
            call(session)
    cm.clear_hook("before_encode")
    assert cm.stats() == before
    np.testing.assert_array_equal(cm.logits(session), logits)
    cm.prepare(session)
    assert_exact(cm, session)


@pytest.mark.parametrize(
    "nonsense",
    [5, "text", {"role": "user"}, ["x"], [{"role": "user"}], [{"role": "king", "content": "x"}], [None],
     [{"role": "user", "content": 5}], [{"role": "system", "content": 5}], [{"content": "x"}]],
)  # fmt: skip
def test_before_encode_that_returns_nonsense_is_an_option_error(cm: ContextManager, nonsense: Any) -> None:
    session = prepared(cm)
    logits = cm.logits(session).copy()
    cm.set_hook("before_encode", lambda messages, session: nonsense)
    with pytest.raises(OptionError, match=r"message|before_encode"):
        cm.prepare(session)
    np.testing.assert_array_equal(cm.logits(session), logits)


def test_on_progress_hears_of_every_chunk(load: Loader) -> None:
    cm = load(n_batch=32)
    heard: list[tuple[int, int]] = []
    cm.set_hook("on_progress", lambda done, total, session: heard.append((done, total)))
    session = prepared(cm, "Who are you? " * 8)
    n = session.n_past
    assert heard == [(min(at, n), n) for at in range(0, n + 32, 32)][: len(heard)]
    assert heard[0] == (0, n)
    assert heard[-1] == (n, n)
    assert len(heard) == 2 + (n - 1) // 32


def test_on_progress_returning_false_cancels_and_what_was_decoded_stays(load: Loader) -> None:
    cm = load(n_batch=32)
    session = said("Who are you? " * 8)
    cm.set_hook("on_progress", lambda done, total, session: done < 64)
    with pytest.raises(Cancelled, match=r"at 64 of \d+ tokens; prepare again"):
        cm.prepare(session)
    assert session.n_past == len(cm.tokens(session)) == 64
    with pytest.raises(StateError):
        cm.logits(session)
    cm.clear_hook("on_progress")
    cm.prepare(session)
    assert session.last_prepare is not None
    assert session.last_prepare.n_reused == 64
    assert_exact(cm, session)


@pytest.mark.parametrize("answer", [None, 0, "", [], True])
def test_only_false_itself_cancels(cm: ContextManager, answer: Any) -> None:
    cm.set_hook("on_progress", lambda done, total, session: answer)
    assert prepared(cm).n_past > 0


def test_on_progress_saying_no_to_finished_work_is_too_late(cm: ContextManager) -> None:
    cm.set_hook("on_progress", lambda done, total, session: done < total)
    session = prepared(cm)
    assert_exact(cm, session)


def test_on_progress_may_read(cm: ContextManager) -> None:
    other = prepared(cm, "other")
    read: list[Any] = []

    def reader(done: int, total: int, session: Session) -> None:
        read.append((cm.stats().n_sessions, cm.describe(), len(cm.tokens(session)), len(cm.tokens(other)), done))

    cm.set_hook("on_progress", reader)
    session = prepared(cm)
    assert session.last_prepare is not None
    n_reused = session.last_prepare.n_reused
    assert [(r[2], r[4]) for r in read] == [(n_reused, n_reused), (session.n_past, session.n_past)]
    assert {r[3] for r in read} == {other.n_past}


@pytest.mark.parametrize(
    "change",
    [
        lambda cm, s: cm.prepare(s),
        lambda cm, s: cm.begin(s),
        lambda cm, s: cm.append(s, 65),
        lambda cm, s: cm.fork(s),
        lambda cm, s: cm.release(s),
        lambda cm, s: cm.set_system("x"),
        lambda cm, s: cm.set_hook("on_progress", print),
        lambda cm, s: cm.clear_hook("on_progress"),
        lambda cm, s: cm.make_room(s, 1),
        lambda cm, s: cm.clear_radix(),
        lambda cm, s: cm.close(),
        lambda cm, s: Engine(cm).chat(s, "x"),
    ],
)
def test_on_progress_may_not_change_anything(cm: ContextManager, change: Any) -> None:
    other = prepared(cm, "other")
    refused: list[Exception] = []

    def meddler(done: int, total: int, session: Session) -> None:
        try:
            change(cm, other)
        except StateError as e:
            refused.append(e)

    cm.set_hook("on_progress", meddler)
    session = prepared(cm)
    assert len(refused) == 2
    assert "may only be read" in str(refused[0])
    assert other.messages == [{"role": "user", "content": "other"}]
    cm.clear_hook("on_progress")
    assert_exact(cm, session)
    assert_exact(cm, other)


def test_on_progress_that_raises_ends_prepare_and_what_was_decoded_stays(load: Loader) -> None:
    cm = load(n_batch=32)

    def broken(done: int, total: int, session: Session) -> None:
        if done == 32:
            raise ZeroDivisionError("mine")

    cm.set_hook("on_progress", broken)
    session = said("Who are you? " * 8)
    with pytest.raises(ZeroDivisionError):
        cm.prepare(session)
    assert session.n_past == len(cm.tokens(session)) == 32
    cm.clear_hook("on_progress")  # the thread may change things again
    cm.prepare(session)
    assert_exact(cm, session)


@pytest.mark.parametrize("name", ["on_nothing", "", None, "before encode"])
def test_an_unknown_hook_is_an_error_that_names_the_known_ones(cm: ContextManager, name: Any) -> None:
    for call in (lambda: cm.set_hook(name, print), lambda: cm.clear_hook(name)):
        with pytest.raises(OptionError, match="known: before_encode, on_evict, sink_fn, on_progress"):
            call()


def test_a_hook_must_be_callable(cm: ContextManager) -> None:
    with pytest.raises(OptionError, match="must be callable"):
        cm.set_hook("on_progress", 5)  # type: ignore[arg-type]
    cm.clear_hook("on_progress")  # clearing what is not set is fine


# -- the system prompt


def test_set_system_returns_its_tokens_and_later_prepares_share_them(cm: ContextManager) -> None:
    n = cm.set_system("Be brief. Be kind.")
    assert n == cm.prefix.n_tokens == cm.stats().prefix_tokens > 0
    assert cm.stats().prefix_cached
    assert cm.prefix.text == "Be brief. Be kind."
    for i in range(3):
        before = cm.stats()
        session = prepared(cm, f"{i} is here")
        assert session.last_prepare is not None
        stretch = session.last_prepare.stretches[0]
        assert (stretch.source, stretch.p0, stretch.p1) == ("prefix", 0, n)
        assert cm.stats().n_native_operations == before.n_native_operations + 1
        assert cm.stats().n_cells_unique == before.n_cells_unique + session.n_past - n
        cm.release(session)


def test_set_system_again_decodes_only_what_differs(cm: ContextManager) -> None:
    first = cm.set_system("Be brief. Be kind. Be there.")
    before = cm.stats()
    assert cm.set_system("Be brief. Be kind. Be there.") == first
    assert cm.stats().n_decodes == before.n_decodes
    second = cm.set_system("Be brief. Be kind. Be gone!")
    assert 0 < cm.stats().n_tokens_decoded - before.n_tokens_decoded < second / 2


def test_a_changed_system_text_reaches_sessions_at_their_next_prepare(cm: ContextManager) -> None:
    cm.set_system("Be brief.")
    session, own = prepared(cm), prepared(cm, "Who?", system="Be mine.")
    cm.set_system("Be long.")
    assert "Be brief." in text_of(cm, session)
    assert_exact(cm, session)
    for each in (session, own):
        cm.prepare(each)
        assert_exact(cm, each)
    assert "Be long." in text_of(cm, session)
    assert "Be mine." in text_of(cm, own)
    assert "Be long." not in text_of(cm, own)
    assert cm.set_system("") == 0
    assert (cm.prefix.n_tokens, cm.prefix.text, cm.stats().prefix_cached) == (0, None, False)
    cm.prepare(session)
    assert "Be" not in text_of(cm, session)


def test_a_system_message_at_the_head_of_the_messages_wins_over_the_managers(cm: ContextManager) -> None:
    cm.set_system("Be brief.")
    session = Session()
    session.add("system", "Be me.")
    session.add_user("Who?")
    cm.prepare(session)
    assert "Be me." in text_of(cm, session)
    assert "Be brief." not in text_of(cm, session)


def test_a_system_text_that_is_too_long_leaves_the_old_one(cm: ContextManager) -> None:
    n = cm.set_system("Be brief.")
    with pytest.raises(ContextOverflow) as e:
        cm.set_system("~" * 3000)
    assert e.value.needed > e.value.available == cm.n_ctx_seq
    assert "the system prompt" in str(e.value)
    assert (cm.prefix.text, cm.prefix.n_tokens) == ("Be brief.", n)
    session = prepared(cm)
    assert "Be brief." in text_of(cm, session)
    assert_exact(cm, session)


@pytest.mark.parametrize("model", ["llama-bpe", "hybrid"])
def test_a_system_text_without_cells_leaves_the_old_one(load: Loader, model: str) -> None:
    cm = load(model, n_ctx=256, max_sessions=3)
    n = cm.set_system("Be brief.")
    neighbour = prepared(cm, "~" * 120)
    cm.pin(neighbour)
    with pytest.raises(CapacityError) as e:
        cm.set_system("Be brief. " + "-" * 120)
    assert not isinstance(e.value, ContextOverflow)
    assert e.value.needed > e.value.available
    assert (cm.prefix.text, cm.prefix.n_tokens) == ("Be brief.", n)
    oracle_for(model_path(model)).assert_exact(cm.logits(neighbour), cm.tokens(neighbour))


@pytest.mark.parametrize("model", ["llama-bpe", "hybrid"])
def test_a_system_text_that_others_share_frees_no_cells_by_going(load: Loader, model: str) -> None:
    """A state cannot be cut back: the whole new text is needed there, and the old one must not go for nothing."""
    cm = load(model, n_ctx=256, max_sessions=3)
    n = cm.set_system("Be brief.")
    sharing = prepared(cm, "~" * 80)
    cm.pin(sharing)
    n_free = 256 - cm.stats().n_cells_unique
    text = "Be brief." + "-" * (n_free - n + 10)  # with the kept beginning it fits, as a whole it does not
    if model == "hybrid":
        with pytest.raises(CapacityError):
            cm.set_system(text)
        assert (cm.prefix.text, cm.prefix.n_tokens) == ("Be brief.", n)
    else:
        assert cm.set_system(text) > n_free
    oracle_for(model_path(model)).assert_exact(cm.logits(sharing), cm.tokens(sharing))


@pytest.mark.parametrize("text", [None, 5, b"x", "\ud800"])
def test_set_system_refuses_what_is_no_text(cm: ContextManager, text: Any) -> None:
    cm.set_system("Be brief.")
    with pytest.raises(OptionError, match="system text"):
        cm.set_system(text)
    assert cm.prefix.text == "Be brief."
    with pytest.raises(OptionError, match="keep_cache must be True or False"):
        cm.set_system("x", keep_cache=1)  # type: ignore[arg-type]


def test_a_changed_namespace_drops_the_row_at_the_next_prepare(cm: ContextManager) -> None:
    session = prepared(cm, namespace="a")
    session.namespace = "b"
    cm.prepare(session)
    assert session.last_prepare is not None
    assert [s.source for s in session.last_prepare.stretches] == ["decode"]
    cm.prepare(session)
    assert [s.source for s in session.last_prepare.stretches] == ["row"]
    assert_exact(cm, session)


# -- looking at it


def test_stats_count_what_happened(cm: ContextManager) -> None:
    empty = cm.stats()
    assert (empty.slots_total, empty.slots_free, empty.n_cells_total, empty.n_cells_used) == (3, 3, 1024, 0)
    assert (empty.n_sink, empty.eviction, empty.n_evictions, empty.radix.n_nodes) == (4, "message", 0, 0)
    n = cm.set_system("Be brief.")
    session = prepared(cm)
    child = cm.fork(session)
    s = cm.stats()
    assert (s.n_sessions, s.slots_free, s.prefix_tokens) == (2, 1, n)
    assert s.n_cells_used == n + 2 * session.n_past
    assert s.n_cells_unique == session.n_past == child.n_past
    assert (s.n_tokens_decoded, s.n_tokens_reused) == (session.n_past, n)
    assert (s.n_decodes, s.n_native_operations) == (2, 2)
    assert s.decode_seconds > 0 < s.operation_seconds
    with pytest.raises(AttributeError):
        s.n_decodes = 5  # type: ignore[misc]


def test_describe_names_every_row(cm: ContextManager) -> None:
    cm.set_system("Be brief.")
    session = prepared(cm, namespace="team")
    stream = Engine(cm).stream(other := Session(), "Who?", max_tokens=4)
    next(stream)
    text = cm.describe()
    for part in ("2 of 3 slots in use", "of 1024 cells", "prefix", "team", f"{session.n_past} tokens", "idle"):
        assert part in text
    assert "generating" in text
    assert text.splitlines()[-1] == "saved: 0 tokens on 0 edges, 0.0 of 512 MiB, by range"
    assert len(text.splitlines()) == 6
    stream.close()
    assert "generating" not in cm.describe()
    assert other.messages


def test_stats_and_describe_do_not_wait_for_a_decode(cm: ContextManager, monkeypatch: pytest.MonkeyPatch) -> None:
    other = prepared(cm, "other")
    before = cm.stats()
    gate = Gate(monkeypatch, of=LlamaContext)
    session = said("Who are you?")
    thread = threading.Thread(target=cm.prepare, args=(session,))
    thread.start()
    gate.wait()
    stats, text = cm.stats(), cm.describe()
    assert thread.is_alive()  # in the decode, which nobody has let through
    assert gate.inside.is_set()
    assert stats.n_decodes == before.n_decodes
    assert "slots in use" in text
    waiting = threading.Thread(target=cm.tokens, args=(other,))
    waiting.start()
    waiting.join(0.05)
    assert waiting.is_alive()  # what may change under a decode has to wait for it
    gate.open()
    thread.join(10)
    waiting.join(10)
    assert cm.stats().n_decodes == before.n_decodes + 1
    assert_exact(cm, session)


def test_describe_does_not_wait_for_a_decode_that_begins_in_the_middle_of_it(
    cm: ContextManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = prepared(cm)
    for k in range(1000):  # at each line of it
        left = k
        with monkeypatch.context() as patched:
            gate = Gate(patched, of=LlamaContext)
            thread = threading.Thread(target=cm.append, args=(session, 65))

            def local(frame: FrameType, event: str, arg: Any) -> Any:
                nonlocal left
                left -= event == "line"
                if left == -1 and event == "line":
                    thread.start()  # noqa: B023 - it runs in this turn of the loop
                    gate.wait()  # noqa: B023
                return local

            def trace(frame: FrameType, event: str, arg: Any) -> Any:
                return local if frame.f_code.co_filename.endswith(("manager.py", "entry.py", "overview.py")) else None

            sys.settrace(trace)
            try:
                text = cm.describe()
            finally:
                sys.settrace(None)
            if left >= 0:
                break
            assert gate.inside.is_set()
            gate.open()
            thread.join(LONG_S)
        assert "slots in use" in text
    assert k > 10
    cm.check_integrity()


def test_describe_leaves_the_edges_out_where_the_cache_changes_under_it(
    cm: ContextManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = prepared(cm, namespace="a"), prepared(cm, namespace="b")
    cm.flush(first)
    assert "(namespace 'a')" in cm.describe()
    real = RadixTree.walk

    def walk(tree: RadixTree[Any]) -> Any:
        for visit in real(tree):
            cm.flush(second)
            yield visit

    with monkeypatch.context() as patched:
        patched.setattr(RadixTree, "walk", walk)
        text = cm.describe()
    assert "slots in use" in text
    assert "namespace 'a')" not in text
    assert "(namespace 'b')" in cm.describe()


def test_close_waits_for_the_call_that_is_under_way(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    cm = load()
    gate = Gate(monkeypatch, of=LlamaContext)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            cm.prepare(said("Who are you?"))
        except BaseException as e:
            failures.append(e)

    worker = threading.Thread(target=work)
    worker.start()
    gate.wait()
    closer = threading.Thread(target=cm.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    gate.open()
    worker.join(10)
    closer.join(10)
    assert cm.is_closed
    assert failures == [] or isinstance(failures[0], StateError)


def test_calls_from_several_threads_run_one_at_a_time(load: Loader) -> None:
    cm = load(max_sessions=6)
    cm.set_system("Be brief.")
    failures: list[BaseException] = []
    sessions: list[Session] = []

    def live(number: int) -> None:
        try:
            for turn in range(6):
                session = said(f"{number} asks {turn}")
                cm.prepare(session)
                child = cm.fork(session)
                cm.append(child, 65 + number)
                cm.stats()
                cm.describe()
                session.add_assistant("Yes.")
                session.add_user("More.")
                cm.prepare(session)
                cm.release(child)
                if turn < 5:
                    cm.release(session)
            sessions.append(session)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=live, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    cm.check_integrity()
    assert len(sessions) == 3
    for session in sessions:
        assert_exact(cm, session)


def test_threads_that_prepare_the_same_session_take_turns(load: Loader) -> None:
    """Without turns each would void the prompt of the one before it."""
    cm = load(n_batch=32)
    cm.set_hook("on_progress", lambda done, total, session: time.sleep(0.002))  # room for the others to come in
    session = said("Who are you? " * 8)
    outcomes: list[Any] = []

    def work() -> None:
        try:
            outcomes.append(cm.prepare(session))
        except Exception as e:
            outcomes.append(e)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert outcomes == [session.n_past] * 4
    assert cm.stats().n_tokens_decoded == session.n_past  # the first decoded it, the others found it done
    assert_exact(cm, session)


# -- the end


EVERY_CALL: dict[str, Callable[[ContextManager, Session], Any]] = {
    "prepare": lambda cm, s: cm.prepare(s),
    "begin": lambda cm, s: cm.begin(s),
    "preview": lambda cm, s: cm.preview(s),
    "step": lambda cm, s: cm.step([NextToken(s, 65)]),
    "append": lambda cm, s: cm.append(s, 65),
    "logits": lambda cm, s: cm.logits(s),
    "tokens": lambda cm, s: cm.tokens(s),
    "fork": lambda cm, s: cm.fork(s),
    "release": lambda cm, s: cm.release(s),
    "make_room": lambda cm, s: cm.make_room(s, 1),
    "set_system": lambda cm, s: cm.set_system("x"),
    "set_hook": lambda cm, s: cm.set_hook("on_progress", print),
    "clear_hook": lambda cm, s: cm.clear_hook("on_progress"),
    "clear_radix": lambda cm, s: cm.clear_radix(),
    "stats": lambda cm, s: cm.stats(),
    "describe": lambda cm, s: cm.describe(),
    "check_integrity": lambda cm, s: cm.check_integrity(),
    "with": lambda cm, s: cm.__enter__(),
    "chat": lambda cm, s: Engine(cm).chat(s, "x"),
}


@pytest.mark.parametrize("name", EVERY_CALL)
def test_after_close_every_call_is_a_state_error(cm: ContextManager, name: str) -> None:
    session = prepared(cm)
    cm.close()
    assert cm.is_closed
    assert session.n_past == 0
    assert session.messages
    with pytest.raises(StateError, match="the manager is closed"):
        EVERY_CALL[name](cm, session)
    cm.close()
    assert session.messages == [{"role": "user", "content": "Who are you?"}]


def test_leaving_a_with_block_closes(load: Loader) -> None:
    with load() as cm:
        prepared(cm)
    assert cm.is_closed


def test_on_progress_cannot_close_but_before_encode_may(cm: ContextManager) -> None:
    cm.set_hook("before_encode", lambda messages, session: cm.close())
    with pytest.raises(StateError, match="closed"):
        cm.prepare(said("x"))
    assert cm.is_closed


@pytest.mark.parametrize("name", ["prepare", "preview", "append", "logits", "tokens", "fork", "release", "chat"])
def test_a_session_of_another_manager_is_refused(cm: ContextManager, load: Loader, name: str) -> None:
    other = load()
    session = prepared(cm)
    before = session.copy().messages
    with pytest.raises(StateError, match="belongs to another manager"):
        EVERY_CALL[name](other, session)
    assert session.messages == before
    assert_exact(cm, session)
    cm.release(session)
    other.prepare(session)
    assert_exact(other, session)


def test_a_session_of_a_closed_manager_may_go_to_another(cm: ContextManager, load: Loader) -> None:
    session = prepared(cm)
    cm.close()
    other = load()
    other.prepare(session)
    assert_exact(other, session)


def test_a_session_of_a_manager_that_was_dropped_unclosed_may_go_to_another(load: Loader) -> None:
    import conftest

    cm = load()
    session = prepared(cm)
    conftest.opened.remove(cm)
    del cm
    gc.collect()
    other = load()
    other.prepare(session)
    assert_exact(other, session)


ABOUT_A_SESSION = [
    "begin", "prepare", "preview", "append", "logits", "tokens", "fork", "release", "make_room", "park", "flush", "pin",
    "rebuild", "is_parked", "is_pinned", "is_held", "n_room",
]  # fmt: skip


@pytest.mark.parametrize("name", ABOUT_A_SESSION)
@pytest.mark.parametrize("thing", [None, "session", 5, {}, Session])
def test_what_is_no_session_is_an_option_error(cm: ContextManager, name: str, thing: Any) -> None:
    more = {"append": [65], "make_room": [1]}.get(name, [])
    with pytest.raises(OptionError, match=r"a Session is wanted|NextToken\(session="):
        getattr(cm, name)(thing, *more)


def test_after_os_fork_every_call_in_the_child_says_spawn_and_close_does_nothing() -> None:
    out = run_child("""
        import os, sys, threading, warnings
        warnings.simplefilter("ignore")
        from models import model_path
        from llama_sessions import ContextManager, Engine, Session, StateError
        sys.argv = ["child"]
        from test_manager import EVERY_CALL

        cm = ContextManager.load(model_path("llama-bpe"), n_ctx=256, max_sessions=2, n_threads=1)
        session = Session()
        session.add_user("Who are you?")
        cm.prepare(session)
        streaming = Session()
        stream = Engine(cm).stream(streaming, "Who?", max_tokens=4)
        next(stream)
        holding, done = threading.Event(), threading.Event()

        def hold_the_lock():  # as a thread would that is in the middle of a decode
            with cm._entry._lock:
                holding.set()
                done.wait()

        thread = threading.Thread(target=hold_the_lock)
        thread.start()
        holding.wait()
        pid = os.fork()
        if pid == 0:
            import signal
            signal.alarm(20)  # a hang is a failure too
            bad = []
            for name, call in EVERY_CALL.items():
                try:
                    call(cm, session)
                except StateError as e:
                    if "spawn" not in str(e):
                        bad.append((name, str(e)))
                else:
                    bad.append((name, "let through"))
            try:
                next(stream)
            except StateError as e:
                if "spawn" not in str(e):
                    bad.append(("stream", str(e)))
            else:
                bad.append(("stream", "let through"))
            stream.close()
            cm.close()
            del session, streaming, stream
            if cm.is_closed:
                bad.append(("close", "did something"))
            print(bad, flush=True)
            os._exit(1 if bad else 0)
        _, status = os.waitpid(pid, 0)
        done.set()
        thread.join()
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, status
        for chunk in stream:
            pass
        cm.append(session, 65)
        cm.check_integrity()
        cm.close()
        print("parent fine")
    """)
    assert out.splitlines() == ["[]", "parent fine"]


def test_a_forked_child_whose_decode_would_wait_for_the_parents_threads_is_told_so() -> None:
    out = run_child("""
        import os, signal
        import llama_cpp
        from models import model_path
        from llama_sessions import ContextManager, Session, StateError

        def prepare(n_threads):
            with ContextManager.load(model_path("llama-bpe"), n_ctx=256, max_sessions=2, n_threads=n_threads) as cm:
                session = Session()
                session.add_user("Who are you?")
                return cm.prepare(session)

        def in_a_child(n_threads):
            pid = os.fork()
            if pid == 0:
                signal.alarm(20)  # a hang is a failure too
                try:
                    print(prepare(n_threads), flush=True)
                except StateError as e:
                    print(e, flush=True)
                os._exit(0)
            _, status = os.waitpid(pid, 0)
            assert status == 0, status

        print(b"OPENMP = 1" in llama_cpp.llama_print_system_info(), flush=True)
        prepare(1)
        in_a_child(2)  # nobody has left threads behind so far
        print(prepare(2), flush=True)
        in_a_child(1)
        in_a_child(2)
    """)
    has_openmp, before, *others, last = out.splitlines()
    assert {before, *others} == {before}
    assert int(before) > 0
    assert ("use multiprocessing's 'spawn' start method, or n_threads=1" in last) == (has_openmp == "True")


def test_a_forked_child_that_just_exits_frees_nothing_of_the_parents() -> None:
    out = run_child("""
        import os, sys, warnings
        warnings.simplefilter("ignore")
        from models import model_path
        from llama_sessions import ContextManager, Session

        cm = ContextManager.load(model_path("llama-bpe"), n_ctx=256, max_sessions=2, n_threads=1)
        session = Session()
        session.add_user("Who are you?")
        cm.prepare(session)
        pid = os.fork()
        if pid == 0:
            del cm
            sys.exit(0)  # atexit and finalisers run
        assert os.waitpid(pid, 0)[1] == 0
        cm.append(session, 65)
        cm.check_integrity()
        print("parent fine")
    """)
    assert out == "parent fine\n"


# -- log


def test_log_true_sends_llama_cpps_lines_to_logging_and_false_does_not(
    load: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="llama_sessions.llama")
    load(log=False).close()
    assert not [r for r in caplog.records if r.name == "llama_sessions.llama"]
    load(log=True).close()
    lines = [r for r in caplog.records if r.name == "llama_sessions.llama"]
    assert any("llama" in r.getMessage() for r in lines)
    assert all(r.levelno < logging.ERROR for r in lines)


def test_a_quiet_manager_beside_a_loud_one_stays_quiet(load: Loader, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="llama_sessions.llama")
    managers = {log: load(log=log) for log in (True, False)}
    heard = {}
    for log in (True, False, True):
        cm = managers[log]
        session = prepared(cm)
        cm._store.context.memory.seq_rm(row_of(cm, session).seq_id, 5, None)  # llama.cpp will complain
        caplog.clear()
        with pytest.raises(DecodeError, match="llama_decode returned -1") as e:
            cm.append(session, 65)
        heard[log] = [r.getMessage() for r in caplog.records if r.name == "llama_sessions.llama"]
        assert e.value.detail  # in the exception it is found either way
        cm.release(session)
    assert heard[True]
    assert heard[False] == []


def test_a_quiet_manager_is_quiet_about_grammars_too(
    load: Loader, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are compiled on a thread with a larger stack."""
    caplog.set_level(logging.DEBUG, logger="llama_sessions.llama")
    managers = {log: load(log=log) for log in (True, False)}

    def refuse(*_: object) -> None:
        callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
        llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
        callback(4, b"no such rule\n", data)

    monkeypatch.setattr(llama_cpp, "llama_sampler_init_grammar", refuse)
    for log in (True, False, True):
        caplog.clear()
        with pytest.raises(OptionError, match="refuses it: no such rule"):
            managers[log].grammar('root ::= "a"')
        heard = [r.getMessage() for r in caplog.records if r.name == "llama_sessions.llama"]
        assert heard == (["no such rule"] if log else [])


def test_nothing_is_printed_by_a_library(load: Loader, capfd: pytest.CaptureFixture[str]) -> None:
    cm = load()
    prepared(cm)
    cm.close()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


# -- check_integrity


def test_check_integrity_is_content_with_a_manager_in_use(cm: ContextManager) -> None:
    cm.set_system("Be brief.")
    session = prepared(cm)
    cm.fork(session)
    cm.check_integrity()


def plant_lost_cells(cm: ContextManager, session: Session) -> None:
    cm._store.context.memory.seq_rm(row_of(cm, session).seq_id, 3, None)


def plant_lost_beginning(cm: ContextManager, session: Session) -> None:
    cm._store.context.memory.seq_rm(row_of(cm, session).seq_id, 0, 3)


def plant_stray_cells(cm: ContextManager, session: Session) -> None:
    cm._store.context.memory.seq_cp(row_of(cm, session).seq_id, 1)


def plant_wrong_length(cm: ContextManager, session: Session) -> None:
    row_of(cm, session).n -= 1


def plant_double_cell(cm: ContextManager, session: Session) -> None:
    row_of(cm, session).cells[1] = row_of(cm, session).cells[0]


def plant_wrong_count(cm: ContextManager, session: Session) -> None:
    cm._store._n_unique = 1


def plant_lost_slot(cm: ContextManager, session: Session) -> None:
    cm.slots.release(row_of(cm, session).seq_id)


def plant_lost_row(cm: ContextManager, session: Session) -> None:
    del cm._store.rows[row_of(cm, session).seq_id]


def row_of(cm: ContextManager, session: Session) -> Any:
    return next(seat.row for other, seat in cm._seats.items() if other is session)


@pytest.mark.parametrize(
    ("plant", "match"),
    [
        (plant_lost_cells, "llama.cpp's last position is 2"),
        (plant_lost_beginning, "begins at position 3"),
        (plant_stray_cells, "row 1 has 0 tokens"),
        (plant_wrong_length, "llama.cpp's last position"),
        (plant_double_cell, "holds a cell twice"),
        (plant_wrong_count, "1 cells are booked"),
        (plant_lost_slot, "slots in use"),
        (plant_lost_row, "are not those of sessions and prefix"),
    ],
)
def test_check_integrity_finds_a_planted_fault(load: Loader, plant: Any, match: str) -> None:
    import conftest

    cm = load()
    session = prepared(cm)
    plant(cm, session)
    conftest.opened.remove(cm)  # it no longer adds up, and must not
    with pytest.raises(StateError, match="does not add up") as e:
        cm.check_integrity()
    assert match in str(e.value)
    cm.close()


def test_a_row_with_gaps_has_the_headroom_too_when_its_positions_end(load: Loader) -> None:
    """Of 512 positions, a row of 256 tokens at most uses more and more; then it begins anew."""
    cm = load(n_ctx=256, overflow="gap", model={"n_ctx_train": 512})
    session, n_anew, had_gaps = Session(), 0, False
    for i in range(30):
        session.add_user(f"Turn {i} is one of many.")
        cm.prepare(session)
        report = session.last_prepare
        assert report is not None
        assert cm.n_room(session) >= min(cm.headroom, cm.n_ctx_seq - report.n_tokens)
        n_anew += had_gaps and report.exact
        had_gaps = not report.exact
        session.add_assistant("I see.")
    assert n_anew


def test_an_on_evict_hook_is_not_asked_about_what_goes_within_it(load: Loader) -> None:
    """Or a summary written by a session that is itself too long would call for another, without end."""
    cm = load(n_ctx=256, max_sessions=3)
    calls: list[int] = []

    def hook(dropped: list[dict[str, Any]], session: Session) -> None:
        calls.append(len(dropped))
        reader = said("~" * 60, "yes", "~" * 60, "yes", "~" * 60)
        cm.prepare(reader)
        assert len(reader.window) < len(reader.messages)
        cm.release(reader)

    cm.set_hook("on_evict", hook)
    session = said("-" * 60, "yes", "-" * 60, "yes", "-" * 60)
    cm.prepare(session)
    assert calls == [2]


@pytest.mark.parametrize("pinned", [0, 1])
def test_a_pinned_message_keeps_its_turn(load: Loader, pinned: int) -> None:
    """A template that wants question and answer in turn would refuse what else is left."""
    cm = load(n_ctx=256, max_sessions=2)
    session = said("the fact", "noted", "-" * 90, "yes", "~" * 20, "yes", "-" * 20)
    session.pin_message(pinned)
    cm.prepare(session)
    assert [m["content"] for m in session.window] == ["the fact", "noted", "~" * 20, "yes", "-" * 20]
