"""Sessions taking turns: what a turn costs here, in llama-cpp-python, in llama-server, and at the limit.

    python benchmarks/turns.py                              # about 5 minutes a round on 2 cores
    python benchmarks/turns.py --shape small --rounds 3     # a quick try
    python benchmarks/turns.py --llama-server /path/to/llama-server --json turns.json

The limit is a bare `llama_decode` loop over only the tokens that nobody has computed yet, in the same batches, with the
system prompt shared by `seq_cp`, and one `llama_sampler_sample` a token.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import peers
from bare import Bare
from harness import Result, described, interleaved, median, ratio, run_part, say, serve_part, spread, table, write_json
from server_peer import server
from workload import SHAPES, model_file, text, user_texts

TITLES = {
    "ours": "llama_sessions.Engine.stream",
    "llama": "Llama.create_chat_completion",
    "cache": "the same with LlamaRAMCache",
    "limit": "limit: bare llama_decode",
    "server": "llama-server",
}
PARTS = {
    "ours": peers.ours,
    "llama": peers.llama,
    "cache": peers.llama_cache,
    "limit": peers.limit,
    "server": server,
    "eog": lambda config: {"banned": Bare(config).eog_tokens()},
}


def check(results: dict[str, list[Result]], config: Result, script: Result) -> list[str]:
    """What is not as it must be: every side generates the same number of tokens from prompts of the same length."""
    n_generated = config["n_sessions"] * config["n_turns"] * config["n_reply"]
    wrong = []
    for side, rounds in results.items():
        for r in rounds:
            if r["n_generated"] != n_generated:
                wrong.append(f"{side} generated {r['n_generated']} tokens, not {n_generated}")
            if r["n_prompt"] != sum(len(t["prompt"]) for t in script["turns"]):
                wrong.append(f"{side} had {r['n_prompt']} prompt tokens in all, unlike ours")
    if any(r["script"] != script for r in results["ours"]):
        wrong.append("ours did not say the same in every round")
    if {r["n_decoded"] for r in results["ours"]} != {r["n_decoded"] for r in results["limit"]}:
        wrong.append("ours did not decode as many prompt tokens as the limit")
    return list(dict.fromkeys(wrong))


def report(results: dict[str, list[Result]]) -> str:
    limit = results["limit"]

    def timed(side: list[Result], key: str, unit: float, digits: int) -> str:
        value = median(side, key)
        return f"{value * unit:.{digits}f} ({ratio(value, median(limit, key))})"

    rows = [
        [
            TITLES[name],
            f"{median(side, 'setup_s') * 1e3:.0f}" if median(side, "setup_s") else "",
            timed(side, "first_turn_s", 1e3, 0),
            timed(side, "later_turn_s", 1e3, 0),
            timed(side, "total_s", 1, 2),
            spread([r["total_s"] for r in side]),
            timed(side, "cpu_s", 1, 2),
            int(median(side, "n_decoded")),
        ]
        for name, side in results.items()
    ]
    header = ["", "system, ms", "first turn: first token, ms", "later turns: first token, ms", "total, s", "of rounds",
              "CPU, s", "prompt tokens decoded"]  # fmt: skip
    return table(header, rows)


def configured(args: argparse.Namespace) -> Result:
    return {
        "model": str(args.model or model_file(args.shape)),
        "n_sessions": args.sessions,
        "n_turns": args.turns,
        "n_reply": args.reply,
        "system": text(args.system, "system"),
        "users": user_texts(args.sessions, args.turns, args.user),
        "n_ctx": args.n_ctx,
        "n_batch": args.n_batch,
        "n_ubatch": args.n_batch,
        "n_threads": args.threads,
        "banned": [],
        "llama_server": args.llama_server,
        "server_options": args.server_options.split(),
    }


def arguments() -> argparse.Namespace:
    parser = described(__doc__)
    add: Any = parser.add_argument
    add("--model", help="a GGUF of yours; its end of generation is banned by logit_bias on every side")
    add("--shape", choices=SHAPES, default="0.5b", help="random weights of this shape (default: 0.5b)")
    add("--sessions", type=int, default=4)
    add("--turns", type=int, default=6)
    add("--system", type=int, default=400, help="words of the shared system prompt")
    add("--user", type=int, default=80, help="words of each user message")
    add("--reply", type=int, default=32, help="tokens of each reply")
    add("--rounds", type=int, default=5)
    add("--n-ctx", type=int, default=8192)
    add("--n-batch", type=int, default=512)
    add("--threads", type=int, default=2, help="on every side; with other programs about, 1 gives steadier figures")
    add("--sides", default="ours,llama,cache,limit,server", help="some of them, in order; ours and limit always run")
    add("--llama-server", metavar="PATH", help="without it that side is skipped")
    add("--server-options", default="", help="more options for llama-server, in one string")
    add("--json", metavar="PATH")
    return parser.parse_args()


def main() -> int:
    if serve_part(PARTS):
        return 0
    args = arguments()
    config = configured(args)
    if args.model:
        config["banned"] = run_part(__file__, "eog", config)["banned"]
    script = run_part(__file__, "ours", config)["script"]  # a dry run: the tokens that the limit plays again
    wanted = args.sides.split(",")
    sides = [s for s in TITLES if s in ("ours", "limit") or (s in wanted and (s != "server" or args.llama_server))]
    results = interleaved(
        __file__, sides, lambda side: {**config, "script": script} if side == "limit" else config, args.rounds
    )
    wrong = check(results, config, script)

    say(
        f"{args.sessions} sessions x {args.turns} turns, one system prompt of {args.system} words, user {args.user} "
        f"words, reply {args.reply} tokens, greedy; medians of {args.rounds} rounds, interleaved; (x) = times the limit"
    )
    print(report(results))
    prefix = script["n_prefix"]
    print(
        f"\nsystem prompt and header: {prefix} tokens, encoded ahead of the turns by ours and the limit, within the "
        "first turn by the others; total counts both."
    )
    if results["limit"][0]["has_plain_buffers"]:
        print("AMX build: every side loads with use_extra_bufts=False (else q8_0 crashes); llama-server: --no-repack.")
    other = max(r["n_sampled_otherwise"] for r in results["limit"])
    print(f"the limit sampled {other} tokens otherwise than ours (it goes on with ours in any case).")
    all_well = "token counts: the same prompts and replies on every side; ours decodes what the limit decodes."
    print("\n".join(f"NOT COMPARABLE: {w}" for w in wrong) or all_well)
    for rounds in results.values():
        for r in rounds:
            r.pop("script", None)
    write_json(args.json, "turns", {**config, "users": None, "system": None}, results)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
