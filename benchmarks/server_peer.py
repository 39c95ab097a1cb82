"""llama-server as a side: its OpenAI endpoint on loopback, a slot for each session."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bare import has_amx
from harness import Result
from peers import chat_turns


def server(config: Result) -> Result:
    """Slots keep each session's KV; idle slots stay where they are (`--no-cache-idle-slots`).

    With `n_slots`, fewer than sessions: the server chooses slots itself, and its prompt cache in RAM is on.
    """
    options = [] if "n_slots" in config else ["--no-cache-idle-slots"]
    with serving(config, config.get("n_slots", config["n_sessions"]), *options) as (port, pid):
        return _turns(config, port, pid)


@contextmanager
def serving(config: Result, n_slots: int, *options: str) -> Iterator[tuple[int, int]]:
    """A llama-server with so many slots over unified KV, ready; its port and process id."""
    port = _free_port()
    command = [
        config["llama_server"], "-m", config["model"], "--host", "127.0.0.1", "--port", str(port),
        "-c", str(config["n_ctx"]), "-np", str(n_slots), "--kv-unified", *settings(config),
        *options, *config.get("server_options", []),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            _wait_until_ready(process, port, log)
            yield port, process.pid
        finally:
            process.terminate()
            process.wait(30)


def settings(config: Result) -> list[str]:
    """Options of llama.cpp's own programs that make them what the other sides are."""
    return [
        "-b", str(config["n_batch"]), "-ub", str(config["n_ubatch"]),
        "-t", str(config["n_threads"]), "-tb", str(config["n_threads"]), "-fa", "auto",
        *(["--no-repack"] if has_amx() else []),
    ]  # fmt: skip


def events(port: int, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The events of a streamed chat completion."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"llama-server answered {response.status}: {response.read()[:500]!r}")
    for line in response:
        if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
            yield json.loads(line[6:])
    connection.close()


def _turns(config: Result, port: int, pid: int) -> Result:
    last: dict[str, Any] = {}

    def answer(messages: list[dict[str, str]], session: int) -> Iterator[str]:
        body = {
            "messages": messages,
            "stream": True,
            "max_tokens": config["n_reply"],
            "temperature": 0.0,
            **({} if "n_slots" in config else {"id_slot": session}),
            "cache_prompt": True,
            "logit_bias": [[t, False] for t in config["banned"]],
        }
        for event in events(port, body):
            last.update(event.get("timings") or {})
            for choice in event.get("choices", ()):
                yield choice["delta"].get("content") or ""

    def counts() -> tuple[int, int]:
        return last["cache_n"] + last["prompt_n"], last["prompt_n"]

    def cpu_seconds() -> float:
        stat = Path(f"/proc/{pid}/stat")  # Linux; elsewhere the client's own counts alone
        ticks = stat.read_text().rpartition(")")[2].split()[11:13] if stat.exists() else []
        return time.process_time() + (sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") if ticks else 0.0)

    return chat_turns(config, answer, counts, cpu_seconds)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Any) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            log.seek(0)
            raise RuntimeError(f"llama-server ended with {process.returncode}: {log.read()[-2000:].decode()}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise RuntimeError("llama-server was not ready within 120 s")
