"""Past the wall: what a token costs once a conversation is longer than its context, and what the model still knows.

    python benchmarks/endless.py                    # about 22 minutes on 2 cores
    python benchmarks/endless.py --quick            # fewer tokens, dialogues, rounds: does it run?
    python benchmarks/endless.py --only speed       # or eight, longest, quality, recall

speed    one reply of 20x n_ctx tokens. Mean time a token past the wall, evictions included, against that of tokens just
         before it: at most 1.10x by shift and by gap. Reprefill beside them, and a bare loop that shifts as often. The
         model was trained for more than 20x n_ctx, so that a gap can stay one
eight    the same in eight sessions of one context and one system prompt, 0.5B shape, 3x n_ctx tokens in all
longest  eight on the small shape, 20x n_ctx tokens in all, none missing; a ninth session, which only waits, must have
         the same logits afterwards. Time has no target here: the cells of a row lie scattered past the wall, and
         llama.cpp, for which attention is most of the work on this shape, takes longer for them
quality  mean negative log-likelihood (nats a token) of the answers in held-out dialogues, from the first eviction to
         3.5x n_ctx tokens: by way, by sinks, with a system prompt that stays and without; beside each the same answers
         over the same messages after a fresh prefill. The built-in model
recall   conversations of more than 20x n_ctx tokens, with a password in the system prompt that is asked for at the end:
         at least 0.97x of what a fresh prefill of the same window answers rightly
"""

from __future__ import annotations

import itertools
import os
import random
import re
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llama_cpp
import numpy as np
from bare import Bare, sampler_chain
from harness import (
    Inside,
    Result,
    described,
    interleaved,
    median,
    met,
    run_part,
    say,
    serve_part,
    spread,
    table,
    write_json,
)
from workload import model_file, text

from llama_sessions import builtin_model

WAYS = ("shift", "gap", "reprefill")
SINKS = (0, 4, 16)
N_TIMES = 20
N_SESSIONS = 8
CLAIMS = ("speed", "eight", "longest", "quality", "recall")

Seconds = tuple[float, float, float]
"""On the clock; of CPU, which is steadier, and with one thread the same; and on the clock inside `llama_decode`."""


def loaded(config: Result, n_sessions: int, **options: Any) -> Any:
    from llama_sessions import ContextManager

    return ContextManager.load(
        config["model"], n_ctx=config["n_ctx"], max_sessions=n_sessions, n_threads=config["n_threads"], **options
    )


# -- what a token costs


def speed(config: Result) -> Result:
    """One reply, far past the wall; and replies that end at it."""
    from llama_sessions import Engine, Session

    with loaded(config, 1, overflow=config["way"]) as cm:
        engine, n_last = Engine(cm), config["n_ctx"] // 8

        def times(n_words: int, n_tokens: int, seed: int) -> tuple[int, list[Seconds]]:
            """Tokens of the prompt, and how long each token of the reply took."""
            session = Session()
            stream = engine.stream(session, text(n_words, f"{seed}"), max_tokens=n_tokens, seed=seed)
            seconds = list(timed(stream))
            assert stream.reply is not None
            assert len(seconds) == n_tokens
            cm.release(session)
            return stream.reply.n_prompt, seconds

        def at_the_wall() -> list[list[Seconds]]:
            most, found = cm.n_ctx_seq, []
            for seed in range(config["n_stretches"]):
                n_prompt, _ = times(most // 2, 1, seed)
                found.append(times(most // 2, most - n_prompt, seed)[1][-n_last - 1 : -1])
            return found

        before = at_the_wall()
        n_prompt, seconds = times(16, N_TIMES * config["n_ctx"], 0)
        stats = cm.stats()
        before += at_the_wall()
        past = seconds[cm.n_ctx_seq - n_prompt :]
        return measured(before, past, N_TIMES - 1, stats.n_evictions)


def timed(tokens: Iterator[Any]) -> Iterator[Seconds]:
    """How long each item took."""
    with Inside((llama_cpp, "llama_decode")) as decode:

        def now() -> Seconds:
            return time.perf_counter(), time.process_time(), decode.seconds

        started = now()
        for _ in tokens:
            ended = now()
            yield ended[0] - started[0], ended[1] - started[1], ended[2] - started[2]
            started = ended


def bare(config: Result) -> Result:
    """The same with nothing but llama.cpp: a full row loses a quarter by seq_rm and seq_add, as ours does."""
    run = Bare({**config, "n_sessions": 1, "n_batch": 512, "n_ubatch": 512})
    most, n_last, n_head = config["n_ctx"], config["n_ctx"] // 8, 32
    chain = sampler_chain(run.n_vocab, greedy=False)
    one = run.batches([0], 0, 0)[0]
    n_evictions = 0

    def tokens(n: int, n_tokens: int) -> Iterator[None]:
        """A prompt of `n`, and a reply."""
        nonlocal n_evictions
        run.trim(0, 0)
        for batch in run.batches([1] * n, 0, 0):
            run.decode(batch)
        for _ in range(n_tokens):
            token = run.sample(chain)
            if n == most:
                n_gone = (most - n_head) // 4
                run.shift_out(0, n_head, n_head + n_gone)
                n -= n_gone
                n_evictions += 1
            one.token[0], one.pos[0] = token, n
            run.decode(one)
            n += 1
            yield

    before = [list(timed(tokens(most - n_last - 1, n_last + 1)))[1:] for _ in range(config["n_stretches"])]
    past = list(timed(tokens(n_head, N_TIMES * config["n_ctx"])))[most - n_head :]
    llama_cpp.llama_sampler_free(chain)
    return measured(before, past, N_TIMES - 1, n_evictions)


def measured(
    before: Sequence[Sequence[Seconds]], past: Sequence[Seconds], n_stretches: int, n_evictions: int
) -> Result:
    """Medians of the means over stretches: each that ends at the wall, and each of about n_ctx tokens past it."""

    def middle(stretches: Sequence[Any]) -> Any:
        return np.median([np.mean(s, axis=0) for s in stretches], axis=0)

    ahead, behind = middle(before), middle(np.array_split(past, n_stretches))
    ratio, cpu_ratio, decode_ratio = behind / ahead
    return {"before_ms": ahead[0] * 1e3, "past_ms": behind[0] * 1e3, "ratio": ratio, "cpu_ratio": cpu_ratio,
            "decode_ratio": decode_ratio, "longest_ms": max(past)[0] * 1e3, "n_evictions": n_evictions}  # fmt: skip


def eight(config: Result) -> Result:
    """Streams advanced in turn, each with its share of the cells; a session that waits beside them."""
    from llama_sessions import Engine, Session

    with loaded(config, N_SESSIONS + 2, overflow=config["way"]) as cm:
        engine = Engine(cm)
        cm.set_system(text(40, "system"))
        waiting = Session()
        waiting.add_user(text(8, "waiting"))
        cm.prepare(waiting)
        cm.pin(waiting)
        twin = cm.fork(waiting)
        cm.append(twin, 7)
        wanted = cm.logits(twin).copy()
        cm.release(twin)

        def in_turn(n_each: int, seed: int) -> tuple[list[Seconds], int, list[int], int]:
            """How long a token took, round by round; in which one the cells were full; tokens of the rows, and said."""
            sessions, n_before, n_full = [Session() for _ in range(N_SESSIONS)], cm.stats().n_evictions, 0
            streams = [
                engine.stream(s, text(8, f"{seed} {i}"), max_tokens=n_each, seed=i) for i, s in enumerate(sessions)
            ]
            seconds: list[Seconds] = []
            for wall, cpu, decode in timed(zip(*streams, strict=True)):
                seconds.append((wall / N_SESSIONS, cpu / N_SESSIONS, decode / N_SESSIONS))
                if not n_full and cm.stats().n_evictions > n_before:
                    n_full = len(seconds) - 1
            lengths = [s.n_past for s in sessions]
            for s in sessions:
                cm.release(s)
            return seconds, n_full, lengths, sum(s.reply.n_generated for s in streams if s.reply is not None)

        n_each = config["n_times"] * config["n_ctx"] // N_SESSIONS
        seconds, n_full, lengths, n_said = in_turn(n_each, 0)
        n_evictions, n_last = cm.stats().n_evictions, n_full // 8
        again = [in_turn(n_full - 1, seed)[0] for seed in range(1, config["n_stretches"])]
        before = [seconds[n_full - n_last : n_full], *(each[-n_last - 1 : -1] for each in again)]  # the last round ends
        cm.append(waiting, 7)
        cm.check_integrity()
        return {
            **measured(before, seconds[n_full:], config["n_times"] - 1, n_evictions), "lengths": lengths,
            "n_missing": N_SESSIONS * n_each - n_said, "moved": float(np.abs(cm.logits(waiting) - wanted).max()),
            "scale": float(np.abs(wanted).max()),
        }  # fmt: skip


# -- what the model still knows


def held_out(cm: Any, seed: str, n_tokens: int) -> list[Any]:
    """Turns of names and words that the built-in model was not trained on, and of no password."""
    from tiny_chat_data import dialogue

    def count(message: str) -> int:
        return len(cm.vocab.tokenize(message)) + 6  # its frame

    return dialogue(random.Random(seed), n_tokens, count, held_out=True, without="password").turns


def can_be_known(turn: Any, window: list[Any]) -> bool:
    """Whether the window has the names in an answer; what was told in a message that is gone can only be guessed."""
    _, colon, items = turn.assistant.partition(": ")
    names = items if colon else turn.assistant.split()[-1] if turn.known else ""
    said = " ".join(m["content"] for m in window)
    return all(name in said for name in re.findall(r"\w+", names))


def likelihood(cm: Any, session: Any, answer: list[int]) -> list[float]:
    """Negative log-likelihood of each token of the answer to a prepared session; they are appended."""
    found = []
    for token in answer:
        logits = cm.logits(session).astype(np.float64)
        top = logits.max()
        found.append(float(top + np.log(np.exp(logits - top).sum()) - logits[token]))
        cm.append(session, token)
    return found


def quality(config: Result) -> Result:
    """All ways and sinks over the same dialogues, with a system prompt or without."""
    from llama_sessions import Session

    system = "You are a helpful assistant." if config["with_prefix"] else ""
    known: dict[tuple[Any, ...], list[float]] = {}
    found: Result = {}
    with loaded(config, 1, overflow="reprefill", n_sink=0, radix=False) as fresh:

        def anew(session: Any, answer: list[int]) -> list[float]:
            """The same after a fresh prefill of the same window."""
            key = (*(m["content"] for m in session.window), *answer)
            if key not in known:
                twin = Session.from_dict(session.to_dict())
                fresh.prepare(twin)
                known[key] = likelihood(fresh, twin, answer)
                fresh.release(twin)
            return known[key]

        for way, n_sink in [*itertools.product(WAYS[:2], SINKS), ("reprefill", 0)]:
            ours, theirs = [], []
            with loaded(config, 1, overflow=way, n_sink=n_sink) as cm:
                for i in range(config["n_dialogues"]):
                    session = Session(system)
                    for turn in held_out(cm, f"quality {i}", config["n_said"]):
                        session.add_user(turn.user)
                        cm.prepare(session)
                        answer = cm.vocab.tokenize(turn.assistant)
                        mine = likelihood(cm, session, answer)
                        if len(session.window) < len(session.messages) and can_be_known(turn, session.window):
                            ours += mine
                            theirs += anew(session, answer)
                        session.add_assistant(turn.assistant)
                    cm.release(session)
            apart = np.asarray(ours) - np.asarray(theirs)
            found[f"{way} {n_sink}"] = {
                "nll": statistics.mean(ours), "fresh": statistics.mean(theirs), "n_tokens": len(ours),
                "error": float(apart.std() / np.sqrt(len(apart))),
            }  # fmt: skip
    return found


def recall(config: Result) -> Result:
    """How many of the conversations know the password at their end, and how many after a fresh prefill."""
    from tiny_chat_data import Words, ask

    from llama_sessions import Engine, Session

    n_right, n_fresh, n_tokens = 0, 0, []
    with (
        loaded(config, 1, overflow="shift", radix=False) as cm,
        loaded(config, 1, overflow="reprefill", n_sink=0, radix=False) as fresh,
    ):
        for i in config["numbers"]:
            rng = random.Random(f"recall {i}")
            value = Words(rng, held_out=True).made_up()
            question, answer = ask("password", value, rng)
            session = Session(f"You are a helpful assistant. The password is {value}.")
            n = 0
            for turn in held_out(cm, f"recall {i}", N_TIMES * config["n_ctx"]):
                session.add_user(turn.user)
                cm.prepare(session)
                n += session.last_prepare.n_decoded
                session.add_assistant(turn.assistant)
            session.add_user(question)
            cm.prepare(session)
            n_tokens.append(n)
            twin = Session.from_dict(session.to_dict())
            n_fresh += Engine(fresh).chat(twin, temperature=0.0, max_tokens=40).text == answer
            n_right += Engine(cm).chat(session, temperature=0.0, max_tokens=40).text == answer
            fresh.release(twin)
            cm.release(session)
    return {"right": n_right, "fresh": n_fresh, "n": len(config["numbers"]), "least_tokens": min(n_tokens)}


PARTS = {
    **dict.fromkeys(WAYS, speed),
    "bare": bare,
    **{f"{name} {way}": eight for name in ("eight", "longest") for way in WAYS[:2]},
    "quality": quality,
    "recall": recall,
}


def time_cells(rounds: list[Result], *, has_target: bool) -> list[object]:
    value = median(rounds, "ratio")
    judged = ["1.10x", met(value <= 1.1)] if has_target else ["", ""]
    return [f"{median(rounds, 'before_ms'):.3f}", f"{median(rounds, 'past_ms'):.3f}", f"{value:.3f}x",
            spread([r["ratio"] for r in rounds]), f"{median(rounds, 'cpu_ratio'):.3f}x",
            f"{median(rounds, 'decode_ratio'):.3f}x",
            f"{median(rounds, 'longest_ms'):.1f}", rounds[0]["n_evictions"],
            *judged]  # fmt: skip


TIME_HEADER = ["", "ms a token ahead of the wall", "past it", "ratio", "of rounds", "CPU", "llama_decode",
               "longest, ms", "evictions", "target", ""]  # fmt: skip


def eight_rows(found: dict[str, list[Result]]) -> list[list[object]]:
    rows: list[list[object]] = []
    for name, rounds in found.items():
        r = rounds[0]
        is_well = all(not x["n_missing"] and x["moved"] <= 0.02 * x["scale"] for x in rounds)
        lengths = f"{min(r['lengths'])}..{max(r['lengths'])}"
        moved = f"{max(x['moved'] for x in rounds):.1g} of {r['scale']:.1f}"
        rows.append([name.split()[1], lengths, r["n_missing"], moved, met(is_well)])
    return rows


def quality_rows(found: dict[str, Result]) -> list[list[object]]:
    rows: list[list[object]] = []
    for name in found["with"]:
        if name == "load_before":
            continue
        way, n_sink = name.split()
        cells: list[object] = []
        for side in found.values():
            r = side[name]
            cells += [f"{r['nll']:.4f}", f"{r['fresh']:.4f}", f"{r['nll'] - r['fresh']:+.4f} +-{r['error']:.4f}"]
        rows.append([f"{way}, {n_sink} sinks" if way != "reprefill" else way, *cells])
    return rows


def at_once(jobs: Sequence[tuple[str, Result]]) -> list[Result]:
    """Parts that measure no time, a thread of llama.cpp each, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda job: run_part(__file__, *job), jobs))


def main() -> int:
    if serve_part(PARTS):
        return 0
    parser = described(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=CLAIMS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of what is timed (default: %(default)s)")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    quick, n_rounds = args.quick, 1 if args.quick else args.rounds
    chosen = {args.only} if args.only else set(CLAIMS)
    found: dict[str, Any] = {}
    timing = {
        "model": str(model_file("builtin" if quick else "small")), "n_threads": args.threads,
        "n_ctx": 256 if quick else 512, "n_stretches": 4 if quick else 8,
    }  # fmt: skip
    known = {"model": builtin_model(), "n_threads": 1, "n_ctx": 256, "n_said": 896,
             "n_dialogues": 3 if quick else 24}  # fmt: skip
    n_asked = 10 if quick else 300
    is_met = []

    if "speed" in chosen:
        found["speed"] = interleaved(__file__, [*WAYS, "bare"], lambda way: {**timing, "way": way}, n_rounds)
        rows = [[name, *time_cells(r, has_target=name in WAYS[:2])] for name, r in found["speed"].items()]
        is_met += [row[-1] for row in rows]
        say(f"One reply of {N_TIMES} x {timing['n_ctx']} tokens; medians of {n_rounds} rounds")
        print(table(TIME_HEADER, rows))
    several: dict[str, Result] = {
        "eight": {**timing, "model": str(model_file("small" if quick else "0.5b")), "n_times": 3, "n_stretches": 2,
                  "n_threads": args.threads if quick else min(4, os.cpu_count() or 1)},
        "longest": {**timing, "n_times": N_TIMES},
    }  # fmt: skip
    for name, config in several.items():
        if name not in chosen:
            continue
        parts = {f"{name} {way}": {**config, "n_ctx": 1024, "way": way} for way in WAYS[:2]}
        found[name] = interleaved(__file__, list(parts), parts.__getitem__, n_rounds)
        rows = [[part.split()[1], *time_cells(r, has_target=name == "eight")] for part, r in found[name].items()]
        others = eight_rows(found[name])
        is_met += [row[-1] for row in [*rows, *others]]
        say(f"{N_SESSIONS} replies in turn, {config['n_times']} x 1024 tokens in all, one system prompt")
        print(table(TIME_HEADER, rows), "\n")
        print(table(["", "tokens in a row at the end", "tokens missing", "logits of one that waits moved by", ""],
                    others))  # fmt: skip
    if "quality" in chosen:
        sides = ("with", "without")
        done = at_once([("quality", {**known, "with_prefix": side == "with"}) for side in sides])
        found["quality"] = dict(zip(sides, done, strict=True))
        n_tokens = found["quality"]["with"]["shift 4"]["n_tokens"]
        say(
            f"{known['n_dialogues']} dialogues of {known['n_said']} tokens, n_ctx {known['n_ctx']}: nats a token, "
            f"{n_tokens} tokens of answers past the first eviction"
        )
        print(table(["", "system prompt stays", "fresh", "more", "none", "fresh", "more"],
                    quality_rows(found["quality"])))  # fmt: skip
    if "recall" in chosen:
        n_jobs = os.cpu_count() or 1
        numbers = [list(range(i, n_asked, n_jobs)) for i in range(n_jobs)]
        done = at_once([("recall", {**known, "numbers": some}) for some in numbers])
        found["recall"] = {k: sum(r[k] for r in done) for k in ("right", "fresh", "n")}
        found["recall"]["least_tokens"] = min(r["least_tokens"] for r in done)
        r = found["recall"]
        share = r["right"] / max(1, r["fresh"])
        is_met.append(met(share >= 0.97))
        say(f"The password of the system prompt after at least {r['least_tokens']} tokens, n_ctx {known['n_ctx']}")
        print(table(["", "right", "a fresh prefill of the same window", "ratio", "target", ""],
                    [["shift", f"{r['right']} of {r['n']}", f"{r['fresh']} of {r['n']}", f"{share:.3f}x", "0.97x",
                      is_met[-1]]]))  # fmt: skip
    write_json(args.json, "endless", {"timing": timing, "known": known}, found)
    return 1 if "MISSED" in is_met else 0


if __name__ == "__main__":
    sys.exit(main())
