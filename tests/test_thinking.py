"""How thinking ends: by the model, by a budget, by a grammar that is owed; and what stop strings have to do with it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
from models import model_path
from oracle import oracle_for
from scripted import ids_of, reply_of, script, scripted, wish
from test_reasoning import OPENS, STRIPS

from llama_sessions import ContextManager, Engine, OptionError, Reply, Session
from llama_sessions.reply_format import ReplyFormat
from llama_sessions.reply_parser import ReplyParser
from llama_sessions.speech import Speech
from llama_sessions.thinking import Thinking

Loader = Callable[..., ContextManager]
GREEDY: dict[str, Any] = {"temperature": 0.0}
YES = 'root ::= "yes" | "no"'
WHOLE = {"controls": ("<|endoftext|>", "<|im_start|>", "</think>", "</think>So", ">So", "> \n", "<|im_end|>")}


def control(cm: ContextManager, *texts: str) -> list[int]:
    return [cm.vocab.control[text] for text in texts]


# -- stop strings


@pytest.mark.parametrize("stop", [">", ">>", "\n", "k>\nSo", "hm", "</think>", "<"])
@pytest.mark.parametrize("template", [STRIPS, OPENS])
@pytest.mark.parametrize("by_byte", [False, True])
def test_a_stop_string_stops_no_thinking(load: Loader, stop: str, template: str, by_byte: bool) -> None:
    engine = Engine(load(chat_template=template))
    said = "hm\n</think>\nSo it is."
    said = said if template is OPENS else "\n<think>" + said
    reply = reply_of(scripted(engine, Session(), "Why?", said, by_byte=by_byte, stop=stop))
    assert (reply.thinking, reply.text, reply.stop_reason) == ("hm", "So it is.", "stop")


@pytest.mark.parametrize(("stop", "text"), [("So", ""), (" it", "So"), ("\n", "So it is"), (".", "So it is\n")])
@pytest.mark.parametrize("by_byte", [False, True])
def test_a_stop_string_behind_the_thinking_stops(load: Loader, stop: str, text: str, by_byte: bool) -> None:
    engine, session = Engine(load(chat_template=OPENS)), Session()
    stream = scripted(engine, session, "Why?", "So\n. it</think>\n\nSo it is\n. So", by_byte=by_byte, stop=stop)
    chunks = list(stream)
    reply = chunks[-1].reply
    assert reply is not None
    assert (reply.thinking, reply.text, reply.stop_reason) == ("So\n. it", text, "stop_string")
    assert "".join(c.text for c in chunks if c.kind == "content") == text


def test_without_thinking_white_space_at_the_start_may_stop(load: Loader) -> None:
    engine = Engine(load(chat_template=STRIPS))
    assert reply_of(scripted(engine, Session(), "Why?", "\n\nSo.", by_byte=True, stop="\n")).text == ""
    shown = reply_of(scripted(engine, Session(), "Why?", "\n So.\nIt", by_byte=True, stop=".\n"))
    assert (shown.text, shown.stop_reason) == ("\n So", "stop_string")


# -- the budget


@pytest.mark.parametrize("stop", [">", ">>", "<", "\n"])
def test_a_stop_string_that_begins_like_the_tag_does_not_close_it_twice(load: Loader, stop: str) -> None:
    cm = load(chat_template=OPENS)
    thoughts, answer = ids_of(cm, "hm", by_byte=True), ids_of(cm, "So.")
    stream = Engine(cm).stream(Session(), "Why?", think_budget=2, stop=stop)
    reply = reply_of(script(stream, [*thoughts, *answer]))
    assert list(reply.tokens) == [*thoughts, *ids_of(cm, "</think>"), *answer]
    assert (reply.thinking, reply.text) == ("hm", "So.")


@pytest.mark.parametrize("stop", [None, ">>"])
@pytest.mark.parametrize("budget", [None, 2])
def test_a_grammar_holds_from_the_very_first_token_behind_the_tag(
    load: Loader, stop: str | None, budget: int | None
) -> None:
    cm = load(chat_template=OPENS)
    wanted = [*ids_of(cm, "hm", by_byte=True), *ids_of(cm, "</think>"), *ids_of(cm, "Oh no", by_byte=True)]
    stream = Engine(cm).stream(Session(), "Why?", think_budget=budget, stop=stop, grammar=YES, **GREEDY)
    reply = reply_of(wish(stream, wanted))
    assert (reply.thinking, reply.stop_reason) == ("hm", "stop")
    assert reply.text in ("yes", "no")


@pytest.mark.parametrize("begun", ["<", "</", "</th", "</think"])
@pytest.mark.parametrize("budget_more", [0, 1])
def test_a_budget_that_ends_within_the_tag_ends_the_tag(load: Loader, begun: str, budget_more: int) -> None:
    cm = load(chat_template=OPENS)
    thoughts = [*ids_of(cm, "hm "), *ids_of(cm, begun, by_byte=True)]
    rest = "</think>".removeprefix(begun)
    own = ids_of(cm, rest[:budget_more])
    stream = Engine(cm).stream(Session(), "Why?", think_budget=len(thoughts) + budget_more)
    reply = reply_of(script(stream, [*thoughts, *own, *ids_of(cm, "So.")]))
    assert (reply.thinking, reply.text) == ("hm", "So.")
    assert list(reply.tokens) == [*thoughts, *own, *ids_of(cm, rest[budget_more:]), *ids_of(cm, "So.")]


def test_where_the_rest_of_a_tag_has_no_tokens_the_whole_tag_is_forced(load: Loader) -> None:
    cm = load("llama-spm", chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}<think>")
    byte = {cm.vocab.piece(token): token for token in range(cm.vocab.n_tokens)}
    thoughts = [byte[bytes([char])] for char in b"hm</th"]
    reply = reply_of(script(Engine(cm).stream(Session(), "Why?", think_budget=6), [*thoughts, byte[b"S"]]))
    assert (reply.thinking, reply.text) == ("hm</th", "S")
    assert list(reply.tokens) == [*thoughts, *ids_of(cm, "</think>"), byte[b"S"]]


def test_a_tag_that_is_one_token_is_forced_whole_behind_what_looks_like_it(load: Loader) -> None:
    cm = load(model=WHOLE, chat_template=OPENS)
    thoughts = ids_of(cm, "a <", by_byte=True)
    reply = reply_of(script(Engine(cm).stream(Session(), "Why?", think_budget=3), [*thoughts, *ids_of(cm, "So.")]))
    assert list(reply.tokens) == [*thoughts, *control(cm, "</think>"), *ids_of(cm, "So.")]
    assert (reply.thinking, reply.text) == ("a <", "So.")


def test_a_budget_forces_nothing_that_the_grammar_refuses(load: Loader) -> None:
    """Where no header opened the thinking, the grammar is about it too."""
    engine = Engine(load())
    grammar = 'root ::= "<think>" [a-c]{4} "</think>" "yes"'
    reply = engine.complete("x", grammar=grammar, think_budget=1, **GREEDY)
    assert (len(reply.thinking), reply.text, reply.stop_reason) == (4, "yes", "stop")
    thoughts = ids_of(engine.cm, "<think>aaaaaaaaaa", by_byte=True)
    for least, budget in [(1, 3), (3, 1)]:
        grammar = f'root ::= "<think>" "a"{{{least},}} "</think>" "yes"'
        stream = engine.stream(Session(), "x", grammar=grammar, think_budget=budget, **GREEDY)
        reply = reply_of(wish(stream, thoughts))
        assert (reply.thinking, reply.text, reply.stop_reason) == ("aaa", "yes", "stop")


def test_a_tag_that_the_vocabulary_cannot_spell_is_forced_once() -> None:
    class Mute:
        def tokenize(self, text: str, *, special: bool = False) -> Any:
            return np.array([3, 4], np.int32)

        def piece(self, token: int) -> bytes:
            return b"?"

        def is_eog(self, token: int) -> bool:
            return token == 9

    said = Speech(ReplyParser(ReplyFormat(), tools=False, thinking_open=True))
    thinking = Thinking(cast(Any, Mute()), said, "</think>", 0)
    assert [thinking.forced(None) for _ in range(4)] == [3, 4, None, None]
    assert said.is_thinking
    assert thinking.instead_of(9) == 9


@pytest.mark.parametrize("penalty", [{"presence_penalty": 100.0}, {"frequency_penalty": 100.0}])
def test_what_is_forced_is_penalised_like_what_was_drawn(load: Loader, penalty: dict[str, float]) -> None:
    cm = load(chat_template=OPENS)
    closing, (slash,) = ids_of(cm, "</think>"), ids_of(cm, "/")
    assert closing.count(slash) == 1
    options = {"think_budget": 0, "max_tokens": len(closing) + 1, "logit_bias": {slash: 50.0}, **GREEDY}
    for given, again in (({}, True), (penalty, False)):
        session = Session()
        reply = Engine(cm).chat(session, "Why?", **options, **given)
        assert list(reply.tokens[:-1]) == closing
        assert slash not in cm.tokens(session)[: reply.n_prompt]
        assert (reply.tokens[-1] == slash) == again


# -- what a grammar is owed


@pytest.mark.parametrize("thought", ["", "hm", "hm</thi"])
def test_an_end_within_the_thinking_closes_it_where_a_grammar_is_owed(load: Loader, thought: str) -> None:
    cm = load(chat_template=OPENS)
    thoughts = ids_of(cm, thought, by_byte=True)
    reply = reply_of(wish(Engine(cm).stream(Session(), "Why?", grammar=YES, **GREEDY), thoughts))
    assert (reply.thinking, reply.stop_reason) == (thought.partition("<")[0], "stop")
    assert reply.text in ("yes", "no")
    spelled = b"".join(map(cm.vocab.piece, reply.tokens)).decode()
    assert spelled == thought.partition("<")[0] + "</think>" + reply.text
    alone = reply_of(wish(Engine(cm).stream(Session(), "Why?", **GREEDY), thoughts))
    assert (list(alone.tokens), alone.text, alone.stop_reason) == (thoughts, "", "stop")


@pytest.mark.parametrize(("thought", "token"), [("hm", "</think>So"), ("hm</think", ">So")])
def test_a_token_that_goes_on_behind_the_tag_does_not_pass_the_grammar_by(
    load: Loader, thought: str, token: str
) -> None:
    cm = load(model=WHOLE, chat_template=OPENS)
    wanted = [*ids_of(cm, thought, by_byte=True), *control(cm, token)]
    reply = reply_of(wish(Engine(cm).stream(Session(), "Why?", grammar=YES, **GREEDY), wanted))
    assert not set(control(cm, token)) & set(reply.tokens)
    assert (reply.text in ("yes", "no"), reply.stop_reason) == (True, "stop")
    assert reply.thinking == thought
    alone = reply_of(wish(Engine(cm).stream(Session(), "Why?", **GREEDY), wanted))
    assert (list(alone.tokens), alone.thinking, alone.text) == (wanted, "hm", "So")


def test_white_space_behind_the_tag_may_be_in_its_token(load: Loader) -> None:
    cm = load(model=WHOLE, chat_template=OPENS)
    wanted = [*ids_of(cm, "hm</think", by_byte=True), *control(cm, "> \n")]
    reply = reply_of(wish(Engine(cm).stream(Session(), "Why?", grammar=YES, **GREEDY), wanted))
    assert list(reply.tokens)[: len(wanted)] == wanted
    assert (reply.thinking, reply.text in ("yes", "no")) == ("hm", True)


# -- going on


def uncut(engine: Engine, session: Session, ids: list[int]) -> Reply:
    return reply_of(script(engine.stream(session, "Why?"), ids))


@pytest.mark.parametrize("template", [STRIPS, OPENS])
def test_a_thinking_that_was_cut_goes_on_wherever_it_was_cut(load: Loader, template: str) -> None:
    cm = load(chat_template=template)
    engine, whole = Engine(cm), Session()
    opening = [] if template is OPENS else ids_of(cm, "<think>")
    ids = [*opening, *ids_of(cm, "\nhm, so\n</think>\n\n€ it is.", by_byte=True)]
    reply = uncut(engine, whole, ids)
    for n in range(max(1, len(opening)), len(ids)):
        session = Session()
        first = reply_of(script(engine.stream(session, "Why?", max_tokens=n), ids[:n]))
        assert first.stop_reason == "length"
        n_row = session.n_past
        chunks = list(script(engine.stream(session, continue_last=True), ids[n:]))
        second = chunks[-1].reply
        assert second is not None
        assert "�" not in first.text + first.thinking
        assert reply.thinking.endswith(second.thinking)
        assert "".join(c.text for c in chunks if c.kind == "thinking") == second.thinking
        assert session.messages == whole.messages
        assert list(first.tokens + second.tokens) == ids
        if not first.text:
            assert second.n_decoded == second.n_prompt - n_row == 1  # the last token of what was thought
        cm.release(session)


def test_a_thinking_goes_on_more_than_once_and_exactly(load: Loader) -> None:
    cm = load(chat_template=OPENS)
    engine, session = Engine(cm), Session()
    ids = ids_of(cm, "hm, so, hm</think>So.", by_byte=True)
    reply_of(script(engine.stream(session, "Why?", max_tokens=3), ids))
    for n in (3, 6, 9):
        reply = reply_of(script(engine.stream(session, continue_last=True, max_tokens=3), ids[n:]))
        oracle_for(model_path("llama-bpe")).assert_exact(cm.logits(session), cm.tokens(session))
        assert cm.tokens(session).tolist()[reply.n_prompt - n : reply.n_prompt] == ids[:n]
    assert session.messages[1:] == [{"role": "assistant", "content": "", "reasoning_content": "hm, so, hm</"}]
    reply_of(script(engine.stream(session, continue_last=True), ids[12:]))
    assert session.messages[1:] == [{"role": "assistant", "content": "So.", "reasoning_content": "hm, so, hm"}]
    assert len(session._replies) == 1


def thought_by(cm: ContextManager) -> tuple[Session, list[int]]:
    """A session whose reply was cut within its thinking, and the ids of that."""
    session, ids = Session(), ids_of(cm, "hm, so", by_byte=True)
    reply_of(script(Engine(cm).stream(session, "Why?", max_tokens=len(ids)), ids))
    assert session.messages[-1] == {"role": "assistant", "content": "", "reasoning_content": "hm, so"}
    return session, ids


@pytest.mark.parametrize("how", ["copy", "saved", "hook"])
def test_a_copy_of_a_thought_goes_on_too(load: Loader, how: str) -> None:
    cm = load(chat_template=OPENS)
    session, ids = thought_by(cm)
    if how == "copy":
        session = session.copy()
    elif how == "saved":
        session = Session.from_dict(json.loads(json.dumps(session.to_dict())))
    else:
        cm.set_hook("before_encode", lambda messages, _: copy.deepcopy(messages))
    reply = reply_of(script(Engine(cm).stream(session, continue_last=True), ids_of(cm, ".</think>So.")))
    assert cm.tokens(session).tolist()[reply.n_prompt - len(ids) : reply.n_prompt] == ids
    assert session.messages[-1] == {"role": "assistant", "content": "So.", "reasoning_content": "hm, so."}


def test_what_is_owed_and_what_is_left_go_on_with_a_thought(load: Loader) -> None:
    cm = load(chat_template=OPENS)
    session, ids = thought_by(cm)
    more = ids_of(cm, " hm hm", by_byte=True)
    options = {"grammar": YES, "think_budget": len(ids) + 2, **GREEDY}
    reply = reply_of(wish(Engine(cm).stream(session, continue_last=True, **options), more))
    assert (session.messages[-1]["reasoning_content"], reply.thinking) == ("hm, so h", " h")
    assert reply.text in ("yes", "no")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.messages[-1].update(reasoning_content="hm"), "the tokens it was thought in are not known"),
        (lambda s: s.messages.append({**s.messages.pop(), "reasoning_content": "x"}), "are not known"),
        (lambda s: s.template_kwargs.update(closed=True), "set the session's tools and template_kwargs as they were"),
    ],
)
def test_a_thought_that_cannot_go_on_is_refused_and_stands(load: Loader, change: Any, message: str) -> None:
    cm = load(chat_template=OPENS.replace("<think>\\n'", "<think>\\n' + ('</think>' if closed else '')"))
    session, _ = thought_by(cm)
    change(session)
    before = copy.deepcopy(session.messages)
    with pytest.raises(OptionError, match=message):
        Engine(cm).chat(session, continue_last=True)
    assert session.messages == before
    Engine(cm).regenerate(session, max_tokens=1)


@pytest.mark.parametrize("change", [{"model": "another"}, {"begun": [2**31 - 1]}, {"begun": []}])
def test_a_saved_thought_of_another_model_is_refused(load: Loader, change: dict[str, Any]) -> None:
    cm = load(chat_template=OPENS)
    saved = thought_by(cm)[0].to_dict()
    saved["replies"][0].update(change)
    with pytest.raises(OptionError, match="the tokens it was thought in are not known"):
        Engine(cm).chat(Session.from_dict(saved), continue_last=True)


def test_begun_ids_that_are_none_are_refused(load: Loader) -> None:
    saved = thought_by(load(chat_template=OPENS))[0].to_dict()
    for wrong, message in [(5, "'begun' of reply 0 must be a list"), ([-1], "an id of reply 0")]:
        saved["replies"][0]["begun"] = wrong
        with pytest.raises(OptionError, match=message):
            Session.from_dict(saved)


def test_a_stop_string_right_behind_the_thinking_leaves_nothing_to_go_on_with(load: Loader) -> None:
    engine, session = Engine(load(chat_template=OPENS)), Session()
    reply = reply_of(scripted(engine, session, "Why?", "hm</think>So.", stop="So"))
    assert (reply.text, reply.stop_reason) == ("", "stop_string")
    with pytest.raises(OptionError, match="are not known"):
        engine.chat(session, continue_last=True)
