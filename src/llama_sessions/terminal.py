"""`python -m llama_sessions chat`: a conversation, or several, in a terminal."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeVar

from .engine import Engine
from .errors import LlamaSessionsError
from .manager import ContextManager
from .session import Session

HELP = """\
/fork         branch off here, and go on in the branch     /switch N     go on in session N (no N: list them)
/undo         take the last question and answer back       /regen        answer the last question anew
/save FILE    write this session down                      /load FILE    read one, and go on in it
/new          an empty session                             /stats        who holds which tokens, how full it is
/pin          the last question and answer stay, when others have to go for want of room
/help         this                                         /quit         or Ctrl-D
A line that ends with \\ goes on in the next; \"\"\" alone begins and ends a text of several lines.
Ctrl-C stops a reply; what was said of it stays."""

T = TypeVar("T")

_DIM, _PLAIN = "\033[2m", "\033[0m"
_LONG_PROMPT = 256  # tokens to decode from which on progress is shown


class Terminal:
    """Reads lines, prints replies. `ask(prompt)` gives a line, EOFError at the end."""

    def __init__(self, cm: ContextManager, ask: Callable[[str], str], out: TextIO, **options: Any) -> None:
        self._cm = cm
        self._engine = Engine(cm)
        self._ask = ask
        self._out = out
        self._options = options
        self._in_colour = out.isatty()
        self._shows_progress = False
        self._can_be_stopped = False
        self._sessions = [Session()]
        self._at = 0
        self._commands: dict[str, Callable[[str], None]] = {
            "fork": self._fork, "switch": self._switch, "undo": self._undo, "regen": self._regenerate,
            "save": self._save, "load": self._load, "new": self._new, "pin": self._pin, "stats": self._stats,
            "help": lambda _: self._say(HELP),
        }  # fmt: skip
        cm.set_hook("on_progress", self._progress)

    @property
    def _session(self) -> Session:
        return self._sessions[self._at]

    def _say(self, text: str = "", end: str = "\n") -> None:
        self._out.write(text + end)
        self._out.flush()

    def run(self) -> None:
        """Until /quit or the end of the input. Errors are said, and the conversation goes on."""
        self._say(f"{self._cm.capabilities.model}, {self._cm.n_ctx_seq} tokens. /help says what can be typed.")
        while True:
            try:
                text = self._until_stopped(self._read)
            except EOFError:
                self._say()
                return
            except KeyboardInterrupt:  # at the prompt: begin the line again
                self._say()
                continue
            if text.strip() in ("/quit", "/exit"):
                return
            try:
                self._until_stopped(partial(self._obey, text))
            except KeyboardInterrupt:
                self._say("\n(stopped)")
            except (LlamaSessionsError, OSError, ValueError, RecursionError) as e:
                self._say(f"{type(e).__name__}: {e}")

    def interrupt(self, *_: object) -> None:
        """A handler for SIGINT: stops the line or the reply that is under way, and at any other moment nothing."""
        if self._can_be_stopped:
            self._can_be_stopped = False  # pressed twice, it must not stop the stopping
            raise KeyboardInterrupt

    def _until_stopped(self, act: Callable[[], T]) -> T:
        try:
            self._can_be_stopped = True
            return act()
        finally:
            self._can_be_stopped = False

    def _read(self) -> str:
        """What the user says: a line, or several."""
        prompt = "> " if len(self._sessions) == 1 else f"{self._at + 1}> "
        line = self._ask(prompt)
        if line.strip() == '"""':
            lines = []
            while (line := self._ask("… ")).strip() != '"""':
                lines.append(line)
            return "\n".join(lines)
        text = line
        while text.endswith("\\"):
            text = text[:-1] + "\n" + self._ask("… ")
        return text

    def _obey(self, text: str) -> None:
        if not text.strip():
            return
        if not text.startswith("/"):
            self._reply(lambda: self._engine.stream(self._session, text, **self._options))
            return
        name, _, rest = text[1:].partition(" ")
        command = self._commands.get(name)
        if command is None:
            self._say(f"there is no /{name}; /help says what there is")
        else:
            command(rest.strip())

    def _reply(self, start: Callable[[], Any]) -> None:
        kind = "content"
        try:
            with start() as stream:
                for chunk in stream:
                    if chunk.kind != kind and chunk.text:
                        if self._in_colour:
                            self._say(_DIM if chunk.kind == "thinking" else _PLAIN, end="")
                        if kind == "thinking":
                            self._say("\n")
                        kind = chunk.kind
                    self._say(chunk.text, end="")
        finally:  # a thinking that is stopped must not leave the terminal dim, nor a prompt its progress to the next
            self._shows_progress = False
            if self._in_colour:
                self._say(_PLAIN, end="")
        reply = stream.reply
        cost = ""
        if reply is not None:
            cost = f"  [{reply.n_reused} reused, {reply.n_decoded} decoded, {reply.n_generated} said{self._unseen()}]"
        self._say(f"{_DIM}{cost}{_PLAIN}" if self._in_colour else cost)

    def _unseen(self) -> str:
        """That the model does not see all messages any more, once that is so."""
        n, n_seen = len(self._session.messages), len(self._session.window)
        return "" if n == n_seen else f"; {n_seen} of {n} messages in the window"

    def _progress(self, done: int, total: int, session: Session) -> None:
        """A line that shows how far a long prompt is, on a terminal."""
        if self._in_colour and (self._shows_progress or total - done > _LONG_PROMPT):
            self._shows_progress = done < total
            line = f"{_DIM}reading {done} of {total} tokens{_PLAIN}" if self._shows_progress else ""
            self._say(f"\r{line}\033[K", end="")

    # -- commands

    def _fork(self, _: str) -> None:
        self._sessions.append(self._cm.fork(self._session))
        self._at = len(self._sessions) - 1
        self._say(f"session {self._at + 1}, with the past of the one before")

    def _switch(self, number: str) -> None:
        if number.isdecimal() and 1 <= int(number) <= len(self._sessions):
            self._at = int(number) - 1
        for i, session in enumerate(self._sessions):
            last = (session.messages[-1].get("content") or "") if session.messages else "nothing said yet"
            self._say(f"{'*' if i == self._at else ' '} {i + 1}: {len(session.messages)} messages, {last[:60]!r}")

    def _undo(self, _: str) -> None:
        if self._session.undo():
            self._say(f"{len(self._session.messages)} messages left")
        else:
            self._say("there is nothing to undo")

    def _regenerate(self, _: str) -> None:
        """Stream another answer; the old one comes back if it is stopped before its first token."""
        messages = self._session.messages
        if not messages or messages[-1]["role"] != "assistant":
            self._say("there is no answer to make anew")
            return
        old = messages.pop()
        try:
            self._reply(lambda: self._engine.stream(self._session, **self._options))
        finally:
            if not messages or messages[-1]["role"] != "assistant":
                messages.append(old)

    def _pin(self, _: str) -> None:
        """Pin the last question with all that followed, since many templates want the two in turn."""
        session = self._session
        turns = [i for i, message in enumerate(session.messages) if message["role"] == "user"]
        if not turns:
            self._say("there is nothing to pin")
            return
        for i in range(turns[-1], len(session.messages)):
            session.pin_message(i)
        self._say(f"{len(session.pinned_messages())} messages pinned")

    def _save(self, name: str) -> None:
        if not name:
            self._say("/save needs the name of a file")
            return
        Path(name).write_text(json.dumps(self._session.to_dict(), indent=1, ensure_ascii=False), encoding="utf-8")
        self._say(f"{len(self._session.messages)} messages written to {name}")

    def _load(self, name: str) -> None:
        if not name:
            self._say("/load needs the name of a file")
            return
        self._add(Session.from_dict(json.loads(Path(name).read_text(encoding="utf-8"))))
        self._say(f"session {self._at + 1}, {len(self._session.messages)} messages")

    def _new(self, _: str) -> None:
        self._add(Session())
        self._say(f"session {self._at + 1}")

    def _add(self, session: Session) -> None:
        self._sessions.append(session)
        self._at = len(self._sessions) - 1

    def _stats(self, _: str) -> None:
        self._say(self._cm.describe())
        session, ahead = self._session, self._cm.preview(self._session)
        share = ahead.n_tokens / self._cm.n_ctx_seq
        self._say(f"context {share:.0%} full: {len(session.window)} of {len(session.messages)} messages in the window")
        self._say(f"last prompt: {self._session.last_prepare or 'none yet'}")


def chat(model: str, system: str | None, *, n_ctx: int | None = None, **options: Any) -> None:
    """Chat on a model in this terminal, or with whatever stdin and stdout are."""
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401 - gives `input` its line editing and history
    with ContextManager.load(model, n_ctx=n_ctx) as cm:
        if system:
            cm.set_system(system)
        terminal = Terminal(cm, input, sys.stdout, **options)
        with _handler(terminal.interrupt):
            terminal.run()


@contextmanager
def _handler(interrupt: Callable[..., None]) -> Iterator[None]:
    """Ctrl-C calls `interrupt`. Python's own handler raises at any moment: between two lines of a loop, too."""
    if threading.current_thread() is not threading.main_thread():  # where there are no handlers
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
