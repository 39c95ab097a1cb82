"""The chat server of the examples in a process of its own, and a client of it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import model_path

SCRIPT = Path(__file__).parent.parent / "examples" / "14_async_chat_server.py"
ARGUMENTS = ["--preset", "fast", "--n-threads", "1", "--port"]
COMMAND = [sys.executable, str(SCRIPT), *ARGUMENTS]
# As if its model were large: however fast the machine, a long reply takes longer than any test of what happens in it.
SLOW = f"""
import runpy, sys, time
from llama_sessions.llama.context import LlamaContext
decode = LlamaContext.decode
LlamaContext.decode = lambda *args: time.sleep(0.05) or decode(*args)
sys.argv[0] = {str(SCRIPT)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@dataclass
class Server:
    """A running server. `end` is what Ctrl-C does."""

    process: subprocess.Popen[str]
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def ask(self, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        """GET, or POST of JSON (bytes as they are). Whoever reads the answer to its end has closed the connection."""
        headers = {"connection": "close", **headers}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        if body is None:
            connection.request("GET", path, headers=headers)
        else:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            connection.request("POST", path, data, {"content-type": "application/json", **headers})
        return connection.getresponse()

    def json(self, path: str, body: Any = None) -> Any:
        """What a call that works answers."""
        response = self.ask(path, body)
        data = json.loads(response.read())
        assert response.status in (200, 201), data
        return data

    def error(self, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """Status and message of a call that is refused."""
        response = self.ask(path, body, **headers)
        return response.status, json.loads(response.read())["error"]

    def events(self, response: http.client.HTTPResponse) -> Iterator[tuple[str, dict[str, Any]]]:
        """Server-sent events as they come."""
        assert response.status == 200, response.read()
        assert (response.getheader("content-type") or "").startswith("text/event-stream")
        while line := response.readline().decode():
            name = line.removeprefix("event: ").strip()
            yield name, json.loads(response.readline().decode().removeprefix("data: "))
            assert response.readline() == b"\n"

    def say(self, tab: str, text: str) -> dict[str, Any]:
        """One turn: the last event, whose reply is what the chunks before it said."""
        *chunks, (name, end) = self.events(self.ask(f"/tabs/{tab}/chat", {"text": text}))
        assert name == "end", end
        assert {kind for kind, _ in chunks} == {"chunk"}
        assert "".join(chunk["text"] for _, chunk in chunks) == end["messages"][-1]["content"]
        return end

    def end(self) -> None:
        """Ctrl-C: it ends by itself, and has nothing to complain about."""
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=60)
        assert errors == ""
        assert self.process.returncode == 0


@contextmanager
def serving(*, endless: bool = False) -> Iterator[Server]:
    """Start it on a free port, and end it. `endless`: a reply takes minutes unless it is stopped: 2,048 tokens, 20 a
    second."""
    model = [sys.executable, "-c", SLOW, *ARGUMENTS, "0", "--model", str(model_path("llama-spm"))]
    process = subprocess.Popen(
        model if endless else [*COMMAND, "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONWARNINGS": "error"},
    )
    try:
        assert process.stdout is not None
        assert process.stderr is not None
        line = process.stdout.readline()
        found = re.match(r"http://127\.0\.0\.1:(\d+) ", line)
        assert found, line + process.stderr.read()
        server = Server(process, int(found[1]))
        yield server
        if process.poll() is None:
            server.end()
    finally:
        process.kill()
        process.communicate()
