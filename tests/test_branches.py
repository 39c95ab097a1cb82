"""Several replies of one prompt; stateless calls; continuing; raw text; log-probabilities; cancel and timeout."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from models import model_path
from oracle import oracle_for
from scripted import ids_of, only_text, reply_of, script, scripted
from test_reasoning import CALL, STRIPS

from llama_sessions import (
    PRESETS,
    Cancelled,
    ContextManager,
    Engine,
    NoFreeSlot,
    OptionError,
    Session,
    StateError,
)
from llama_sessions.generation import Generation
from llama_sessions.llama.context import LlamaContext

Loader = Callable[..., ContextManager]
GREEDY: dict[str, Any] = {"temperature": 0.0}


def assert_exact(cm: ContextManager, session: Session, model: str = "llama-bpe") -> None:
    oracle_for(model_path(model)).assert_exact(cm.logits(session), cm.tokens(session))


# -- several replies


def test_several_replies_of_one_prompt_decode_it_once(load: Loader) -> None:
    cm = load(max_sessions=6)
    session = Session()
    branches = Engine(cm).replies(session, "Who are you?", n=4, max_tokens=8, seed=1)
    assert session.last_prepare is not None
    n_prompt = session.last_prepare.n_tokens
    assert cm.stats().n_tokens_decoded == n_prompt + sum(b.reply.n_generated - 1 for b in branches)
    assert cm.stats().n_decodes <= 1 + 7  # together, not one after the other
    assert len({b.reply.tokens for b in branches}) > 1
    assert [m["role"] for m in session.messages] == ["user"]
    for branch in branches:
        assert branch.session.messages[-1] == {"role": "assistant", "content": branch.reply.text}
        cm.prepare(branch.session) if branch.session.add_user("Go on.") else None
        assert_exact(cm, branch.session)


def test_a_seed_gives_each_of_several_replies_what_it_gives_alone(load: Loader) -> None:
    cm = load(max_sessions=6)
    engine, session = Engine(cm), Session()
    branches = engine.replies(session, "Who are you?", n=3, max_tokens=2, seed=5)
    for i, branch in enumerate(branches):
        alone = Session()
        reply = engine.chat(alone, "Who are you?", max_tokens=2, seed=5 + i)
        cm.release(alone)
        assert reply.tokens[0] == branch.reply.tokens[0]  # the second has float noise: three rows in a batch, or one
    assert len({branch.reply.tokens[0] for branch in branches}) > 1


def test_several_replies_go_on_with_no_message(load: Loader) -> None:
    cm = load()
    session = Session()
    session.add_user("Who?")
    session.add_assistant("It is")
    n_free = cm.slots.n_free
    with pytest.raises(OptionError, match="several replies begin a message each"):
        Engine(cm).replies(session, n=2, continue_last=True, max_tokens=2)
    assert [m["content"] for m in session.messages] == ["Who?", "It is"]
    assert cm.slots.n_free == n_free


def test_several_replies_without_slots_leave_everything_as_it_was(load: Loader) -> None:
    cm = load(max_sessions=3)
    session = Session()
    session.add_user("first")
    before = [dict(m) for m in session.messages]
    with pytest.raises(NoFreeSlot):
        Engine(cm).replies(session, "Who?", n=3)
    assert session.messages == before
    assert cm.stats().n_sessions == 1


def test_several_replies_may_be_longer_together_than_the_context(load: Loader) -> None:
    """None of them loses what it began with: who finds no cells waits until another is through."""
    cm = load(max_sessions=4, n_ctx=256)
    question = "word " * 20
    bias = {int(cm.vocab.eos): -math.inf}
    branches = Engine(cm).replies(Session(), question, n=3, max_tokens=90, logit_bias=bias)
    assert [branch.reply.n_generated for branch in branches] == [90] * 3
    assert cm.stats().n_evictions == 0
    branches = Engine(cm).replies(Session(), question, n=3, max_tokens=600, logit_bias=bias)
    assert [branch.reply.n_generated for branch in branches] == [600] * 3


def test_an_error_in_one_of_several_replies_ends_all_and_is_raised(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    cm = load(max_sessions=4)
    session = Session()
    choose, n_chosen = Generation.choose, 0

    def choose_until_the_eighth(self: Generation, logits: Any) -> int | None:
        nonlocal n_chosen
        n_chosen += 1
        if n_chosen == 8:
            raise RuntimeError("planted")
        return choose(self, logits)

    monkeypatch.setattr(Generation, "choose", choose_until_the_eighth)
    engine = Engine(cm)
    with pytest.raises(RuntimeError, match="planted"):
        engine.replies(session, "Who?", n=3, max_tokens=2000, logit_bias={int(cm.vocab.eos): -math.inf})
    assert n_chosen < 20
    assert session.messages == []
    assert cm.stats().n_sessions == 1
    assert engine.chat(session, "Still there?", max_tokens=3).n_generated


class Clock:
    """The clock of generations, which can be put forward."""

    ahead = 0.0
    monotonic = staticmethod(time.monotonic)

    def perf_counter(self) -> float:
        return time.perf_counter() + self.ahead

    def go_on(self, seconds: float) -> None:
        self.ahead += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("llama_sessions.generation.time", made)
    monkeypatch.setattr("llama_sessions.ticket.time", made)
    return made


LONG = "Who are you? " * 12


@pytest.mark.parametrize("late", ["in the prompt", "at a fork"])
def test_several_replies_that_time_out_before_their_first_token_leave_the_session(
    load: Loader, clock: Clock, late: str
) -> None:
    cm = load(n_batch=32, max_sessions=4)
    calls = iter(range(1, 1000))
    if late == "in the prompt":
        cm.set_hook("on_progress", lambda *args: clock.go_on(50))
    else:
        cm.set_hook("before_encode", lambda *args: clock.go_on(100) if next(calls) == 2 else None)
    session = Session()
    branches = Engine(cm).replies(session, LONG, n=3, timeout_s=90, max_tokens=5)
    assert [(b.reply.stop_reason, b.reply.n_generated) for b in branches] == [("timeout", 0)] * 3
    assert all(b.reply.got_nowhere and b.reply.total_s >= 90 for b in branches)
    assert session.messages == []
    assert all(b.session.messages == [] and b.session.n_past == 0 for b in branches)
    assert (session.n_past < branches[0].reply.n_prompt) == (late == "in the prompt")
    cm.clear_hook("on_progress")
    assert cm.stats().n_sessions == 1
    assert Engine(cm).replies(session, LONG, n=3, max_tokens=2)[2].reply.n_generated


def test_the_times_of_several_replies_count_from_the_call(load: Loader, clock: Clock) -> None:
    cm = load(n_batch=32, max_sessions=4)
    cm.set_hook("on_progress", lambda *args: clock.go_on(50))
    branches = Engine(cm).replies(Session(), LONG, n=2, max_tokens=2)
    assert all(100 < b.reply.first_token_s <= b.reply.total_s for b in branches)


def test_several_replies_that_time_out_later_keep_what_each_has_said(
    load: Loader, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    cm = load(n_ctx=1024, max_sessions=4)
    session = Session()
    decode = LlamaContext.decode
    monkeypatch.setattr(LlamaContext, "decode", lambda *args: clock.go_on(20) or decode(*args))
    branches = Engine(cm).replies(session, "Who?", n=3, timeout_s=90, max_tokens=100_000, logit_bias=only_text(cm))
    for branch in branches:
        assert branch.reply.stop_reason == "timeout"
        assert branch.reply.n_generated == 5  # one a decode that began in time
        assert branch.session.messages[-1] == {"role": "assistant", "content": branch.reply.text}
        assert not cm.is_held(branch.session)
    assert asked(session) == ["Who?"]


@pytest.mark.parametrize("at", [0, 64])
def test_on_progress_cancels_several_replies_as_it_does_one(load: Loader, at: int) -> None:
    cm = load(n_batch=32, max_sessions=4)
    cm.set_hook("on_progress", lambda done, total, session: done < at)
    session = Session()
    branches = Engine(cm).replies(session, LONG, n=2)
    assert [(b.reply.stop_reason, b.reply.text, b.reply.tokens) for b in branches] == [("cancelled", "", ())] * 2
    assert session.messages == []
    assert session.n_past == at
    assert cm.stats().n_sessions == (at > 0)


def test_on_progress_hears_of_prompts_that_only_the_forks_have(load: Loader) -> None:
    cm = load(n_batch=32, max_sessions=4)
    session = Session()
    cm.set_hook("before_encode", lambda messages, who: None if who is session else [{"role": "user", "content": LONG}])
    cm.set_hook("on_progress", lambda done, total, who: who is session)
    branches = Engine(cm).replies(session, "Who?", n=2)
    assert [b.reply.stop_reason for b in branches] == ["cancelled"] * 2
    assert session.messages == []
    assert cm.stats().n_sessions == 1


@pytest.mark.parametrize("n_call", [1, 2, 3])
def test_a_hook_that_raises_cancelled_ends_several_replies_as_it_does_one(load: Loader, n_call: int) -> None:
    cm = load(max_sessions=4)
    calls = iter(range(1, 10))

    def hook(*args: Any) -> None:
        if next(calls) == n_call:
            raise Cancelled("enough")

    cm.set_hook("before_encode", hook)
    engine, session = Engine(cm), Session()
    branches = engine.replies(session, "Who?", n=2, max_tokens=2, logit_bias=only_text(cm))
    reasons = [b.reply.stop_reason for b in branches]
    expected = {1: ["cancelled", "cancelled"], 2: ["cancelled", "length"], 3: ["length", "cancelled"]}
    assert reasons == expected[n_call]
    assert asked(session) == ([] if n_call == 1 else ["Who?"])
    assert not any(cm.is_held(each) for each in (session, *(b.session for b in branches)))


def test_nobody_else_uses_a_session_of_which_several_replies_are_made(
    load: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    cm = load(max_sessions=4)
    engine, session = Engine(cm), Session()
    held: list[bool] = []
    decode = LlamaContext.decode
    monkeypatch.setattr(LlamaContext, "decode", lambda *args: held.append(cm.is_held(session)) or decode(*args))
    n_refused = 0

    def intrude() -> None:
        nonlocal n_refused
        for call in (lambda: engine.chat(session, "Me too?"), lambda: cm.park(session), lambda: cm.prepare(session)):
            with pytest.raises(StateError, match="generating"):
                call()
            n_refused += 1

    def hook(done: int, total: int, who: Session) -> None:
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()

    cm.set_hook("on_progress", hook)
    branches = engine.replies(session, "Who?", n=2, max_tokens=3, logit_bias=only_text(cm))
    assert held == [True] * 3  # the prompt, and a token of both twice
    assert n_refused == 6
    assert asked(session) == ["Who?"]
    assert not any(cm.is_held(each) for each in (session, *(b.session for b in branches)))


@pytest.mark.parametrize("n_call", [1, 2, 3])
def test_a_manager_closed_within_several_replies_takes_the_question_back(load: Loader, n_call: int) -> None:
    cm = load(max_sessions=4)
    calls = iter(range(1, 10))
    cm.set_hook("before_encode", lambda *args: cm.close() if next(calls) == n_call else None)
    session = Session()
    with pytest.raises(StateError, match="closed"):
        Engine(cm).replies(session, "Who?", n=2)
    assert session.messages == []
    assert not cm.is_held(session)


def test_idle_sessions_are_parked_for_several_replies_and_those_are_not(load: Loader) -> None:
    cm = load(max_sessions=4, n_ctx=2048)
    engine = Engine(cm)
    idle = [Session() for _ in range(3)]
    for other in idle:
        engine.chat(other, "I only stand here.", max_tokens=2)
    session = Session()
    branches = engine.replies(session, "Who?", n=3, max_tokens=4, logit_bias=only_text(cm))
    assert cm.stats().n_parked == 3
    assert all(b.reply.n_reused == b.reply.n_prompt for b in branches)
    for branch in branches:
        assert_exact(cm, branch.session)


# -- stateless


def history(n: int) -> list[dict[str, str]]:
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": f"this is text {i}"} for i in range(n)]


def test_a_second_stateless_call_decodes_only_what_is_new(load: Loader) -> None:
    cm = load(n_ctx=2048)
    engine = Engine(cm)
    messages = history(19)
    plain = only_text(cm)
    reply = engine.chat(messages=messages, max_tokens=4, logit_bias=plain, **GREEDY)
    messages += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": "and now?"}]
    whole = reply.n_prompt + reply.n_generated
    second = engine.chat(messages=messages, max_tokens=4, **GREEDY)
    assert second.n_reused >= whole - 1  # the last token sampled was never decoded
    assert second.n_decoded == second.n_prompt - second.n_reused
    assert cm.stats().n_sessions == 1
    stateful = Session()
    stateful.messages = [dict(m) for m in messages]
    assert Engine(load(n_ctx=2048)).chat(stateful, max_tokens=4, **GREEDY).text == second.text


def test_stateless_calls_of_several_conversations_find_their_own(load: Loader) -> None:
    cm = load(n_ctx=2048)
    engine = Engine(cm)
    talks = {name: [{"role": "user", "content": f"I am {name}."}] for name in ("Ann", "Ben")}
    for turn in range(3):
        for name, messages in talks.items():
            reply = engine.chat(messages=messages, max_tokens=4, logit_bias=only_text(cm), **GREEDY)
            assert reply.n_decoded < 30 or turn == 0
            messages += [
                {"role": "assistant", "content": reply.text},
                {"role": "user", "content": f"{name} says {turn}"},
            ]
    assert cm.stats().n_sessions == 2


def test_more_conversations_than_slots_are_all_found_again(load: Loader) -> None:
    """With the ids of their replies, which the tokenizer would not choose."""
    cm = load(n_ctx=2048, max_sessions=2)
    engine, spelled = Engine(cm), ids_of(cm, "the cat", by_byte=True)
    assert len(ids_of(cm, "the cat")) < len(spelled)
    talks: list[list[dict[str, Any]]] = [[{"role": "user", "content": f"I am number {i}."}] for i in range(5)]
    n_held = [0] * 5
    for turn in range(3):
        for i, messages in enumerate(talks):
            reply = reply_of(script(engine.stream(messages=messages), spelled))
            assert turn == 0 or reply.n_decoded == reply.n_prompt - n_held[i]
            n_held[i] = reply.n_prompt + len(spelled)
            messages += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": f"Then {turn}?"}]
    assert cm.stats().n_sessions == 2


def test_a_stateless_call_with_another_past_leaves_the_known_one_alone(load: Loader) -> None:
    cm = load(n_ctx=2048)
    engine = Engine(cm)
    messages = history(9)
    engine.chat(messages=messages, max_tokens=4, **GREEDY)
    other = [*messages[:3], {"role": "assistant", "content": "otherwise"}, {"role": "user", "content": "x"}]
    reply = engine.chat(messages=other, max_tokens=4, **GREEDY)
    assert reply.n_reused > 20  # what both begin with is shared
    assert cm.stats().n_sessions == 2


def test_stateless_calls_give_slots_back(load: Loader) -> None:
    cm = load(max_sessions=2)
    engine = Engine(cm)
    for i in range(5):
        engine.chat(messages=[{"role": "user", "content": f"number {i}"}], max_tokens=2)
    assert cm.stats().n_sessions == 2


def test_stateless_calls_with_other_tools_never_share_a_session(load: Loader) -> None:
    cm = load(n_ctx=2048)
    engine, made = Engine(cm), []
    for tools in ([tool("add")], [tool("sub")], None, [tool("add")]):
        stream = engine.stream(messages=history(3), tools=tools, max_tokens=2)
        list(stream)
        made.append(stream._generation.session)
        assert made[-1].tools == tools
    assert [made.index(session) for session in made] == [0, 1, 2, 0]


def test_a_stateless_stream_that_is_never_advanced_gives_its_conversation_back(load: Loader) -> None:
    engine = Engine(load(n_ctx=2048))
    first = engine.stream(messages=history(3), max_tokens=2)
    list(first)
    for _ in range(2):
        engine.stream(messages=history(3)).close()
    again = engine.stream(messages=history(3), max_tokens=2)
    assert again._generation.session is first._generation.session


def test_a_stream_that_ends_in_the_middle_of_the_search_for_a_session_does_not_hang(load: Loader) -> None:
    """A finaliser comes at any moment, also while its own thread looks for the next call's session."""
    engine = Engine(load(n_ctx=2048, max_sessions=1))
    list(engine.stream(messages=history(3), max_tokens=2))
    stream = engine.stream(messages=history(5), max_tokens=9)
    next(stream)
    conversations = engine._conversations
    collect = conversations._collect
    conversations._collect = lambda: (stream.close(), collect())  # type: ignore[assignment, func-returns-value]
    thread = threading.Thread(target=lambda: engine.stream(messages=[{"role": "user", "content": "x"}]), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {}}}}


def test_a_stateless_call_takes_text_in_parts_and_its_own_system(load: Loader) -> None:
    engine = Engine(load())
    parts = [{"type": "text", "text": "Who "}, {"type": "text", "text": "are you?"}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    plain = [messages[0], {"role": "user", "content": "Who are you?"}]
    assert engine.chat(messages=messages, max_tokens=4, **GREEDY).tokens == (
        Engine(load()).chat(messages=plain, max_tokens=4, **GREEDY).tokens
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.chat(messages=[]), "messages must be a list of messages"),
        (lambda e: e.chat(messages="hi"), "messages must be a list of messages"),
        (lambda e: e.chat(messages=[{"role": "user"}]), "the content of message 0"),
        (lambda e: e.chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), "content of message 0"),
        (lambda e: e.chat(Session(), messages=history(1)), "not both"),
        (lambda e: e.chat(Session(), "x", tools=[]), "tools go with messages"),
        (lambda e: e.chat(messages=history(1), tools=7), "tools must be a list"),
    ],
)
def test_what_no_stateless_call_can_be_is_refused(load: Loader, call: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call(Engine(load()))


# -- continuing


def test_a_partial_reply_goes_on_where_it_stops(load: Loader) -> None:
    cm = load()
    engine, session = Engine(cm), Session()
    plain = {"logit_bias": only_text(cm)}
    whole = engine.chat(session, "Who are you?", max_tokens=12, **plain, **GREEDY)
    ids = list(whole.tokens)
    twin = Session()
    twin.add_user("Who are you?")
    list(script(engine.stream(twin, max_tokens=5), ids[:5]))
    n_row = twin.n_past
    reply = engine.chat(twin, continue_last=True, max_tokens=7, **plain, **GREEDY)
    assert list(reply.tokens) == ids[5:]
    assert reply.n_decoded == reply.n_prompt - n_row == 1  # the last token of what was said
    assert twin.messages == session.messages
    n_row = twin.n_past
    twin.add_user("Go on.")
    cm.prepare(twin)
    assert twin.last_prepare is not None
    assert twin.last_prepare.n_reused == n_row  # ids of both parts stand
    assert_exact(cm, twin)


@pytest.mark.parametrize("text", ["The answer is", "The answer is ", " ", ""])
def test_a_partial_message_that_was_written_by_hand_goes_on(load: Loader, text: str) -> None:
    cm = load()
    session = Session()
    session.add_user("What?")
    session.add_assistant(text)
    reply = Engine(cm).chat(session, continue_last=True, max_tokens=3)
    assert session.messages[-1]["content"] == text + reply.text
    prompt = b"".join(map(cm.vocab.piece, cm.tokens(session)[: reply.n_prompt].tolist())).decode()
    assert prompt == f"<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n{text if text.strip() else ''}"


@pytest.mark.parametrize("trims", [True, False])
def test_a_template_that_trims_or_closes_does_not_hide_where_to_go_on(load: Loader, trims: bool) -> None:
    content = "m['content'] | trim" if trims else "m['content']"
    template = (
        "{% for m in messages %}{{ '### ' + m['role'] + ':\\n' + (" + content + ") + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant:\\n' }}{% endif %}"
    )
    cm = load(chat_template=template)
    session = Session()
    session.add_user("What?")
    session.add_assistant("It is ")
    reply = Engine(cm).chat(session, continue_last=True, max_tokens=2)
    prompt = b"".join(map(cm.vocab.piece, cm.tokens(session)[: reply.n_prompt].tolist())).decode()
    assert prompt == ("### user:\nWhat?\n### assistant:\nIt is ")


def test_an_interrupted_continuation_keeps_what_was_said(load: Loader) -> None:
    engine, session = Engine(load()), Session()
    session.add_user("What?")
    session.add_assistant("It is")
    with scripted(engine, session, None, " so and so", continue_last=True) as stream:
        shown = next(stream).text + next(stream).text
    assert session.messages[-1]["content"] == "It is" + shown
    assert len(session.messages) == 2


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        ([], {}, "the last message is none"),
        (["user"], {}, "the last message is none"),
        (["user", "assistant"], {"text": "x"}, "takes no text"),
    ],
)
def test_there_must_be_something_to_continue(load: Loader, messages: Any, options: Any, message: str) -> None:
    session = Session()
    for role in messages:
        session.add(role, "x")
    with pytest.raises(OptionError, match=message):
        Engine(load()).chat(session, continue_last=True, **options)
    assert len(session.messages) == len(messages)


# -- raw


def test_a_raw_session_says_its_text_as_it_stands(load: Loader) -> None:
    cm = load()
    session = Session.raw("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    plain = {"logit_bias": only_text(cm)}
    reply = Engine(cm).chat(session, max_tokens=4, **plain, **GREEDY)
    templated = Session("")
    assert Engine(cm).chat(templated, "Hi", max_tokens=4, **plain, **GREEDY).tokens == reply.tokens
    assert cm.tokens(session)[: reply.n_prompt].tolist() == cm.tokens(templated)[: reply.n_prompt].tolist()
    n_row = session.n_past
    session.add_user("<|im_end|>\nmore")
    cm.prepare(session)
    assert session.last_prepare is not None
    assert session.last_prepare.n_reused == n_row
    assert_exact(cm, session)


def test_control_text_in_a_raw_session_is_control_but_for_assistant_messages(load: Loader) -> None:
    cm = load()
    end = cm.vocab.control["<|im_end|>"]
    for trusted in (False, True):
        session = Session.raw("a<|im_end|>")
        session.add_tool_result("b<|im_end|>")
        session.add_assistant("c<|im_end|>", trusted=trusted)
        session.add_user("d")
        cm.prepare(session)
        ids = cm.tokens(session).tolist()
        assert ids.count(end) == 2 + trusted
        assert b"".join(map(cm.vocab.piece, ids)) == b"a<|im_end|>b<|im_end|>c<|im_end|>d"


def test_a_raw_session_takes_no_system_text(load: Loader) -> None:
    cm = load()
    cm.set_system("Rules.")
    session = Session.raw("Once upon a time")
    cm.prepare(session)
    assert b"".join(map(cm.vocab.piece, cm.tokens(session).tolist())) == b"Once upon a time"
    assert session.is_raw
    assert session.copy().is_raw


@pytest.mark.parametrize("said", ["<think>hm</think> So.", " \n<think>", '{"name": "add", "parameters": {}}', CALL])
@pytest.mark.parametrize("prompt", ["Once", "Once <think>\n"])
def test_nothing_is_taken_out_of_what_a_raw_session_says(load: Loader, said: str, prompt: str) -> None:
    engine, session = Engine(load()), Session.raw(prompt)
    session.tools = [{"type": "function", "function": {"name": "add"}}]
    chunks = list(scripted(engine, session, None, said, by_byte=True, think_budget=0))
    reply = chunks[-1].reply
    assert reply is not None
    assert (reply.text, reply.thinking, reply.tool_calls) == (said, "", ())
    assert "".join(c.text for c in chunks) == said
    assert session.messages[-1] == {"role": "assistant", "content": said}
    assert reply_of(scripted(engine, session, " ", said, stop="\n")).text == said.partition("\n")[0]


# -- log-probabilities, usage, presets


def test_log_probabilities_are_the_models_own(load: Loader) -> None:
    cm = load()
    session = Session()
    chunks = list(Engine(cm).stream(session, "Who?", max_tokens=5, logprobs=3, seed=3))
    reply = chunks[-1].reply
    assert reply is not None
    assert [p.token for p in reply.logprobs] == list(reply.tokens)
    oracle = oracle_for(model_path("llama-bpe"))
    for i, found in enumerate(reply.logprobs):
        logits = oracle.logits(cm.tokens(session)[: reply.n_prompt + i]).astype(np.float64)
        expected = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
        assert found.logprob == pytest.approx(expected[found.token], abs=0.01)
        assert [p.token for p in found.top] == np.argsort(-logits, kind="stable")[:3].tolist()
        assert [p.logprob for p in found.top] == sorted((p.logprob for p in found.top), reverse=True)
        assert found.text == cm.vocab.piece(found.token).decode("utf-8", "replace")
    assert reply.mean_logprob == pytest.approx(np.mean([p.logprob for p in reply.logprobs]))
    assert [c.logprob for c in chunks if c.token is not None][: len(reply.tokens)] == list(reply.logprobs)


def test_the_end_of_a_reply_has_a_log_probability_of_its_own_and_the_reply_none_for_it(load: Loader) -> None:
    cm = load()
    chunks = list(scripted(Engine(cm), Session(), "Who?", "It is", by_byte=True, logprobs=1))
    reply = chunks[-1].reply
    assert reply is not None
    assert reply.stop_reason == "stop"
    assert [p.token for p in reply.logprobs] == list(reply.tokens) == ids_of(cm, "It is", by_byte=True)
    assert chunks[-1].logprob is not None
    assert (chunks[-1].token, chunks[-1].logprob.token) == (cm.vocab.eos, cm.vocab.eos)


def test_without_being_asked_there_are_no_log_probabilities(load: Loader) -> None:
    reply = Engine(load()).chat(Session(), "Who?", max_tokens=3)
    assert reply.logprobs == ()
    assert math.isnan(reply.mean_logprob)


def test_usage_speaks_openais_words(load: Loader) -> None:
    engine, session = Engine(load()), Session()
    engine.chat(session, "Who?", max_tokens=3)
    reply = engine.chat(session, "And?", max_tokens=3)
    assert reply.usage == {
        "prompt_tokens": reply.n_prompt,
        "completion_tokens": reply.n_generated,
        "total_tokens": reply.n_prompt + reply.n_generated,
        "prompt_tokens_details": {"cached_tokens": reply.n_reused},
    }
    assert reply.n_reused > 0
    assert reply.finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "stop_reason", "finish_reason"),
    [
        ({}, "stop", "stop"),
        ({"stop": "is"}, "stop_string", "stop"),
        ({"max_tokens": 2}, "length", "length"),
        ({"timeout_s": 0.0}, "timeout", "length"),
    ],
)
def test_why_a_reply_ended_in_openais_words(
    load: Loader, options: dict[str, Any], stop_reason: str, finish_reason: str
) -> None:
    reply = reply_of(scripted(Engine(load()), Session(), "Who?", "It is so.", by_byte=True, **options))
    assert (reply.stop_reason, reply.finish_reason) == (stop_reason, finish_reason)


def test_a_preset_is_what_its_options_are(load: Loader) -> None:
    engine = Engine(load())
    for name, options in PRESETS.items():
        a = engine.complete("Who?", preset=name, seed=1, max_tokens=6)
        assert a.tokens == engine.complete("Who?", seed=1, max_tokens=6, **options).tokens
    greedy = engine.complete("Who?", temperature=0, max_tokens=6).tokens
    assert engine.complete("Who?", preset="creative", temperature=0, presence_penalty=0, max_tokens=6).tokens == greedy
    with pytest.raises(OptionError, match="preset must be one of 'balanced', 'precise'"):
        engine.complete("Who?", preset="wild")


# -- cancel and timeout


def test_a_stream_is_cancelled_from_another_thread(load: Loader) -> None:
    cm = load()
    session = Session()
    stream = Engine(cm).stream(session, "Who?", max_tokens=500, logit_bias=only_text(cm))
    sampler = stream._generation._sampler
    sample, n_sampled = sampler.sample, 0

    def cancelled_meanwhile(*args: Any) -> int | None:
        nonlocal n_sampled
        n_sampled += 1
        if n_sampled == 5:
            thread = threading.Thread(target=stream.cancel)
            thread.start()
            thread.join()
        return sample(*args)

    sampler.sample = cancelled_meanwhile  # type: ignore[method-assign]
    chunks = list(stream)
    reply = chunks[-1].reply
    assert reply is not None
    assert (reply.n_generated, n_sampled) == (4, 5)
    assert reply.stop_reason == "cancelled"
    assert chunks[-1].token is None
    assert session.messages[-1]["content"] == reply.text
    session.add_user("And?")
    cm.prepare(session)
    assert_exact(cm, session)


def test_a_cancel_before_the_first_token_takes_everything_back(load: Loader) -> None:
    cm = load()
    cm.set_system("Be brief.")
    session = Session()
    stream = Engine(cm).stream(session, "Who?")
    stream.cancel()
    (chunk,) = stream
    assert chunk.reply is not None
    assert (chunk.reply.stop_reason, chunk.reply.text, chunk.reply.n_generated) == ("cancelled", "", 0)
    assert session.messages == []
    assert cm.stats().n_sessions == 0
    assert Engine(cm).chat(session, "Who?", max_tokens=2).n_generated


def test_a_deadline_ends_the_reply_as_it_stands(load: Loader, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    cm = load(n_ctx=8192)
    session = Session()
    decode = LlamaContext.decode
    monkeypatch.setattr(LlamaContext, "decode", lambda *args: clock.go_on(200) or decode(*args))
    reply = Engine(cm).chat(session, "Who?", max_tokens=500, timeout_s=900, logit_bias=only_text(cm))
    assert (reply.stop_reason, reply.n_generated) == ("timeout", 4)  # one a decode that began and ended in time
    assert reply.finish_reason == "length"
    assert session.messages[-1]["content"] == reply.text
    late = Engine(cm).chat(session, "And?", timeout_s=0)
    assert (late.stop_reason, late.text) == ("timeout", "")
    assert len(session.messages) == 2


def test_a_second_stream_on_one_session_is_refused_and_hurts_nobody(load: Loader) -> None:
    engine, session = Engine(load()), Session()
    first = engine.stream(session, "Who?", max_tokens=4)
    next(first)
    with pytest.raises(StateError, match="generating"):
        engine.chat(session, "And?")
    rest = list(first)
    assert rest[-1].reply is not None
    assert [m["role"] for m in session.messages] == ["user", "assistant"]


# -- what a review found


def asked(session: Session) -> list[str]:
    return [m["content"] for m in session.messages if m["role"] == "user"]


def test_two_stateless_streams_at_once_never_share_a_session(load: Loader) -> None:
    cm = load(n_ctx=2048)
    engine, plain = Engine(cm), only_text(cm)
    rules = {"role": "system", "content": "Rules."}
    engine.chat(messages=[rules, {"role": "user", "content": "warm"}], max_tokens=3, logit_bias=plain)
    streams = [
        engine.stream(messages=[rules, {"role": "user", "content": f"I am {name}."}], max_tokens=4, logit_bias=plain)
        for name in ("Ann", "Ben")
    ]
    for _ in zip(*streams, strict=False):
        pass
    sessions = [stream._generation.session for stream in streams]
    assert [asked(session) for session in sessions] == [["I am Ann."], ["I am Ben."]]


def test_of_two_stateless_calls_at_once_that_go_on_alike_one_begins_anew(load: Loader) -> None:
    engine = Engine(load(n_ctx=2048))
    engine.chat(messages=history(1), max_tokens=2)
    streams = [engine.stream(messages=history(3), max_tokens=4) for _ in range(2)]
    for _ in zip(*streams, strict=False):
        pass
    replies = [reply_of(stream) if stream.reply is None else stream.reply for stream in streams]
    assert all(reply.n_generated for reply in replies)
    assert streams[0]._generation.session is not streams[1]._generation.session


def test_a_conversation_is_found_again_by_who_brings_no_reasoning(load: Loader) -> None:
    engine = Engine(load(chat_template=STRIPS))
    first = engine.stream(messages=history(1))
    reply = reply_of(script(first, ids_of(engine.cm, "<think>hm</think>It is so.")))
    assert (reply.thinking, reply.text) == ("hm", "It is so.")
    said = {"role": "assistant", "content": reply.text}
    again = engine.stream(messages=[*history(1), said, {"role": "user", "content": "And?"}], max_tokens=2)
    list(again)
    assert again._generation.session is first._generation.session
    assert first._generation.session.messages[1]["reasoning_content"] == "hm"


def test_stateless_calls_from_threads_answer_their_own_messages(load: Loader) -> None:
    cm = load(n_ctx=4096, max_sessions=4)
    engine, plain = Engine(cm), only_text(cm)
    wrong: list[Any] = []

    def work(name: str) -> None:
        messages = [{"role": "system", "content": "Rules."}]
        for turn in range(8):
            messages.append({"role": "user", "content": f"{name} {turn}"})
            stream = engine.stream(messages=messages, max_tokens=2, logit_bias=plain)
            for _ in stream:
                pass
            if asked(stream._generation.session) != [f"{name} {i}" for i in range(turn + 1)]:
                wrong.append((name, turn))
            assert stream.reply is not None
            messages.append({"role": "assistant", "content": stream.reply.text})

    threads = [threading.Thread(target=work, args=(name,)) for name in "ABCD"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


def test_a_refused_stateless_call_leaves_what_is_known(load: Loader) -> None:
    cm = load(max_sessions=1)
    engine = Engine(cm)
    engine.chat(messages=history(1), max_tokens=2)
    before = cm.stats().n_cells_unique
    known = engine._conversations._given_back[0].messages.copy()
    for refused in ({"grammar": "root ::= ("}, {"continue_last": True}, {"logit_bias": {10**6: 1.0}}):
        for messages in ([{"role": "user", "content": "other"}], [*known, *history(1)]):
            with pytest.raises(OptionError):
                engine.chat(messages=messages, **refused)
    assert [session.messages for session in engine._conversations._given_back] == [known]
    with pytest.raises(OptionError, match="there is nothing to answer"):
        engine.chat(messages=history(2))
    assert cm.stats().n_cells_unique == before


def test_reasoning_that_a_caller_brings_counts(load: Loader) -> None:
    engine = Engine(load())
    said = {"role": "assistant", "content": "yes"}
    talk = [history(1)[0], {**said, "reasoning_content": "first"}, {"role": "user", "content": "x"}]
    engine.chat(messages=talk, max_tokens=2)
    other = [talk[0], {**said, "reasoning_content": "other"}, talk[2]]
    stream = engine.stream(messages=other, max_tokens=2)
    list(stream)
    assert stream._generation.session.messages[1]["reasoning_content"] == "other"


@pytest.mark.parametrize("text", ["Use <|im_end|> here", "a <|im_end|> b ", "<|im_start|>"])
def test_special_token_text_in_a_partial_message_is_not_written_twice(load: Loader, text: str) -> None:
    cm = load()
    session = Session("")
    session.add_user("What?")
    session.add_assistant(text)
    reply = Engine(cm).chat(session, continue_last=True, max_tokens=2)
    prompt = b"".join(map(cm.vocab.piece, cm.tokens(session)[: reply.n_prompt].tolist())).decode()
    assert prompt.endswith("<|im_start|>assistant\n" + text)


def test_a_continuation_is_kept_when_the_manager_is_closed_under_it(load: Loader) -> None:
    cm = load()
    engine, session = Engine(cm), Session()
    session.add_user("What?")
    session.add_assistant("It is")
    stream = scripted(engine, session, None, " so and so", continue_last=True)
    shown = next(stream).text + next(stream).text
    cm.close()
    with pytest.raises(StateError):
        next(stream)
    assert session.messages[-1]["content"] == "It is" + shown


def test_a_question_that_is_gone_when_the_stream_starts_is_an_error(load: Loader) -> None:
    engine, session = Engine(load()), Session()
    session.add_user("x")
    stream = engine.stream(session)
    session.messages.clear()
    with pytest.raises(OptionError, match="there is nothing to answer"):
        next(stream)


@pytest.mark.parametrize("call", [lambda e: e.replies("x", "hi"), lambda e: e.regenerate(None)])
def test_what_is_no_session_is_said_to_be_none(load: Loader, call: Any) -> None:
    with pytest.raises(OptionError, match="a Session is wanted"):
        call(Engine(load()))
