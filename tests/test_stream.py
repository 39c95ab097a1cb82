"""Streams: whatever ends one, its chunks add up to its reply; and only one thread at a time is inside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from scripted import only_text, scripted

from llama_sessions import Chunk, ContextManager, Engine, Reply, Session, StateError, Stream

Loader = Callable[..., ContextManager]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
HERMES = '<tool_call>{"name": "add", "arguments": {"a": 2, "b": [3]}}</tool_call>'
MISTRAL = '[TOOL_CALLS][{"name": "add", "arguments": {"a": 2}}, {"name": "sub", "arguments": {}}]'
SAID = {
    "text": "one two three stop",
    "characters": "a € and 🙂 too",
    "thinking": "<think>hm. so be it</think> yes, it is",
    "hermes": f"well {HERMES} and {HERMES} so",
    "mistral": f"so {MISTRAL}",
    "llama3": '{"name": "add", "parameters": {"a": 2}}; {"name": "sub", "parameters": {}}',
    "no call": 'x <tool_call>{"name": "add", "arguments": {"a": oh no',
}


def added_up(chunks: Iterable[Chunk]) -> tuple[str, str, list[dict[str, Any]]]:
    """Content, thinking and calls as a reader of the chunks has them at the end."""
    texts = {"content": "", "thinking": "", "tool_call": ""}
    calls: list[dict[str, Any]] = []
    for chunk in chunks:
        texts[chunk.kind] += chunk.text
        delta = chunk.tool_call
        if delta is None:
            continue
        if delta.withdrawn:
            assert calls.pop()["id"] == delta.id
        elif delta.index == len(calls):
            calls.append({"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}})
        else:
            assert calls[delta.index]["id"] == delta.id
            calls[delta.index]["function"]["arguments"] += delta.arguments
    assert texts["tool_call"] == ""
    return texts["content"], texts["thinking"], calls


def assert_adds_up(chunks: list[Chunk], session: Session) -> Reply:
    reply = chunks[-1].reply
    assert reply is not None
    assert not any(chunk.reply for chunk in chunks[:-1])
    assert added_up(chunks) == (reply.text, reply.thinking, list(reply.tool_calls))
    if not reply.got_nowhere:
        last = session.messages[-1]
        assert (last["content"], last.get("tool_calls", [])) == (reply.text, list(reply.tool_calls))
    return reply


@pytest.mark.parametrize("why", ["cancelled", "timeout", "length"])
@pytest.mark.parametrize("said", SAID)
def test_the_chunks_of_a_reply_cut_short_anywhere_add_up_to_it(load: Loader, said: str, why: str) -> None:
    engine = Engine(load(n_ctx=8192, max_sessions=1))
    whole, n, n_held = "", 0, 0
    while not whole:
        session, n = Session(tools=TOOLS), n + 1
        options: dict[str, Any] = {"max_tokens": n} if why == "length" else {}
        stream = scripted(engine, session, "x", SAID[said], by_byte=True, stop=["stop!", "too far"], **options)
        chunks: list[Chunk] = []
        if why != "length":
            while sum(chunk.token is not None for chunk in chunks) < n and stream.reply is None:
                chunks.append(next(stream))
            if why == "timeout" and stream.reply is None:
                stream._why_stop = lambda: "timeout"  # type: ignore[method-assign]
            stream.cancel()
        shown = added_up(chunks)
        chunks += list(stream)
        reply = assert_adds_up(chunks, session)
        n_held += why != "length" and added_up(chunks) != shown
        if reply.stop_reason == "stop":
            whole = reply.text + reply.thinking + str(reply.tool_calls)
        else:
            assert reply.stop_reason == why
    assert n > 10
    assert why == "length" or n_held  # at some point something was held back


def test_a_stop_string_that_has_begun_is_text_where_the_reply_is_cancelled(load: Loader) -> None:
    session = Session()
    stream = scripted(Engine(load()), session, "x", "one stop", by_byte=True, stop="stop!")
    chunks = [next(stream) for _ in "one st"]
    assert "".join(chunk.text for chunk in chunks) == "one "
    stream.cancel()
    (last,) = stream
    assert (last.text, last.token, last.kind) == ("st", None, "content")
    assert last.reply is not None
    assert last.reply.text == session.messages[-1]["content"] == "one st"


# -- threads


class Gate:
    """Stops a stream in the middle of `next`, in its sampler."""

    def __init__(self, stream: Stream) -> None:
        self.inside, self.go_on = threading.Event(), threading.Event()
        sample = stream._generation._sampler.sample

        def slow(*args: Any) -> Any:
            self.inside.set()
            assert self.go_on.wait(10)
            return sample(*args)

        stream._generation._sampler.sample = slow  # type: ignore[method-assign]


def in_thread(act: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """A started thread, and what `act` comes to."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(act())
        except Exception as e:
            outcome.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, outcome


def test_a_second_thread_is_told_that_the_stream_is_being_advanced(load: Loader) -> None:
    stream = Engine(load()).stream(Session(), "Who?", max_tokens=2, logit_bias=only_text(load()))
    gate = Gate(stream)
    thread, outcome = in_thread(lambda: next(stream))
    assert gate.inside.wait(10)
    with pytest.raises(StateError, match="being advanced already, by another thread"):
        next(stream)
    gate.go_on.set()
    thread.join(10)
    assert isinstance(outcome[0], Chunk)
    assert len(list(stream)) == 1


def test_of_two_threads_that_come_at_the_same_instant_one_waits_and_sees_how_it_ended(load: Loader) -> None:
    session = Session()
    stream = Engine(load()).stream(session, "Who?", max_tokens=1)
    gate = Gate(stream)

    class LooksFree:
        """The stream's lock, as it looks to a thread that asks just before another takes it."""

        lock = stream._inside

        def locked(self) -> bool:
            asked.set()
            return False

        def __enter__(self) -> None:
            self.lock.acquire()

        def __exit__(self, *exc: object) -> None:
            self.lock.release()

    asked = threading.Event()
    stream._inside = LooksFree()  # type: ignore[assignment]
    first, one = in_thread(lambda: next(stream))
    assert gate.inside.wait(10)
    asked.clear()
    second, other = in_thread(lambda: next(stream, "over"))
    assert asked.wait(10)
    gate.go_on.set()
    first.join(10)
    second.join(10)
    assert one[0].reply is stream.reply is not None
    assert other == ["over"]
    assert [m["role"] for m in session.messages] == ["user", "assistant"]


def test_a_close_from_another_thread_ends_the_next_that_is_under_way(load: Loader) -> None:
    cm = load()
    session = Session()
    stream = Engine(cm).stream(session, "Who?", logit_bias=only_text(cm))
    said = next(stream).text
    gate = Gate(stream)
    thread, outcome = in_thread(lambda: next(stream))
    assert gate.inside.wait(10)
    stream.close()  # does not wait
    assert stream.reply is None
    gate.go_on.set()
    thread.join(10)
    assert outcome[0].reply is stream.reply is not None
    assert (stream.reply.stop_reason, stream.reply.text) == ("cancelled", said)
    assert list(stream) == []
    assert not cm.is_held(session)


def test_a_close_that_comes_too_late_for_the_step_under_way_still_ends_the_stream(load: Loader) -> None:
    cm = load()
    session = Session()
    stream = Engine(cm).stream(session, "Who?", logit_bias=only_text(cm))
    chunks_of = stream._generation.chunks

    def chunks(token: int | None) -> list[Chunk]:
        thread, _ = in_thread(stream.close)
        thread.join(10)
        return chunks_of(token)

    stream._generation.chunks = chunks  # type: ignore[method-assign]
    chunk = next(stream)
    assert chunk.reply is None
    assert stream.reply is not None
    assert stream.reply.text == chunk.text == session.messages[-1]["content"]
    assert not cm.is_held(session)
    assert list(stream) == []
