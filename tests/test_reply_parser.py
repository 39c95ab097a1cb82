"""A reply taken apart as it streams: the same however it is cut, and nothing that the model said is lost."""

from __future__ import annotations

import codecs
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from llama_sessions.call_reader import ToolCallDelta
from llama_sessions.errors import StateError
from llama_sessions.reply_format import ReplyFormat, ToolFormat
from llama_sessions.reply_parser import Part, ReplyParser

ANY = ReplyFormat()
HERMES = ReplyFormat(tool_formats=(ToolFormat.HERMES,))
MISTRAL = ReplyFormat(think_open="[THINK]", think_close="[/THINK]", tool_formats=(ToolFormat.MISTRAL,))
LLAMA3 = ReplyFormat(tool_formats=(ToolFormat.LLAMA3,))
COHERE = ReplyFormat(think_open="<|START_THINKING|>", think_close="<|END_THINKING|>")


@dataclass(frozen=True)
class Told:
    """What a reply came to. Calls are (name, arguments)."""

    content: str = ""
    thinking: str = ""
    calls: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Case:
    """A canned reply and what it comes to."""

    text: str
    told: Told
    reply_format: ReplyFormat = ANY
    tools: bool = True
    thinking_open: bool = False

    def parser(self) -> ReplyParser:
        return ReplyParser(self.reply_format, tools=self.tools, thinking_open=self.thinking_open, id_seed=7)


def case(text: str, content: str = "", thinking: str = "", *calls: tuple[str, str], **options: Any) -> Case:
    return Case(text, Told(content, thinking, calls), **options)


PARIS = ("get_weather", '{"city": "Paris"}')
TIME = ("get_time", '{"zone": "CET"}')
NESTED = (
    '{"q": "a \\"}]</tool_call>[TOOL_CALLS]\\\\", "f": [{"n": {"é": [1, -2.5e3, null]}}], "u": "\\u00e9\\ud83d\\ude00"}'
)
WEATHER_JSON = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
TIME_JSON = '{"name": "get_time", "arguments": {"zone": "CET"}}'
A_CALL = f"<tool_call>{TIME_JSON}</tool_call>"
NESTED_JSON = '{"name": "find", "arguments": ' + NESTED + "}"

PLAIN = {
    "empty": case(""),
    "white space": case(" \n\t ", " \n\t "),
    "text": case("  Hi there.\n\n- a\n- b  \n", "  Hi there.\n\n- a\n- b  \n"),
    "not a tag": case("a < b <tool_box> [TOOL] <think> </think>", "a < b <tool_box> [TOOL] <think> </think>"),
    "a tag that never ends": case("see <tool_cal", "see <tool_cal"),
    "the start of a thinking tag": case("\n<thin", "\n<thin"),
    "calls without tools": case(f"{A_CALL}\n", f"{A_CALL}\n", tools=False),
    "bare call without tools": case(WEATHER_JSON, WEATHER_JSON, tools=False),
    "mistral without tools": case(f"[TOOL_CALLS][{TIME_JSON}]", f"[TOOL_CALLS][{TIME_JSON}]", tools=False),
}  # fmt: skip

THINKING = {
    "qwen3": case("<think>\nOkay, a\n\nquestion.\n</think>\n\nHi!\n", "Hi!\n", "Okay, a\n\nquestion."),
    "deepseek r1": case("Okay.\nSo\n</think>\n\nHi!", "Hi!", "Okay.\nSo", thinking_open=True),
    "opened twice": case("\n<think>\nOkay.</think>Hi!", "Hi!", "Okay.", thinking_open=True),
    "magistral": case("[THINK]Hm [1] <think>.[/THINK]Hi!", "Hi!", "Hm [1] <think>.", reply_format=MISTRAL),
    "cohere": case("<|START_THINKING|>Hm.<|END_THINKING|> Hi!", "Hi!", "Hm.", reply_format=COHERE),
    "white space before": case(" \n <think>Hm.</think>Hi!", "Hi!", "Hm."),
    "empty": case("<think>\n\n</think>\n\nHi!", "Hi!"),
    "never closed": case("<think>\nHm, \n <b", "", "Hm, \n <b"),
    "never closed, white space last": case("<think>\nHm.\n", "", "Hm.\n"),
    "never closed, opened by the header": case("\nHm </thin", "", "Hm </thin", thinking_open=True),
    "only a tag": case("<think>\n"),
    "only tags": case("<think>\n</think>\n"),
    "in the middle": case("Hi <think>hm</think> there", "Hi <think>hm</think> there"),
    "a second time": case("<think>a</think>b<think>c</think>", "b<think>c</think>", "a"),
    "a second time at once": case("<think>a</think>\n<think>c</think>", "<think>c</think>", "a"),
    "of another format": case("<think>a</think>", "<think>a</think>", reply_format=MISTRAL),
    "closed without being open": case("a</think>b", "a</think>b"),
    "calls in it": case(f"<think>try {A_CALL}</think>b", "b", f"try {A_CALL}"),
}  # fmt: skip

CALLS = {
    "qwen": case(f"<tool_call>\n{WEATHER_JSON}\n</tool_call>", "", "", PARIS, reply_format=HERMES),
    "qwen, two, text around": case(
        f"Let me see. \n<tool_call>\n{WEATHER_JSON}\n</tool_call>\n<tool_call>\n{TIME_JSON}\n</tool_call>\n",
        "Let me see.", "", PARIS, TIME, reply_format=HERMES,
    ),
    "qwen3, thinking": case(
        f"<think>\nHm.\n</think>\n\n<tool_call>\n{NESTED_JSON}\n</tool_call>\n", "", "Hm.", ("find", NESTED)
    ),
    "hermes, one line": case(f"<tool_call>{TIME_JSON}</tool_call>", "", "", TIME),
    "arguments first": case('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', "", "", ("f", '{"a": 1}')),
    "parameters": case('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', "", "", ("f", '{"a": 1}')),
    "arguments in a string": case(
        r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\\u00e9 \ud83d\ude00\"}"}</tool_call>',
        "", "", ("f", '{"a": "\\u00e9 \U0001f600"}'),
    ),
    "no arguments": case('<tool_call>{"name": "f"}</tool_call>', "", "", ("f", "{}")),
    "null arguments": case('<tool_call>{"name": "f", "arguments": null}</tool_call>', "", "", ("f", "{}")),
    "empty arguments": case('<tool_call>{"name": "f", "arguments": ""}</tool_call>', "", "", ("f", "{}")),
    "an escaped name": case(r'<tool_call>{"n\u0061me": "f\u00e9\"", "x": [1]}</tool_call>', "", "", ('fé"', "{}")),
    "text between, kept apart by white space before": case(
        f"A\n\n<tool_call>{TIME_JSON}</tool_call> B", "A\n\nB", "", TIME
    ),
    "text between, kept apart by white space behind": case(
        f"A<tool_call>{TIME_JSON}</tool_call> \n B", "A \n B", "", TIME
    ),
    "text behind two": case(
        f"A<tool_call>{TIME_JSON}</tool_call>\n<tool_call>{TIME_JSON}</tool_call>\n\nB", "A\nB", "", TIME, TIME
    ),
    "text behind only": case(f" <tool_call>{TIME_JSON}</tool_call>\nB ", "B ", "", TIME),
    "mistral": case(f"[TOOL_CALLS] [{WEATHER_JSON}]", "", "", PARIS, reply_format=MISTRAL),
    "mistral, two": case(
        f"Sure.[TOOL_CALLS][{WEATHER_JSON}, {NESTED_JSON}]", "Sure.", "", PARIS, ("find", NESTED), reply_format=MISTRAL
    ),
    "mistral, ids": case(
        '[TOOL_CALLS][{"name": "f", "arguments": {}, "id": "abcdef123"}]', "", "", ("f", "{}"), reply_format=MISTRAL
    ),
    "mistral, new": case(
        '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[ARGS]{"zone": "CET"}',
        "", "", PARIS, TIME, reply_format=MISTRAL,
    ),
    "mistral, new, without [ARGS]": case(
        'Well. [TOOL_CALLS]get_weather{"city": "Paris"}\n[TOOL_CALLS] find {}'.replace("{}", NESTED),
        "Well.", "", PARIS, ("find", NESTED), reply_format=MISTRAL,
    ),
    "mistral, new, with an id": case(
        '[TOOL_CALLS]get_time[CALL_ID]k3_-Zb9aQ[ARGS] {"zone": "CET"}', "", "", TIME, reply_format=MISTRAL
    ),
    "magistral": case(
        "[THINK]Hm.[/THINK]Let me see.[TOOL_CALLS]ns.f-1[ARGS]{}", "Let me see.", "Hm.", ("ns.f-1", "{}"),
        reply_format=MISTRAL,
    ),
    "llama 3": case(
        '{"name": "get_weather", "parameters": {"city": "Paris"}}', "", "", PARIS, reply_format=LLAMA3
    ),
    "llama 3.1": case(
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}',
        "", "", PARIS, reply_format=LLAMA3,
    ),
    "llama 3, semicolons": case(
        f'{WEATHER_JSON}; {TIME_JSON};\n{NESTED_JSON} \n', "", "", PARIS, TIME, ("find", NESTED), reply_format=LLAMA3
    ),
    "llama 3, lines": case(f"\n{WEATHER_JSON}\n{TIME_JSON}", "", "", PARIS, TIME, reply_format=LLAMA3),
    "llama 3, thinking": case(f"<think>Hm.</think>\n{TIME_JSON}\n", "", "Hm.", TIME, reply_format=LLAMA3),
    "a template that does not tell, hermes": case(f"A <tool_call>{TIME_JSON}</tool_call>", "A", "", TIME),
    "a template that does not tell, mistral": case(f"A [TOOL_CALLS][{TIME_JSON}]", "A", "", TIME),
    "a template that does not tell, llama 3": case(f"{TIME_JSON}", "", "", TIME),
    "two formats in one reply": case(
        f"<tool_call>{TIME_JSON}</tool_call>[TOOL_CALLS][{WEATHER_JSON}]", "", "", TIME, PARIS
    ),
}  # fmt: skip


def same(text: str, *calls: tuple[str, str], rest: str | None = None, reply_format: ReplyFormat = ANY) -> Case:
    """A reply with no call in it, or none in its first part: that is content, letter by letter."""
    return case(text + (rest or ""), text, "", *calls, reply_format=reply_format)


MALFORMED = {
    "no JSON": same("<tool_call>get_time()</tool_call>"),
    "invalid JSON": same('<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>'),
    "a literal": same('<tool_call>{"name": "f", "arguments": {"a": nil}}</tool_call>'),
    "not a number": same('<tool_call>{"name": "f", "arguments": {"a": NaN}}</tool_call>'),
    "a raw line break": same('<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}</tool_call>'),
    "no name": same('<tool_call>\n{"arguments": {"a": 1}}\n</tool_call>'),
    "an empty name": same('<tool_call>{"name": " ", "arguments": {"a": 1}}</tool_call>'),
    "a name that is no string": same('<tool_call>{"name": {"x": 1}, "arguments": {"a": 1}}</tool_call>'),
    "a name that cannot be written": same(r'<tool_call>{"name": "\ud800", "arguments": {}}</tool_call>'),
    "arguments that are no object": same('<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    "arguments in a string that are no object": same('<tool_call>{"name": "f", "arguments": "[1]"}</tool_call>'),
    "arguments in a string that cannot be written": same(
        r'<tool_call>{"name": "f", "arguments": "{\"a\": \"\ud800\"}"}</tool_call>'
    ),
    "arguments twice": same('<tool_call>{"name": "f", "parameters": {"a": 1}, "arguments": {}}</tool_call>'),
    "a name twice": same('<tool_call>{"name": "f", "name": "g", "arguments": {}}</tool_call>'),
    "not closed": same(f"Well <tool_call>\n{TIME_JSON}\n"),
    "not closed, half a tag": same(f"<tool_call>{TIME_JSON}</tool_ca"),
    "not closed, in its arguments": same('<tool_call>{"name": "f", "arguments": {"a": "x'),
    "only a tag": same("a <tool_call>"),
    "more behind the object": same(f"<tool_call>{TIME_JSON} and</tool_call>"),
    "then a good one": same('<tool_call>{"name": "f" oops</tool_call>', TIME, rest=f"\n{A_CALL}"),
    "not closed, then a good one": same(f"<tool_call>{WEATHER_JSON}", TIME, rest=f"\n{A_CALL}"),
    "two tags": same("<tool_call>", TIME, rest=A_CALL),
    "a half tag, then a good one": same("<tool_call>{} <tool", TIME, rest=A_CALL),
    "python": same("<|python_tag|>brave_search.call(query=\"x\")", reply_format=LLAMA3),
    "mistral, empty": same("[TOOL_CALLS] []", reply_format=MISTRAL),
    "mistral, an object alone": same(f"[TOOL_CALLS]{TIME_JSON}", reply_format=MISTRAL),
    "mistral, one of two bad": same(f"[TOOL_CALLS][{TIME_JSON}, {{}}] x", reply_format=MISTRAL),
    "mistral, no comma": same(f"[TOOL_CALLS][{TIME_JSON}x{WEATHER_JSON}]", reply_format=MISTRAL),
    "mistral, not closed": same(f"[TOOL_CALLS][{TIME_JSON}, ", reply_format=MISTRAL),
    "mistral, two tags": same("[TOOL_CALLS][", TIME, rest=f"[TOOL_CALLS][{TIME_JSON}]", reply_format=MISTRAL),
    "mistral, new, name only": same("[TOOL_CALLS]get_time", reply_format=MISTRAL),
    "mistral, new, then a good one": same(
        "[TOOL_CALLS]get_time", TIME, rest='[TOOL_CALLS]get_time{"zone": "CET"}', reply_format=MISTRAL
    ),
    "mistral, new, prose": same("[TOOL_CALLS]is what I write {}", reply_format=MISTRAL),
    "mistral, new, a bad id": same("[TOOL_CALLS]f[CALL_ID]a b[ARGS]{}", reply_format=MISTRAL),
    "mistral, new, no id": same("[TOOL_CALLS]f[CALL]{}", reply_format=MISTRAL),
    "mistral, new, a long name": same(f"[TOOL_CALLS]{'f' * 257}[ARGS]{{}}", reply_format=MISTRAL),
    "mistral, new, bad arguments": same('[TOOL_CALLS]f[ARGS]{"a": 01}', reply_format=MISTRAL),
    "mistral, of another format": same(A_CALL, reply_format=MISTRAL),
    "hermes, of another format": same(f"[TOOL_CALLS][{TIME_JSON}]", reply_format=HERMES),
    "hermes, a bare call": same(TIME_JSON, reply_format=HERMES),
    "llama 3, text behind": same(f"{WEATHER_JSON}\nThat should do.", reply_format=LLAMA3),
    "llama 3, text before": same(f"Here: {WEATHER_JSON}", reply_format=LLAMA3),
    "llama 3, a tag in the middle": same(f"Here: <|python_tag|>{WEATHER_JSON}", reply_format=LLAMA3),
    "llama 3, one of two bad": same(f'{WEATHER_JSON}; {{"name": "f"}}', reply_format=LLAMA3),
    "llama 3, JSON for its own sake": same('{"city": "Paris", "name": "f", "parameters": {}}', reply_format=LLAMA3),
    "llama 3, JSON with a name": same('{"name": "Anna", "age": 31}', reply_format=LLAMA3),
    "llama 3, no arguments": same(' {"name": "Anna"} ', reply_format=LLAMA3),
    "llama 3, a definition": same('{"name": "f", "description": "", "parameters": {}}', reply_format=LLAMA3),
    "llama 3, half a tag": same("<|python_ta", reply_format=LLAMA3),
    "llama 3, then a tag": same('{"say": "', TIME, rest=A_CALL),
    "nested too deeply": same('<tool_call>{"name": "f", "arguments": {"a":' + "[" * 300 + "]" * 300 + "}}</tool_call>"),
}  # fmt: skip

CASES = {
    f"{group}: {name}": found
    for group, cases in {"plain": PLAIN, "thinking": THINKING, "calls": CALLS, "malformed": MALFORMED}.items()
    for name, found in cases.items()
}


def fold(parts: Sequence[Part]) -> tuple[Told, list[str]]:
    """What somebody comes to who only looks at the parts, and the ids of the calls."""
    content, thinking, calls = "", "", list[list[str]]()
    for part in parts:
        assert (part.kind == "tool_call") == (part.tool_call is not None) == (not part.text)
        if part.tool_call is None:
            content += part.text if part.kind == "content" else ""
            thinking += part.text if part.kind == "thinking" else ""
            continue
        delta = part.tool_call
        if delta.withdrawn:
            assert calls[-1][0] == delta.id
            assert len(calls) - 1 == delta.index
            calls.pop()
        elif delta.name:
            assert delta == ToolCallDelta(len(calls), delta.id, delta.name)
            calls.append([delta.id, delta.name, ""])
        else:
            assert delta.arguments
            assert (len(calls) - 1, calls[-1][0]) == (delta.index, delta.id)
            calls[-1][2] += delta.arguments
    told = Told(content, thinking, tuple((name, arguments) for _, name, arguments in calls))
    return told, [call_id for call_id, _, _ in calls]


def told_by(parser: ReplyParser, pieces: Sequence[str]) -> tuple[Told, list[str]]:
    """What the reply came to; the parts and the parser's own record say the same."""
    parts = [part for piece in pieces for part in parser.push(piece)] + parser.push("", final=True)
    told, ids = fold(parts)
    assert parser.content == told.content
    assert parser.thinking == told.thinking
    assert parser.tool_calls == [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, (name, arguments) in zip(ids, told.calls, strict=True)
    ]
    return told, ids


@pytest.mark.parametrize("name", CASES)
def test_a_reply_comes_to_the_same_however_it_is_cut(name: str) -> None:
    found = CASES[name]
    text = found.text
    told, ids = told_by(found.parser(), [text])
    assert told == found.told
    for pieces in [list(text), *([text[:i], text[i:]] for i in range(len(text) + 1))]:
        assert told_by(found.parser(), pieces) == (told, ids)


@pytest.mark.parametrize("name", [name for name, found in CASES.items() if not found.text.isascii()])
def test_a_reply_comes_to_the_same_at_whichever_byte_it_is_cut(name: str) -> None:
    found = CASES[name]
    data = found.text.encode()
    for i in range(len(data) + 1):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(data[:i]), decoder.decode(data[i:], final=True)]
        assert told_by(found.parser(), pieces)[0] == found.told


@pytest.mark.parametrize("name", CASES)
def test_the_last_push_may_bring_all_the_text(name: str) -> None:
    found = CASES[name]
    parser = found.parser()
    assert fold(parser.push(found.text, final=True))[0] == found.told


# -- what is given out, and when


def given_out(parser: ReplyParser, *pieces: str) -> list[list[Part]]:
    return [parser.push(piece) for piece in pieces]


def call(index: int, call_id: str, **news: Any) -> Part:
    return Part("tool_call", tool_call=ToolCallDelta(index, call_id, **news))


def test_text_is_given_out_at_once_and_a_tag_held_back_until_it_is_decided() -> None:
    parser = ReplyParser(HERMES, tools=True)
    assert given_out(parser, "Hi", " there", " \n", "<tool", "_box>", " <") == [
        [Part("content", "Hi")], [Part("content", " there")], [], [], [Part("content", " \n<tool_box>")], [],
    ]  # fmt: skip


def test_where_no_call_can_come_white_space_is_given_out_at_once() -> None:
    parser = ReplyParser(HERMES, tools=False)
    assert given_out(parser, "Hi ", "\n", "<tool_call>") == [
        [Part("content", "Hi ")], [Part("content", "\n")], [Part("content", "<tool_call>")],
    ]  # fmt: skip


def test_thinking_is_given_out_as_it_comes() -> None:
    parser = ReplyParser(ANY, tools=False)
    assert given_out(parser, "<thi", "nk>\n", "Hm", ".\n", "</", "think", ">\n\nHi") == [
        [], [], [Part("thinking", "Hm")], [Part("thinking", ".")], [], [], [Part("content", "Hi")],
    ]  # fmt: skip


def test_a_call_is_given_out_as_soon_as_its_name_is_known_and_its_arguments_as_they_come() -> None:
    parser = ReplyParser(HERMES, tools=True, id_seed=1)
    parts = given_out(
        parser, '<tool_call>\n{"na', 'me": "f"', ', "arguments": ', '{"a": ', '"x', 'y"}', "}", "</tool_call>"
    )
    (first,) = parts[1]
    assert first.tool_call is not None
    call_id = first.tool_call.id
    assert parts == [
        [], [call(0, call_id, name="f")], [], [call(0, call_id, arguments='{"a": ')],
        [call(0, call_id, arguments='"x')], [call(0, call_id, arguments='y"}')], [], [],
    ]  # fmt: skip
    assert [found["id"] for found in parser.tool_calls] == [call_id]


def test_arguments_that_come_before_the_name_wait_for_it() -> None:
    parser = ReplyParser(HERMES, tools=True, id_seed=1)
    parts = given_out(parser, '<tool_call>{"arguments": {"a": 1', '}, "name": "f', '"')
    assert parts[:2] == [[], []]
    assert fold(parts[2])[0].calls == (("f", '{"a": 1}'),)


def test_a_call_that_is_none_after_all_is_withdrawn_before_its_text_comes_as_content() -> None:
    parser = ReplyParser(HERMES, tools=True, id_seed=1)
    ((named,), (fragment,), withdrawn) = given_out(parser, '<tool_call>{"name": "f", ', '"arguments": {"a"', " 1}")
    assert named.tool_call is not None
    call_id = named.tool_call.id
    assert fragment == call(0, call_id, arguments='{"a"')
    assert withdrawn[0] == call(0, call_id, withdrawn=True)
    assert withdrawn[1:] == [Part("content", '<tool_call>{"name": "f", "arguments": {"a" 1}')]
    again = given_out(parser, A_CALL)[0]
    assert again[0].tool_call is not None
    assert again[0].tool_call.index == 0
    assert again[0].tool_call.id != call_id


def test_calls_that_stand_and_fall_together_are_withdrawn_last_one_first() -> None:
    parser = ReplyParser(LLAMA3, tools=True)
    parts = given_out(parser, WEATHER_JSON + ";" + TIME_JSON[:30], TIME_JSON[30:], " so")[2]
    assert [(part.tool_call.index, part.tool_call.withdrawn) for part in parts if part.tool_call] == [
        (1, True), (0, True),
    ]  # fmt: skip
    assert parser.content == f"{WEATHER_JSON};{TIME_JSON} so"
    assert parser.tool_calls == []


def test_bare_json_is_no_news_of_a_call_before_it_has_arguments() -> None:
    parser = ReplyParser(LLAMA3, tools=True)
    assert given_out(parser, '{"name": "Anna"', ', "age', '"') == [
        [], [], [Part("content", '{"name": "Anna", "age"')]
    ]  # fmt: skip
    parser = ReplyParser(LLAMA3, tools=True)
    assert [len(parts) for parts in given_out(parser, '{"name": "f"', ', "parameters"', ": {")] == [0, 1, 1]


def test_a_call_that_is_given_out_and_fails_within_one_push_is_never_seen() -> None:
    parser = ReplyParser(HERMES, tools=True)
    text = '<tool_call>{"name": "f", "arguments": {} oops'
    assert parser.push(text) == [Part("content", text)]


def test_adjacent_text_of_one_kind_is_one_part() -> None:
    parser = ReplyParser(ANY, tools=True)
    text = "<think>a b</think> c <tool_call> d <tool_call> e"
    assert parser.push(text, final=True) == [
        Part("thinking", "a b"), Part("content", "c <tool_call> d <tool_call> e")
    ]  # fmt: skip


def test_parts_come_in_the_order_in_which_they_were_written() -> None:
    parser = ReplyParser(ANY, tools=True)
    parts = parser.push(f"<think>a</think>b {A_CALL} c {A_CALL} d", final=True)
    assert [part.text or (part.tool_call and part.tool_call.name) for part in parts] == [
        "a", "b", "get_time", "", " c", "get_time", "", " d",
    ]  # fmt: skip


def test_after_the_final_push_nothing_may_come() -> None:
    parser = ReplyParser(ANY, tools=False)
    parser.push("a", final=True)
    assert parser.push("", final=True) == []
    with pytest.raises(StateError, match="2 characters"):
        parser.push("bc")
    assert parser.content == "a"


# -- ids


def ids_of(parser: ReplyParser) -> list[str]:
    parser.push(A_CALL * 50, final=True)
    return [found["id"] for found in parser.tool_calls]


def test_an_id_is_nine_letters_or_digits_and_belongs_to_one_call() -> None:
    ids = ids_of(ReplyParser(ANY, tools=True)) + ids_of(ReplyParser(ANY, tools=True))
    assert all(len(call_id) == 9 and call_id.isascii() and call_id.isalnum() for call_id in ids)
    assert len(set(ids)) == 100


def test_the_same_seed_draws_the_same_ids() -> None:
    assert ids_of(ReplyParser(ANY, tools=True, id_seed=3)) == ids_of(ReplyParser(ANY, tools=True, id_seed=3))
    assert ids_of(ReplyParser(ANY, tools=True, id_seed=3)) != ids_of(ReplyParser(ANY, tools=True, id_seed=4))


# -- any reply, any cut


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[str]:
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=10)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=300, deadline=None)
@given(st.data(), st.sampled_from(list(CASES.values())))
def test_a_canned_reply_comes_to_the_same_in_any_pieces(data: st.DataObject, found: Case) -> None:
    assert told_by(found.parser(), data.draw(cut(found.text)))[0] == found.told


BITS = [
    "<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>",
    *(WEATHER_JSON, TIME_JSON, A_CALL, '{"name": "f"', ', "arguments": ', '"parameters": {', '{"a": "', '"', "\\"),
    *("{", "}", "[", "]", ",", ";", " ", "\n", "x", "é", "<", "/", "1"),
]  # fmt: skip
formats = st.sampled_from([ANY, HERMES, MISTRAL, LLAMA3])


@settings(max_examples=300, deadline=None)
@given(st.data(), st.lists(st.sampled_from(BITS), max_size=14), formats, st.booleans(), st.booleans())
def test_any_text_comes_to_the_same_in_any_pieces_and_none_of_it_is_lost(
    data: st.DataObject, bits: list[str], reply_format: ReplyFormat, tools: bool, thinking_open: bool
) -> None:
    found = Case("".join(bits), Told(), reply_format, tools, thinking_open)
    whole = told_by(found.parser(), [found.text])
    assert told_by(found.parser(), data.draw(cut(found.text))) == whole
    told = whole[0]
    if not told.calls:
        tags = reply_format.think_open, reply_format.think_close
        said = [told.content, *(t + told.thinking + u + told.content for t in ("", tags[0]) for u in ("", tags[1]))]
        assert "".join(found.text.split()) in ["".join(way.split()) for way in said]


plain_bits = st.sampled_from(["a", "é ", "<", "[TOOL", "\n", "b. ", "</tool_call>", "{", '"', "<think>"])
good = st.sampled_from([(A_CALL, TIME), (f"<tool_call>\n{NESTED_JSON}\n</tool_call>", ("find", NESTED))])
bad = st.sampled_from(['<tool_call>{"name": "f", "arguments": {"a": }}</tool_call>', "<tool_call>x", "<tool_call>[]"])


@settings(max_examples=120, deadline=None)
@given(st.data(), st.lists(plain_bits | good | bad, max_size=10))
def test_what_is_no_call_is_content_letter_by_letter(
    data: st.DataObject, bits: list[str | tuple[str, tuple[str, str]]]
) -> None:
    text = "".join(bit if isinstance(bit, str) else bit[0] for bit in bits)
    content = "".join(bit for bit in bits if isinstance(bit, str))
    calls = tuple(bit[1] for bit in bits if not isinstance(bit, str))
    parser = ReplyParser(HERMES, tools=True)
    told, _ = told_by(parser, data.draw(cut("x" + text + "x")))
    assert told.calls == calls
    assert "".join(told.content.split()) == "".join(f"x{content}x".split())


json_texts = st.dictionaries(
    st.text(max_size=4),
    st.text(max_size=8) | st.integers() | st.none() | st.lists(st.text(max_size=4), max_size=3),
    max_size=4,
)


@settings(max_examples=100, deadline=None)
@given(
    st.data(),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    json_texts,
    st.booleans(),
    st.booleans(),
)
def test_any_arguments_arrive_as_they_were_written(
    data: st.DataObject, name: str, arguments: dict[str, Any], ascii_only: bool, as_string: bool
) -> None:
    written = json.dumps(arguments, ensure_ascii=ascii_only)
    value = json.dumps(written, ensure_ascii=ascii_only) if as_string else written
    obj = f'{{"name": {json.dumps(name, ensure_ascii=ascii_only)}, "arguments": {value}}}'
    for text in (f"<tool_call>{obj}</tool_call>", f"[TOOL_CALLS][{obj}]", obj):
        told, _ = told_by(ReplyParser(ANY, tools=True), data.draw(cut(text)))
        assert told == Told(calls=((name, written),))


# -- what is large

LARGE = {
    "text": "word <b> " * 30,
    "white space": " \n" * 150,
    "half tags": "<" * 300,
    "bad calls": "<tool_call>" * 30,
    "half arrays": "[TOOL_CALLS][" * 25,
    "good calls": A_CALL * 5,
}


def seconds_for(text: str) -> float:
    """Of processor time, one character at a time; the least of three, as somebody else may have the caches."""

    def once() -> float:
        parser = ReplyParser(ANY, tools=True)
        start = time.thread_time()
        for char in text:
            parser.push(char)
        parser.push("", final=True)
        return time.thread_time() - start

    gc.collect()
    gc.disable()  # it looks at all that other tests have left, at a moment of its own
    try:
        return min(once() for _ in range(3))
    finally:
        gc.enable()


@pytest.mark.parametrize("name", LARGE)
def test_the_cost_is_linear_in_the_length(name: str) -> None:
    unit = LARGE[name]
    short, long = unit * 5, unit * 80
    assert seconds_for(long) < 16 * 3 * seconds_for(short)


@pytest.mark.parametrize("opener", ["<tool_call>", "[TOOL_CALLS][", "", "[TOOL_CALLS]f[ARGS]"])
@pytest.mark.parametrize(
    "inside", ['{{"name": "f", "arguments": {{"a": "{x}', '{{"name": ["{x}"], "arguments": {{"a": "{x}']
)
def test_a_long_call_is_read_once(opener: str, inside: str) -> None:
    short, long = (opener + inside.format(x="x" * n) for n in (1_000, 16_000))
    assert seconds_for(long) < 16 * 3 * seconds_for(short)


@pytest.mark.parametrize("opened", ["[", '{"a":'])
def test_nesting_without_end_is_content(opened: str) -> None:
    text = '<tool_call>{"name": "f", "arguments": ' + opened * 10_000
    for pieces in ([text], list(text)):
        told, _ = told_by(ReplyParser(ANY, tools=True), pieces)
        assert told == Told(content=text)
