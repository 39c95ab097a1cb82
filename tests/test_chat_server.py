"""The web chat of the examples, over HTTP: `test_browser` looks at it through a browser."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from chat_server import COMMAND, SCRIPT, Server, serving
from gate import wait_until


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def slow() -> Iterator[Server]:
    with serving(endless=True) as server:
        yield server


@pytest.fixture
def tab(server: Server) -> str:
    return new_tab(server)


def new_tab(server: Server) -> str:
    tab: str = server.json("/tabs", {})["tab"]
    return tab


def last(state: dict[str, Any]) -> str:
    text: str = state["messages"][-1]["content"]
    return text


# -- talking


def test_a_reply_comes_as_events_and_the_next_turn_reuses_it(server: Server, tab: str) -> None:
    first = server.say(tab, "My name is Marelo.")
    assert last(first) == "Nice to meet you, Marelo."
    second = server.say(tab, "What is my name?")
    assert last(second) == "Your name is Marelo."
    assert int(second["cost"].split(" reused")[0]) > 20
    assert server.json(f"/tabs/{tab}")["messages"] == second["messages"]


def test_tabs_that_talk_at_once_never_hear_each_other(server: Server) -> None:
    names = ["Anelda", "Borvin", "Cemiro", "Dolfan"]
    said: dict[str, str] = {}

    def talk(name: str) -> None:
        tab = new_tab(server)
        server.say(tab, f"My name is {name}.")
        said[name] = last(server.say(tab, "What is my name?"))

    threads = [threading.Thread(target=talk, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == {name: f"Your name is {name}." for name in names}


def test_a_fork_goes_on_from_the_same_past(server: Server, tab: str) -> None:
    server.say(tab, "My cat is called Sulan.")
    n_decoded = server.json("/map")["stats"]["n_tokens_decoded"]
    branch = server.json(f"/tabs/{tab}/fork", {})
    assert branch["tab"] != tab
    assert len(branch["messages"]) == 2
    assert server.json("/map")["stats"]["n_tokens_decoded"] == n_decoded
    server.say(branch["tab"], "My horse is called Bemor.")
    assert last(server.say(branch["tab"], "What is my cat called?")) == "Your cat is called Sulan."
    assert last(server.say(tab, "What is my horse called?")) == "You have not told me what your horse is called."


def test_a_tab_that_talks_on_and_on_is_still_understood(server: Server, tab: str) -> None:
    """Past what the model was trained for it would be not: the oldest turns go before that."""
    story = "There was a long story in the paper about Orwas, who sailed to Tamoli in a small boat and came back rich. "
    for _ in range(30):
        server.say(tab, 2 * story)
    server.say(tab, "My name is Marelo.")
    assert last(server.say(tab, "What is my name?")) == "Your name is Marelo."
    assert len(server.json(f"/tabs/{tab}")["messages"]) == 64


def test_undo_takes_the_last_question_and_its_answer_back(server: Server, tab: str) -> None:
    server.say(tab, "My cat is called Sulan.")
    server.say(tab, "My cat is called Mirto.")
    assert len(server.json(f"/tabs/{tab}/undo", {})["messages"]) == 2
    assert last(server.say(tab, "What is my cat called?")) == "Your cat is called Sulan."
    for n_left in (2, 0, 0):
        assert len(server.json(f"/tabs/{tab}/undo", {})["messages"]) == n_left


# -- stopping


def test_stop_ends_a_reply_with_what_was_said(slow: Server) -> None:
    tab = new_tab(slow)
    events = slow.events(slow.ask(f"/tabs/{tab}/chat", {"text": "Count."}))
    said = [next(events)[1]["text"]]
    for path, message in (("chat", "in the pool already"), ("fork", "stop it first"), ("undo", "stop it first")):
        status, error = slow.error(f"/tabs/{tab}/{path}", {"text": "And?"})
        assert status == 409
        assert message in error
    assert slow.ask(f"/tabs/{tab}/stop", {}).status == 204
    for name, data in events:
        if name == "chunk":
            said.append(data["text"])
    assert (name, data["stopped"]) == ("end", True)
    assert last(data) == "".join(said)
    assert slow.ask(f"/tabs/{tab}/stop", {}).status == 204  # there is nothing to stop: no harm
    assert len(slow.json(f"/tabs/{tab}/undo", {})["messages"]) == 0


def test_who_leaves_in_mid_reply_leaves_the_session_free(slow: Server) -> None:
    tab = new_tab(slow)
    before = slow.json("/map")["pool"]["n_cancelled"]
    response = slow.ask(f"/tabs/{tab}/chat", {"text": "Count."})
    next(slow.events(response))
    response.close()
    wait_until(lambda: slow.json("/map")["pool"]["n_cancelled"] > before)
    assert slow.json("/map")["pool"]["n_running"] == 0
    assert len(slow.json(f"/tabs/{tab}/undo", {})["messages"]) == 0


def test_ctrl_c_in_mid_reply_ends_it_with_what_was_said() -> None:
    with serving(endless=True) as server:
        events = server.events(server.ask(f"/tabs/{new_tab(server)}/chat", {"text": "Count."}))
        next(events)
        server.end()
        name, data = list(events)[-1]
    assert (name, data["stopped"]) == ("end", True)


# -- the map


def test_the_map_says_who_holds_what() -> None:
    with serving() as server:
        first, second = new_tab(server), new_tab(server)
        server.say(first, "My name is Anelda.")
        server.say(second, "My name is Borvin.")
        seen = server.json("/map")
        stats = seen["stats"]
        assert [row["name"] for row in seen["rows"]] == ["tab 1", "tab 2"]
        for row in seen["rows"]:
            assert row["state"] == "idle"
            assert sum(n for _, n in row["parts"]) == row["n"] > 0
        parts = [dict(row["parts"]) for row in seen["rows"]]
        assert [list(each) for each in parts] == [["prefix", "decode", "said"], ["live", "decode", "said"]]
        assert sum(row["n"] for row in seen["rows"]) + stats["prefix_tokens"] == stats["n_cells_used"]
        assert stats["n_cells_used"] - stats["n_cells_unique"] == parts[0]["prefix"] + parts[1]["live"]
        assert seen["tree"] == []
        assert seen["pool"]["n_done"] == 2
        assert seen["pool"]["first_token_p95_s"] > 0

        server.json(f"/tabs/{first}/undo", {})
        server.say(first, "My dog is called Telmi.")
        tree = server.json("/map")["tree"]
        assert sum(edge["p1"] - edge["p0"] for edge in tree) == server.json("/map")["stats"]["radix"]["n_tokens"] > 0
        assert server.json(f"/tabs/{second}/fork", {})["name"] == "tab 3 ← 2"
        assert b"llama_sessions_done_total 3\n" in server.ask("/metrics").read()


def test_who_has_no_slot_is_shown_as_parked() -> None:
    with serving() as server:
        for _ in range(10):
            server.say(new_tab(server), "My name is Anelda.")
        rows = server.json("/map")["rows"]
    assert [row["state"] for row in rows] == ["parked"] * 2 + ["idle"] * 8
    assert all(row["n"] > 0 for row in rows)


# -- what is refused


@pytest.mark.parametrize(
    ("body", "headers", "status", "message"),
    [
        ({"text": " \n"}, {}, 400, "text must say something"),
        ({"text": 5}, {}, 400, "text must say something, not 5"),
        ({}, {}, 400, "text must say something, not None"),
        ({"text": "\ud800"}, {}, 400, "surrogate"),
        ([], {}, 400, "send an object, not list"),
        (b"{", {}, 400, "this is no JSON"),
        (b"\xff\xfe{", {}, 400, "this is no JSON"),
        (b"[" * 50_000, {}, 400, "this is no JSON"),
        ({"text": "x" * 200_000}, {}, 413, "at most 100000 bytes"),
        (b"text=hello", {"content-type": "application/x-www-form-urlencoded"}, 415, "send application/json"),
    ],
)
def test_what_is_no_question_is_refused_and_said_so(
    server: Server, tab: str, body: Any, headers: dict[str, str], status: int, message: str
) -> None:
    answer = server.error(f"/tabs/{tab}/chat", body, **headers)
    assert answer[0] == status
    assert message in answer[1]
    assert server.json(f"/tabs/{tab}")["messages"] == []


def test_a_question_that_can_never_fit_is_an_error_of_its_own(server: Server, tab: str) -> None:
    (event,) = server.events(server.ask(f"/tabs/{tab}/chat", {"text": "tea " * 20_000}))
    assert event[0] == "error"
    assert "raise n_ctx" in event[1]["error"]
    assert event[1]["messages"] == []
    assert last(server.say(tab, "My name is Marelo.")) == "Nice to meet you, Marelo."


def test_only_names_of_this_machine_are_let_in(server: Server) -> None:
    assert server.ask("/", host="localhost").status == 200
    assert server.ask("/map", host="elsewhere.example").status == 400


def test_tabs_are_bounded_and_whoever_spoke_longest_ago_goes() -> None:
    with serving() as server:
        oldest, second = new_tab(server), new_tab(server)
        server.say(oldest, "My name is Anelda.")
        for _ in range(63):
            new_tab(server)
        assert server.error(f"/tabs/{second}") == (404, "this tab is not known here any more; open a new one")
        assert last(server.say(oldest, "What is my name?")) == "Your name is Anelda."


def test_a_port_that_is_taken_is_one_clear_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([*COMMAND, str(port)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert re.fullmatch(rf"port {port} of 127\.0\.0\.1: .*in use.*; try --port 0\n", done.stderr)


def test_the_page_needs_nothing_from_elsewhere(server: Server) -> None:
    response = server.ask("/")
    page = response.read().decode()
    assert page == SCRIPT.with_suffix(".html").read_text()
    assert "default-src 'none'" in (response.getheader("content-security-policy") or "")
    assert re.findall(r"https?://[^'\"\s]+", page) == ["http://www.w3.org/2000/svg"]  # a name, not an address
    assert json.dumps(re.findall(r"\bsrc=|@import|url\(|innerHTML", page)) == "[]"
