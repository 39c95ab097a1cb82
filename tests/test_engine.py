"""Replies: chunks, stop reasons, sampling, and what is left in session and row however a reply ends."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from models import model_path
from oracle import Oracle, oracle_for
from scripted import ids_of, logits_seen, only_text, reply_of, script, scripted

from llama_sessions import (
    CapacityError,
    Chunk,
    ContextManager,
    ContextOverflow,
    DecodeError,
    Engine,
    NoFreeSlot,
    OptionError,
    Session,
    StateError,
)
from llama_sessions.llama.context import LlamaContext

Loader = Callable[..., ContextManager]
GREEDY: dict[str, Any] = {"temperature": 0.0}


@pytest.fixture
def cm(load: Loader) -> ContextManager:
    return load()


@pytest.fixture
def engine(cm: ContextManager) -> Engine:
    return Engine(cm)


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return oracle_for(model_path("llama-bpe"))


def eog(cm: ContextManager) -> int:
    return int(cm.vocab.eos)


def row_text(cm: ContextManager, session: Session) -> str:
    return oracle_for(model_path("llama-bpe")).detokenize(cm.tokens(session)).decode("utf-8", "replace")


def n_decoded_by_next_turn(cm: ContextManager, session: Session, text: str) -> tuple[int, int]:
    """Tokens that the next turn decoded, and how many of its prompt the row did not hold."""
    before = cm.tokens(session)
    session.add_user(text)
    cm.prepare(session)
    assert session.last_prepare is not None
    n_held = len(before) if np.array_equal(cm.tokens(session)[: len(before)], before) else -1
    return session.last_prepare.n_decoded, session.n_past - n_held


# -- chat


def test_chat_appends_both_messages_and_returns_the_reply(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    reply = engine.chat(session, "Who are you?", max_tokens=6, logit_bias=only_text(cm))
    assert session.messages == [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": reply.text},
    ]
    assert reply.text == b"".join(map(cm.vocab.piece, reply.tokens)).decode()
    assert (reply.stop_reason, reply.n_generated, len(reply.tokens)) == ("length", 6, 6)
    assert reply.n_prompt == reply.n_reused + reply.n_decoded
    assert reply.n_prompt + 5 == session.n_past  # the last token sampled is not decoded yet
    assert 0 < reply.first_token_s <= reply.total_s
    assert list(cm.tokens(session)[reply.n_prompt :]) == list(reply.tokens[:-1])


def test_chat_without_a_text_answers_the_session_as_it_stands(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    session.add_user("Who are you?")
    reply = engine.chat(session, max_tokens=2, **GREEDY)
    other = Session()
    assert engine.chat(other, "Who are you?", max_tokens=2, **GREEDY).tokens == reply.tokens
    assert session.messages == other.messages


def test_chat_answers_a_tool_result(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    session.add_user("What time is it?")
    session.add_tool_result("13:00")
    assert engine.chat(session, max_tokens=1).n_generated <= 1
    assert [m["role"] for m in session.messages] == ["user", "tool", "assistant"]


@pytest.mark.parametrize("roles", [[], ["user", "assistant"]])
def test_with_nothing_to_answer_chat_is_an_option_error(cm: ContextManager, engine: Engine, roles: list[str]) -> None:
    session = Session()
    for role in roles:
        session.add(role, "x")
    with pytest.raises(OptionError, match="pass a text"):
        engine.chat(session)
    assert len(session.messages) == len(roles)
    assert cm.stats().slots_free == 4


def test_complete_is_a_chat_of_its_own_that_leaves_nothing_behind(cm: ContextManager, engine: Engine) -> None:
    reply = engine.complete("Who are you?", system="Be brief.", max_tokens=3, **GREEDY)
    assert cm.stats().slots_free == 4
    assert cm.stats().n_cells_unique == 0
    session = Session("Be brief.")
    assert engine.chat(session, "Who are you?", max_tokens=3, **GREEDY).tokens == reply.tokens


def test_complete_that_fails_gives_its_slot_back(cm: ContextManager, engine: Engine) -> None:
    with pytest.raises(ContextOverflow):
        engine.complete("~" * 3000)
    assert cm.stats().slots_free == 4


def test_a_reply_that_is_whole_is_returned_though_the_manager_was_closed_behind_it(
    cm: ContextManager, engine: Engine
) -> None:
    chat = engine.chat

    def and_closed(*args: Any, **options: Any) -> Any:
        reply = chat(*args, **options)
        cm.close()
        return reply

    engine.chat = and_closed  # type: ignore[method-assign]
    assert engine.complete("Who?", max_tokens=2).n_generated


# -- stream


def test_a_stream_gives_one_chunk_a_token_and_the_last_carries_the_reply(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    chunks = list(engine.stream(session, "Who are you?", max_tokens=7, logit_bias=only_text(cm)))
    assert len(chunks) == 7
    assert all(isinstance(c, Chunk) for c in chunks)
    assert [c.reply is not None for c in chunks] == [False] * 6 + [True]
    reply = chunks[-1].reply
    assert reply is not None
    assert tuple(c.token for c in chunks) == reply.tokens
    assert "".join(c.text for c in chunks) == reply.text == session.messages[-1]["content"]


def test_the_chunk_of_an_end_of_generation_token_is_the_last(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    stream = engine.stream(session, "Who?", logit_bias={eog(cm): 10_000.0})
    (chunk,) = list(stream)
    assert (chunk.token, chunk.text) == (eog(cm), "")
    assert chunk.reply is stream.reply is not None
    assert (chunk.reply.stop_reason, chunk.reply.tokens, chunk.reply.text) == ("stop", (), "")
    assert session.messages[-1] == {"role": "assistant", "content": ""}


def test_a_reply_that_ends_by_itself_has_its_end_token_in_the_last_chunk_only(
    cm: ContextManager, engine: Engine
) -> None:
    session = Session()
    session.add_user("Who?")
    for seed in range(200):  # until one says something and then ends: by a real draw
        chunks = list(engine.stream(session, logit_bias={eog(cm): 4.0}, seed=seed, max_tokens=6, temperature=1.0))
        reply = chunks[-1].reply
        assert reply is not None
        session.messages.pop()
        if reply.stop_reason == "stop" and reply.n_generated >= 2:
            break
    else:
        pytest.fail("no seed ended by itself")
    assert [c.token for c in chunks] == [*reply.tokens, eog(cm)]
    assert eog(cm) not in cm.tokens(session)[reply.n_prompt :]


def test_a_chunk_is_given_out_before_its_token_is_decoded(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    stream = engine.stream(session, "Who are you?", max_tokens=5, logit_bias=only_text(cm))
    first = next(stream)
    n_prompt = session.n_past
    n_decodes = cm.stats().n_decodes
    second = next(stream)
    assert session.n_past == n_prompt + 1
    assert cm.tokens(session)[-1] == first.token
    assert cm.stats().n_decodes == n_decodes + 1
    assert second.token is not None
    stream.close()


def test_nothing_happens_before_the_first_next(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    stream = engine.stream(session, "Who are you?")
    assert (session.messages, cm.stats().slots_free, stream.reply) == ([], 4, None)
    stream.close()
    assert list(stream) == []
    assert session.messages == []


def test_chunks_never_hold_half_a_character(load: Loader) -> None:
    cm = load()
    engine = Engine(cm)
    euro = "€".encode()
    ids = [int(t) for t in cm.vocab.tokenize("€")]
    assert len(ids) > 1, "the test vocabulary knows it in bytes"
    assert b"".join(map(cm.vocab.piece, ids)) == euro
    session = Session()
    stream = engine.stream(session, "Who?", max_tokens=2 * len(ids), logit_bias=dict.fromkeys(ids, 10_000.0))
    script = iter(ids * 2)
    stream._generation._sampler.sample = lambda *_: next(script)  # type: ignore[method-assign]
    texts = [chunk.text for chunk in stream]
    assert texts == [*[""] * (len(ids) - 1), "€"] * 2
    assert session.messages[-1]["content"] == "€€"


def test_half_a_character_at_the_end_is_shown_as_its_replacement(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    chunks = list(script(engine.stream(session, "Who?"), ids_of(cm, "€")[:1]))
    assert [c.text for c in chunks] == ["", "�"]
    assert session.messages[-1]["content"] == "�"


@pytest.mark.parametrize("n", [4, 5])
def test_a_reply_that_was_cut_within_a_character_goes_on_with_it(
    cm: ContextManager, engine: Engine, oracle: Oracle, n: int
) -> None:
    ids, session = ids_of(cm, "It €!", by_byte=True), Session()
    first = reply_of(script(engine.stream(session, "Who?", max_tokens=n), ids))
    assert (first.text, first.tokens) == ("It ", tuple(ids[:n]))
    chunks = list(script(engine.stream(session, continue_last=True), ids[3:]))
    assert "".join(chunk.text for chunk in chunks) == "€!"
    assert session.messages[-1]["content"] == "It €!"
    assert session.last_prepare is not None
    assert session.last_prepare.n_decoded == n - 4  # where a byte of it is in the row, that goes, and its logits
    session.add_user("And?")
    cm.prepare(session)
    assert session.last_prepare.n_decoded < session.last_prepare.n_reused
    oracle.assert_exact(cm.logits(session), cm.tokens(session))


def test_a_stream_in_a_with_block_is_ended_at_its_end(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    with engine.stream(session, "Who?", logit_bias=only_text(cm)) as stream:
        text = next(stream).text + next(stream).text
    assert stream.reply is not None
    assert (stream.reply.stop_reason, stream.reply.text) == ("cancelled", text)
    assert session.messages[-1]["content"] == text
    assert list(stream) == []


# -- stop strings and limits


@pytest.mark.parametrize(
    ("stop", "shown"),
    [
        ("seven", "five six "),
        (["nine", "six"], "five "),
        ("five", ""),
        ("ix se", "five s"),
        ("ten", "five six seven eight"),
    ],
)
def test_a_stop_string_ends_the_reply_and_is_not_shown(
    cm: ContextManager, engine: Engine, stop: Any, shown: str
) -> None:
    session = Session()
    chunks = list(scripted(engine, session, "Count!", "five six seven eight", stop=stop))
    reply = chunks[-1].reply
    assert reply.stop_reason == ("stop" if stop == "ten" else "stop_string")
    assert "".join(c.text for c in chunks) == reply.text == session.messages[-1]["content"] == shown


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    shown = ""
    for chunk in scripted(engine, session, "Count!", "one two", stop="two!"):
        shown += chunk.text
        if chunk.reply is None:
            assert not shown.endswith(("t", "tw", "two"))
    assert shown == "one two"


@pytest.mark.parametrize(
    ("said", "n", "shown", "text"),
    [("one two", 6, "one ", "one tw"), ("It €", 4, "It ", "It "), (" <think", 3, "", " <t")],
)
def test_what_was_held_back_when_a_stream_is_left_is_kept(
    cm: ContextManager, engine: Engine, said: str, n: int, shown: str, text: str
) -> None:
    session = Session()
    ids = [token for char in said for token in cm.vocab.tokenize(char).tolist()]
    with engine.stream(session, "Count!", stop="two!") as stream:
        stream._generation._sampler.sample = lambda *_: ids.pop(0)  # type: ignore[method-assign]
        assert "".join(next(stream).text for _ in range(n)) == shown
    assert stream.reply is not None
    assert (stream.reply.text, session.messages[-1]["content"]) == (text, text)


@pytest.mark.parametrize("stop", ["seven", "ix se", "even"])
def test_after_a_stop_string_row_and_session_agree_and_a_turn_decodes_only_what_is_new(
    cm: ContextManager, engine: Engine, oracle: Oracle, stop: str
) -> None:
    session = Session()
    list(scripted(engine, session, "Count!", "five six seven eight", stop=stop))
    content = session.messages[-1]["content"]
    before = cm.tokens(session)
    session.add_user("Go on.")
    cm.prepare(session)
    assert session.last_prepare is not None
    text = row_text(cm, session)
    assert f"assistant\n{content}<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>" in text
    n_common = next(
        (i for i, (a, b) in enumerate(zip(before, cm.tokens(session), strict=False)) if a != b), len(before)
    )
    assert session.last_prepare.n_reused == n_common
    assert n_common >= len(before) - len(cm.vocab.tokenize("six seven eight"))
    oracle.assert_exact(cm.logits(session), cm.tokens(session))


def test_after_a_stop_string_the_ids_before_it_still_stand(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    list(scripted(engine, session, "Count!", "five six seven eight", by_byte=True, stop="seven"))
    assert session.messages[-1]["content"] == "five six "
    before = cm.tokens(session)
    session.add_user("Go on.")
    cm.prepare(session)
    assert session.last_prepare is not None
    assert session.last_prepare.n_reused == len(before) - len("seve")  # the n was never decoded


@pytest.mark.parametrize("n", [1, 2, 9])
def test_max_tokens_ends_the_reply_with_length(cm: ContextManager, engine: Engine, n: int) -> None:
    session = Session()
    n_before = cm.stats().n_decodes
    reply = engine.chat(session, "Who?", max_tokens=n, logit_bias=only_text(cm))
    assert (reply.stop_reason, reply.n_generated) == ("length", n)
    assert cm.stats().n_decodes - n_before == n


def test_a_stop_string_that_the_last_token_completes_wins_over_length(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    n = len(cm.vocab.tokenize("five six"))
    chunks = list(scripted(engine, session, "Count!", "five six", stop="six", max_tokens=n))
    assert chunks[-1].reply.stop_reason == "stop_string"
    assert session.messages[-1]["content"] == "five "


def test_reaching_n_ctx_seq_ends_the_reply_with_length(load: Loader, oracle: Oracle) -> None:
    """Where nothing can go: the question alone fills the context."""
    cm = load(n_ctx=256, max_sessions=2)
    session = Session()
    n_frame = len(cm.renderer.render([{"role": "user", "content": "~"}]).tokens) - 1
    reply = Engine(cm).chat(session, "~" * (256 - n_frame), logit_bias=only_text(cm))
    assert reply.stop_reason == "length"
    assert (reply.n_generated, session.n_past) == (1, 256)
    assert session.messages[-1]["content"] == reply.text
    oracle.assert_exact(cm.logits(session), cm.tokens(session))
    cm.check_integrity()
    with pytest.raises(ContextOverflow):
        Engine(cm).chat(session, "~" * 256)
    assert [m["role"] for m in session.messages] == ["user", "assistant"]


def test_when_another_session_holds_the_cells_the_own_past_gives_way(load: Loader) -> None:
    cm = load(n_ctx=256, max_sessions=2)
    other = Session()
    other.add_user("~" * 150)
    cm.prepare(other)
    cm.pin(other)
    logits = cm.logits(other).copy()
    session = Session()
    reply = Engine(cm).chat(session, "Who?", max_tokens=400, logit_bias=only_text(cm))
    assert (reply.stop_reason, reply.n_generated) == ("length", 400)
    assert cm.stats().n_evictions > 0
    np.testing.assert_array_equal(cm.logits(other), logits)


def test_when_another_session_holds_the_cells_what_was_said_is_kept(load: Loader, oracle: Oracle) -> None:
    """And nothing of the own past can go."""
    cm = load(n_ctx=256, max_sessions=2)
    other = Session(namespace="other")  # which shares nothing
    session, shown = Session(), ""
    n_frame = len(cm.renderer.render([{"role": "user", "content": "~"}]).tokens) - 1
    other.add_user("~" * (256 - 2 * n_frame - len("Who?")))
    cm.prepare(other)
    cm.pin(other)
    logits = cm.logits(other).copy()
    stream = Engine(cm).stream(session, "Who?", logit_bias=only_text(cm))
    with pytest.raises(CapacityError) as e:  # noqa: PT012
        for chunk in stream:
            shown += chunk.text
    assert not isinstance(e.value, ContextOverflow)
    assert (e.value.needed, e.value.available, e.value.unit) == (1, 0, "cells")
    assert shown
    assert session.messages == [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": shown}]
    np.testing.assert_array_equal(cm.logits(other), logits)
    cm.release(other)
    n_decoded, n_new = n_decoded_by_next_turn(cm, session, "Go on.")
    assert n_decoded == n_new
    oracle.assert_exact(cm.logits(session), cm.tokens(session))


# -- the next turn


@pytest.mark.parametrize("model", ["llama-bpe", "gemma3", "mamba", "hybrid"])
def test_the_next_turn_decodes_the_new_turn_and_the_last_token_sampled_only(load: Loader, model: str) -> None:
    cm = load(model)
    engine = Engine(cm)
    session = Session()
    bias = only_text(cm)
    for turn in range(3):
        reply = engine.chat(session, f"Question {turn}?", max_tokens=8, logit_bias=bias, temperature=1.5, seed=turn)
        n_row = session.n_past
        n_decoded, n_new = n_decoded_by_next_turn(cm, session, "Go on?")
        assert n_decoded == n_new == session.n_past - n_row
        assert list(cm.tokens(session)[reply.n_prompt :][: reply.n_generated]) == list(reply.tokens)
        session.messages.pop()
    assert session.last_prepare is not None
    assert [s.source for s in session.last_prepare.stretches] == ["row", "decode"]
    oracle_for(model_path(model)).assert_exact(cm.logits(session), cm.tokens(session))


def test_reply_ids_stand_even_where_the_tokenizer_would_choose_others(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    ids = iter([*(int(cm.vocab.tokenize(c)[0]) for c in "the"), eog(cm)])  # three tokens; the tokenizer has one
    assert len(cm.vocab.tokenize("the")) < 3
    stream = engine.stream(session, "Say it.")
    stream._generation._sampler.sample = lambda *_: next(ids)  # type: ignore[method-assign]
    reply = [*stream][-1].reply
    assert reply is not None
    n_row = session.n_past
    n_decoded, n_new = n_decoded_by_next_turn(cm, session, "Again.")
    assert n_decoded == n_new == session.n_past - n_row
    assert list(cm.tokens(session)[reply.n_prompt :][:3]) == list(reply.tokens)


def test_an_edited_reply_loses_its_ids(cm: ContextManager, engine: Engine, oracle: Oracle) -> None:
    session = Session()
    reply = engine.chat(session, "Who?", max_tokens=6, logit_bias=only_text(cm))
    session.messages[-1]["content"] = "I am a clock."
    session.add_user("Really?")
    cm.prepare(session)
    assert session.last_prepare is not None
    assert session.last_prepare.n_reused <= reply.n_prompt + 1
    assert "assistant\nI am a clock.<|im_end|>" in row_text(cm, session)
    oracle.assert_exact(cm.logits(session), cm.tokens(session))


# -- regenerate


def test_regenerate_answers_the_last_user_message_anew(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    first = engine.chat(session, "Who?", max_tokens=8, seed=1)
    second = engine.regenerate(session, max_tokens=8, seed=2)
    assert [m["role"] for m in session.messages] == ["user", "assistant"]
    assert session.messages[-1]["content"] == second.text
    assert first.tokens != second.tokens
    assert (second.n_prompt, second.n_decoded) == (first.n_prompt, 1)
    assert engine.regenerate(session, max_tokens=8, seed=1).tokens == first.tokens


@pytest.mark.parametrize("messages", [[], ["user"], ["user", "assistant", "user"]])
def test_regenerate_without_a_reply_is_a_state_error(cm: ContextManager, engine: Engine, messages: list[str]) -> None:
    session = Session()
    for role in messages:
        session.add(role, "x")
    with pytest.raises(StateError, match="no reply to regenerate"):
        engine.regenerate(session)
    assert len(session.messages) == len(messages)


@pytest.mark.parametrize("failure", [KeyboardInterrupt, "cancel", "hook", "held"])
def test_a_regenerate_that_fails_before_its_first_token_brings_the_old_reply_back(
    cm: ContextManager, engine: Engine, monkeypatch: pytest.MonkeyPatch, failure: Any
) -> None:
    session = Session()
    engine.chat(session, "Who?", max_tokens=4, logit_bias=only_text(cm))
    before = [dict(m) for m in session.messages]
    if failure == "cancel":
        cm.set_hook("on_progress", lambda *args: False)
        assert engine.regenerate(session).stop_reason == "cancelled"
    elif failure == "hook":
        cm.set_hook("before_encode", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.regenerate(session)
    elif failure == "held":
        stream = engine.stream(session, "More?")
        next(stream)
        held = list(session.messages)
        with pytest.raises(StateError, match="no reply to regenerate"):
            engine.regenerate(session)
        assert session.messages == held
        stream.close()
        return
    else:
        fail_decode(monkeypatch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            engine.regenerate(session)
    assert session.messages == before


def test_a_regenerate_that_is_refused_never_touches_the_messages(cm: ContextManager, engine: Engine) -> None:
    """Another thread might add to them just then."""

    class Watched(list[Any]):
        def pop(self, *at: Any) -> Any:
            popped.append(at)
            return super().pop(*at)

    popped: list[Any] = []
    session = Session()
    engine.chat(session, "Who?", max_tokens=2)
    session.messages = Watched(session.messages)
    holder = Session()  # whoever
    cm.hold(session, holder)
    with pytest.raises(StateError, match="generating"):
        engine.regenerate(session)
    assert popped == []
    cm.let_go(session, holder)
    engine.regenerate(session, max_tokens=2)
    assert popped == [()]


# -- sampling


@pytest.mark.parametrize("model", ["llama-bpe", "gemma3", "mamba", "hybrid"])
def test_greedy_is_the_argmax_of_the_oracles_logits_step_by_step(load: Loader, model: str) -> None:
    cm, truth = load(model), oracle_for(model_path(model))
    session = Session()
    tokens: list[int] = []
    for chunk in Engine(cm).stream(session, "Who are you?", max_tokens=8, **GREEDY):
        assert chunk.token is not None
        prompt = list(cm.tokens(session))  # without the token of this chunk
        logits = truth.logits(prompt)
        top = np.sort(logits)[-2:]
        if top[1] - top[0] > 2 * truth.model_spread:  # no tie within what splits alone make
            assert chunk.token == int(logits.argmax())
        assert logits[chunk.token] >= top[1] - 2 * truth.model_spread
        tokens.append(chunk.token)
    assert len(tokens) == 8


def test_a_seed_gives_the_same_reply_whatever_else_is_going_on(cm: ContextManager, engine: Engine) -> None:
    alone = engine.chat(Session(), "Who?", max_tokens=12, seed=7, temperature=1.5)
    cm.set_system("")
    one, two = Session(), Session()
    streams = [
        engine.stream(one, "Who?", max_tokens=12, seed=7, temperature=1.5),
        engine.stream(two, "Who?", max_tokens=12, seed=8, temperature=1.5),
    ]
    tokens: list[list[int]] = [[], []]
    for _ in range(13):
        for i, stream in enumerate(streams):
            chunk = next(stream, None)
            if chunk is not None and chunk.token is not None and not cm.vocab.is_eog(chunk.token):
                tokens[i].append(chunk.token)
    assert tokens[0] == list(alone.tokens)
    assert tokens[1] != tokens[0]


def test_without_a_seed_replies_differ(cm: ContextManager, engine: Engine) -> None:
    replies = {engine.complete("Who?", max_tokens=12, temperature=2.0, top_k=0, top_p=1.0, min_p=0.0).tokens
               for _ in range(4)}  # fmt: skip
    assert len(replies) == 4


def test_logit_bias_bans_and_forces(cm: ContextManager, engine: Engine) -> None:
    free = engine.complete("Who?", max_tokens=4, **GREEDY)
    banned = engine.complete("Who?", max_tokens=4, logit_bias={free.tokens[0]: -math.inf}, **GREEDY)
    assert free.tokens[0] not in banned.tokens
    forced = engine.complete("Who?", max_tokens=4, logit_bias={np.int64(65): np.float32(1000.0)}, temperature=1.0)
    assert forced.tokens == (65,) * 4


def test_a_bias_of_one_logit_is_added_once(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    session.add_user("Who?")
    cm.prepare(session)
    logits = cm.logits(session)
    order = np.argsort(logits)
    best, other = int(order[-1]), int(order[-2])
    gap = float(logits[best] - logits[other])
    for bias, winner in ((gap - 0.01, best), (gap + 0.01, other)):
        reply = engine.complete("Who?", max_tokens=1, logit_bias={other: bias}, **GREEDY)
        assert reply.tokens == (winner,)


def test_with_every_token_banned_nothing_can_be_sampled(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    with pytest.raises(OptionError, match="no token can be sampled"):
        engine.chat(session, "Who?", logit_bias=dict.fromkeys(range(640), -math.inf))
    assert session.messages == []
    engine.chat(session, "Who?", max_tokens=1)


def penalised(row: list[int], logits: np.ndarray, **p: float) -> int:
    """The greedy choice after penalties over the last 64 of prompt and reply, in numpy (llama.cpp's formula)."""
    last, out = row[-64:], logits.copy()
    for token in set(last):
        repeat = p.get("repeat_penalty", 1.0)
        out[token] = out[token] * repeat if out[token] <= 0 else out[token] / repeat
        out[token] -= last.count(token) * p.get("frequency_penalty", 0.0) + p.get("presence_penalty", 0.0)
    return int(out.argmax())


@pytest.mark.parametrize(
    "options",
    [{"repeat_penalty": 1.8}, {"frequency_penalty": 1.5}, {"presence_penalty": 4.0}],
    ids=lambda o: next(iter(o)),
)
def test_penalties_act_over_the_last_64_tokens_of_prompt_and_reply(
    cm: ContextManager, engine: Engine, options: dict[str, float]
) -> None:
    session = Session()
    stream = engine.stream(session, "Who are you?", max_tokens=60, **GREEDY, **options)
    seen = logits_seen(stream)
    acted = 0
    for chunk in stream:
        row = [int(t) for t in cm.tokens(session)]
        assert chunk.token == penalised(row, seen[-1], **options)
        acted += chunk.token != int(seen[-1].argmax())
    assert acted > 0, "the penalties never mattered"
    assert session.n_past > 64 + 8


def test_penalties_forget_what_is_older_than_64_tokens(cm: ContextManager, engine: Engine) -> None:
    """A token of the prompt is punished while it is among the last 64, and no longer."""
    tilde = int(cm.vocab.tokenize("~")[0])
    distances = {}
    for n in range(48, 64):
        session = Session()
        reply = engine.chat(
            session, "~" + "x?" * (n // 2) + "x" * (n % 2), logit_bias={tilde: 50.0}, presence_penalty=100.0,
            max_tokens=1, **GREEDY,
        )  # fmt: skip
        row = [int(t) for t in cm.tokens(session)]
        assert row.count(tilde) == 1
        distances[len(row) - row.index(tilde)] = reply.tokens != (tilde,)
        cm.release(session)
    assert {64, 65} <= set(distances)
    assert distances == {distance: distance <= 64 for distance in distances}


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}, {"temperature": 1e-6}])
def test_each_filter_at_its_end_is_greedy(cm: ContextManager, engine: Engine, options: dict[str, Any]) -> None:
    greedy = engine.complete("Who?", max_tokens=6, **GREEDY)
    assert engine.complete("Who?", max_tokens=6, seed=3, **options).tokens == greedy.tokens


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": math.nan}, "temperature must be a finite number"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": math.inf}, "temperature"),
    ({"temperature": "hot"}, "temperature must be a number"),
    ({"temperature": True}, "temperature must be a number"),
    ({"top_p": 1.1}, "top_p must be a finite number from 0 to 1"),
    ({"top_p": math.nan}, "top_p"),
    ({"min_p": -1}, "min_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"top_k": 1.5}, "top_k must be an integer"),
    ({"repeat_penalty": 0.0}, "repeat_penalty must be a finite number from 0.01 to 100"),
    ({"repeat_penalty": math.nan}, "repeat_penalty"),
    ({"frequency_penalty": math.inf}, "frequency_penalty"),
    ({"presence_penalty": 101}, "presence_penalty"),
    ({"max_tokens": 0}, "max_tokens must be at least 1"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 1.0}, "max_tokens must be an integer"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**32 - 1}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"logit_bias": [1]}, "logit_bias must map"),
    ({"logit_bias": {640: 1.0}}, "outside the vocabulary of 640"),
    ({"logit_bias": {-1: 1.0}}, "token id in logit_bias"),
    ({"logit_bias": {"a": 1.0}}, "token id in logit_bias"),
    ({"logit_bias": {1: math.nan}}, r"logit_bias\[1\]"),
    ({"logit_bias": {1: math.inf}}, r"logit_bias\[1\]"),
    ({"logit_bias": {1: "x"}}, r"logit_bias\[1\]"),
    ({"stop": ""}, "stop string must not be empty"),
    ({"stop": ["a", ""]}, "stop string must not be empty"),
    ({"stop": 5}, "stop"),
    ({"stop": [5]}, "a stop string must be text"),
    ({"stop": "\ud800"}, "a stop string holds a lone surrogate"),
    ({"n_predict": 5}, "unknown generation option 'n_predict'; known: max_tokens"),
]


@pytest.mark.parametrize(("options", "match"), BAD_OPTIONS, ids=lambda v: str(v)[:40])
def test_a_sampling_option_out_of_range_is_refused_before_anything_happens(
    cm: ContextManager, engine: Engine, options: dict[str, Any], match: str
) -> None:
    session = Session()
    for call in (engine.chat, engine.stream, lambda s, t, **o: engine.complete(t, **o)):
        with pytest.raises(OptionError, match=match):
            call(session, "Who?", **options)
    session.add_user("x")
    session.add_assistant("y")
    with pytest.raises(OptionError, match=match):
        engine.regenerate(session, **options)
    assert [m["content"] for m in session.messages] == ["x", "y"]
    assert (cm.stats().slots_free, cm.stats().n_decodes) == (4, 0)


@pytest.mark.parametrize("thing", [None, "text", 5])
def test_what_is_no_session_or_manager_is_refused(engine: Engine, thing: Any) -> None:
    for call in (engine.chat, engine.stream):
        with pytest.raises(OptionError, match="a Session is wanted"):
            call(thing, "Who?")
    with pytest.raises(OptionError, match="takes a ContextManager"):
        Engine(thing)


@pytest.mark.parametrize("text", [5, b"x", ["x"], "\udc00"])
def test_a_text_that_is_none_is_refused(cm: ContextManager, engine: Engine, text: Any) -> None:
    session = Session()
    with pytest.raises(OptionError, match="the user's text"):
        engine.chat(session, text)
    assert session.messages == []
    assert cm.stats().slots_free == 4


@pytest.mark.parametrize("option", [{"text": "x"}, {"messages": []}, {"tools": []}])
def test_regenerate_takes_generation_options_alone(engine: Engine, option: dict[str, Any]) -> None:
    session = Session()
    session.add_user("x")
    session.add_assistant("y")
    with pytest.raises(OptionError, match=f"unknown generation option '{next(iter(option))}'"):
        engine.regenerate(session, **option)
    assert [m["content"] for m in session.messages] == ["x", "y"]


@pytest.mark.parametrize("last", ["text", None, {"content": "x"}, {"role": "user", "content": 5}])
def test_a_last_message_that_is_none_is_refused(cm: ContextManager, engine: Engine, last: Any) -> None:
    session = Session()
    session.messages.append(last)
    for call in (engine.chat, engine.regenerate):
        with pytest.raises(OptionError, match="the last message"):
            call(session)
    assert session.messages == [last]


# -- endings that are none


def fail_decode(monkeypatch: pytest.MonkeyPatch, outcome: Any, *, at: int = 0, after: bool = False) -> None:
    """Let the `at`-th decode from now return a code or raise."""
    calls = iter(range(10**6))
    real = LlamaContext.decode

    def decode(this: LlamaContext, runs: Any) -> int:
        if next(calls) != at:
            return real(this, runs)
        if after:
            real(this, runs)
        if isinstance(outcome, BaseException):
            raise outcome
        return int(outcome)

    monkeypatch.setattr(LlamaContext, "decode", decode)


@pytest.mark.parametrize("how", ["close", "drop", "with", "break"])
def test_a_stream_ended_early_keeps_what_was_said(cm: ContextManager, engine: Engine, oracle: Oracle, how: str) -> None:
    session = Session()
    stream: Any = engine.stream(session, "Who?", logit_bias=only_text(cm))
    said = ""
    if how == "with":
        with stream:
            said = "".join(next(stream).text for _ in range(3))
    else:
        for chunk in stream:
            said += chunk.text
            if len(said) > 5:
                break
        if how == "close":
            stream.close()
            assert stream.reply is not None
            assert (stream.reply.stop_reason, stream.reply.text) == ("cancelled", said)
            stream.close()
        del stream
        gc.collect()
    assert session.messages == [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": said}]
    n_row = session.n_past
    n_decoded, n_new = n_decoded_by_next_turn(cm, session, "Go on.")
    assert n_decoded == n_new == session.n_past - n_row
    oracle.assert_exact(cm.logits(session), cm.tokens(session))


@pytest.mark.parametrize(
    ("outcome", "after"),
    [(outcome, after) for outcome in (KeyboardInterrupt(), MemoryError(), 2, -2, -3) for after in (False, True)]
    + [(-1, False)],
    ids=str,
)
def test_an_error_in_the_middle_keeps_what_was_said(
    cm: ContextManager, engine: Engine, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, outcome: Any, after: bool
) -> None:
    session = Session()
    stream = engine.stream(session, "Who?", logit_bias=only_text(cm))
    said = "".join(next(stream).text for _ in range(3))
    with monkeypatch.context() as m:
        fail_decode(m, outcome, after=after)
        with pytest.raises((KeyboardInterrupt, MemoryError, DecodeError, CapacityError)):
            next(stream)
    assert session.messages == [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": said}]
    assert list(stream) == []
    assert stream.reply is not None
    assert stream.reply.stop_reason == "cancelled"
    cm.check_integrity()
    reply = engine.chat(session, "Go on.", max_tokens=2, logit_bias=only_text(cm))
    assert reply.n_generated == 2
    assert reply.n_reused > 0
    oracle.assert_exact(cm.logits(session), cm.tokens(session))


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), 2, 1, "hook", "long", "slots", "held", "closed"], ids=str)
def test_a_chat_that_fails_before_its_first_token_takes_its_user_message_back(
    load: Loader, monkeypatch: pytest.MonkeyPatch, failure: Any
) -> None:
    cm = load(max_sessions=1)
    engine = Engine(cm)
    session, text = Session(), "Who?"
    keep: Any = None
    if failure == "hook":
        cm.set_hook("before_encode", lambda *args: 1 / 0)
    elif failure == "long":
        text = "~" * 3000
    elif failure == "slots":
        keep = Session()
        cm.prepare(keep)
        cm.pin(keep)
    elif failure == "held":
        session.add_user("First")
        keep = engine.stream(session)
        next(keep)
    elif failure == "closed":
        cm.close()
    else:
        fail_decode(monkeypatch, failure)
    expected = {"hook": ZeroDivisionError, "long": ContextOverflow, "slots": NoFreeSlot, "held": StateError,
                "closed": StateError, 2: DecodeError, 1: CapacityError}  # fmt: skip
    before = list(session.messages)
    kind = KeyboardInterrupt if isinstance(failure, BaseException) else expected[failure]
    with pytest.raises(kind):
        engine.chat(session, text)
    assert session.messages == before
    if failure not in ("slots", "held", "closed"):
        cm.clear_hook("before_encode")
        assert engine.chat(session, "Who?", max_tokens=1).n_prompt > 0


@pytest.mark.parametrize("failure", ["long", "hook"])
def test_a_chat_that_fails_before_its_prompt_gives_its_slot_back(cm: ContextManager, failure: str) -> None:
    """A session that has no row must not keep others out."""
    session = Session()
    if failure == "hook":
        cm.set_hook("before_encode", lambda *args: 1 / 0)
    with pytest.raises((ContextOverflow, ZeroDivisionError)):
        Engine(cm).chat(session, "~" * 3000)
    cm.check_integrity()
    assert cm.stats().slots_free == 4


def test_a_chat_with_nothing_to_answer_gives_its_slot_back(cm: ContextManager, engine: Engine) -> None:
    cm.set_system("Be brief.")
    session = Session()
    session.add("system", "Be long.")
    for _ in range(2):
        with pytest.raises(OptionError, match="only a system text"):
            engine.chat(session)
    assert cm.stats().slots_free == 4
    cm.prepare(session)
    n_past = session.n_past
    assert n_past
    with pytest.raises(OptionError, match="only a system text"):
        engine.chat(session)
    assert session.n_past == n_past  # it had its row before


def test_a_chat_that_is_cancelled_before_anything_is_decoded_gives_its_slot_back(
    cm: ContextManager, engine: Engine
) -> None:
    cm.set_hook("on_progress", lambda *args: False)
    assert engine.chat(Session(), "Who?").got_nowhere
    assert cm.stats().slots_free == 4


def test_a_failed_user_message_is_not_taken_back_where_it_was_not_ours(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    session.add_user("~" * 3000)
    with pytest.raises(ContextOverflow):
        engine.chat(session)
    assert len(session.messages) == 1


def test_a_session_that_is_streaming_is_held(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    stream = engine.stream(session, "Who?", max_tokens=5, logit_bias=only_text(cm))
    next(stream)
    before = list(session.messages)
    for call in (
        lambda: engine.chat(session, "Me too?"),
        lambda: next(engine.stream(session, "Me too?")),
        lambda: cm.prepare(session),
        lambda: cm.append(session, 65),
        lambda: cm.release(session),
        lambda: cm.begin(session),
    ):
        with pytest.raises(StateError, match="finish or close its stream first, or wait for its ticket"):
            call()
    assert session.messages == before
    assert len(cm.tokens(session)) == session.n_past  # reading is allowed
    assert len([*stream]) == 4
    engine.chat(session, "Now?", max_tokens=1)


def test_a_fork_of_a_streaming_session_goes_its_own_way(cm: ContextManager, engine: Engine, oracle: Oracle) -> None:
    session = Session()
    stream = engine.stream(session, "Who?", max_tokens=8, logit_bias=only_text(cm))
    for _ in range(4):
        next(stream)
    twin = cm.fork(session)
    oracle.assert_exact(cm.logits(twin), cm.tokens(twin))
    engine.chat(twin, max_tokens=3, logit_bias=only_text(cm))
    assert len([*stream]) == 4
    assert [m["role"] for m in twin.messages] == ["user", "assistant"]
    cm.check_integrity()
    oracle.assert_exact(cm.logits(session), cm.tokens(session))


@pytest.mark.parametrize("at", [0, 64])
def test_on_progress_returning_false_gives_a_cancelled_reply(load: Loader, at: int) -> None:
    cm = load(n_batch=32)
    engine, session = Engine(cm), Session()
    cm.set_hook("on_progress", lambda done, total, session: done < at)
    chunks = list(engine.stream(session, "Who are you? " * 8))
    (chunk,) = chunks
    assert (chunk.text, chunk.token) == ("", None)
    assert chunk.reply is not None
    assert (chunk.reply.stop_reason, chunk.reply.text, chunk.reply.tokens) == ("cancelled", "", ())
    assert (chunk.reply.n_reused, chunk.reply.n_decoded) == (0, at)
    assert session.messages == []
    assert len(cm.tokens(session)) == at
    cm.clear_hook("on_progress")
    reply = engine.chat(session, "Who are you? " * 8, max_tokens=1)
    assert reply.n_reused == at


def test_on_progress_that_raises_ends_the_chat_with_its_error(load: Loader) -> None:
    cm = load()
    cm.set_hook("on_progress", lambda *args: 1 / 0)
    session = Session()
    with pytest.raises(ZeroDivisionError):
        Engine(cm).chat(session, "Who?")
    assert session.messages == []


def test_a_manager_closed_under_a_stream_ends_it(cm: ContextManager, engine: Engine) -> None:
    session = Session()
    stream = engine.stream(session, "Who?", logit_bias=only_text(cm))
    said = next(stream).text
    cm.close()
    with pytest.raises(StateError, match="closed"):
        next(stream)
    assert session.messages[-1] == {"role": "assistant", "content": said}


def test_a_session_released_by_its_death_under_a_stream_is_kept_by_it(cm: ContextManager, engine: Engine) -> None:
    stream = engine.stream(Session(), "Who?", max_tokens=4, logit_bias=only_text(cm))
    next(stream)
    gc.collect()
    assert len([*stream]) == 3
    del stream
    gc.collect()
    cm.check_integrity()
    assert cm.stats().slots_free == 4


def test_a_session_that_is_dropped_after_a_chat_gives_its_slot_back_at_once(engine: Engine, cm: ContextManager) -> None:
    """Nothing of a reply holds on to it in a cycle that only a garbage collection would break."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(3 * cm.slots.capacity):
            session = Session()
            list(engine.stream(session, "Who?", max_tokens=2))
            engine.chat(session, "And?", max_tokens=2, grammar="root ::= [a-z]+")
            del session
        cm.check_integrity()
        assert (cm.stats().n_sessions, cm.stats().n_parked) == (0, 0)
    finally:
        gc.enable()
