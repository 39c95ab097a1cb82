"""What the library itself costs, beside the llama.cpp calls it makes.

    python benchmarks/overhead.py                      # all four, about 12 minutes on 2 cores
    python benchmarks/overhead.py --only prepare,import
    python benchmarks/overhead.py --quick              # small shapes, few rounds

prepare   our own work in a warm `prepare` on top of an 8,000-token history, `llama_decode` not counted: at most 2 ms
token     a token of `Engine.stream` over a bare decode-and-sample loop with the same samplers: at most 0.1 ms more
import    `import llama_sessions` over `import llama_cpp` alone, in fresh processes: at most 50 ms more
prefill   `prepare` of n new tokens over a bare `llama_decode` of the same n: at most 2 % more
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import llama_cpp
from bare import Bare, sampler_chain
from harness import Inside, Result, described, interleaved, met, say, serve_part, spread, table, write_json
from workload import model_file, text

TARGETS = {"prepare": 2.0, "token": 0.1, "import": 50.0, "prefill": 2.0}  # ms, ms, ms, %
N_PREFILL = (32, 128, 512, 2000)


@dataclass(slots=True)
class Measured:
    """Seconds: `wall` in all; `own`: CPU time of this thread outside `llama_decode`. Nothing we call waits or sleeps,
    so own work is wall time too, but for what the machine's other programs took."""

    wall: float = 0.0
    own: float = 0.0


class Clock:
    """Measures; knows what was spent inside `llama_decode`, whoever calls it through the module (both sides do)."""

    def __init__(self) -> None:
        self._inside = Inside((llama_cpp, "llama_decode"), now=time.thread_time).__enter__()  # as long as the process

    @contextmanager
    def measure(self) -> Iterator[Measured]:
        """No garbage collection in the middle; one before it."""
        measured = Measured()
        gc.collect()
        gc.disable()
        inside, cpu, started = self._inside.seconds, time.thread_time(), time.perf_counter()
        try:
            yield measured
            measured.wall = time.perf_counter() - started
            measured.own = time.thread_time() - cpu - (self._inside.seconds - inside)
        finally:
            gc.enable()


# -- prepare


def warm_prepare(config: Result) -> Result:
    """Turn after turn on a long history; each new turn is prepared in one go, and answered with appended tokens."""
    from llama_sessions import ContextManager, Engine, Session

    clock = Clock()
    with ContextManager.load(config["model"], n_ctx=16384, max_sessions=8, n_threads=config["n_threads"]) as cm:
        engine = Engine(cm)
        cm.set_system(text(400, "system"))
        for i in range(3):  # neighbours, so that there is something to look through
            neighbour = Session()
            engine.chat(neighbour, text(500, f"neighbour {i}", f"other{i}"), max_tokens=8, temperature=0.0)
            config.setdefault("neighbours", []).append(neighbour)
        session = Session()
        turn = 0
        while session.n_past < config["n_history"]:
            engine.chat(session, text(60, f"turn {turn}", f"begin{turn}"), max_tokens=80, temperature=0.0)
            turn += 1
        n_messages, n_tokens = len(session.messages), session.n_past
        own, operations, n_decoded = [], [], []
        for i in range(config["n_turns"]):
            session.add_user(text(20, f"more {i}", f"next{i}"))
            before = cm.stats()
            with clock.measure() as measured:
                cm.prepare(session)
            after = cm.stats()
            own.append(measured.own)
            operations.append(after.operation_seconds - before.operation_seconds)
            assert session.last_prepare is not None
            n_decoded.append(session.last_prepare.n_decoded)
            spoken = b""
            for _ in range(8):
                token = int(cm.logits(session).argmax())
                spoken += cm.vocab.piece(token)
                cm.append(session, token)
            session.add_assistant(spoken.decode())
    return {
        "own_ms": statistics.median(own) * 1e3,
        "worst_ms": max(own) * 1e3,
        "operations_ms": statistics.median(operations) * 1e3,
        "n_messages": n_messages,
        "n_tokens": n_tokens,
        "n_decoded": statistics.median(n_decoded),
    }


# -- token


def adopted(config: Result) -> tuple[Bare, Any]:
    """A bare context, and a manager over the same one: both sides run on the same cells and graphs."""
    from llama_sessions import ContextManager

    bare = Bare(config)
    return bare, ContextManager(bare.ctx, bare.vocab)


def per_token(config: Result) -> Result:
    """Replies in pairs, ours and bare, over the same prompt: milliseconds a token."""
    from llama_sessions import Engine, Session

    clock = Clock()
    bare, cm = adopted(config)
    engine = Engine(cm)
    n = config["n_tokens"]
    out: Result = {}
    for chain_name, greedy in (("greedy", True), ("default", False)):
        pairs: dict[str, list[float]] = {"ours": [], "bare": [], "ours_own": [], "bare_own": []}
        for i in range(config["n_pairs"] + 1):
            session = Session()
            session.add_user(text(100, "prompt", "go"))
            cm.prepare(session)
            prompt = cm.tokens(session).tolist()
            options: dict[str, Any] = {"temperature": 0.0} if greedy else {"seed": i}
            stream = engine.stream(session, max_tokens=n, **options)
            next(stream)
            with clock.measure() as ours:
                for _ in stream:
                    pass
            assert stream.reply is not None
            n_said = stream.reply.n_generated
            cm.release(session)

            chain = sampler_chain(bare.n_vocab, greedy=greedy, seed=i)
            for batch in bare.batches(prompt, 0, 1):
                bare.decode(batch)
            token, one = bare.sample(chain), bare.batches([0], len(prompt), 1)[0]
            with clock.measure() as theirs:
                for pos in range(len(prompt), len(prompt) + n_said - 1):
                    one.token[0], one.pos[0] = token, pos
                    bare.decode(one)
                    token = bare.sample(chain)
            llama_cpp.llama_sampler_free(chain)
            bare.trim(1, 0)
            if i:  # the first pair warms up
                per = n_said - 1
                pairs["ours"].append(ours.wall / per)
                pairs["bare"].append(theirs.wall / per)
                pairs["ours_own"].append(ours.own / per)
                pairs["bare_own"].append(theirs.own / per)
        out |= {f"{chain_name}_{k}_ms": statistics.median(v) * 1e3 for k, v in pairs.items()}
        out[f"{chain_name}_own_ms"] = out[f"{chain_name}_ours_own_ms"] - out[f"{chain_name}_bare_own_ms"]
        walls = [(a - b) * 1e3 for a, b in zip(pairs["ours"], pairs["bare"], strict=True)]
        owns = [(a - b) * 1e3 for a, b in zip(pairs["ours_own"], pairs["bare_own"], strict=True)]
        out[f"{chain_name}_wall_ms"], out[f"{chain_name}_spread"] = statistics.median(walls), spread(owns)
    return out


# -- import


def import_times(n_rounds: int) -> dict[str, list[list[float]]]:
    """(wall, CPU) seconds of an import in a fresh process, interleaved; bytecode is cached, as after installation.

    CPU of the importing thread: numpy starts others, which spin for a while.
    """
    code = (
        "import time; t, c = time.perf_counter(), time.thread_time(); import {0}; "
        "print(time.perf_counter() - t, time.thread_time() - c)"
    )
    found: dict[str, list[list[float]]] = {"llama_cpp": [], "llama_sessions": []}
    with tempfile.TemporaryDirectory() as bytecode:
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for i in range(n_rounds + 1):
            for name, times in found.items():
                command = [sys.executable, "-c", code.format(name)]
                out = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                if i:  # the first round compiles, and fills the page cache
                    times.append([float(word) for word in out.stdout.split()])
    return found


# -- prefill


def prefill(config: Result) -> Result:
    """`prepare` of a new session on a shared prefix against bare decodes of the same tokens behind the same prefix."""
    from llama_sessions import Session

    clock = Clock()
    bare, cm = adopted(config)
    n_prefix = cm.set_system(text(100, "system"))
    out: Result = {}
    for n in config["n_prefill"]:
        walls, own = [], []
        for i in range(config["n_pairs"] + 1):
            session = Session()
            session.add_user(text(n - 16, f"{n}", f"go{i}"))
            missing = n - cm.preview(session).n_to_decode  # a word is a token
            session.messages[0]["content"] += " the" * missing
            assert cm.preview(session).n_to_decode == n, (n, cm.preview(session))
            with clock.measure() as ours:
                cm.prepare(session)
            tokens = cm.tokens(session).tolist()
            cm.release(session)
            bare.share(0, 1, 0, n_prefix)
            batches = bare.batches(tokens[n_prefix:], n_prefix, 1)
            with clock.measure() as theirs:
                for batch in batches:
                    bare.decode(batch)
            bare.trim(1, 0)
            if i:
                walls.append((ours.wall, theirs.wall))
                own.append(ours.own - theirs.own)
        fastest = min(theirs for _, theirs in walls)
        out[f"wall_{n}"] = statistics.median(100 * (a / b - 1) for a, b in walls)
        out[f"wall_spread_{n}"] = spread([100 * (a / b - 1) for a, b in walls])
        out[f"own_{n}_ms"], out[f"bare_{n}_ms"] = statistics.median(own) * 1e3, fastest * 1e3
        out[f"own_{n}"], out[f"own_spread_{n}"] = (
            100 * statistics.median(own) / fastest,
            spread([100 * o / fastest for o in own]),
        )
    return out


PARTS = {"prepare": warm_prepare, "token-0.5b": per_token, "token-small": per_token, "token-builtin": per_token,
         "prefill": prefill}  # fmt: skip


def context(shape: str, args: argparse.Namespace, **more: Any) -> Result:
    """`n_threads` 1 where the model is tiny: our own work is the same, and two threads that wait for each other suffer
    most from whatever else the machine does."""
    settings = {"n_ctx": 8192, "n_batch": 512, "n_ubatch": 512, "n_sessions": 4, "n_threads": args.threads}
    return {"model": str(model_file(shape)), **settings, **more}


def verdict(value: float, target: float) -> str:
    return met(value <= target)


def run(args: argparse.Namespace) -> tuple[list[list[object]], Result]:
    """Rows of the table and everything measured."""
    only = args.only.split(",")
    big = "small" if args.quick else "0.5b"
    rows: list[list[object]] = []
    raw: Result = {}
    r: Any
    if "prepare" in only:
        config = context("flat", args, n_threads=1, n_history=2000 if args.quick else 8000, n_turns=30)
        r = interleaved(__file__, ["prepare"], lambda _: config, 1 if args.quick else 3)["prepare"]
        raw["prepare"] = r
        own = statistics.median(x["own_ms"] for x in r)
        what = f"warm prepare, {r[0]['n_messages']} messages, {r[0]['n_tokens']} tokens"
        detail = f"{statistics.median(x['operations_ms'] for x in r):.2f} ms of it llama_memory_*"
        rows.append([what, f"{own:.2f} ms", spread([x["own_ms"] for x in r]), detail, "2 ms", verdict(own, 2.0)])
    if "token" in only:
        n_pairs = 3 if args.quick else 8
        shapes = {
            f"token-{big}": context(big, args, n_tokens=32, n_pairs=n_pairs),
            "token-builtin": context("builtin", args, n_threads=1, n_tokens=512, n_pairs=n_pairs),
        }
        found = interleaved(__file__, list(shapes), shapes.__getitem__, 1)
        raw["token"] = found
        for part, r in found.items():
            for chain in ("greedy", "default"):
                own = statistics.median(x[f"{chain}_own_ms"] for x in r)
                bare, wall = (statistics.median(x[f"{chain}_{k}_ms"] for x in r) for k in ("bare", "wall"))
                what = f"a token, {part.removeprefix('token-')}, {chain} samplers"
                detail = f"bare {bare:.3f} ms; difference of wall times {wall:+.3f} ms"
                rows.append([what, f"{own:.3f} ms", r[0][f"{chain}_spread"], detail, "0.1 ms", verdict(own, 0.1)])
    if "import" in only:
        times = import_times(5 if args.quick else 15)
        raw["import"] = times
        (base_wall, base), (wall, ours) = (
            [statistics.median(column) * 1e3 for column in zip(*times[name], strict=True)]
            for name in ("llama_cpp", "llama_sessions")
        )
        detail = f"llama_cpp {base:.0f} ms, llama_sessions {ours:.0f} ms of CPU; wall {base_wall:.0f}, {wall:.0f} ms"
        differences = [(a[1] - b[1]) * 1e3 for a, b in zip(times["llama_sessions"], times["llama_cpp"], strict=True)]
        rows.append(["import", f"{ours - base:.1f} ms", spread(differences), detail, "50 ms", verdict(ours - base, 50)])
    if "prefill" in only:
        n_prefill = N_PREFILL[:3] if args.quick else N_PREFILL
        config = context(big, args, n_prefill=n_prefill, n_pairs=3 if args.quick else 5)
        (r,) = interleaved(__file__, ["prefill"], lambda _: config, 1)["prefill"]
        raw["prefill"] = r
        for n in n_prefill:
            own, wall = r[f"own_{n}"], f"{r[f'wall_{n}']:+.1f} % ({r[f'wall_spread_{n}']})"
            detail = f"{r[f'own_{n}_ms']:.2f} ms on {r[f'bare_{n}_ms']:.0f}; difference of wall times {wall}"
            each = r[f"own_spread_{n}"]
            rows.append([f"prepare of {n}", f"{own:.2f} %", each, detail, "2 %", verdict(own, 2.0)])
    return rows, raw


def main() -> int:
    if serve_part(PARTS):
        return 0
    parser = described(__doc__)
    parser.add_argument("--only", default=",".join(TARGETS), help="some of: %(default)s")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: to try, not to quote")
    parser.add_argument("--threads", type=int, default=2, help="for the 0.5B shape; the tiny ones use 1")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    rows, raw = run(args)
    say("What the library costs beside the llama.cpp calls it makes")
    print(table(["", "over the limit", "lowest..highest", "detail", "target", ""], rows))
    write_json(args.json, "overhead", vars(args), raw)
    return 0


if __name__ == "__main__":
    sys.exit(main())
