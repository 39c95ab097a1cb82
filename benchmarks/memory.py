"""Host memory of saved KV: a long chat with branches, stored once by its tokens, or a whole row a snapshot.

    python benchmarks/memory.py

A 20-turn chat, then 4 forks, each branch talked on, all five released. Ours keeps one blob an edge of a radix tree: at
most 1.05x the KV bytes of their unique tokens, and each transcript prepared again decodes one token. Beside it what
whole rows take: one a turn (as servers with a prompt cache keep them), and one a session.
"""

from __future__ import annotations

import argparse
import sys

from harness import Result, interleaved, met, say, serve_part, table, write_json
from workload import WORDS, model_file, text


def chat(config: Result) -> Result:
    from llama_sessions import ContextManager, Engine, Session

    with ContextManager.load(config["model"], n_ctx=8192, max_sessions=8, n_threads=1) as cm:
        engine, session = Engine(cm), Session()
        banned = {t: float("-inf") for t in range(cm.vocab.n_tokens) if cm.vocab.is_eog(t)}
        rows: list[int] = []

        def talk(one: Session, words: str) -> None:
            engine.chat(one, words, max_tokens=24, temperature=0.0, logit_bias=banned)
            rows.append(one.n_past)

        for i in range(config["n_turns"]):
            talk(session, text(40, f"turn {i}", WORDS[i]))
        branches = [session, *(cm.fork(session) for _ in range(config["n_forks"]))]
        for i, branch in enumerate(branches):
            for turn in range(2):
                talk(branch, text(40, f"branch {i} {turn}", WORDS[40 + 2 * i + turn]))
        tokens = [tuple(cm.tokens(branch).tolist()) for branch in branches]
        n_unique = len({row[: i + 1] for row in tokens for i in range(len(row))})
        for branch in branches:
            cm.release(branch)
        radix = cm.stats().radix
        per_token = cm.capabilities.kv_bytes_per_token
        n_decoded = []
        for row in tokens:
            again = Session.raw("")
            again.messages[0]["content"] = b"".join(map(cm.vocab.piece, row)).decode()
            cm.prepare(again)
            assert again.last_prepare is not None
            n_decoded.append(again.last_prepare.n_decoded)
            cm.release(again)
        return {
            "bytes": radix.n_bytes, "n_unique": n_unique, "n_kept": radix.n_tokens, "kv_bytes": n_unique * per_token,
            "a_turn_bytes": sum(rows) * per_token, "a_session_bytes": sum(map(len, tokens)) * per_token,
            "most_decoded": max(n_decoded), "n_nodes": radix.n_nodes,
        }  # fmt: skip


def main() -> int:
    if serve_part({"chat": chat}):
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shape", default="small")
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    config = {"model": str(model_file(args.shape)), "n_turns": 20, "n_forks": 4}
    ((r,),) = interleaved(__file__, ["chat"], lambda _: config, 1).values()

    def row(name: str, n: float, target: str = "", verdict: str = "") -> list[object]:
        return [name, f"{n / 1e6:.2f} MB", f"{n / r['kv_bytes']:.2f}x", target, verdict]

    say(f"20 turns, 4 forks talked on, all five released: {r['n_unique']} unique tokens")
    fits = r["bytes"] <= 1.05 * r["kv_bytes"] and r["most_decoded"] <= 1
    print(
        table(
            ["", "host bytes", "of their KV", "target", ""],
            [
                row("KV of the unique tokens", r["kv_bytes"]),
                row(f"ours, {r['n_nodes']} edges", r["bytes"], "1.05x", met(fits)),
                row("a whole row a session", r["a_session_bytes"]),
                row("a whole row a turn", r["a_turn_bytes"]),
            ],
        )
    )
    print(f"\neach transcript prepared again decodes at most {r['most_decoded']} token(s); target 1")
    write_json(args.json, "memory", config, r)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
