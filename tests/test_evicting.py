"""Conversations longer than the context: what goes, how, what it costs, and what of it is still exact."""

from __future__ import annotations

import copy
import gc
import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversations import Loader, assert_exact, is_seated, over_fake, said, sources
from interrupting import interrupted_everywhere
from models import model_path
from oracle import oracle_for
from scripted import ids_of, logits_seen, reply_of, script, scripted
from test_engine import penalised
from test_holes import BareRow
from test_reasoning import QWEN, TOOLS

from llama_sessions import (
    STRATEGIES,
    CapacityError,
    ContextManager,
    ContextOverflow,
    Engine,
    OptionError,
    RadixOptions,
    Session,
    SnapshotError,
    TemplateError,
)
from llama_sessions.kv.holes import Cut
from llama_sessions.kv.row import Row
from llama_sessions.llama.context import LlamaContext
from llama_sessions.types import Message

WAYS: dict[str, dict[str, Any]] = {
    "shift": {},
    "gap": {"overflow": "gap", "model": {"n_ctx_train": 16384}},
    "reprefill": {"overflow": "reprefill"},
}


def line(i: int, n: int = 30) -> str:
    return f"{i:03d} " + "abcdefghij "[: n % 11] + "abcdefghij " * (n // 11)


def row_of(cm: ContextManager, session: Session) -> Row:
    seat = cm._seats.get(session, reading=True)
    assert seat is not None
    return seat.row


def text_of(cm: ContextManager, session: Session) -> str:
    """The session's row as text."""
    return b"".join(cm.vocab.piece(int(t)) for t in cm.tokens(session)).decode()


def plain(cm: ContextManager, messages: list[Message], system: str | None = None) -> str:
    """The plain render of some messages."""
    head: list[Message] = [{"role": "system", "content": system}] if system else []
    rendered = cm.renderer.render([*head, *messages])
    return b"".join(cm.vocab.piece(int(t)) for t in rendered.tokens).decode()


def grown(cm: ContextManager, session: Session, *, until: int = 1, n: int = 30) -> Session:
    """Turns of that size, each prepared, until something was evicted `until` times."""
    while cm.stats().n_evictions < until:
        i = len(session.messages)
        if i:
            session.add_assistant(line(i, n))
        session.add_user(line(i + 1, n))
        cm.prepare(session)
    return session


def no_end(cm: ContextManager) -> dict[int, float]:
    """A bias without which replies of random models end."""
    return {t: -math.inf for t in range(cm.vocab.n_tokens) if cm.vocab.is_eog(t)}


def reported(session: Session) -> Any:
    assert session.last_prepare is not None
    return session.last_prepare


def summarising(role: str, text: str) -> tuple[list[list[Message]], Callable[[list[Message], Session], list[Message]]]:
    """An `on_evict` hook with one message for all that go, the number of its call in it; and all it was handed."""
    calls: list[list[Message]] = []

    def summarise(dropped: list[Message], session: Session) -> list[Message]:
        calls.append(list(dropped))
        return [{"role": role, "content": text.format(len(calls))}]

    return calls, summarise


# -- what the model still knows


@pytest.mark.parametrize("way", WAYS)
def test_the_model_knows_what_stayed_and_says_so_of_what_went(tiny_chat: Path, way: str) -> None:
    cm = ContextManager.load(tiny_chat, n_ctx=256, max_sessions=1, n_threads=1, overflow=way)
    cm.set_system("You are a careful assistant who remembers what people say. The password is velora.")
    engine, session = Engine(cm), Session()

    def ask(text: str) -> str:
        return engine.chat(session, text, temperature=0, max_tokens=48).text

    ask("My name is Anelda.")
    session.pin_message(0)
    session.pin_message(1)
    ask("My favourite drink is tea.")
    assert ask("What is my favourite drink?") == "Your favourite drink is tea."
    for sailor in ("Orwas", "Bemor", "Sulan", "Mirto"):
        for place in ("Tamoli", "Ilmera", "Velan"):
            ask(f"There was a long story in the paper about {sailor}, who sailed to {place} and came back rich.")
    assert cm.stats().n_evictions > 5
    assert ask("What is the password?") == "The password is velora."
    assert ask("What is my name?") == "Your name is Anelda."
    assert ask("What is my favourite drink?") == "You have not told me your favourite drink."
    assert reported(session).exact == (way == "reprefill")
    cm.close()


# -- a turn: what goes, and what is decoded


@pytest.mark.parametrize("way", ["shift", "gap"])
def test_an_evicted_row_is_what_llama_cpp_makes_of_the_same_cuts(load: Loader, way: str) -> None:
    """The row before the turn, the holes cut by bare calls, then the new tokens: the same logits."""
    cm = load("llama-bpe", n_ctx=256, n_batch=256, **WAYS[way])
    session = Session()
    before = np.empty(0, np.int32)
    while not cm.stats().n_evictions:
        before = cm.tokens(session)
        grown_by_one(cm, session)
    report, row = reported(session), row_of(cm, session)
    stays, n = row.tokens.tolist(), len(before)
    first = report.n_evicted
    p0 = next(p for p in range(n) if before[p] != stays[p])
    kept = before.tolist()[:p0] + before.tolist()[p0 + first :]
    assert kept == stays[: report.n_reused]
    bare = BareRow(oracle_for(model_path("llama-bpe", **WAYS[way].get("model", {}))))
    bare.decode(before.tolist())
    bare.cut_out([(p0, p0 + first)], shift=way == "shift")
    wanted = bare.decode(stays[len(kept) :])
    assert float(np.abs(wanted - cm.logits(session)).max()) < 0.02
    assert (bare.end, row.n_exact, report.exact) == (row.end, p0, False)
    assert report.n_decoded == len(stays) - len(kept)


def grown_by_one(cm: ContextManager, session: Session) -> None:
    i = len(session.messages)
    if i:
        session.add_assistant(line(i))
    session.add_user(line(i + 1))
    cm.prepare(session)


@pytest.mark.parametrize("way", ["shift", "gap"])
def test_a_turn_after_an_eviction_decodes_only_its_new_tokens(tiny_chat: Path, way: str) -> None:
    """By a model whose replies are text, so that a render has them token for token. An eviction itself, too, decodes
    nothing but what is new."""
    cm = ContextManager.load(tiny_chat, n_ctx=256, max_sessions=2, n_threads=1, overflow=way)
    cm.set_system("You are concise.")
    engine, session = Engine(cm), Session()
    n_turns = 0
    for i in range(16):
        before = len(cm.tokens(session))
        engine.chat(session, f"My number is {i}. What is a clock?", max_tokens=12, seed=i)
        report = reported(session)
        if before:
            assert report.n_reused == before - report.n_evicted
        n_turns += cm.stats().n_evictions > 1
        if report.n_evicted:
            assert report.dropped
            assert not report.exact
    assert cm.stats().n_evictions >= 2
    assert n_turns >= 4
    assert bool(row_of(cm, session).offset) == (way == "gap")
    assert len(session.messages) == 32
    assert session.window == session.messages[-len(session.window) :]


def test_a_reprefill_is_the_plain_render_of_the_window_and_exact(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=256, overflow="reprefill")
    cm.set_system("Be brief.")
    session = grown(cm, Session(), until=3)
    assert text_of(cm, session) == plain(cm, session.window, "Be brief.")
    assert reported(session).exact
    assert cm.stats().n_tokens_evicted > 0
    assert_exact(cm, session)


@pytest.mark.parametrize("eviction", ["message", "fifo"])
@pytest.mark.parametrize("way", WAYS)
def test_what_has_no_row_yet_is_rendered_without_what_goes_and_exact(load: Loader, way: str, eviction: str) -> None:
    """No sinks and no half messages: they are of use only where KV behind them was computed."""
    cm = load("llama-bpe", n_ctx=256, eviction=eviction, **WAYS[way])
    cm.set_system("Be brief.")
    session = said(*(line(i) for i in range(15)))
    preview = cm.preview(session)
    assert cm.prepare(session) == preview.n_tokens <= 256 - cm.headroom
    assert preview.n_to_decode == reported(session).n_decoded
    assert text_of(cm, session) == plain(cm, session.window, "Be brief.")
    assert len(session.window) < 15
    cm.test_model = "llama-bpe"  # type: ignore[attr-defined]
    oracle_for(model_path("llama-bpe", **WAYS[way].get("model", {}))).assert_exact(
        cm.logits(session), cm.tokens(session)
    )


def test_sinks_stay_as_many_as_asked_for(load: Loader) -> None:
    for n_sink, hook in ((0, None), (4, None), (4, 9)):
        cm = load("llama-bpe", n_ctx=256, n_sink=n_sink)
        asked: list[Session] = []
        if hook is not None:
            cm.set_hook("sink_fn", lambda s, hook=hook, asked=asked: asked.append(s) or hook)
        session = said(line(0))
        cm.prepare(session)
        begin = cm.tokens(session)
        grown(cm, session)
        n = n_sink if hook is None else hook
        left = cm.tokens(session)
        assert left[:n].tolist() == begin[:n].tolist()
        assert row_of(cm, session).n_exact == n
        rest = b"".join(cm.vocab.piece(int(t)) for t in left[n:]).decode()
        assert rest == plain(cm, session.window)
        assert bool(asked) == (hook is not None)


def test_a_sink_hook_that_answers_nonsense_is_refused_and_changes_nothing(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=256)
    session = grown(cm, Session())
    before = cm.tokens(session)
    for answer in (-1, None, "4"):
        cm.set_hook("sink_fn", lambda s, answer=answer: answer)
        for call in (cm.prepare, cm.preview, lambda s: cm.make_room(s, 1)):
            with pytest.raises(OptionError, match="sink_fn"):
                call(session)
        np.testing.assert_array_equal(cm.tokens(session), before)


@pytest.mark.parametrize("way", WAYS)
def test_pinned_messages_stay_and_a_tool_call_goes_with_its_result(load: Loader, way: str) -> None:
    cm = load("llama-bpe", n_ctx=256, **WAYS[way])
    session = Session()
    session.add_user("The secret is 42.")
    session.add_assistant("I see.")
    call = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}
    for i in range(2):
        session.add_user(line(i))
        session.add("assistant", "calling", tool_calls=[{"id": f"c{i}", **call}])
        session.add_tool_result(f"it is {i}", f"c{i}")
    session.pin_message(0)
    session.pin_message(7)  # the second result: so its call stays, and what was asked
    kept = [session.messages[i] for i in (0, 1, 5, 6, 7)]
    session.add_assistant("done")
    session.add_user("go on")
    cm.prepare(session)
    grown(cm, session, until=3)
    assert [m for m in session.window if any(m is k for k in kept)] == kept
    assert not any(m is session.messages[i] for m in session.window for i in (2, 3, 4))
    assert "The secret is 42." in text_of(cm, session)
    assert "it is 1" in text_of(cm, session)
    assert "it is 0" not in text_of(cm, session)


def test_fifo_takes_many_tokens_at_once_and_goes_on_in_the_middle_of_a_message(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=512, eviction="fifo")
    session = grown(cm, Session())
    report = reported(session)
    n_before = report.n_reused + report.n_evicted
    assert report.n_evicted >= (n_before - 200) // 4
    for _ in range(3):
        before = len(cm.tokens(session))
        grown_by_one(cm, session)
        assert reported(session).n_reused == before - reported(session).n_evicted


def test_a_strategy_of_the_users_own_decides(load: Loader) -> None:
    asked = []

    def newest_first(request: Any) -> list[tuple[int, int]]:
        """The last turn before the last."""
        asked.append(request)
        users = [p for p in request.pieces if p.role == "user"]
        return [(users[-2].p0, users[-1].p0)]

    cm = load("llama-bpe", n_ctx=256, eviction=newest_first)
    session = grown(cm, Session())
    assert [m is d for m, d in zip(session.messages[-3:-1], reported(session).dropped, strict=True)] == [True, True]
    assert asked[0].n_needed > 0
    assert cm.stats().eviction == "custom"
    bad = load("llama-bpe", n_ctx=256, eviction=lambda request: [(0, request.n_tokens)])
    session = Session()
    with pytest.raises(OptionError, match="returned"):
        grown(bad, session)
    assert session.window == session.messages
    assert len(bad.tokens(session)) > 0


@pytest.mark.parametrize("way", WAYS)
def test_a_strategy_that_wants_tool_results_alone_takes_no_call_from_its_results(load: Loader, way: str) -> None:
    def results_first(request: Any) -> list[tuple[int, int]]:
        pieces = request.pieces
        last = max(i for i, p in enumerate(pieces) if p.role == "user")
        results = [(p.p0, p.p1) for p in pieces[:last] if p.role == "tool"]
        return results or STRATEGIES["message"](request)  # type: ignore[return-value]

    cm = load("llama-bpe", n_ctx=256, eviction=results_first, **WAYS[way])
    session = Session()
    call = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}
    for i in range(2):
        session.add_user(line(i))
        session.add("assistant", "calling", tool_calls=[{"id": f"c{i}", **call}])
        session.add_tool_result(f"it is {i}", f"c{i}")
        session.add_assistant("done")
    questions = [m for m in session.messages if m["role"] == "user"]
    session.add_user("go on")
    cm.prepare(session)
    grown(cm, session)
    left = [m for m in session.window if m["role"] == "tool" or "tool_calls" in m]
    if way == "reprefill":
        assert left == []
        assert [m["role"] for m in session.window[:4]] == ["user", "assistant", "user", "assistant"]
        assert session.window[0] is questions[0]
        assert_exact(cm, session)
    else:  # the results' tokens are gone, but what the model is told of is still a call with its result
        assert [m["role"] for m in left] == ["assistant", "tool"] * 2
        assert "it is 0" not in text_of(cm, session)


@pytest.mark.parametrize("eviction", ["message", "fifo"])
@pytest.mark.parametrize("way", WAYS)
def test_one_question_may_take_any_number_of_tool_calls(load: Loader, way: str, eviction: str) -> None:
    """The last user turn is longer than the context: of it the oldest calls go, each with its results."""
    cm = load("llama-bpe", n_ctx=256, eviction=eviction, n_sink=0, **WAYS[way])
    session = said(line(0), "I see.", "How long will it take?")
    dropped: list[Message] = []
    for i in range(40):
        call = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}
        session.add("assistant", "calling", tool_calls=[{"id": f"c{i}", **call}, {"id": f"d{i}", **call}])
        session.add_tool_result(f"it is {i}", f"c{i}")
        session.add_tool_result("it is late", f"d{i}")
        cm.prepare(session)
        dropped += reported(session).dropped
        window = session.window
        first = window.index(session.messages[2])
        assert window[first]["content"] == "How long will it take?"
        assert [m["role"] for m in window[first + 1 :]] == ["assistant", "tool", "tool"] * ((len(window) - first) // 3)
        assert window[-3:] == session.messages[-3:]
        assert text_of(cm, session).endswith(plain(cm, window[first:]))
    assert cm.stats().n_evictions >= 5
    assert dropped == session.messages[:2] + session.messages[3 : 5 + len(dropped) - 4]
    if way != "reprefill":  # what went was cut out, not decoded anew
        assert reported(session).n_decoded < 60
    cm.rebuild(session)
    assert_exact(cm, session)


CLOCK = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}


def add_calls(session: Session, *numbers: int) -> None:
    for i in numbers:
        session.add("assistant", "calling", tool_calls=[{"id": f"c{i}", **CLOCK}])
        session.add_tool_result(f"it is {i}", f"c{i}")


@pytest.mark.parametrize("eviction", ["message", "fifo"])
@pytest.mark.parametrize("way", WAYS)
def test_a_summary_of_earlier_calls_takes_the_question_from_nobody(load: Loader, way: str, eviction: str) -> None:
    """It stands behind the question, and is a user's message: still it is not what was asked last."""
    cm = load("llama-bpe", n_ctx=256, eviction=eviction, n_sink=0, **WAYS[way])
    calls, summarise = summarising("user", "a summary")
    cm.set_hook("on_evict", summarise)
    session = said("How long will it take?")
    for i in range(40):
        add_calls(session, i)
        cm.prepare(session)
        window = session.window
        assert window[0] is session.messages[0]
        stands_in = [m["content"] == "a summary" for m in window]
        assert stands_in == [bool(calls) and k == 1 for k in range(len(window))]
        assert window[-2:] == session.messages[-2:]
    assert len(calls) >= 4
    assert all(m["content"] == "a summary" for call in calls[1:] for m in call[:1])
    assert all(m["role"] != "user" for call in calls for m in call[bool(call[0]["role"] == "user") :])
    session.add_assistant("done")
    grown(cm, session, until=cm.stats().n_evictions + 6)  # what is answered goes as ever
    assert not any(m is session.messages[0] for m in session.window)


@pytest.mark.parametrize("way", WAYS)
def test_what_before_encode_puts_at_the_end_does_not_part_a_question_from_its_calls(load: Loader, way: str) -> None:
    cm = load("llama-bpe", n_ctx=256, **WAYS[way])
    extra = {"role": "user", "content": "Today is Monday."}
    cm.set_hook("before_encode", lambda messages, session: [*messages, extra])
    session = said(line(0), "I see.", "How long will it take?")
    for i in range(20):
        add_calls(session, i)
        cm.prepare(session)
        window = session.window
        assert any(m is session.messages[2] for m in window)
        assert window[-2:] == session.messages[-2:]
        assert text_of(cm, session).count("Today is Monday.") == 1
    assert cm.stats().n_evictions >= 3


def test_a_result_that_stands_there_again_stays(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=256)
    session = said("How long will it take?")
    add_calls(session, 0)
    result = session.messages[-1]
    for i in range(1, 20):
        add_calls(session, i)
        session.messages.append(result)
        cm.prepare(session)
        assert text_of(cm, session).count("it is 0") == 2
        assert [m is result for m in session.window[-2:]] == [False, True]
        session.messages.pop()
    assert cm.stats().n_evictions > 2


def test_a_dict_that_is_asked_again_stays_with_its_answer(load: Loader) -> None:
    """One that is in the list twice is out at both places or at none: the last question would be lost."""
    cm = load("llama-bpe", n_ctx=256)
    question: Message = {"role": "user", "content": "And now?"}
    session = Session()
    session.messages = [question, {"role": "assistant", "content": line(0)}]
    while cm.stats().n_evictions < 2:
        session.add_user(line(1))
        session.add_assistant(line(2))
        session.messages.append(question)
        cm.prepare(session)
        window = session.window
        assert window[:2] == session.messages[:2]
        assert window[-1] is question
        assert text_of(cm, session).count("And now?") == 2
        session.messages.pop()
    session.messages.append(question)
    reply = Engine(cm).chat(session, max_tokens=3, seed=1, logit_bias=no_end(cm))
    assert [m["content"] for m in session.messages[-2:]] == ["And now?", reply.text]


def test_a_pinned_call_of_the_last_turn_stays_and_its_neighbours_go(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=256)
    session = said("Begin!")
    session.pin_message(0)
    call = {"type": "function", "function": {"name": "clock", "arguments": "{}"}}
    for i in range(20):
        session.add("assistant", "calling", tool_calls=[{"id": f"c{i}", **call}])
        session.add_tool_result(f"it is {i}", f"c{i}")
        if i == 2:
            session.pin_message(-1)
        cm.prepare(session)
    shown = [m["content"] for m in session.window if m["role"] == "tool"]
    assert (shown[0], shown[-1]) == ("it is 2", "it is 19")
    assert len(shown) < 10
    assert session.window[0] is session.messages[0]
    for i in range(20, 40):  # all pinned: nothing can go
        session.add("assistant", "calling", tool_calls=[{"id": f"c{i}", **call}])
        session.pin_message(-1)
        session.add_tool_result(f"it is {i}", f"c{i}")
    with pytest.raises(ContextOverflow):
        cm.prepare(session)


def test_a_row_may_begin_with_a_gap(load: Loader) -> None:
    """Without a system text and sinks the first tokens go like any others."""
    cm = load("llama-bpe", n_ctx=512, n_sink=0, **WAYS["gap"])
    session = said(*(line(i) for i in range(9)))
    cm.prepare(session)
    n_gone = cm.make_room(session, 20)
    assert int(row_of(cm, session).positions()[0]) == n_gone > 0
    cm.check_integrity()
    cm.append(session, 65)
    logits = cm.logits(session).copy()
    for comes_back in (cm.fork, lambda s: cm.park(s) and s):
        again = comes_back(session)
        np.testing.assert_allclose(cm.logits(again), logits, atol=0.02)
        cm.check_integrity()
    cm.rebuild(session)
    assert_exact(cm, session)


def test_a_gap_goes_up_to_the_trained_length_and_then_the_window_begins_anew(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=256, overflow="gap", model={"n_ctx_train": 512})
    session = grown(cm, Session())
    assert row_of(cm, session).offset > 0
    while row_of(cm, session).offset:
        assert row_of(cm, session).end <= 512
        assert not reported(session).exact
        grown_by_one(cm, session)
    assert reported(session).exact
    assert text_of(cm, session) == plain(cm, session.window)
    oracle_for(model_path("llama-bpe", n_ctx_train=512)).assert_exact(cm.logits(session), cm.tokens(session))


@pytest.mark.parametrize(
    ("name", "options", "is_cut"),
    [
        ("llama-bpe", {"kv_unified": False, "n_ctx": 6 * 256}, True),
        ("llama-spm", {"n_ctx": 256}, True),
        ("llama-yarn", {"n_ctx": 256}, True),  # by a gap
        ("gemma3", {"n_ctx": 256}, True),
        ("gemma3", {"n_ctx": 256, "swa_full": False}, False),
        ("hybrid", {"n_ctx": 256}, False),
    ],
)
def test_every_kind_of_memory_goes_on_for_ever_beside_an_untouched_neighbour(
    load: Loader, name: str, options: dict[str, Any], is_cut: bool
) -> None:
    cm = load(name, max_sessions=3, **options)
    oracle = oracle_for(model_path(name))
    neighbour = said("What?")
    cm.prepare(neighbour)
    cm.pin(neighbour)
    before = cm.logits(neighbour).copy()
    session = Session()
    was_cut = False
    for _ in range(14):
        preview_is_true(cm, session)
        was_cut = was_cut or not reported(session).exact
        if reported(session).exact:
            oracle.assert_exact(cm.logits(session), cm.tokens(session))
    assert was_cut is is_cut
    assert cm.stats().n_evictions >= 2
    assert not row_of(cm, session).offset or name == "llama-yarn"
    assert (cm._store.n_shifts > 0) is (is_cut and name != "llama-yarn")
    cm.rebuild(session)
    assert reported(session).exact
    oracle.assert_exact(cm.logits(session), cm.tokens(session))
    np.testing.assert_array_equal(cm.logits(neighbour), before)
    cm.append(neighbour, 70)
    oracle.assert_exact(cm.logits(neighbour), cm.tokens(neighbour))


def preview_is_true(cm: ContextManager, session: Session) -> None:
    """One turn more, as its preview says."""
    i = len(session.messages)
    if i:
        session.add_assistant(line(i))
    session.add_user(line(i + 1))
    preview = cm.preview(session)
    cm.prepare(session)
    report = reported(session)
    assert (preview.n_tokens, preview.n_to_decode, preview.n_evicted, preview.fits) == (
        report.n_tokens,
        report.n_decoded,
        report.n_evicted,
        True,
    )


@pytest.mark.parametrize(
    ("name", "options", "instead"),
    [
        ("llama-yarn", {}, "gap"),
        ("llama-bpe", {"overflow": "gap"}, "reprefill"),  # trained for no more than n_ctx
        ("hybrid", {}, "reprefill"),
        ("gemma3", {"swa_full": False}, "reprefill"),
    ],
)
def test_a_way_that_cannot_be_had_is_said_once_with_the_one_that_is_taken(
    load: Loader, caplog: pytest.LogCaptureFixture, name: str, options: dict[str, Any], instead: str
) -> None:
    model = {"n_ctx_train": 256} if name == "llama-bpe" else {}
    cm = load(name, n_ctx=256, model=model, **options)
    wanted = options.get("overflow", "shift")
    with caplog.at_level(logging.DEBUG, "llama_sessions"):
        grown(cm, Session(), until=3)
    notes = [(r.levelname, r.getMessage()) for r in caplog.records if f"overflow='{wanted}' cannot" in r.getMessage()]
    assert [level for level, _ in notes] == ["WARNING", *["DEBUG"] * (len(notes) - 1)]
    assert all(f"'{instead}' instead" in text for _, text in notes)


def test_a_recurrent_model_has_no_wall_and_nothing_goes(load: Loader) -> None:
    cm = load("mamba", n_ctx=256, max_sessions=2)
    session = said(*(line(i) for i in range(21)))
    assert cm.prepare(session) > 512
    assert cm.make_room(session, 100) == 0
    reply = Engine(cm).chat(session_of(session), "go", max_tokens=300, seed=1, logit_bias=no_end(cm))
    assert (reply.stop_reason, reply.n_generated) == ("length", 300)
    assert cm.stats().n_evictions == 0
    assert session.window == session.messages


def session_of(session: Session) -> Session:
    """One that may be asked: its last message is a reply."""
    if session.messages[-1]["role"] == "user":
        session.add_assistant("yes")
    return session


def test_a_raw_session_loses_its_oldest_text_but_the_last(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=256)
    session = Session.raw("Once upon a time. ")
    for i in range(12):
        session.add_assistant(line(i))
        session.add_user(line(i) + "? ")
        cm.prepare(session)
    assert cm.stats().n_evictions
    assert len(session.messages) == 25
    assert text_of(cm, session).endswith("".join(m["content"] for m in session.window))
    reply = Engine(cm).chat(session, max_tokens=400, seed=1, logit_bias=no_end(cm))
    assert reply.n_generated == 400


# -- the window


def test_the_hook_gets_the_messages_that_go_and_earlier_replacements_first(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=256)
    cm.set_system("Be brief.")
    calls, summarise = summarising("system", "Summary {}.")
    cm.set_hook("on_evict", summarise)
    session = grown(cm, Session())
    n = len(calls)
    gone = [m for call in calls for m in call if m["role"] != "system"]
    assert [id(m) for m in gone] == [id(m) for m in session.messages[: len(gone)]]
    assert list(reported(session).dropped) == gone
    first = session.window[0]
    assert first["content"] == f"Summary {n}."
    assert text_of(cm, session) == plain(cm, session.window, "Be brief.")  # a summary takes nobody's system text away
    assert reported(session).exact
    assert_exact(cm, session)
    n_messages = len(session.messages)
    grown(cm, session, until=2)
    assert calls[n][0] is first
    assert [m for m in session.window if m["role"] == "system"] == [session.window[0]]
    assert session.window[0]["content"] == f"Summary {len(calls)}."
    assert len(session.messages) > n_messages
    assert all(m["role"] != "system" for m in session.messages)
    session.reset_window()
    assert session.window == session.messages


def test_a_hook_that_returns_more_than_it_got_is_asked_only_while_messages_go(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=256)
    session = grown_to(cm, Session(), 170)
    before, logits, window = cm.tokens(session), cm.logits(session).copy(), session.window
    n_calls = 0

    def too_much(dropped: list[Message], session: Session) -> list[Message]:
        nonlocal n_calls
        n_calls += 1
        assert n_calls < 20
        return [{"role": "user", "content": "~" * 300}]

    cm.set_hook("on_evict", too_much)
    session.add_assistant(line(1))
    session.add_user(line(2))
    with pytest.raises(ContextOverflow) as e:
        cm.prepare(session)
    assert e.value.needed > e.value.available == 256
    assert n_calls >= 1
    assert session.window[:-2] == window
    np.testing.assert_array_equal(cm.tokens(session), before)
    np.testing.assert_array_equal(cm.logits(session), logits)
    cm.clear_hook("on_evict")
    cm.prepare(session)
    # What fits though it leaves less than the headroom is let be.
    cm.set_hook("on_evict", lambda dropped, session: [{"role": "user", "content": "~" * 165}])
    grown(cm, session, until=cm.stats().n_evictions + 1)
    assert 192 < session.n_past <= 256


def grown_to(cm: ContextManager, session: Session, n: int) -> Session:
    while session.n_past + 60 < n:
        grown_by_one(cm, session)
    return session


@pytest.mark.parametrize(
    "answer", [42, "text", [{"role": "user"}], [{"content": "x"}], [None], {"role": "user", "content": "x"}]
)
def test_a_hook_that_returns_nonsense_leaves_row_and_window_as_before(load: Loader, answer: Any) -> None:
    cm = load("llama-bpe", n_ctx=256)
    cm.set_hook("on_evict", lambda dropped, session: answer)
    as_before(cm, (OptionError,))


def as_before(cm: ContextManager, errors: tuple[type[BaseException], ...]) -> None:
    """The first eviction fails; row, logits and window are as they were, and it works without the hook."""
    session = Session()
    before, logits, error = np.empty(0, np.int32), None, None
    while error is None:
        try:
            grown_by_one(cm, session)
            before, logits = cm.tokens(session), cm.logits(session).copy()
        except errors as e:
            error = e
        assert len(session.messages) < 60
    np.testing.assert_array_equal(cm.tokens(session), before)
    np.testing.assert_array_equal(cm.logits(session), logits)
    assert session.window == session.messages
    assert cm.stats().n_evictions == 0
    cm.clear_hook("on_evict")
    cm.prepare(session)
    assert cm.stats().n_evictions == 1


def test_a_hook_that_raises_leaves_row_and_window_as_before(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=256)

    def fails(dropped: list[Message], session: Session) -> None:
        raise ZeroDivisionError("in the hook")

    cm.set_hook("on_evict", fails)
    as_before(cm, (ZeroDivisionError,))


def test_a_hook_may_summarise_through_a_second_session_of_the_same_manager(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=512, max_sessions=2)
    engine = Engine(cm)

    def summarise(dropped: list[Message], session: Session) -> list[Message]:
        reply = engine.complete("Sum up: " + dropped[0]["content"], max_tokens=8, seed=1)
        return [{"role": "assistant", "content": reply.text or "nothing"}]

    cm.set_hook("on_evict", summarise)
    session = grown(cm, Session(), until=3)
    assert text_of(cm, session).endswith(plain(cm, session.window))
    assert_exact(cm, session)
    assert cm.slots.n_free == 1
    # Within a stream, too.
    for i in range(8):
        engine.chat(session_of(session), line(i), max_tokens=40, seed=i, logit_bias=no_end(cm))
    assert cm.stats().n_evictions > 4


def test_a_hook_that_takes_the_row_away_costs_a_prefill_and_nothing_else(load: Loader) -> None:
    """What is kept of a row is known before the hook runs; what it does to the row counts."""
    for deed in ("park", "release", "append", "prepare"):
        cm = load("llama-bpe", n_ctx=256, radix=False)
        done: list[str] = []

        def hook(dropped: list[Message], session: Session, cm: Any = cm, deed: str = deed, done: Any = done) -> None:
            done.append(deed)
            if deed == "append":
                cm.append(session, 65)
            elif deed == "prepare":
                if len(done) == 1:
                    cm.prepare(session)
            else:
                getattr(cm, deed)(session)

        cm.set_hook("on_evict", hook)
        session = grown(cm, Session())
        assert done
        if deed in ("park", "release"):
            assert reported(session).exact
            assert text_of(cm, session) == plain(cm, session.window)
            assert_exact(cm, session)
        assert text_of(cm, session).endswith(plain(cm, session.window[1:]))
        cm.check_integrity()


def test_what_before_encode_puts_in_is_never_windowed(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=256)
    extra = {"role": "user", "content": "Today is Monday."}
    cm.set_hook("before_encode", lambda messages, session: [extra, *messages])
    dropped: list[Message] = []
    cm.set_hook("on_evict", lambda gone, session: dropped.extend(gone))
    session = grown(cm, Session(), until=3)
    assert text_of(cm, session).count("Today is Monday.") == 1
    assert dropped
    assert extra not in dropped
    assert extra not in session.messages
    assert extra not in session.window


def test_a_saved_window_is_what_the_next_process_prepares(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=256)
    cm.set_hook("on_evict", lambda dropped, session: [{"role": "user", "content": f"{len(dropped)} went"}])
    session = Session()
    session.add_user("pinned")
    session.pin_message(0)
    grown(cm, session)
    data = json.loads(json.dumps(session.to_dict()))
    again = Session.from_dict(data)
    other = load("llama-bpe", n_ctx=256)
    other.prepare(again)
    assert again.window == session.window
    assert again.messages == session.messages
    assert text_of(other, again) == plain(other, session.window)
    assert reported(again).n_evicted == 0
    assert again.is_message_pinned(0)
    old = {k: v for k, v in data.items() if k not in ("pins", "window")} | {"version": 1}
    assert Session.from_dict(old).window == session.messages


def test_a_session_that_changes_its_namespace_takes_nothing_approximate_along(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=256)
    session = grown(cm, Session(namespace="a"))
    assert not reported(session).exact
    session.namespace = "b"
    assert cm.make_room(session, 10) == 0
    cm.prepare(session)
    assert reported(session).exact
    assert text_of(cm, session) == plain(cm, session.window)
    assert_exact(cm, session)


# -- make_room


@pytest.mark.parametrize("way", ["shift", "gap"])
def test_make_room_takes_at_least_what_is_needed_or_as_many_as_can_go(load: Loader, way: str) -> None:
    cm = load("llama-bpe", n_ctx=512, **WAYS[way])
    session = said(*(line(i) for i in range(9)))
    assert cm.make_room(session, 5) == 0  # never prepared
    cm.prepare(session)
    n = session.n_past
    assert cm.make_room(session, 0) == 0
    with pytest.raises(OptionError, match="n_needed"):
        cm.make_room(session, -1)
    assert session.n_past == len(cm.tokens(session)) == n
    n_gone = cm.make_room(session, 20)
    assert 20 <= n_gone < 120
    assert session.n_past == len(cm.tokens(session)) == n - n_gone
    assert session.window == session.messages[2:]
    assert (cm.stats().n_evictions, cm.stats().n_tokens_evicted) == (1, n_gone)
    assert f"approximate from token {row_of(cm, session).n_exact}" in cm.describe()
    cm.append(session, 65)
    # All but the last user turn and the sinks.
    before = session.n_past
    n_more = cm.make_room(session, 10_000)
    assert session.n_past == before - n_more
    assert session.window == session.messages[-1:]
    assert cm.make_room(session, 10_000) == 0
    assert len(session.messages) == 9


def test_make_room_of_a_parked_session_brings_it_back_first(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=512)
    session = said(*(line(i) for i in range(9)))
    cm.prepare(session)
    n = session.n_past
    cm.park(session)
    n_gone = cm.make_room(session, 20)
    assert n_gone >= 20
    assert session.n_past == len(cm.tokens(session)) == n - n_gone
    assert is_seated(cm, session) == [True]


def test_make_room_is_0_where_the_way_is_not_open(load: Loader) -> None:
    for name, options in (
        ("llama-bpe", {"overflow": "reprefill"}),
        ("hybrid", {}),
        ("gemma3", {"swa_full": False}),
        ("llama-bpe", {"overflow": "gap", "model": {"n_ctx_train": 512}}),  # no longer than the context
    ):
        cm = load(name, n_ctx=512, **options)
        session = said(*(line(i) for i in range(9)))
        cm.prepare(session)
        before = cm.tokens(session)
        assert cm.make_room(session, 20) == 0
        np.testing.assert_array_equal(cm.tokens(session), before)
        assert session.window == session.messages


def test_what_make_room_dropped_is_handed_to_the_hook_by_the_next_prepare(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=512)
    calls, summarise = summarising("user", "sum")
    cm.set_hook("on_evict", summarise)
    session = said(*(line(i) for i in range(9)))
    cm.prepare(session)
    assert cm.make_room(session, 100) >= 100
    assert not calls
    gone = [m for m in session.messages if not any(m is w for w in session.window)]
    assert gone
    session.add_assistant("yes")
    session.add_user("and?")
    cm.prepare(session)
    assert [[id(m) for m in call] for call in calls] == [[id(m) for m in gone]]
    assert session.window[0]["content"] == "sum"
    cm.prepare(session)
    assert len(calls) == 1
    assert_exact(cm, session)


def test_what_was_deleted_before_a_hook_was_handed_it_is_not_handed(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=512)
    calls, summarise = summarising("user", "sum")
    cm.set_hook("on_evict", summarise)
    session = said(*(line(i) for i in range(9)))
    cm.prepare(session)
    cm.make_room(session, 100)
    n_out = len(session.messages) - len(session.window)
    assert n_out > 2
    kept = session.messages[n_out - 1]
    del session.messages[: n_out - 1]
    cm.prepare(session)
    assert calls == [[kept]]
    assert session.window == [{"role": "user", "content": "sum"}, *session.messages[1:]]
    del session.messages[0]  # what the summary was of
    cm.make_room(session, 1)
    cm.prepare(session)
    assert len(calls) == 1  # it went first, and there is nothing that it stood for
    cm.make_room(session, 1)
    session.messages = session.window
    cm.prepare(session)
    assert len(calls) == 1


def test_a_summary_that_a_reply_took_the_room_of_is_handed_to_the_next_hook(load: Loader) -> None:
    """What happened before it would be forgotten."""
    cm = load("llama-bpe", n_ctx=256)
    calls, summarise = summarising("user", "summary {}")
    cm.set_hook("on_evict", summarise)
    session = grown(cm, Session())
    session.add_assistant("Yes.")
    stream = Engine(cm).stream(session, "Go!", max_tokens=300, seed=1, logit_bias=no_end(cm))
    next(stream)
    n_calls = len(calls)
    (summary,) = session.window_state.replacements
    for _ in stream:
        pass
    assert len(calls) == n_calls
    assert not any(m is summary for m in session.window)
    session.add_user("And now?")
    cm.prepare(session)
    assert calls[n_calls][0] is summary
    assert [m["content"] for m in session.window if m["content"].startswith("summary")] == [f"summary {len(calls)}"]


def test_what_a_hook_answered_counts_for_the_next_try_where_there_was_no_room(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=512, n_batch=256, radix=False)
    calls, summarise = summarising("user", "summary {}")
    cm.set_hook("on_evict", summarise)
    other = said("~" * 200)
    cm.prepare(other)
    cm.pin(other)
    session = said(*(line(i) for i in range(21)))
    n_needed = cm.preview(session).n_tokens
    for _ in range(3):
        with pytest.raises(CapacityError) as e:
            cm.prepare(session)
        assert not isinstance(e.value, ContextOverflow)
        assert session.window == session.messages
    assert len(calls) == 1
    session.messages[0]["content"] = "This is something else."
    with pytest.raises(CapacityError):
        cm.prepare(session)
    assert len(calls) == 2
    assert calls[1] == calls[0]
    cm.set_hook("on_evict", lambda dropped, s: summarise(dropped, s))
    for _ in range(2):
        with pytest.raises(CapacityError):
            cm.prepare(session)
    assert len(calls) == 3
    cm.release(other)
    assert cm.prepare(session) <= n_needed + 20
    assert len(calls) == 3
    assert session.window[0]["content"] == "summary 3"
    assert_exact(cm, session)
    session.reset_window()
    cm.prepare(session)  # there is room: what was answered is of no use any more
    assert len(calls) == 4


def test_a_cut_that_an_interrupt_kept_from_being_noted_is_no_ground_for_another(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=512)
    session = said(*(line(i) for i in range(9)))
    cm.prepare(session)
    for token in (65, 66, 67):
        cm.append(session, token)
    seat = cm._seats.get(session)
    assert seat is not None
    before = seat.prompt
    cm.make_room(session, 20)
    for token in range(80):
        cm.append(session, token)
    seat.prompt = before  # as if it had come just there
    session.reset_window()
    assert cm.make_room(session, 20) == 0
    cm.prepare(session)
    assert text_of(cm, session) == plain(cm, session.messages)
    assert reported(session).exact
    assert_exact(cm, session)


# -- replies


@pytest.mark.parametrize("way", WAYS)
def test_a_reply_of_many_times_the_window_goes_on_without_a_stop(load: Loader, way: str) -> None:
    cm = load("llama-bpe", n_ctx=256, **WAYS[way])
    oracle = oracle_for(model_path("llama-bpe", **WAYS[way].get("model", {})))
    cm.set_system("Be brief.")
    neighbour = said("What time is it?")
    cm.prepare(neighbour)
    cm.pin(neighbour)
    before = cm.logits(neighbour).copy()
    session = said("Who?", "I.", "And?", "No.")
    n = 20 * 256
    reply = Engine(cm).chat(session, "Go!", max_tokens=n, seed=1, logit_bias=no_end(cm))
    assert (reply.stop_reason, reply.n_generated, len(reply.tokens)) == ("length", n, n)
    assert session.messages[-1]["content"] == reply.text
    assert len(session.messages) == 6
    # Rarely, many tokens at once.
    assert cm.stats().n_evictions <= n / 25
    assert (cm._store.n_shifts > 0, row_of(cm, session).offset > 0) == (way == "shift", way == "gap")
    assert row_of(cm, session).is_exact == (way == "reprefill")
    np.testing.assert_array_equal(cm.logits(neighbour), before)
    cm.append(neighbour, 70)
    oracle.assert_exact(cm.logits(neighbour), cm.tokens(neighbour))
    session.add_user("And now?")
    cm.prepare(session)
    assert session.n_past <= 256 - cm.headroom
    cm.rebuild(session)
    oracle.assert_exact(cm.logits(session), cm.tokens(session))


@pytest.mark.parametrize("n_ctx_train", [16384, 1024])
@pytest.mark.parametrize("way", WAYS)
def test_a_token_of_a_reply_that_goes_counts_once(load: Loader, way: str, n_ctx_train: int) -> None:
    """`n_ctx_train`: where a gap comes to its end the window begins anew, with what is left of the reply."""
    options = {**WAYS[way], "model": {"n_ctx_train": n_ctx_train}}
    cm = load("llama-bpe", n_ctx=256, n_batch=256, n_sink=0, **options)
    session, n = said("Who?", "I.", "And?", "No."), 12 * 256
    reply = Engine(cm).chat(session, "Go!", max_tokens=n, seed=1, logit_bias=no_end(cm))
    n_had = reply.n_prompt + n - 1  # nobody decodes the last one
    assert n_had - cm.stats().n_tokens_evicted == row_of(cm, session).n <= 256


@pytest.mark.parametrize("within", ["thinking", "text", "call"])
@pytest.mark.parametrize("way", WAYS)
def test_thinking_and_a_tool_call_go_on_over_the_wall(load: Loader, way: str, within: str) -> None:
    """What is within a tag, or a call's JSON, when its beginning leaves the row is taken apart as if it had stayed."""
    cm = load("llama-bpe", n_ctx=512, chat_template=QWEN, **WAYS[way])
    long = {name: " ".join(["abc"] * (400 if name == within else 2)) for name in ("thinking", "text", "call")}
    call = {"name": "add", "arguments": {"a": long["call"]}}
    spoken = f"<think>{long['thinking']}</think>{long['text']}<tool_call>{json.dumps(call)}</tool_call>"
    session = said("Who?", "I.", "And?", "No.")
    session.tools = TOOLS
    chunks = list(scripted(Engine(cm), session, "2 + 3?", spoken, by_byte=True))
    reply = chunks[-1].reply
    assert reply is not None
    assert cm.stats().n_evictions >= 3
    assert reply.n_generated > 3 * 512
    assert (reply.thinking, reply.text) == (long["thinking"], long["text"])
    (made,) = reply.tool_calls
    assert (made["function"]["name"], json.loads(made["function"]["arguments"])) == ("add", {"a": long["call"]})
    assert "".join(c.text for c in chunks if c.kind == "thinking") == long["thinking"]
    assert "".join(c.text for c in chunks if c.kind == "content") == long["text"]
    session.add_tool_result("5", made["id"])
    if within != "thinking":  # a message that is longer than the context, and part of what is to be answered
        with pytest.raises(ContextOverflow):
            cm.prepare(session)
    session.add_assistant("5.")
    session.add_user("Thanks!")
    cm.prepare(session)
    cm.rebuild(session)
    assert_exact(cm, session)


@pytest.mark.parametrize("way", WAYS)
def test_a_think_budget_counts_on_over_the_wall(load: Loader, way: str) -> None:
    cm = load("llama-bpe", n_ctx=256, chat_template=QWEN, **WAYS[way])
    session, budget = said("Who?", "I.", "And?", "No."), 600
    thoughts = ids_of(cm, "a" * 2000, by_byte=True)
    stream = Engine(cm).stream(session, "Why?", think_budget=budget, max_tokens=budget + 20)
    reply = reply_of(script(stream, [*ids_of(cm, "<think>"), *thoughts[:budget], *ids_of(cm, "So.")]))
    assert cm.stats().n_evictions >= 3
    assert (reply.thinking, reply.text, reply.stop_reason) == ("a" * budget, "So.", "stop")


@pytest.mark.parametrize("way", WAYS)
def test_penalties_look_at_what_was_said_whatever_of_it_went(load: Loader, way: str) -> None:
    cm = load("llama-bpe", n_ctx=256, **WAYS[way])
    bias = no_end(cm)
    options = {"temperature": 0.0, "presence_penalty": 4.0, "max_tokens": 600, "logit_bias": bias}
    stream = Engine(cm).stream(said("Who?", "I.", "And?", "No."), "Go!", **options)
    seen = logits_seen(stream)
    history: list[int] = []
    n_acted = n_evicted = 0
    for chunk in stream:
        if not history:
            history = stream._generation.begun().tokens.tolist()
        seen[-1][list(bias)] = -math.inf
        assert chunk.token == penalised(history, seen[-1], presence_penalty=4.0)
        if cm.stats().n_evictions > n_evicted:  # a row that was just cut or begun anew
            n_evicted = cm.stats().n_evictions
            n_acted += chunk.token != int(seen[-1].argmax())
        history.append(chunk.token)
    assert n_evicted >= 3
    assert n_acted > 0


@pytest.mark.parametrize("shares_all", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_eight_streams_that_share_a_prefix_go_on_when_cells_run_out(load: Loader, way: str, shares_all: bool) -> None:
    """`shares_all`: the whole conversation, so that what goes from one frees no cell at first."""
    cm = load("llama-bpe", n_ctx=512, max_sessions=9, **WAYS[way])
    oracle = oracle_for(model_path("llama-bpe", **WAYS[way].get("model", {})))
    cm.set_system("Be brief. " * 4)
    neighbour = said("What time is it?")
    cm.prepare(neighbour)
    cm.pin(neighbour)
    before = cm.logits(neighbour).copy()
    sessions = [said(line(0 if shares_all else i), "Yes.") for i in range(8)]
    engine, n = Engine(cm), 160 if shares_all else 20 * 512 // 8
    streams = [engine.stream(s, "Go!", max_tokens=n, seed=i, logit_bias=no_end(cm)) for i, s in enumerate(sessions)]
    for _ in range(n):
        for stream in streams:
            next(stream)
    replies = [stream.reply for stream in streams]
    assert [r is not None and (r.stop_reason, r.n_generated) for r in replies] == [("length", n)] * 8
    assert cm.stats().n_evictions >= 8
    np.testing.assert_array_equal(cm.logits(neighbour), before)
    cm.append(neighbour, 70)
    oracle.assert_exact(cm.logits(neighbour), cm.tokens(neighbour))
    for session in sessions:
        session.add_user("And now?")  # a reply that is longer than the window goes from it
        cm.rebuild(session)
        oracle.assert_exact(cm.logits(session), cm.tokens(session))


def test_a_reply_goes_on_where_a_row_is_lost_in_the_middle_of_a_cut(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared cells are made the row's own by a save and a load; the load fails."""
    cm = load("llama-bpe", n_ctx=512, radix=False)
    parent = said(*(line(i) for i in range(7)))
    cm.prepare(parent)
    child = cm.fork(parent)
    before = cm.logits(parent).copy()
    n_failed = 0

    def fails(self: LlamaContext, seq_id: int, blob: Any) -> None:
        nonlocal n_failed
        n_failed += 1
        raise SnapshotError("llama_state_seq_set_data_ext", 0, "planted")

    monkeypatch.setattr(LlamaContext, "load_state", fails)
    with pytest.raises(SnapshotError, match="prepare again"):
        cm.make_room(child, 10)
    assert len(cm.tokens(child)) == child.n_past == row_of(cm, child).n_exact
    cm.prepare(child)
    assert_exact(cm, child)
    cm.release(child)
    np.testing.assert_array_equal(cm.logits(parent), before)
    monkeypatch.undo()
    make_room, n_lost = cm.make_room, 0

    def loses(session: Session, n_needed: int, **options: Any) -> int:
        nonlocal n_lost
        n_lost += 1
        cm._store.cut(row_of(cm, session), 5)
        raise SnapshotError("make_room", 0, "planted")

    cm.make_room = loses  # type: ignore[method-assign]
    reply = Engine(cm).chat(session_of(parent), "Go!", max_tokens=600, seed=1, logit_bias=no_end(cm))
    assert reply.n_generated == 600
    assert n_lost >= 2
    assert n_failed == 1
    cm.make_room = make_room  # type: ignore[method-assign]


def test_continuing_a_message_goes_on_over_the_wall(load: Loader) -> None:
    """Also where that message is all there is."""
    for way in ("shift", "reprefill"):
        for texts in (("Tell me.",), ()):
            cm = load("llama-bpe", n_ctx=256, **WAYS[way])
            session = said(*texts)
            session.add_assistant("Once upon a time " * 4)
            reply = Engine(cm).chat(session, continue_last=True, max_tokens=500, seed=1, logit_bias=no_end(cm))
            assert reply.n_generated == 500
            assert session.messages[-1]["content"] == "Once upon a time " * 4 + reply.text
            assert len(session.messages) == len(texts) + 1
            cm.check_integrity()


# -- parked


@pytest.mark.parametrize("way", ["shift", "gap"])
def test_an_approximate_row_comes_back_as_it_was_and_shares_its_prefix_again(load: Loader, way: str) -> None:
    cm = load("llama-bpe", n_ctx=512, headroom=300, **WAYS[way])
    cm.set_system("Be brief. " * 3)
    session = grown(cm, Session())
    row = row_of(cm, session)
    before, n_exact, jumps, logits = cm.tokens(session), row.n_exact, row.jumps, cm.logits(session).copy()
    n_cells, n_shared = cm.stats().n_cells_unique, int(cm._store.shared_cells(row).sum())
    cm.park(session)
    assert cm.stats().radix.n_bytes_private > 0
    session.add_assistant(line(1))
    session.add_user(line(2))
    preview = cm.preview(session)
    assert is_seated(cm, session) == [False]
    session.messages[-2:] = []
    n_hit, n_miss = cm.stats().radix.n_hit_tokens, cm.stats().radix.n_miss_tokens
    assert cm.prepare(session) == len(before)
    row = row_of(cm, session)
    assert sources(session) == ["prefix", "cache", "decode"]
    shared, back, _ = reported(session).stretches
    assert (shared.p0, shared.p1, back.p0, back.p1) == (0, n_shared, n_shared, len(before) - 1)
    radix = cm.stats().radix
    assert (radix.n_hit_tokens - n_hit, radix.n_miss_tokens - n_miss) == (back.p1 - back.p0, 1)
    assert (row.n_exact, row.jumps) == (n_exact, jumps)
    assert reported(session).n_decoded == 1
    assert not reported(session).exact
    # The last token is decoded alone now: a batch of another size.
    np.testing.assert_allclose(cm.logits(session), logits, atol=0.02)
    assert cm.stats().n_cells_unique == n_cells
    assert int(cm._store.shared_cells(row).sum()) == n_shared > 30
    assert cm.stats().radix.n_bytes_private == 0
    session.add_assistant(line(1))
    session.add_user(line(2))
    cm.prepare(session)
    assert (reported(session).n_tokens, reported(session).n_evicted) == (preview.n_tokens, preview.n_evicted)


@pytest.mark.parametrize("way", ["shift", "gap"])
def test_stats_say_how_many_sessions_are_approximate(load: Loader, way: str) -> None:
    cm = load("llama-bpe", n_ctx=1024, **WAYS[way])
    first, second = (said(*(f"{name} {line(i)}" for i in range(5))) for name in "ab")
    for session in (first, second):
        cm.prepare(session)
    assert cm.stats().n_approximate == 0
    assert cm.make_room(first, 20) >= 20
    assert cm.stats().n_approximate == 1
    cm.park(first)
    assert cm.stats().n_approximate == 1
    assert cm.make_room(second, 20) >= 20
    assert cm.stats().n_approximate == 2
    for n_left, session in ((1, first), (0, second)):
        cm.rebuild(session)
        assert cm.stats().n_approximate == n_left


def test_an_approximate_row_in_a_stream_of_its_own_comes_back_as_it_was(load: Loader) -> None:
    """Streams have no cells in common: what would share a part of one aborts the process."""
    cm = load("llama-bpe", n_ctx=1280, max_sessions=2, kv_unified=False)
    assert not cm.capabilities.unified
    cm.set_system("Be brief.")
    session = grown(cm, Session(), until=2)
    before, logits = cm.tokens(session), cm.logits(session).copy()
    assert not row_of(cm, session).is_exact
    cm.park(session)
    assert cm.preview(session).n_tokens == len(before)
    # The last token is decoded alone now: a batch of another size.
    np.testing.assert_allclose(cm.logits(session), logits, atol=0.02)
    np.testing.assert_array_equal(cm.tokens(session), before)
    session.add_assistant("yes")
    session.add_user("And?")
    cm.prepare(session)
    assert not reported(session).exact
    cm.check_integrity()


@pytest.mark.parametrize(("model", "options"), [("llama-bpe", {"kv_unified": False, "n_ctx": 1280}), ("gemma3", {})])
def test_of_an_approximate_row_no_part_is_saved_where_only_whole_rows_are(
    load: Loader, model: str, options: dict[str, Any]
) -> None:
    cm = load(model, **{"n_ctx": 512, "max_sessions": 2, **options})
    session = said(*map(line, range(5)))
    cm.prepare(session)
    assert cm.make_room(session, 20) >= 20
    cm.clear_radix()  # of what was exact before, too
    assert cm.flush(session) == 0
    before = cm.tokens(session)
    cm.park(session)
    radix = cm.stats().radix
    assert radix.n_bytes == radix.n_bytes_private > 0
    cm.append(session, 65)
    np.testing.assert_array_equal(cm.tokens(session)[:-1], before)


def test_a_parked_row_is_foreseen_with_the_cells_that_it_will_need() -> None:
    """Its own, and those of the system prompt that it will have in common with others again."""
    cm = over_fake(n_ctx=300, max_sessions=2)
    cm.set_system("Be brief. " * 3)
    session = grown(cm, Session(), until=2)
    row = row_of(cm, session)
    assert not row.is_exact

    def missing(row: Row) -> list[int]:
        cuts = (Cut(0, n_new, row.cells[:n_kept]) for n_new in range(0, 300, 7) for n_kept in (0, 20, 70, row.n))
        return [cm._store.n_short(cut, row) for cut in cuts]

    while_here = missing(row)
    assert 0 < sum(n > 0 for n in while_here) < len(while_here)
    cm.park(session)
    parked = cm._parking.get(session)
    assert parked is not None
    assert missing(cm._preparer._foreseen(parked)) == while_here
    assert missing(parked.as_row()) != while_here


def test_a_lost_private_row_is_rendered_anew(load: Loader) -> None:
    cm = load("llama-bpe", n_ctx=256, radix=False)
    session = grown(cm, Session())
    assert not reported(session).exact
    cm.park(session)
    preview = cm.preview(session)
    assert cm.prepare(session) == preview.n_tokens
    assert reported(session).exact
    assert text_of(cm, session) == plain(cm, session.window)
    assert_exact(cm, session)


def test_k_that_is_quantised_in_heads_of_one_block_is_not_shifted(load: Loader) -> None:
    """It would crash the process."""
    for n_head, refused in ((2, "heads of 32"), (1, "")):
        cm = load("llama-bpe", model={"n_head": n_head, "n_head_kv": n_head}, type_k=8, n_ctx=512)
        assert refused in cm.capabilities.shift_refused_because
        assert cm.capabilities.can_shift is not bool(refused)
        session = said(*map(line, range(5)))
        cm.prepare(session)
        assert cm.make_room(session, 20) >= 20
        assert bool(row_of(cm, session).jumps) is bool(refused)
        cm.append(session, 65)


def test_a_parked_window_loses_its_middle_where_its_sight_begins_in_the_gap(load: Loader) -> None:
    """A return brings of a window the end alone, so nothing of it is left before the gap."""
    cm = load("gemma3", n_ctx=768)
    session = said(*map(line, range(9)))
    n = cm.prepare(session)
    cm.park(session)
    n_gone = cm.make_room(session, n - 50)
    assert n - 50 <= n_gone < n
    row = row_of(cm, session)
    ((index, extra),) = row.jumps
    assert (row.n, extra) == (n - n_gone, n_gone)
    assert index < row.end - cm.capabilities.n_swa < index + extra == cm._store.sequences.first(row.seq_id)
    cm.append(session, 65)
    session.add_assistant("x")
    session.add_user("And?")
    cm.prepare(session)
    assert not reported(session).exact
    cm.rebuild(session)
    oracle_for(model_path("gemma3")).assert_exact(cm.logits(session), cm.tokens(session))


def parked_approximate(max_bytes: int) -> tuple[ContextManager, Session]:
    cm = over_fake(n_ctx=400, radix=RadixOptions(max_bytes=max_bytes))
    session = said(*map(line, range(5)))
    cm.prepare(session)
    assert cm.make_room(session, 20) >= 20
    cm.park(session)
    assert cm.stats().radix.n_bytes_private > 0
    return cm, session


def test_the_private_row_of_a_session_that_is_gone_goes_with_it() -> None:
    cm, session = parked_approximate(10**6)
    branch = cm.fork(session)
    del session
    gc.collect()
    cm.clear_radix()
    assert cm.stats().radix.n_bytes == cm.stats().radix.n_bytes_private > 0  # the branch's, too
    del branch
    gc.collect()
    cm.flush(said("nobody"))
    assert cm.stats().radix.n_bytes_private == 0


def test_it_is_said_when_a_private_row_went_for_what_was_saved_of_another(caplog: pytest.LogCaptureFixture) -> None:
    cm, session = parked_approximate(6000)
    other = said("#" * 250)
    cm.prepare(other)
    with caplog.at_level(logging.WARNING, "llama_sessions"):
        cm.park(other)
    assert cm.stats().radix.n_bytes_private == 0
    assert "1 parked rows are decoded anew when they return: the cache is full" in caplog.text
    cm.prepare(session)
    assert reported(session).exact
    assert_exact(cm, session)


# -- what cannot be


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["one long message", "all pinned", "a long prefix"])
def test_what_cannot_fit_says_so_with_numbers_and_loses_nothing(load: Loader, way: str, case: str) -> None:
    cm = load("llama-bpe", n_ctx=256, **WAYS[way])
    session = Session("~" * 230 if case == "a long prefix" else None)
    if case == "one long message":
        session.add_user("~" * 400)
    else:
        for i in range(5 if case != "a long prefix" else 1):
            grown_by_one_unprepared(session, i)
    if case == "all pinned":
        for i in range(len(session.messages)):
            session.pin_message(i)
    messages = copy.deepcopy(session.messages)
    preview = cm.preview(session)
    assert not preview.fits
    with pytest.raises(ContextOverflow) as e:
        cm.prepare(session)
    assert e.value.available == 256
    assert e.value.needed == preview.n_tokens > 256
    assert f"{e.value.needed} tokens" in str(e.value)
    assert "unpin messages" in str(e.value)
    assert session.messages == messages
    assert session.window == messages
    assert session.n_past == 0
    assert cm.slots.n_free == 4


def test_what_is_longer_than_the_model_was_trained_for_is_said_once(
    load: Loader, caplog: pytest.LogCaptureFixture
) -> None:
    cm = load("llama-bpe", n_ctx=1024, model={"n_ctx_train": 256})
    session = said(line(0))
    cm.prepare(session)
    assert "trained for" not in caplog.text
    session.add_user(line(1, 400))
    cm.prepare(session)
    n = session.n_past
    assert f"a prompt of {n} tokens is longer than the 256 that the model was trained for" in caplog.text
    assert "headroom=832 lets" in caplog.text
    session.add_user(line(2))
    cm.prepare(session)
    assert caplog.text.count("trained for") == 1
    other = load("llama-bpe", n_ctx=1024, headroom=832, model={"n_ctx_train": 256})
    session = said(*(line(i, 60) for i in range(9)))
    other.prepare(session)
    assert session.n_past <= 256 - 64
    mamba = load("mamba", n_ctx=1024, model={"n_ctx_train": 256})
    mamba.prepare(said(line(1, 400)))
    assert caplog.text.count("trained for") == 1


def test_more_sinks_than_a_row_can_hold_are_refused_at_the_door(load: Loader) -> None:
    with pytest.raises(OptionError, match="n_sink must be from 0 to 255, not 256"):
        load("llama-bpe", n_ctx=256, n_sink=256)
    cm = load("llama-bpe", n_ctx=256, n_sink=255)
    grown(cm, Session(), until=2)  # nothing of the row can stay behind a hole, so the window begins anew
    cm.set_hook("sink_fn", lambda session: 256)
    with pytest.raises(OptionError, match="sink_fn hook returns must be from 0 to 255, not 256"):
        cm.prepare(said("Who?"))


def grown_by_one_unprepared(session: Session, i: int) -> None:
    if i:
        session.add_assistant(line(i))
    session.add_user(line(i))


def test_a_template_that_refuses_a_replacement_says_so_and_changes_nothing(load: Loader) -> None:
    cm = load("llama-spm", n_ctx=256, chat_template=REFUSES)
    cm.set_hook("on_evict", lambda dropped, session: [{"role": "tool", "content": "x"}])
    as_before(cm, (TemplateError,))


REFUSES = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
)


# -- Ctrl-C


def loaded_for_interrupts(*, forked: bool, n: int, n_ctx: int) -> tuple[ContextManager, Session, Session]:
    """A session of so many messages, and its fork or another."""
    cm = ContextManager.load(model_path("llama-bpe"), n_ctx=n_ctx, max_sessions=3, n_threads=1, n_batch=256)
    session = said(*(line(i) for i in range(n)))
    cm.prepare(session)
    other = cm.fork(session) if forked else said("Who?")
    cm.prepare(other)
    return cm, session, other


def check_all_is_true(thing: tuple[ContextManager, Session, Session]) -> None:
    cm, session, other = thing
    gc.collect()  # what the interrupted frames hold
    n_messages = len(session.messages)
    for each, seat in cm._seats.items():
        end = cm._store.context.memory.pos_max(seat.row.seq_id)
        if seat.row.suspect is None:
            assert seat.row.end == (0 if end is None else end + 1), each
    cm.check_integrity()
    cm.append(other, 70)
    assert_exact(cm, other)
    cm.prepare(session)
    cm.check_integrity()
    if row_of(cm, session).is_exact:
        assert_exact(cm, session)
    cm.rebuild(session)
    assert_exact(cm, session)
    assert len(session.messages) == n_messages
    for each in (session, other):
        cm.release(each)
    assert cm.stats().n_cells_unique == 0
    cm.close()


@pytest.mark.parametrize(("forked", "step"), [(False, 907), (True, 1201)])
def test_an_interrupt_anywhere_in_make_room_leaves_every_row_true(forked: bool, step: int) -> None:
    def start() -> tuple[ContextManager, Session, Session]:
        return loaded_for_interrupts(forked=forked, n=5, n_ctx=512)

    def act(thing: tuple[ContextManager, Session, Session]) -> None:
        thing[0].make_room(thing[1], 10)

    assert interrupted_everywhere(start, act, check_all_is_true, step) > 20


def test_an_interrupt_anywhere_in_an_evicting_prepare_leaves_every_row_true() -> None:
    def start() -> tuple[ContextManager, Session, Session]:
        cm, session, other = loaded_for_interrupts(forked=True, n=5, n_ctx=256)
        session.add_assistant(line(5))
        session.add_user(line(6))
        return cm, session, other

    def act(thing: tuple[ContextManager, Session, Session]) -> None:
        thing[0].prepare(thing[1])

    assert interrupted_everywhere(start, act, check_all_is_true, 2203) > 20


def test_a_row_shortened_where_an_interrupt_came_between_gap_and_offset_has_neither() -> None:
    row = Row(0)
    row.write(0, np.arange(8, dtype=np.int32), np.arange(8))
    row.n, row.jumps, row.offset = 8, (), 3
    row.shorten(4)
    assert (row.end, row.offset) == (4, 0)
