"""Thinking and tool calls in replies: apart from the text in chunks and messages, back in the prompt where a template
wants them, exact in the row."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

import pytest
from interrupting import interrupted_everywhere
from models import model_path
from oracle import oracle_for
from scripted import ids_of, reply_of, script, scripted

from llama_sessions import ContextManager, Engine, OptionError, Session
from llama_sessions.tool_loop import answer_calls

Loader = Callable[..., ContextManager]

HEADER = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
STRIPS = (  # as Qwen3 and R1 do: old thinking goes
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'].split('</think>')[-1] }}"
    "{{ '<|im_end|>\\n' }}{% endfor %}" + HEADER
)
OPENS = STRIPS.replace("assistant\\n' }}{% endif", "assistant\\n<think>\\n' }}{% endif")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {"type": "object", "properties": {"a": {"type": "number"}, "b": {"type": "number"}}},
        },
    }
]
QWEN = (
    "{% if tools %}{{ '<|im_start|>system\\n' + tools | tojson + ' Answer in <tool_call>.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] }}"
    '{% for c in m.tool_calls or [] %}{{ \'<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}" + HEADER
)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'


def by_kind(chunks: list[Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    for chunk in chunks:
        found[chunk.kind] = found.get(chunk.kind, "") + chunk.text
    return found


@pytest.mark.parametrize("by_byte", [False, True])
def test_thinking_comes_apart_from_the_text(load: Loader, by_byte: bool) -> None:
    engine, session = Engine(load(chat_template=STRIPS)), Session()
    chunks = list(scripted(engine, session, "Why?", "<think>\nhm, so\n</think>\n\nIt is so.", by_byte=by_byte))
    reply = chunks[-1].reply
    assert reply is not None
    assert (reply.thinking, reply.text) == ("hm, so", "It is so.")
    assert by_kind(chunks) == {"thinking": "hm, so", "content": "It is so."}
    assert [c.token for c in chunks if c.token is not None][:-1] == list(reply.tokens)
    assert session.messages[-1] == {"role": "assistant", "content": "It is so.", "reasoning_content": "hm, so"}


def test_a_header_that_opens_the_thinking_is_known_from_the_prompt(load: Loader) -> None:
    engine, session = Engine(load(chat_template=OPENS)), Session()
    chunks = list(scripted(engine, session, "Why?", "hm\n</think>\n\nSo."))
    assert chunks[-1].reply is not None
    assert (chunks[-1].reply.thinking, chunks[-1].reply.text) == ("hm", "So.")


def test_the_answer_keeps_its_ids_where_the_thinking_is_taken_out(load: Loader) -> None:
    cm = load(chat_template=STRIPS)
    engine, session = Engine(cm), Session()
    spelled = ids_of(cm, "the", by_byte=True)  # not as the tokenizer has it
    assert len(ids_of(cm, "the")) < len(spelled)
    list(script(engine.stream(session, "Why?"), [*ids_of(cm, "<think>hm</think>"), *spelled]))
    session.add_user("And?")
    cm.prepare(session)
    row = cm.tokens(session).tolist()
    assert any(row[i : i + len(spelled)] == spelled for i in range(len(row)))
    oracle_for(model_path("llama-bpe")).assert_exact(cm.logits(session), cm.tokens(session))


@pytest.mark.parametrize("template", [STRIPS, OPENS])
@pytest.mark.parametrize("budget", [0, 3])
def test_a_think_budget_closes_the_thinking(load: Loader, template: str, budget: int) -> None:
    cm = load(chat_template=template)
    engine, session = Engine(cm), Session()
    opening = [] if template is OPENS else ids_of(cm, "<think>")
    thoughts = ids_of(cm, "hm hm hm hm hm hm", by_byte=True)
    stream = script(
        engine.stream(session, "Why?", think_budget=budget), [*opening, *thoughts[:budget], *ids_of(cm, "So.")]
    )
    reply = list(stream)[-1].reply
    assert reply is not None
    assert reply.text == "So."
    assert len(ids_of(cm, reply.thinking, by_byte=True)) <= budget
    closing = ids_of(cm, "</think>")
    assert list(reply.tokens) == [*opening, *thoughts[:budget], *closing, *ids_of(cm, "So.")]
    assert cm.tokens(session).tolist()[reply.n_prompt :][: len(reply.tokens) - 1] == list(reply.tokens)[:-1]


@pytest.mark.parametrize("by_byte", [False, True])
def test_tool_calls_are_parsed_as_they_stream(load: Loader, by_byte: bool) -> None:
    engine, session = Engine(load(chat_template=QWEN)), Session(tools=TOOLS)
    chunks = list(scripted(engine, session, "2 + 3?", "Let me see.\n" + CALL, by_byte=by_byte))
    reply = chunks[-1].reply
    assert reply is not None
    (call,) = reply.tool_calls
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add", {"a": 2, "b": 3})
    assert (reply.text, reply.finish_reason) == ("Let me see.", "tool_calls")
    deltas = [c.tool_call for c in chunks if c.tool_call is not None]
    assert "".join(d.arguments for d in deltas) == call["function"]["arguments"]
    assert session.messages[-1]["tool_calls"] == [call]


def test_without_tools_a_call_is_only_text(load: Loader) -> None:
    engine, session = Engine(load(chat_template=QWEN)), Session()
    reply = list(scripted(engine, session, "2 + 3?", CALL))[-1].reply
    assert reply is not None
    assert (reply.text, reply.tool_calls) == (CALL, ())


@pytest.mark.parametrize("by_byte", [False, True])
def test_json_that_was_asked_for_is_no_call(load: Loader, by_byte: bool) -> None:
    """A template that says nothing about tools leaves all formats possible, bare JSON too."""
    engine, session = Engine(load(chat_template=STRIPS)), Session(tools=TOOLS)
    asked = {"type": "object", "properties": {"name": {"type": "string"}, "parameters": {"type": "object"}}}
    person = '{"name": "add", "parameters": {}}'
    assert reply_of(scripted(engine, session, "Who?", person, by_byte=by_byte)).tool_calls
    for form in ({"json_schema": asked}, {"grammar": "root ::= [^x]*"}):
        reply = reply_of(scripted(engine, session, "Who?", person, by_byte=by_byte, **form))
        assert (reply.text, reply.tool_calls) == (person, ())
        assert session.messages[-1] == {"role": "assistant", "content": person}


def test_a_grammar_that_spells_the_tag_of_a_call_asks_for_calls(load: Loader) -> None:
    engine, session = Engine(load(chat_template=STRIPS)), Session(tools=TOOLS)
    grammar = 'root ::= "<tool_call>" [^x]* "</tool_call>"'
    reply = reply_of(scripted(engine, session, "2 + 3?", CALL, grammar=grammar))
    assert [call["function"]["name"] for call in reply.tool_calls] == ["add"]
    quoted = f'{{"q": {json.dumps(CALL)}}}'
    reply = reply_of(scripted(engine, session, "Quote it.", quoted, json_schema={"type": "object"}))
    assert (reply.text, reply.tool_calls) == (quoted, ())


def test_a_result_goes_back_and_costs_only_what_is_new(load: Loader) -> None:
    cm = load(chat_template=QWEN)
    engine, session = Engine(cm), Session(tools=TOOLS)
    reply = list(scripted(engine, session, "2 + 3?", CALL))[-1].reply
    assert reply is not None
    n_row = session.n_past
    session.add_tool_result("5", reply.tool_calls[0]["id"])
    assert session.messages[-1] == {
        "role": "tool", "content": "5", "tool_call_id": reply.tool_calls[0]["id"], "name": "add",
    }  # fmt: skip
    cm.prepare(session)
    assert session.last_prepare is not None
    assert session.last_prepare.n_reused == n_row  # the call, written by the template, is the call that was sampled
    oracle_for(model_path("llama-bpe")).assert_exact(cm.logits(session), cm.tokens(session))


WRITES_TEXT = QWEN.replace("c.function.arguments | tojson", "c.function.arguments + ''")


@pytest.mark.parametrize("template", [QWEN, WRITES_TEXT])
def test_a_template_gets_arguments_as_it_wants_them(load: Loader, template: str) -> None:
    cm = load(chat_template=template)
    session = Session(tools=TOOLS)
    session.add_user("2 + 3?")
    call = {"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}
    session.messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
    session.add_tool_result("5", "a")
    cm.prepare(session)
    text = b"".join(map(cm.vocab.piece, cm.tokens(session).tolist())).decode()
    assert CALL in text
    assert session.messages[1]["tool_calls"] == [call]  # what is said stays as it is


def test_a_result_for_an_unknown_call_is_refused() -> None:
    session = Session(tools=TOOLS)
    with pytest.raises(OptionError, match=r"no tool call has the id 'x'; calls made: none"):
        session.add_tool_result("5", "x")
    assert session.messages == []


async def awaited() -> None: ...


class Awaited:
    async def __call__(self) -> None: ...


def calling(engine: Engine, session: Session, replies: list[str]) -> None:
    """Let the next replies of an engine be these."""
    scripts = iter(replies)
    stream = engine.stream
    engine.stream = lambda *args, **options: script(  # type: ignore[method-assign]
        stream(*args, **options), ids_of(engine.cm, next(scripts))
    )


def test_run_tools_calls_answers_and_goes_on(load: Loader) -> None:
    engine, session = Engine(load(chat_template=QWEN)), Session(tools=TOOLS)
    calling(engine, session, [CALL, "It is 5."])
    reply = engine.run_tools(session, {"add": lambda a, b: a + b}, "2 + 3?")
    assert reply.text == "It is 5."
    assert [m["role"] for m in session.messages] == ["user", "assistant", "tool", "assistant"]
    assert session.messages[2]["content"] == "5"


@pytest.mark.parametrize(
    ("functions", "error"),
    [
        ({}, "there is no function 'add'"),
        ({"add": lambda a: a}, "TypeError"),
        ({"add": lambda a, b: 1 / 0}, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_goes_wrong_in_a_tool_is_told_to_the_model(load: Loader, functions: Any, error: str) -> None:
    engine, session = Engine(load(chat_template=QWEN)), Session(tools=TOOLS)
    calling(engine, session, [CALL, "Sorry."])
    assert engine.run_tools(session, functions, "2 + 3?").text == "Sorry."
    assert error in json.loads(session.messages[2]["content"])["error"]


def test_run_tools_stops_at_its_limit(load: Loader) -> None:
    engine, session = Engine(load(chat_template=QWEN)), Session(tools=TOOLS)
    calling(engine, session, [CALL] * 3)

    def add(a: int, b: int) -> dict[str, int]:
        return {"sum": a + b}

    reply = engine.run_tools(session, [add], "2 + 3?", max_rounds=2)
    assert len(reply.tool_calls) == 1
    assert [m["role"] for m in session.messages].count("tool") == 2
    assert session.messages[2]["content"] == '{"sum": 5}'


@pytest.mark.parametrize("interrupted", [0, 1])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_within_a_tool_leaves_a_session_that_goes_on(load: Loader, interrupted: int, kind: Any) -> None:
    engine, session = Engine(load(chat_template=QWEN)), Session(tools=TOOLS)
    calling(engine, session, [CALL + CALL, "Well."])
    n_calls = iter(range(9))

    def add(a: int, b: int) -> int:
        if next(n_calls) == interrupted:
            raise kind
        return a + b

    with pytest.raises(kind):
        engine.run_tools(session, [add], "2 + 3?")
    asked = [call["id"] for call in session.messages[1]["tool_calls"]]
    assert [m["tool_call_id"] for m in session.messages[2:]] == asked
    error = json.dumps({"error": f"not finished: interrupted by {kind.__name__}"})
    assert [m["content"] for m in session.messages[2:]] == ["5"] * interrupted + [error] * (2 - interrupted)
    assert engine.chat(session).text == "Well."
    assert [m["role"] for m in session.messages] == ["user", "assistant", "tool", "tool", "assistant"]


def test_an_interrupt_anywhere_in_the_answers_gives_each_call_one_result() -> None:
    calls = [{"id": i, "type": "function", "function": {"name": "add", "arguments": "{}"}} for i in "ab"]

    def start() -> Session:
        session = Session()
        session.messages.append({"role": "assistant", "content": "", "tool_calls": calls})
        return session

    def check(session: Session) -> None:
        ids = [m["tool_call_id"] for m in session.messages[1:]]
        assert ids in ([], ["a", "b"])  # none: before the first was called
        n_whole.append(len(ids) // 2)

    n_whole: list[int] = []
    n = interrupted_everywhere(start, lambda session: answer_calls(session, calls, {"add": lambda: "5"}), check)
    assert sum(n_whole) > 0.9 * n > 100


def test_a_tool_that_takes_its_call_out_of_the_session_is_an_error(load: Loader) -> None:
    engine, session = Engine(load(chat_template=QWEN)), Session(tools=TOOLS)
    calling(engine, session, [CALL])
    with pytest.raises(OptionError, match="no tool call has the id"):
        engine.run_tools(session, {"add": lambda a, b: session.messages.clear()}, "2 + 3?")
    assert session.messages == []


@pytest.mark.parametrize("why", ["cancelled", "timeout"])
def test_run_tools_calls_nothing_that_a_reply_cut_short_asked_for(load: Loader, why: str) -> None:
    cm = load(chat_template=QWEN)
    engine, session = Engine(cm), Session(tools=TOOLS)
    stream = engine.stream

    def cut(*args: Any, **options: Any) -> Any:
        made = script(stream(*args, **options), [*ids_of(cm, CALL), *ids_of(cm, " and so on")])
        chunks = made._generation.chunks

        def watched(token: int) -> Any:
            found = chunks(token)
            if made._generation._speech.tool_calls:  # whole: the reply is cut behind it
                made.cancel()
            return found

        made._generation.chunks = watched  # type: ignore[method-assign]
        if why == "timeout":
            made._why_stop = lambda: "timeout" if made._stop else None  # type: ignore[method-assign]
        return made

    engine.stream = cut  # type: ignore[method-assign]
    called: list[Any] = []
    reply = engine.run_tools(session, {"add": lambda a, b: called.append(a)}, "2 + 3?")
    assert (reply.stop_reason, len(reply.tool_calls)) == (why, 1)
    assert called == []
    assert [m["role"] for m in session.messages] == ["user", "assistant"]


def test_a_result_that_json_does_not_know_is_told_as_text(load: Loader) -> None:
    engine, session = Engine(load(chat_template=QWEN)), Session(tools=TOOLS)
    calling(engine, session, [CALL, "Today."])
    engine.run_tools(session, {"add": lambda a, b: {"on": datetime.date(2024, a, b)}}, "2 + 3?")
    assert session.messages[2]["content"] == '{"on": "2024-02-03"}'


@pytest.mark.parametrize(
    ("functions", "tools", "message"),
    [
        ({"add": 1}, TOOLS, "the function 'add' must be callable"),
        ([lambda: 1, lambda: 2], TOOLS, "two functions have one name"),
        ({"add": awaited}, TOOLS, "the function 'add' is async"),
        ({"add": Awaited()}, TOOLS, "the function 'add' is async"),
        (7, TOOLS, "functions must be a dict of callables, or a list of functions, not 7"),
        ({}, None, "the session offers no tools"),
    ],
)
def test_run_tools_checks_what_it_is_given(load: Loader, functions: Any, tools: Any, message: str) -> None:
    session = Session(tools=tools)
    with pytest.raises(OptionError, match=message):
        Engine(load()).run_tools(session, functions, "x")
    assert session.messages == []


def test_a_continued_message_gets_its_calls(load: Loader) -> None:
    engine, session = Engine(load(chat_template=QWEN)), Session(tools=TOOLS)
    session.add_user("2 + 3?")
    session.add_assistant("Let me see. ")
    reply = list(scripted(engine, session, None, CALL, continue_last=True))[-1].reply
    assert reply is not None
    session.add_tool_result("5", reply.tool_calls[0]["id"])
    assert session.messages[1]["tool_calls"] == list(reply.tool_calls)
    reply.tool_calls[0]["function"]["name"] = "x"  # type: ignore[index]
    assert session.messages[1]["tool_calls"][0]["function"]["name"] == "add"


def test_run_tools_continues_the_first_message_only(load: Loader) -> None:
    engine, session = Engine(load(chat_template=QWEN)), Session(tools=TOOLS)
    session.add_user("2 + 3?")
    session.add_assistant("Let me see. ")
    calling(engine, session, [CALL, "It is 5."])
    assert engine.run_tools(session, {"add": lambda a, b: a + b}, continue_last=True).text == "It is 5."
    assert [m["content"] for m in session.messages[1:]] == ["Let me see. ", "5", "It is 5."]


def test_run_tools_checks_its_limit_first_and_survives_odd_results(load: Loader) -> None:
    engine, session = Engine(load(chat_template=QWEN)), Session(tools=TOOLS)
    with pytest.raises(OptionError, match="max_rounds must be at least 1"):
        engine.run_tools(session, {}, "x", max_rounds=0)
    assert session.messages == []
    calling(engine, session, [CALL, "Well."])
    assert engine.run_tools(session, {"add": lambda a, b: "file-\udcff"}, "2 + 3?").text == "Well."
    assert session.messages[2]["content"] == "file-?"


def test_a_grammar_holds_for_tags_that_no_header_opened(load: Loader) -> None:
    reply = Engine(load()).complete("x", grammar='root ::= "<think>" [a-c]{3} "</think>" "yes"', seed=1)
    assert (reply.text, len(reply.thinking)) == ("yes", 3)
    assert set(reply.thinking) <= set("abc")


@pytest.mark.parametrize("calls", [5, [1], "x", [{"function": None}], [{"id": [], "function": {}}]])
def test_tool_calls_that_are_none_are_refused(load: Loader, calls: Any) -> None:
    session = Session()
    session.add_user("x")
    session.messages.append({"role": "assistant", "content": "", "tool_calls": calls})
    session.add_user("y")
    with pytest.raises(OptionError, match="the tool_calls of message 1"):
        load().prepare(session)
    with pytest.raises(OptionError, match="the tool_calls of message 1"):
        session.add_tool_result("5", "a")
