"""Who is parked by itself and who never is, and what of a session a return brings back."""

from __future__ import annotations

import gc
import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from conversations import Loader, assert_exact, is_seated, over_fake, prepared, said, sources

from llama_sessions import (
    CapacityError,
    ContextManager,
    Engine,
    MemoryKind,
    NextToken,
    NoFreeSlot,
    PromptChunk,
    RadixOptions,
    Session,
    StateError,
)
from llama_sessions.seats import Seats
from llama_sessions.testing import FakeContext

# -- who is parked, and who is not


def test_a_session_whose_prompt_is_being_decoded_is_not_parked_by_itself() -> None:
    cm = over_fake()
    begun = said("Who are you? " * 6)
    pending = cm.begin(begun)
    cm.step([PromptChunk(pending, 10)])
    (idle,) = prepared(cm, "idle")  # used later than the other
    (third,) = prepared(cm, "third")
    assert is_seated(cm, begun, idle, third) == [True, False, True]
    cm.pin(third)
    with pytest.raises(NoFreeSlot):
        cm.prepare(idle)
    cm.step([PromptChunk(pending, 64)])
    cm.step([PromptChunk(pending, 64)])
    assert pending.done
    assert_exact(cm, begun)
    cm.prepare(idle)  # now that it is done
    assert is_seated(cm, begun, idle, third) == [False, True, True]


def test_a_prompt_that_nobody_will_decode_on_keeps_no_slot() -> None:
    cm = over_fake()
    begun = said("Who are you? " * 6)
    pending = cm.begin(begun)
    cm.step([PromptChunk(pending, 10)])
    del pending
    gc.collect()
    second, third = prepared(cm, "second", "third")
    assert is_seated(cm, begun, second, third) == [False, True, True]


def test_a_step_parks_others_but_none_of_its_own() -> None:
    cm = over_fake(n_ctx=128, max_sessions=3)
    old, new, idle = prepared(cm, "old", "new", "idle")
    while cm.stats().n_cells_unique < 127:
        cm.append(idle, 65)
    report = cm.step([NextToken(old, 65), NextToken(new, 66)])
    assert [result.error for result in report.results.values()] == [None, None]
    assert is_seated(cm, old, new, idle) == [True, True, False]
    assert_exact(cm, old)
    assert_exact(cm, new)


def test_where_llama_cpp_finds_no_room_a_step_parks_others_but_none_of_its_own() -> None:
    cm = over_fake(max_sessions=3)
    old, new, idle = prepared(cm, "old", "new", "idle")
    assert isinstance(cm._store.context, FakeContext)
    cm._store.context.codes.append(1)
    report = cm.step([NextToken(old, 65), NextToken(new, 66)])
    assert [result.error for result in report.results.values()] == [None, None]
    assert is_seated(cm, old, new, idle) == [True, True, False]
    assert_exact(cm, old)
    assert_exact(cm, new)


def test_a_step_that_has_only_its_own_sessions_parks_nobody() -> None:
    cm = over_fake(n_ctx=128, max_sessions=2)
    old, new = prepared(cm, "old", "new")
    while cm.stats().n_cells_unique < 127:
        cm.append(new, 65)
    report = cm.step([NextToken(old, 65), NextToken(new, 66)])
    assert report.results[old].error is None
    assert isinstance(report.results[new].error, CapacityError)
    assert is_seated(cm, old, new) == [True, True]
    assert_exact(cm, old)
    assert_exact(cm, new)


def test_a_branch_never_takes_its_parents_slot() -> None:
    cm = over_fake()
    parent, other = prepared(cm, "parent", "other")
    branch = cm.fork(parent)
    assert is_seated(cm, parent, branch, other) == [True, True, False]
    cm.pin(branch)
    cm.pin(parent, False)
    with pytest.raises(NoFreeSlot):
        cm.fork(parent)


def test_a_system_prompt_parks_idle_sessions_where_cells_are_short() -> None:
    cm = over_fake(n_ctx=400, max_sessions=3)
    sessions = prepared(cm, "~" * 100, "#" * 100)
    n = cm.set_system("Be brief. " * 16)
    assert n > 400 - sum(len(cm.tokens(session)) for session in sessions)
    assert is_seated(cm, *sessions) == [False, True]
    for session in sessions:
        assert_exact(cm, session)


def test_a_system_prompt_for_which_nobody_may_be_parked_is_refused_and_the_old_one_stays() -> None:
    cm = over_fake(n_ctx=400, max_sessions=3)
    n = cm.set_system("Be brief.")
    sessions = prepared(cm, "~" * 110, "#" * 110)
    for session in sessions:
        cm.pin(session)
    with pytest.raises(CapacityError, match="cells"):
        cm.set_system("Be long. " * 20)
    assert (cm.prefix.text, cm.stats().prefix_tokens, cm.stats().n_parked) == ("Be brief.", n, 0)


def test_cells_that_an_interrupt_left_to_nobody_are_used_before_anybody_is_parked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cm = over_fake(n_ctx=400, max_sessions=4)
    lost, idle = prepared(cm, "~" * 150, "#" * 60)

    def interrupted(self: Seats, seq_id: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Seats, "_free", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cm.release(lost)
    cm.prepare(said("?" * 150))
    assert is_seated(cm, idle) == [True]


# -- what comes back


def interrupt(monkeypatch: pytest.MonkeyPatch, deed: Callable[[], object], *, at: int = 0) -> None:
    """Ctrl-C right after llama.cpp has done the `at`-th decode of a deed, and before anybody took note of it."""
    real, calls = FakeContext.decode, iter(range(100))

    def interrupted(self: FakeContext, runs: Any) -> int:
        code = real(self, runs)
        if next(calls) == at:
            raise KeyboardInterrupt
        return code

    with monkeypatch.context() as patched:
        patched.setattr(FakeContext, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            deed()


@pytest.mark.parametrize("how", ["park", "release", "flush"])
def test_a_row_that_an_interrupt_left_in_doubt_is_made_true_before_it_is_saved(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    cm = over_fake()
    (session,) = prepared(cm, "Who are you? " * 5)
    tokens = cm.tokens(session).tolist()
    interrupt(monkeypatch, lambda: cm.append(session, 65))
    getattr(cm, how)(session)
    assert cm.stats().radix.n_tokens == len(tokens)
    n_decoded = cm.stats().n_tokens_decoded
    if how != "release":
        assert cm.tokens(session).tolist() == tokens
        cm.append(session, 66)
        assert cm.tokens(session).tolist() == [*tokens, 66]
    else:
        cm.prepare(session)
    assert cm.stats().n_tokens_decoded == n_decoded + 1
    assert_exact(cm, session)


def test_what_is_in_doubt_is_also_saved_of_a_session_that_is_gone_and_of_the_system_prompt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cm = over_fake()
    n_system = cm.set_system("Be brief. " * 3)
    sessions = prepared(cm, "Who are you? " * 5)
    n = len(cm.tokens(sessions[0]))
    interrupt(monkeypatch, lambda: cm.append(sessions[0], 65))
    sessions.clear()
    gc.collect()
    cm.set_system("Be brief. " * 3)
    assert cm.stats().radix.n_tokens == n
    cm.clear_radix()
    interrupt(monkeypatch, lambda: cm.set_system("Be brief. " * 4))
    cm.set_system("", keep_cache=True)
    assert 0 < cm.stats().radix.n_tokens <= n_system


def test_half_a_prompt_that_comes_back_is_still_half_a_prompt() -> None:
    cm = over_fake()
    session = said("Who are you? " * 6)
    pending = cm.begin(session)
    cm.step([PromptChunk(pending, 10)])
    cm.park(session)
    assert len(cm.tokens(session)) == 10
    with pytest.raises(StateError, match=f"only 10 of the prompt's {pending.n_tokens} tokens"):
        cm.append(session, 65)
    assert len(cm.tokens(session)) == 10
    cm.prepare(session)
    cm.append(session, 65)
    assert_exact(cm, session)


def test_a_whole_prompt_that_comes_back_takes_tokens_at_once() -> None:
    cm = over_fake()
    (session,) = prepared(cm, "Who are you? ")
    for token in (65, 66):
        cm.append(session, token)
        cm.park(session)
    cm.append(session, 67)
    assert cm.tokens(session)[-3:].tolist() == [65, 66, 67]
    assert_exact(cm, session)


def test_a_session_that_is_parked_again_before_it_was_back_loses_no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    cm = over_fake(n_batch=16)
    (session,) = prepared(cm, "Who are you? " * 8)
    tokens = cm.tokens(session).tolist()
    cm.park(session)
    cm.clear_radix()
    interrupt(monkeypatch, lambda: cm.logits(session), at=2)
    assert is_seated(cm, session) == [True]
    prepared(cm, "second", "third")
    assert is_seated(cm, session) == [False]
    assert cm.tokens(session).tolist() == tokens
    assert session.n_past == len(tokens)
    assert_exact(cm, session)


def test_logits_come_back_though_the_session_was_parked_while_they_were_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cm = over_fake()
    (session,) = prepared(cm, "Who are you? ")
    expected = cm.logits(session).copy()
    real = cm._entry.reading

    def late() -> Any:
        """Another thread was inside until now."""
        cm.park(session)
        return real()

    with monkeypatch.context() as patched:
        patched.setattr(cm._entry, "reading", late)
        np.testing.assert_array_equal(cm.logits(session), expected)


def test_a_prepared_session_is_parked_no_more() -> None:
    cm = over_fake()
    (session,) = prepared(cm, "Who are you? ")
    cm.park(session)
    session.messages[0]["content"] = "Who else? "
    n = cm.prepare(session)
    assert (cm.stats().n_parked, len(cm.tokens(session)), session.n_past) == (0, n, n)
    assert_exact(cm, session)


def test_a_parked_session_and_its_branch_say_how_long_they_are_until_the_manager_is_closed() -> None:
    cm = over_fake()
    (session,) = prepared(cm, "Who are you? ")
    n = session.n_past
    cm.park(session)
    branch = cm.fork(session)
    assert (session.n_past, branch.n_past) == (n, n)
    cm.close()
    assert (session.n_past, branch.n_past) == (0, 0)


def test_a_return_counts_only_on_what_parking_for_it_has_left_in_the_cache() -> None:
    """Whoever is parked to make cells goes into the cache, and may push out what was found there."""
    for max_bytes in range(1600, 4800, 400):
        cm = over_fake(n_ctx=300, max_sessions=3, radix=RadixOptions(max_bytes=max_bytes))
        wanted, idle = said("~" * 90), said("#" * 160)
        cm.prepare(wanted)
        cm.park(wanted)
        cm.prepare(idle)
        cm.prepare(wanted)
        cm.check_integrity()
        assert_exact(cm, wanted)
        assert_exact(cm, idle)


# -- namespaces


def test_what_a_change_of_namespace_drops_is_kept_under_the_old_name() -> None:
    cm = over_fake(max_sessions=4)
    (session,) = prepared(cm, "Who are you? " * 6, namespace="a")
    session.namespace = "b"
    cm.prepare(session)
    assert sources(session) == ["decode"]
    session.messages[0]["content"] = "x"
    cm.prepare(session)
    old, new = said("Who are you? " * 6, "I am.", "And?", namespace="a"), said("Who are you? " * 6, namespace="c")
    cm.prepare(old)
    cm.prepare(new)
    assert (sources(old), sources(new)) == (["cache", "decode"], ["decode"])
    assert_exact(cm, old)


# -- previews

FAKES: dict[str, dict[str, Any]] = {
    "full": {},
    "streams": {"unified": False, "n_ctx": 2000},
    "window": {"kind": MemoryKind.WINDOW},
    "recurrent": {"kind": MemoryKind.RECURRENT},
    "hybrid": {"kind": MemoryKind.HYBRID},
}


def assert_preview_holds(cm: ContextManager, session: Session) -> None:
    """A preview says what `prepare` then does, and has not changed anything."""
    before = cm.stats()
    preview = cm.preview(session)
    assert cm.stats() == before
    if not preview.fits:
        with pytest.raises(CapacityError):
            cm.prepare(session)
        return
    assert cm.prepare(session) == preview.n_tokens
    assert session.last_prepare is not None
    assert session.last_prepare.n_decoded == preview.n_to_decode
    assert_exact(cm, session)


@pytest.mark.parametrize("name", FAKES)
def test_a_preview_counts_what_the_cache_has(name: str) -> None:
    cm = over_fake(**FAKES[name])
    text = "Who are you? " * 5
    (first,) = prepared(cm, text)
    cm.release(first)
    longer, shorter = said(text, "I am.", "And?"), said("Who are you? " * 3)
    for session in (longer, shorter):
        assert_preview_holds(cm, session)
        cm.release(session)
    assert_preview_holds(cm, first)
    longer_still = cm.preview(said(text, "I am.", "And?", "", "So?"))
    assert longer_still.n_to_decode < longer_still.n_tokens / 2


@pytest.mark.parametrize("name", FAKES)
def test_a_preview_of_a_parked_session_counts_what_it_left(name: str) -> None:
    cm = over_fake(**FAKES[name])
    (session,) = prepared(cm, "Who are you? " * 5)
    for text in ("I am.", "And?"):
        session.add("assistant" if text == "I am." else "user", text)
    cm.park(session)
    n = len(cm.tokens(session))
    assert cm.preview(session).n_to_decode <= cm.preview(session).n_tokens - n + 1
    assert_preview_holds(cm, session)


def test_a_preview_fits_where_somebody_can_be_parked_for_it() -> None:
    cm = over_fake(n_ctx=300)
    first, second = prepared(cm, "~" * 60, "#" * 60)
    new, long = said("?" * 60), said("!" * 220)
    assert cm.preview(new).fits
    assert cm.preview(long).fits
    cm.pin(first)
    cm.pin(second)
    assert not cm.preview(new).fits  # no slot
    cm.pin(second, False)
    assert cm.preview(new).fits
    assert not cm.preview(long).fits  # a slot, but not the cells
    assert_preview_holds(cm, long)
    assert_preview_holds(cm, new)
    assert is_seated(cm, first, second, new) == [True, False, True]


@pytest.mark.parametrize("kind", [MemoryKind.WINDOW, MemoryKind.HYBRID])
def test_a_preview_knows_that_a_whole_row_does_not_fit_where_its_rear_does(kind: MemoryKind) -> None:
    cm = over_fake(n_ctx=400, max_sessions=3, kind=kind, n_swa=400)
    cm.set_system("Be brief and be kind. " * 7)
    (session,) = prepared(cm, "Who are you? " * 5)
    cm.park(session)
    (neighbour,) = prepared(cm, "~" * 20)
    cm.pin(neighbour)
    while 400 - len(cm._store.context.memory.cells) > len(cm.tokens(session)) - 30:  # type: ignore[attr-defined]
        cm.append(neighbour, 65)
    assert cm.preview(session).fits
    assert_preview_holds(cm, session)


# -- threads


def talk(engine: Engine, names: str, replies: dict[str, list[str]]) -> list[Session]:
    """A conversation under each name, a turn of each in turn."""
    vocab = engine.cm.vocab
    # Of three letters one is the likeliest by far: how a prompt was split into batches does not change which.
    bias = {token: -math.inf for token in range(vocab.n_tokens) if vocab.piece(token) not in (b"a", b"b", b"c")}
    sessions = [Session() for _ in names]
    for turn in range(4):
        for name, session in zip(names, sessions, strict=True):
            text = f"I am {name}, this is turn {turn}."
            replies[name].append(engine.chat(session, text, max_tokens=6, temperature=0, logit_bias=bias).text)
    return sessions


@pytest.mark.parametrize("over", ["llama.cpp", "fake"])
def test_threads_that_chat_over_fewer_slots_than_sessions_hear_what_they_would_one_after_another(
    load: Loader, over: str
) -> None:
    def engine(n_slots: int) -> Engine:
        options = {"n_ctx": 2048, "max_sessions": n_slots}
        return Engine(over_fake(**options) if over == "fake" else load(**options))

    pairs = ["AB", "CD", "EF"]
    expected: dict[str, list[str]] = {name: [] for pair in pairs for name in pair}
    for pair in pairs:
        talk(engine(2), pair, expected)
    assert len({tuple(texts) for texts in expected.values()}) == 6
    heard: dict[str, list[str]] = {name: [] for name in expected}
    crowded = engine(3)
    sessions, errors = list[Session](), list[BaseException]()

    def run(pair: str) -> None:
        try:
            sessions.extend(talk(crowded, pair, heard))
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=run, args=(pair,)) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert errors == []
    assert heard == expected
    assert crowded.cm.stats().n_parked == 3
    crowded.cm.check_integrity()
    for session in sessions:
        assert_exact(crowded.cm, session)
