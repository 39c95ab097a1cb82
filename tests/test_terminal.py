"""The chat in a terminal: commands, several lines, errors that do not end it, Ctrl-C that stops a reply only."""

from __future__ import annotations

import io
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from interrupting import interrupted_everywhere
from scripted import only_text
from test_reasoning import OPENS

from llama_sessions import ContextManager
from llama_sessions.terminal import _DIM, _PLAIN, Terminal

Loader = Callable[..., ContextManager]


def typing(*lines: str) -> Callable[[str], str]:
    """Lines for a terminal to ask for, then the end."""
    left = iter(lines)

    def ask(prompt: str) -> str:
        line = next(left, None)
        if line is None:
            raise EOFError
        return line

    return ask


def talk(cm: ContextManager, *lines: str, **options: Any) -> str:
    """What the terminal prints when these lines are typed."""
    out, next_line = io.StringIO(), typing(*lines)

    def ask(prompt: str) -> str:
        line = next_line(prompt)
        out.write(f"{prompt}{line}\n")
        return line

    Terminal(cm, ask, out, **{"max_tokens": 6, "temperature": 0.0, **options}).run()
    return out.getvalue()


@pytest.fixture
def cm(tiny_chat: Path) -> ContextManager:
    return ContextManager.load(tiny_chat, max_sessions=4, n_ctx=1024, n_threads=1)


def test_a_conversation_remembers_and_counts(cm: ContextManager) -> None:
    cm.set_system("You remember what you are told.")
    out = talk(cm, "My name is Marelo.", "What is my name?", max_tokens=24)
    assert "Marelo" in out.split("What is my name?")[1]
    assert re.search(r"\[\d+ reused, \d+ decoded, \d+ said\]", out)


def test_lines_go_on_behind_a_backslash_and_between_quotes(load: Loader) -> None:
    cm = load()
    seen: list[str] = []
    cm.set_hook("before_encode", lambda messages, session: seen.append(messages[-1]["content"]))
    talk(cm, "one\\", "two", '"""', "three", "", "four", '"""', logit_bias=only_text(cm))
    assert seen == ["one\ntwo", "three\n\nfour"]


def test_fork_and_switch_keep_conversations_apart(load: Loader) -> None:
    cm = load()
    out = talk(cm, "first", "/fork", "second", "/switch 1", "/switch 9", "/new", "/switch", logit_bias=only_text(cm))
    assert "session 2, with the past of the one before" in out
    lists = re.findall(r"([* ]) (\d): (\d) messages", out)
    assert lists[:2] == [("*", "1", "2"), (" ", "2", "4")]
    assert lists[-3:] == [(" ", "1", "2"), (" ", "2", "4"), ("*", "3", "0")]


def test_undo_and_regen(load: Loader) -> None:
    cm = load()
    out = talk(cm, "/undo", "/regen", "first", "/regen", "/undo", "/undo", logit_bias=only_text(cm))
    assert "there is nothing to undo" in out
    assert "there is no answer to make anew" in out
    assert "0 messages left" in out
    assert out.count("reused") == 2


def test_a_regen_that_is_stopped_before_its_first_token_brings_the_answer_back(load: Loader) -> None:
    cm = load()
    presses = iter([None, KeyboardInterrupt])

    def press(messages: Any, session: Any) -> None:
        key = next(presses, None)
        if key is not None:
            raise key

    cm.set_hook("before_encode", press)
    out = talk(cm, "first", "/regen", "/switch", "/regen", logit_bias=only_text(cm))
    assert "(stopped)\n> /switch\n* 1: 2 messages" in out
    assert out.count("said]") == 2


def test_save_and_load(load: Loader, tmp_path: Path) -> None:
    cm, file = load(), tmp_path / "talk.json"
    lines = ["first", f"/save {file}", f"/load {file}", "/stats", "/load nowhere.json", "/load", "/save"]
    out = talk(cm, *lines, logit_bias=only_text(cm))
    assert f"2 messages written to {file}" in out
    assert "session 2, 2 messages" in out
    assert "slots in use" in out
    assert "FileNotFoundError" in out
    assert "/load needs the name of a file" in out
    assert "/save needs the name of a file" in out


@pytest.mark.parametrize("line", ["/nothing", "/load", "/save /", "\ud800", "x" * 100_000])
def test_an_error_is_said_and_the_conversation_goes_on(load: Loader, line: str) -> None:
    out = talk(cm := load(), line, "/help", "hi", logit_bias=only_text(cm))
    assert "/switch N" in out  # of /help, after it
    assert "said]" in out


def test_pin_keeps_the_last_turn_and_what_is_out_of_the_window_is_said(tiny_chat: Path) -> None:
    with ContextManager.load(tiny_chat, max_sessions=1, n_ctx=256, n_threads=1) as cm:
        counting = [f"What comes after {n}?" for n in range(1, 10)]
        out = talk(cm, "/pin", "My name is Marelo.", "/pin", *counting, "What is my name?", "/stats", max_tokens=24)
    nothing, said = out.split("there is nothing to pin")
    assert nothing.endswith("> /pin\n")
    assert "2 messages pinned" in said
    assert "Your name is Marelo." in said
    assert "; 14 of 22 messages in the window]" in said
    assert re.search(r"context \d\d% full: 14 of 22 messages in the window", said)
    assert " of 14 messages in the window" not in said  # while all of them are


def test_from_a_pipe_it_answers_and_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llama_sessions", "chat", "--preset", "fast", "--system", "The password is velora."],
        input="What is the password?\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "velora" in done.stdout
    assert "\033" not in done.stdout


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_what_the_terminal_cannot_spell_does_not_end_it(encoding: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llama_sessions", "chat", "--preset", "fast"],
        input=b'caf\xe9\n\xff\xfe\n"""\nMy name is\nMarelo.\n"""\n/help\n',
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b" said]") == 3
    assert b"/switch N" in done.stdout


def test_ctrl_c_at_no_moment_ends_the_program(load: Loader) -> None:
    cm = load()
    outs: list[io.StringIO] = []

    def start() -> Terminal:
        outs.append(io.StringIO())
        return Terminal(cm, typing("/undo", "/nothing", "/switch 5"), outs[-1])

    ended: list[Terminal] = []

    def act(terminal: Terminal) -> None:
        terminal.run()
        ended.append(terminal)

    n = interrupted_everywhere(start, act, lambda _: None, press=Terminal.interrupt)
    assert len(ended) == len(outs) > n > 200
    assert sum("(stopped)" in out.getvalue() for out in outs) > 50  # and elsewhere there was nothing to stop


def test_ctrl_c_stops_a_reply_and_not_the_program(tmp_path: Path) -> None:
    from models import model_path

    main, other = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "llama_sessions",
        "chat",
        "--model",
        str(model_path("llama-bpe")),
        "--n-ctx",
        "2048",
    ]
    process = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, start_new_session=True)
    os.close(other)
    printed = b""

    def wait_for(pattern: bytes, seconds: float = 30) -> None:
        nonlocal printed
        os.set_blocking(main, False)
        end = time.monotonic() + seconds
        while not re.search(pattern, printed):
            assert time.monotonic() < end, printed[-2000:]
            try:
                printed += os.read(main, 65536)
            except BlockingIOError:
                time.sleep(0.01)

    try:
        wait_for(rb"> $")
        for _ in range(50):  # a reply of random weights may be over before the signal comes
            printed = b""
            os.write(main, b"go on and on\n")
            wait_for(rb"on and on\r\n(.{4}|\r\n> $)")
            if printed.endswith(b"\r\n> "):  # the signal before came as the prompt did, and took this line with it
                continue
            process.send_signal(signal.SIGINT)
            wait_for(rb"> $")
            if b"(stopped)" in printed:
                break
        assert b"(stopped)" in printed
        printed = b""
        os.write(main, b"/stats\n")
        wait_for(rb"slots in use")
        os.write(main, b"/quit\n")
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        os.close(main)


def test_info_tells_what_a_model_can_do() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llama_sessions", "info"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    for text in (
        "tiny-chat (llama 1.8M F16)",
        "memory     full",
        "bytes a token",
        "shifting   allowed",
        "shift: what stands",
        "nothing to warn of",
    ):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("recipe", "options", "says"),
    [
        ("llama-bpe", {}, "shift: what stands behind a hole moves up"),
        (
            "llama-yarn",
            {},
            r"gap: positions go on to \d+ \(so choose a smaller n_ctx\), then the window is decoded anew",
        ),
        ("gemma3", {"swa_full": False}, "decoded anew: whatever stays"),
        ("hybrid", {}, "decoded anew: whatever stays"),
        ("mamba", {}, "never needed: a state takes no more room"),
    ],
)
def test_info_says_what_becomes_of_long_conversations(
    load: Loader, recipe: str, options: dict[str, Any], says: str
) -> None:
    from llama_sessions.info import describe

    assert re.search(rf"^eviction   {says}", "\n".join(describe(load(recipe, **options))), re.MULTILINE)


@pytest.mark.parametrize(("recipe", "says"), [("llama-bpe", "256"), ("gemma3", "1,536"), ("mamba", "0")])
def test_info_says_what_a_token_takes(load: Loader, recipe: str, says: str) -> None:
    from llama_sessions.info import describe

    assert f"\nKV         {says} bytes a token" in "\n".join(describe(load(recipe)))


REFUSES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}{{ m.role + ': ' }}"
    "{{ m.content.split('</think>')[-1] + '\n' }}{% endfor %}"
)


def test_info_warns_of_what_a_template_does(load: Loader) -> None:
    from llama_sessions.info import template_warnings

    warnings = " ".join(template_warnings(load(chat_template=REFUSES)))
    for text in ("refuses a system text", "rewrites its past", "writes no control tokens"):
        assert text in warnings
    assert list(template_warnings(load())) == []


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_thinking_that_is_stopped_leaves_nothing_dim(load: Loader) -> None:
    """Neither what is said of it nor the next line."""

    class Stopped(Screen):
        presses = iter([KeyboardInterrupt])

        def write(self, text: str) -> int:
            if self.getvalue().endswith(_DIM):
                for press in self.presses:
                    raise press
            return super().write(text)

    cm, out = load(chat_template=OPENS), Stopped()
    Terminal(cm, typing("hi", "/help"), out, max_tokens=6, logit_bias=only_text(cm)).run()
    assert f"{_DIM}{_PLAIN}\n(stopped)\n" in out.getvalue()


@pytest.mark.parametrize("n_words", [20, 600])
def test_a_long_prompt_shows_its_progress_on_a_terminal_and_clears_it(load: Loader, n_words: int) -> None:
    cm, out = load(n_ctx=2048), Screen()
    Terminal(cm, typing("word " * n_words), out, max_tokens=2, logit_bias=only_text(cm)).run()
    text = out.getvalue()
    assert ("reading" in text) == (n_words > 256)
    assert text.count("\r\033[K") == (1 if n_words > 256 else 0)  # cleared once, before the reply


def test_a_long_prompt_that_is_stopped_leaves_its_progress_to_no_other(load: Loader) -> None:
    class Stopped(Screen):
        presses = iter([KeyboardInterrupt])

        def write(self, text: str) -> int:
            if "reading 256" in text:
                for press in self.presses:
                    raise press
            return super().write(text)

    cm, out = load(n_ctx=2048), Stopped()
    Terminal(cm, typing("word " * 600, "hi"), out, max_tokens=2, logit_bias=only_text(cm)).run()
    stopped, answered = out.getvalue().split("(stopped)")
    assert "reading 0 of" in stopped
    assert "reading" not in answered
    assert "said]" in answered
