"""Parking: what it costs to give a row up and bring it back, and what more sessions than slots cost.

    python benchmarks/parking.py                    # about 8 minutes on 2 cores
    python benchmarks/parking.py --quick            # small shape, few sessions: does it run?
    python benchmarks/parking.py --llama-server /path/to/llama-server

bytes   `park` and return of a 2,000-token session against `llama_state_seq_get_data` + `set_data` of the same bytes in
        warm buffers, and against decoding the tokens again: at most 2x the bare calls
turns   64 sessions in turns over 8 slots, system prompt 400 words, user 20, reply 8 tokens: tokens decoded are the new
        ones, and the first token of a later turn comes within 1.15x of the time that 8 sessions over 8 slots take, and
        0.7x of llama-server's, whose own RAM cache is on
stem    100 requests that share a 1,000-token stem, which is no system prompt: it is decoded once
"""

from __future__ import annotations

import ctypes
import statistics
import sys
import time
from typing import Any

import llama_cpp
import numpy as np
from harness import Result, described, interleaved, median, met, run_part, say, serve_part, table, write_json
from server_peer import server
from workload import WORDS, model_file, text


def loaded(config: Result, n_sessions: int, **options: Any) -> Any:
    from llama_sessions import ContextManager

    names = ("n_ctx", "n_batch", "n_ubatch", "n_threads")
    return ContextManager.load(
        config["model"], max_sessions=n_sessions, **{name: config[name] for name in names}, **options
    )


def bytes_part(config: Result) -> Result:
    """Park and return, the bare calls, and a prefill, of the same row."""
    from llama_sessions import RadixOptions, Session

    # Room for two rows: from the third round on saves go where others were, into pages that have been touched.
    with loaded(config, 4, radix=RadixOptions(max_bytes=config["n_tokens"] * 30_000)) as cm:
        session = Session()
        session.add_user(text(config["n_tokens"], "long"))
        n = cm.prepare(session)
        prefill = cm.stats().decode_seconds
        ctx = cm._parts.context.handle
        ours, bare = [], []
        size = int(llama_cpp.llama_state_seq_get_size_ext(ctx, cm._seats.get(session).row.seq_id, 0))
        buffer = np.zeros(size, np.uint8)
        pointer = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        for i in range(config["n_rounds"] + 6):
            session.namespace = cm._seats.get(session).row.namespace = f"round {i}"  # nothing of it is saved yet
            started = time.perf_counter()
            cm.park(session)
            parked = time.perf_counter()
            cm.append(session, 7)  # brings the row back; its own decode is taken off
            returned = time.perf_counter()
            decode = cm.stats().decode_seconds
            cm.append(session, 7)
            one = cm.stats().decode_seconds - decode
            seq_id = cm._seats.get(session).row.seq_id
            cm._store.cut(cm._seats.get(session).row, n)
            begun = time.perf_counter()
            llama_cpp.llama_state_seq_get_data_ext(ctx, pointer, size, seq_id, 0)
            llama_cpp.llama_state_seq_set_data_ext(ctx, pointer, size, 1, 0)
            took = time.perf_counter() - begun
            llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(ctx), 1, -1, -1)
            if i > 5:
                ours.append(returned - started - one)
                bare.append(took)
        return {
            "n_tokens": n, "mb": size / 1e6, "ours_ms": statistics.median(ours) * 1e3,
            "bare_ms": statistics.median(bare) * 1e3, "park_ms": (parked - started) * 1e3, "prefill_ms": prefill * 1e3,
        }  # fmt: skip


def turns_part(config: Result) -> Result:
    """Sessions in turns over `n_slots`: time to the first token of later turns, and tokens decoded."""
    from llama_sessions import Engine, Session

    n_sessions = config["n_sessions"]
    with loaded(config, config["n_slots"]) as cm:
        engine = Engine(cm)
        cm.set_system(text(400, "system"))
        banned = {t: float("-inf") for t in range(cm.vocab.n_tokens) if cm.vocab.is_eog(t)}
        sessions = [Session() for _ in range(n_sessions)]
        rows = [cm.prefix.n_tokens] * n_sessions
        firsts, n_wrong = [], 0
        for turn in range(config["n_turns"]):
            for i, session in enumerate(sessions):
                begun, first = time.perf_counter(), 0.0
                stream = engine.stream(
                    session, text(20, f"{i} {turn}", WORDS[(turn * n_sessions + i) % len(WORDS)]), max_tokens=8,
                    temperature=0.0, logit_bias=banned,
                )  # fmt: skip
                for _ in stream:
                    first = first or time.perf_counter() - begun
                if turn:
                    firsts.append(first)
                    n_wrong += stream.reply.n_reused < rows[i]
                rows[i] = session.n_past
        stats = cm.stats()
        return {
            "later_ms": statistics.median(firsts) * 1e3, "n_wrong": n_wrong, "n_parked": stats.n_parked,
            "n_restored": stats.radix.n_hit_tokens, "saved_mb": stats.radix.n_bytes / 1e6,
        }  # fmt: skip


def eog_part(config: Result) -> Result:
    with loaded(config, 1) as cm:
        return {"banned": [t for t in range(cm.vocab.n_tokens) if cm.vocab.is_eog(t)]}


def server_part(config: Result) -> Result:
    """llama-server with as many slots, its prompt cache in RAM."""
    n = config["n_sessions"]
    users = [
        [text(20, f"{i} {t}", WORDS[(t * n + i) % len(WORDS)]) for t in range(config["n_turns"])] for i in range(n)
    ]
    played = server({**config, "users": users, "system": text(400, "system"), "n_reply": 8, "banned": config["banned"]})
    return {"later_ms": played["later_turn_s"] * 1e3, "n_decoded": played["n_decoded"]}


def stem_part(config: Result) -> Result:
    """Requests on one long text: a session each, released afterwards."""
    from llama_sessions import Engine, Session

    with loaded(config, 2) as cm:
        engine = Engine(cm)
        stem, firsts = text(config["n_stem"], "stem"), []
        for i in range(config["n_requests"]):
            session = Session("")
            before = cm.stats().n_tokens_decoded
            engine.chat(session, f"{stem} {text(8, f'question {i}', WORDS[i % len(WORDS)])}", max_tokens=2)
            firsts.append(cm.stats().n_tokens_decoded - before)
            cm.release(session)
        return {"first": firsts[0], "later": max(firsts[1:]), "n_restored": cm.stats().radix.n_hit_tokens}


PARTS = {
    "bytes": bytes_part,
    "many": turns_part,
    "few": turns_part,
    "stem": stem_part,
    "server": server_part,
    "eog": eog_part,
}


def main() -> int:
    if serve_part(PARTS):
        return 0
    parser = described(__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-server", metavar="PATH")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    shape = "small" if args.quick else "0.5b"
    base = {"model": str(model_file(shape)), "n_ctx": 8192, "n_batch": 512, "n_ubatch": 512, "n_threads": args.threads,
            "llama_server": args.llama_server}  # fmt: skip
    many = {"n_sessions": 16 if args.quick else 64, "n_slots": 8, "n_turns": 3}
    banned = run_part(__file__, "eog", base)["banned"] if args.llama_server else []
    configs = {
        "bytes": {**base, "n_tokens": 500 if args.quick else 2000, "n_rounds": 15},
        "many": {**base, **many},
        "few": {**base, **many, "n_sessions": 8},
        "stem": {**base, "n_stem": 200 if args.quick else 1000, "n_requests": 20 if args.quick else 100},
        "server": {**base, **many, "banned": banned, "server_options": ["--cache-ram", "2048"]},
    }
    parts = [p for p in configs if p != "server" or args.llama_server]
    found = interleaved(__file__, parts, configs.__getitem__, args.rounds)
    b, many_r, few = found["bytes"], found["many"], found["few"]
    ratio = median(b, "ours_ms") / median(b, "bare_ms")
    slots = median(many_r, "later_ms") / median(few, "later_ms")
    n_wrong = sum(r["n_wrong"] for r in many_r)
    stem = found["stem"][0]

    rows = [
        [f"park and return, {b[0]['n_tokens']} tokens", f"{median(b, 'ours_ms'):.2f} ms",
         f"get_data + set_data {median(b, 'bare_ms'):.2f} ms of {b[0]['mb']:.1f} MB; decoded again "
         f"{median(b, 'prefill_ms'):.0f} ms", f"{ratio:.2f}x", "2x", met(ratio <= 2)],
        [f"first token, {many['n_sessions']} sessions over 8 slots", f"{median(many_r, 'later_ms'):.1f} ms",
         f"8 sessions over 8 slots {median(few, 'later_ms'):.1f} ms", f"{slots:.2f}x", "1.15x", met(slots <= 1.15)],
        ["turns that decoded more than what is new", n_wrong, f"{many_r[0]['n_restored']} tokens restored", "", "0",
         met(not n_wrong)],
        [f"a later one of {configs['stem']['n_requests']} requests", f"{stem['later']} decoded",
         f"the first {stem['first']}", "", "the stem once", met(stem["later"] < 60)],
    ]  # fmt: skip
    if "server" in found:
        server_ms = median(found["server"], "later_ms")
        against = median(many_r, "later_ms") / server_ms
        rows.append(["the same against llama-server", f"{median(many_r, 'later_ms'):.1f} ms",
                     f"llama-server {server_ms:.1f} ms", f"{against:.2f}x", "0.7x", met(against <= 0.7)])  # fmt: skip
    say("What parking costs")
    print(table(["", "ours", "beside it", "ratio", "target", ""], rows))
    write_json(args.json, "parking", configs, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
