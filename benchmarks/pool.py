"""Many sessions at once: what a pool says in a second, and how long anybody waits while somebody joins, JSON too.

    python benchmarks/pool.py                       # about 12 minutes on 2 cores
    python benchmarks/pool.py --quick               # small shape, few rounds: does it run?
    python benchmarks/pool.py --only together,join
    python benchmarks/pool.py --batched-bench /path/to/llama-batched-bench --llama-server /path/to/llama-server

together  tokens a second of 1, 2, 4, 8 and 16 sessions that talk: `Pool`, one after another (`Engine`), and the limit,
          a bare loop of the same batches and sampler chains: at least 0.97x of it at 8 and 16, above llama-server;
          our own work beyond decode and sampling: at most 0.05 ms a session and step
join      a prompt of 2,000 tokens joins eight sessions that talk. By default the time between two of their tokens (p95)
          stays within 2x, the newcomer's first token comes within 3x of prefilling alone; with prefill_share=1.0
          within 1.15x
leave     a slot is free, and taken, in the step after a cancel
unified   unified KV against a cache for each sequence, with unrelated sessions of 2,000 tokens: bare loop, no target

The sides of `together` take turns step by step in one process, over the same rows: the bare loop on copies of them
(shared cells, dropped afterwards). So both have the same KV, and a slow minute hits both.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import llama_cpp
import numpy as np
from bare import Bare, Batch, has_amx, sampler_chain
from harness import Inside, Result, described, interleaved, met, run_part, say, serve_part, spread, table, write_json
from server_peer import events, serving, settings
from workload import SHAPES, WORDS, model_file, text

SESSIONS = (1, 2, 4, 8, 16)
ENDLESS = 1_000_000  # tokens of a reply that is ended by other means
TARGETS = {"bare": 0.97, "own": 0.05, "between": 2.0, "first": 3.0, "first_at_once": 1.15}


def asking(n_words: int, i: int) -> Any:
    """A session with a question that begins like no other."""
    from llama_sessions import Session

    session = Session("")
    session.add_user(text(n_words, f"question {i}", WORDS[i]))
    return session


# -- together


class Together:
    """`n` sessions that talk in a pool, and the other sides over the same rows."""

    def __init__(self, config: Result, n: int) -> None:
        from llama_sessions import ContextManager, Engine, Pool

        self.n, self.n_steps = n, config["n_steps"]
        self.bare = Bare({**config, "n_sessions": 2 * n + 1})
        self.cm = ContextManager(self.bare.ctx, self.bare.vocab, radix=False)
        self.engine, self.pool = Engine(self.cm), Pool(self.cm, prefill_share=1.0)
        sessions = [asking(config["n_words"], i) for i in range(n)]
        self.tickets = [self.pool.submit(s, max_tokens=ENDLESS, seed=i) for i, s in enumerate(sessions)]
        while not all(ticket.n_generated > 1 for ticket in self.tickets):
            self.step()
        self.chains = [sampler_chain(self.bare.n_vocab, greedy=False, seed=i) for i in range(n)]
        self.turn = 0

    def step(self) -> None:
        self.pool.step()
        for ticket in self.tickets:
            while ticket.take() is not None:
                pass

    def ours(self) -> float:
        return self.n * self._per_second(self.step)

    def _per_second(self, step: Callable[[], None]) -> float:
        """Steps a second; one first, in which llama.cpp finds that the batch has another form."""
        step()
        started = time.perf_counter()
        for _ in range(self.n_steps):
            step()
        return self.n_steps / (time.perf_counter() - started)

    def own_ms(self) -> float:
        """Milliseconds a session and step that are neither decode nor sampling."""
        from llama_sessions.llama.sampler import Sampler

        own = []
        with Inside((llama_cpp, "llama_decode"), (Sampler, "sample")) as inside:
            for _ in range(self.n_steps + 1):
                before, started = inside.seconds, time.perf_counter()
                self.step()
                own.append((time.perf_counter() - started - (inside.seconds - before)) / self.n * 1e3)
        return statistics.median(own[1:])

    def limit(self) -> float:
        """The bare loop, from where the pool's rows are."""
        first = self.n + 3  # behind the pool's rows and that of the branch
        seq_ids = range(first, first + self.n)
        ends = []
        for ticket, seq_id in zip(self.tickets, seq_ids, strict=True):
            row = self.cm._seats.get(ticket.session, reading=True).row
            self.bare.share(row.seq_id, seq_id, 0, row.n)
            ends.append(row.n)
        latest = [int(self.cm.tokens(t.session)[-1]) for t in self.tickets]
        batch = Batch(latest, ends, seq_ids, [True] * self.n)
        rate = self._per_second(lambda: self.bare.decode_and_sample(batch, self.chains))
        for seq_id in seq_ids:
            self.bare.trim(seq_id, 0)
        return self.n * rate

    def alone(self) -> float:
        """One of them after another: a branch goes on, the others rest."""
        self.turn += 1
        branch = self.cm.fork(self.tickets[self.turn % self.n].session)
        with self.engine.stream(branch, max_tokens=ENDLESS, seed=self.turn) as stream:
            next(stream)
            rate = self._per_second(lambda: next(stream))
        self.cm.release(branch)
        return rate

    def close(self) -> None:
        self.pool.close()
        self.cm.close()
        for chain in self.chains:
            llama_cpp.llama_sampler_free(chain)
        llama_cpp.llama_free(self.bare.ctx)


def together(config: Result) -> Result:
    n = config["n_talking"]
    sides = Together(config, n)
    found: dict[str, list[float]] = {"ours": [], "limit": [], "alone": [], "own_ms": []}
    calls = {"ours": sides.ours, "limit": sides.limit, "alone": sides.alone, "own_ms": sides.own_ms}
    for i in range(config["n_pairs"] + 1):
        for name in list(calls) if i % 2 else reversed(calls):
            value = calls[name]()
            if i:  # the first are to warm up
                found[name].append(value)
    sides.close()
    return found


def server_part(config: Result) -> Result:
    """llama-server: tokens a second from when all talk to when the first is done."""
    n, n_tokens = config["n_talking"], config["n_tokens"]
    times: list[list[float]] = [[] for _ in range(n)]

    def ask(i: int, port: int) -> None:
        body = {
            "messages": [{"role": "user", "content": text(config["n_words"], f"question {i}", WORDS[i])}],
            "stream": True, "max_tokens": n_tokens, "seed": i, "temperature": 0.8, "top_k": 40, "top_p": 0.95,
            "min_p": 0.05, "samplers": ["top_k", "top_p", "min_p", "temperature"], "ignore_eos": False,
        }  # fmt: skip
        for event in events(port, body):
            if any(choice["delta"].get("content") for choice in event.get("choices", ())):
                times[i].append(time.perf_counter())

    with serving(config, n) as (port, _):
        threads = [threading.Thread(target=ask, args=(i, port)) for i in range(n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
    n_said = sum(begin < at <= end for each in times for at in each)
    return {"rate": n_said / (end - begin), "n_said": n_said}


def batched_part(config: Result) -> Result:
    """llama-batched-bench: it decodes, and samples nothing."""
    n = config["n_talking"]
    command = [
        config["batched_bench"], "-m", config["model"], "-c", str(config["n_ctx"]), "-kvu",
        "-npp", str(config["n_prompt"]), "-ntg", str(config["n_tokens"]), "-npl", str(n),
        "--output-format", "jsonl", *settings(config),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError(f"llama-batched-bench ended with {done.returncode}: {done.stderr[-2000:]}")
    return {"rate": lines[-1]["speed_tg"]}


# -- join


def join(config: Result) -> Result:
    """Times between tokens before and while a long prompt joins, and the newcomer's first token, alone and so."""
    from llama_sessions import ContextManager, Engine, Pool

    names = ("n_ctx", "n_batch", "n_ubatch", "n_threads")
    cm = ContextManager.load(config["model"], max_sessions=10, radix=False, **{name: config[name] for name in names})
    with cm:
        newcomer = asking(config["n_long"], 100)
        begun = time.perf_counter()
        with Engine(cm).stream(newcomer, max_tokens=1) as stream:
            next(stream)
            alone = time.perf_counter() - begun
        cm.release(newcomer)
        newcomer.messages.pop()

        pool = Pool(cm, prefill_share=config["share"])
        tickets = [pool.submit(asking(config["n_words"], i), max_tokens=ENDLESS, seed=i) for i in range(8)]
        last: dict[Any, float] = {}

        def step() -> list[float]:
            """The times between tokens that it brought."""
            pool.step()
            now, times = time.perf_counter(), []
            for ticket in tickets:
                if ticket.take() is not None:
                    if ticket in last:
                        times.append(now - last[ticket])
                    last[ticket] = now
            return times

        while not all(ticket.n_generated > 4 for ticket in tickets):
            step()
        without = [t for _ in range(config["n_before"]) for t in step()]
        lengths = [ticket.session.n_past for ticket in tickets]
        late = pool.submit(newcomer, max_tokens=1)
        during: list[float] = []
        given = [pool.stats().n_prompt_tokens]
        while not late.is_over:
            during += step()
            given.append(pool.stats().n_prompt_tokens)
        first = late.result().first_token_s
        cm.release(newcomer)
        step()
        without += [t for _ in range(config["n_before"]) for t in step()]  # their rows have grown meanwhile
        pool.close()
    bare_s = join_bare(config, lengths, np.diff(given).tolist())
    return {
        "bare_s": bare_s, "n_long": late.result().n_prompt, "alone_s": alone, "first_s": first,
        "n_steps": len(during) // 8,
        "without_s": float(np.percentile(without, 95)), "during_s": float(np.percentile(during, 95)),
        "median_without_s": statistics.median(without), "median_during_s": statistics.median(during),
    }  # fmt: skip


def join_bare(config: Result, lengths: Sequence[int], given: Sequence[int]) -> float:
    """Seconds of the bare loop with the same batches: a token for each row, and so many of the prompt."""
    n = len(lengths)
    bare = Bare({**config, "n_sessions": n})
    for seq_id, length in enumerate(lengths):
        for batch in bare.batches([7] * length, 0, seq_id):
            bare.decode(batch)
    chains = [sampler_chain(bare.n_vocab, greedy=False, seed=i) for i in range(n)]
    rounds, at = [], 0
    for i, more in enumerate(given):
        positions = [*(length + i for length in lengths), *range(at, at + more)]
        wishes = [True] * n + [False] * more
        rounds.append(Batch([7] * (n + more), positions, [*range(n), *[n] * more], wishes))
        at += more
    started = time.perf_counter()
    for batch in rounds:
        bare.decode_and_sample(batch, chains)
    return time.perf_counter() - started


# -- leave


def leave(config: Result) -> Result:
    """Two slots, two who have them, one who waits: steps from a cancel until the third has a slot."""
    from llama_sessions import ContextManager, Pool

    found = {}
    for stage, n_words in (("in its reply", 20), ("in its prompt", 1500)):
        with ContextManager.load(
            config["model"], n_ctx=4096, max_sessions=2, n_batch=256, n_threads=config["n_threads"]
        ) as cm:
            pool = Pool(cm)
            talks, leaves = [pool.submit(asking(n, i), max_tokens=ENDLESS) for i, n in enumerate((20, n_words))]
            waits = pool.submit(asking(20, 2), max_tokens=2)
            while not talks.n_generated or leaves.state != ("running" if n_words < 1000 else "prompt"):
                pool.step()
            leaves.cancel()
            n_steps = 0
            while waits.state == "waiting":
                pool.step()
                n_steps += 1
            found[stage] = n_steps
            pool.close()
    return found


# -- unified


def unified(config: Result) -> Result:
    """Tokens a second of a bare loop over 2, 4 and 8 rows, all in one cache and each in its own; taken in turns."""
    kinds = {}
    for kind in ("unified", "separate"):
        other = next(iter(kinds.values()))[0] if kinds else None
        bare = Bare({**config, "n_sessions": 8, "kv_unified": kind == "unified"}, other)
        tokens = [int(t) for t in np.random.default_rng(1).integers(0, bare.n_vocab, config["n_long"])]
        for batch in bare.batches(tokens, 0, 0):
            bare.decode(batch)
        size = int(llama_cpp.llama_state_seq_get_size(bare.ctx, 0))
        blob = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(bare.ctx, blob, size, 0)
        kinds[kind] = bare, blob
    found: Result = {}
    chains = [sampler_chain(bare.n_vocab, greedy=False, seed=i) for i in range(8)]
    for n in (2, 4, 8):
        for bare, blob in kinds.values():  # what KV says does not change what it costs
            for seq_id in range(1, n):
                if llama_cpp.llama_memory_seq_pos_max(bare.memory, seq_id) < 0 and not (
                    llama_cpp.llama_state_seq_set_data(bare.ctx, blob, len(blob), seq_id)
                ):
                    raise RuntimeError("the KV of a row could not be put into another")
        rates: dict[str, list[float]] = {kind: [] for kind in kinds}
        for i in range(config["n_pairs"] + 1):
            for kind in list(kinds) if i % 2 else reversed(kinds):
                bare, _ = kinds[kind]
                batch = Batch([7] * n, [len(tokens)] * n, range(n), [True] * n)
                bare.decode_and_sample(batch, chains[:n])
                started = time.perf_counter()
                for _ in range(config["n_steps"]):
                    bare.decode_and_sample(batch, chains[:n])
                rate = n * config["n_steps"] / (time.perf_counter() - started)
                for seq_id in range(n):
                    bare.trim(seq_id, len(tokens))
                if i:
                    rates[kind].append(rate)
        found[str(n)] = rates
    return found


PARTS = {
    "together": together,
    "server": server_part,
    "batched": batched_part,
    "join": join,
    "leave": leave,
    "unified": unified,
    "amx": lambda config: {"has_amx": has_amx()},
}


# -- reports


def report_together(config: Result, sessions: list[int]) -> tuple[Result, bool]:
    sides = ["together"] + [s for s, path in (("server", "llama_server"), ("batched", "batched_bench")) if config[path]]
    found, rows, all_met = {}, [], True
    for n in sessions:
        each = interleaved(__file__, sides, lambda _, n=n: {**config, "n_talking": n}, 1)
        (r,) = each["together"]
        found[n] = {side: result[0] for side, result in each.items()}
        ratios = [a / b for a, b in zip(r["ours"], r["limit"], strict=True)]
        ours, own = statistics.median(r["ours"]), statistics.median(r["own_ms"])
        ratio = statistics.median(ratios)
        others = [each[side][0]["rate"] if side in each else None for side in ("server", "batched")]
        yes = own <= TARGETS["own"] and (n < 8 or (ratio >= TARGETS["bare"] and ours > (others[0] or 0.0)))
        all_met = all_met and yes
        rows.append(
            [n, f"{ours:.1f}", f"{statistics.median(r['alone']):.1f}", f"{statistics.median(r['limit']):.1f}",
             f"{ratio:.3f}x", spread(ratios), *("" if rate is None else f"{rate:.1f}" for rate in others),
             f"{own:.3f} ms", met(yes)]
        )  # fmt: skip
    say(f"Tokens a second of all, {config['shape']} shape; medians of {config['n_pairs']} pairs of {config['n_steps']} "
        "steps")  # fmt: skip
    header = ["sessions", "Pool", "Engine, in turns", "bare loop", "Pool / bare", "of pairs", "llama-server",
              "batched-bench (no sampling)", "own work a session and step", ""]  # fmt: skip
    print(table(header, rows))
    return found, all_met


def report_join(config: Result, n_rounds: int) -> tuple[Result, bool]:
    shares = {"join at 0.5": 0.5, "join at 1.0": 1.0}
    found: Result = {name: [] for name in shares}
    for i in range(n_rounds):
        for name in list(shares) if i % 2 == 0 else reversed(shares):
            found[name].append(run_part(__file__, "join", {**config, "share": shares[name]}))
    rows, all_met = [], True
    for name, share in shares.items():
        each = found[name]
        between = statistics.median(r["during_s"] / r["without_s"] for r in each)
        first = statistics.median(r["first_s"] / r["alone_s"] for r in each)
        most = TARGETS["first" if share < 1 else "first_at_once"]
        yes = first <= most and (share == 1.0 or between <= TARGETS["between"])
        all_met = all_met and yes
        r = each[0]
        rows.append(
            [share, f"{r['without_s'] * 1e3:.0f} ms", f"{r['during_s'] * 1e3:.0f} ms", f"{between:.2f}x",
             "2x" if share < 1 else "", f"{r['alone_s']:.1f} s", f"{r['first_s']:.1f} s", f"{first:.2f}x", f"{most}x",
             met(yes)]
        )  # fmt: skip
    say(
        f"A prompt of {found['join at 0.5'][0]['n_long']} tokens joins eight sessions; ratios are medians of {n_rounds}"
    )
    header = ["prefill_share", "between tokens, p95", "while it joins", "ratio", "target", "first token alone",
              "while eight talk", "ratio", "target", ""]  # fmt: skip
    print(table(header, rows))
    bare = statistics.median(r["first_s"] / r["bare_s"] for r in found["join at 0.5"])
    print(f"\nFirst token with prefill_share 0.5 against the bare loop with the same batches: {bare:.2f}x")
    return found, all_met


def report_leave(config: Result) -> tuple[Result, bool]:
    found = run_part(__file__, "leave", config)
    rows = [[stage, found[stage], 1, met(found[stage] == 1)] for stage in ("in its reply", "in its prompt")]
    say("Steps from a cancel until whoever waits has the slot")
    print(table(["cancelled", "steps", "target", ""], rows))
    return found, all(row[-1] == "met" for row in rows)


def report_unified(config: Result) -> tuple[Result, bool]:
    found = run_part(__file__, "unified", config)
    rows = []
    for n in ("2", "4", "8"):
        one, own = found[n]["unified"], found[n]["separate"]
        ratios = [a / b for a, b in zip(own, one, strict=True)]
        rows.append([n, f"{statistics.median(one):.1f}", f"{statistics.median(own):.1f}",
                     f"{statistics.median(ratios):.2f}x", spread(ratios)])  # fmt: skip
    say(f"Unrelated sessions of {config['n_long']} tokens, tokens a second of a bare loop")
    print(table(["sessions", "kv_unified=True", "kv_unified=False", "ratio", "of pairs"], rows))
    return found, True


def main() -> int:
    if serve_part(PARTS):
        return 0
    parser = described(__doc__)
    add: Any = parser.add_argument
    add("--shape", choices=SHAPES, help="random weights of this shape (default: 0.5b; with --quick: small)")
    add("--quick", action="store_true")
    add("--only", default="together,join,leave,unified")
    add("--sessions", default=",".join(map(str, SESSIONS)))
    add("--pairs", type=int, help="of together and unified (default: 9; with --quick: 3)")
    add("--rounds", type=int, default=1, help="of join (default: %(default)s)")
    add("--threads", type=int, default=2)
    add("--llama-server", metavar="PATH", help="without it that side is skipped")
    add("--batched-bench", metavar="PATH", help="the same")
    add("--json", metavar="PATH")
    args = parser.parse_args()
    shape = args.shape or ("small" if args.quick else "0.5b")
    config: Result = {
        "model": str(model_file(shape)), "shape": shape, "n_ctx": 4096, "n_batch": 512, "n_ubatch": 512,
        "n_threads": args.threads, "n_pairs": args.pairs or (3 if args.quick else 9), "n_steps": 4, "n_words": 24,
        "n_prompt": 40, "n_tokens": 96, "llama_server": args.llama_server, "batched_bench": args.batched_bench,
    }  # fmt: skip
    long = {**config, "n_long": 500 if args.quick else 2000, "n_before": 40, "n_ctx": 24576}
    reports: dict[str, Callable[[], tuple[Result, bool]]] = {
        "together": lambda: report_together(config, [int(n) for n in args.sessions.split(",")]),
        "join": lambda: report_join({**long, "n_ctx": 8192}, args.rounds),
        "leave": lambda: report_leave(config),
        "unified": lambda: report_unified(long),
    }
    results, all_met = {}, True
    for name in args.only.split(","):
        results[name], yes = reports[name]()
        all_met = all_met and yes
    write_json(args.json, "pool", config, results)
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
