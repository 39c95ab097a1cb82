"""Tokens a second of `Engine.stream`, beside a bare decode-and-sample loop and `llama_cpp.Llama`, JSON too.

    python benchmarks/engine.py                     # about 8 minutes on 2 cores
    python benchmarks/engine.py --shape small --pairs 4

stream   `Engine.stream` against `llama_decode` + `llama_sampler_sample` with the same sampler chain: at least 0.98x
llama    the same against `Llama.create_chat_completion(stream=True)` over the same weights: above 1x
json     both with the same JSON schema: at least 0.98x

Replies of the two sides follow each other in one process, on one model, so that a slow minute hits both; the order
turns with each pair. What counts is time from the first token on; ratios are medians over the pairs.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import llama_cpp
from bare import Bare, plain_buffers, sampler_chain
from harness import Result, described, interleaved, met, say, serve_part, spread, table, write_json
from workload import SHAPES, model_file, text

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 40}},
        "size": {"type": "integer"},
    },
    "required": ["name", "tags", "size"],
}
Speed = Callable[[int], float]  # tokens a second of the reply with this seed


def pairs(n: int, ours: Speed, theirs: Speed) -> Result:
    """Both sides in turns, the first pair to warm up."""
    found: dict[str, list[float]] = {"ours": [], "theirs": []}
    for i in range(n + 1):
        sides = [("ours", ours), ("theirs", theirs)]
        for name, speed in sides if i % 2 else sides[::-1]:
            value = speed(i)
            if i:
                found[name].append(value)
    ratios = [a / b for a, b in zip(found["ours"], found["theirs"], strict=True)]
    return {**found, "ratio": statistics.median(ratios), "ratios": ratios}


def timed(tokens: Any) -> float:
    """Tokens a second of an iterator, from its first on."""
    next(tokens)
    started, n = time.perf_counter(), 0
    for _ in tokens:
        n += 1
    return n / (time.perf_counter() - started)


def messages(seed: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": text(60, f"prompt {seed}", "go")}]


def streamed(engine: Any, config: Result, seed: int, **form: Any) -> float:
    """A reply of ours."""
    from llama_sessions import Session

    session = Session()
    session.messages = messages(seed)
    banned = {t: float("-inf") for t in config["banned"]} if not form else None
    stream = engine.stream(session, max_tokens=config["n_tokens"], seed=seed, logit_bias=banned, **form)
    speed = timed(chunk for chunk in stream if chunk.token is not None)
    engine.cm.release(session)
    return speed


def against_bare(config: Result) -> Result:
    from llama_sessions import ContextManager, Engine, Session

    bare = Bare(config)
    config = config | {"banned": []}
    cm = ContextManager(bare.ctx, bare.vocab)
    engine = Engine(cm)

    def theirs(seed: int) -> float:
        session = Session()
        session.messages = messages(seed)
        cm.prepare(session)
        prompt = cm.tokens(session).tolist()
        cm.release(session)
        chain = sampler_chain(bare.n_vocab, greedy=False, seed=seed)
        for batch in bare.batches(prompt, 0, 1):
            bare.decode(batch)
        one = bare.batches([0], len(prompt), 1)[0]

        def tokens() -> Any:
            token = bare.sample(chain)
            yield token
            for pos in range(len(prompt), len(prompt) + config["n_tokens"] - 1):
                one.token[0], one.pos[0] = token, pos
                bare.decode(one)
                token = bare.sample(chain)
                yield token

        speed = timed(tokens())
        llama_cpp.llama_sampler_free(chain)
        bare.trim(1, 0)
        return speed

    return pairs(config["n_pairs"], lambda seed: streamed(engine, config, seed), theirs)


def against_llama(config: Result) -> Result:
    return _against_llama(config, {}, {})


def against_llama_json(config: Result) -> Result:
    form = {"type": "json_object", "schema": SCHEMA}
    return _against_llama(config, {"json_schema": SCHEMA}, {"response_format": form})


def _against_llama(config: Result, our_form: dict[str, Any], their_form: dict[str, Any]) -> Result:
    from llama_sessions import ContextManager, Engine

    plain_buffers()
    names = ("n_ctx", "n_batch", "n_ubatch", "n_threads")
    settings = {name: config[name] for name in names}
    llm = llama_cpp.Llama(
        config["model"], n_threads_batch=config["n_threads"], flash_attn=True, no_perf=True, verbose=False, **settings
    )
    cm = ContextManager.from_llama(llm, max_sessions=config["n_sessions"], **settings)
    engine = Engine(cm)
    config = config | {"banned": [t for t in range(cm.vocab.n_tokens) if cm.vocab.is_eog(t)]}
    banned = {t: float("-inf") for t in config["banned"]}

    def theirs(seed: int) -> float:
        bias = None if their_form else banned  # with a grammar llama.cpp aborts on a banned end
        stream = llm.create_chat_completion(
            messages(seed), stream=True, max_tokens=config["n_tokens"], temperature=0.8, seed=seed, logit_bias=bias,
            **their_form,
        )  # fmt: skip
        return timed(chunk for chunk in stream if chunk["choices"][0]["delta"].get("content"))

    return pairs(config["n_pairs"], lambda seed: streamed(engine, config, seed, **our_form), theirs)


PARTS = {"stream": against_bare, "llama": against_llama, "json": against_llama_json}
TITLES = {
    "stream": ("a bare loop, same samplers", 0.98),
    "llama": ("Llama.create_chat_completion", 1.0),
    "json": ("the same, both with a JSON schema", 0.98),
}


def main() -> int:
    if serve_part(PARTS):
        return 0
    parser = described(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64, help="of a reply (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    config = {
        "model": str(model_file(args.shape)), "n_ctx": 4096, "n_batch": 512, "n_ubatch": 512, "n_sessions": 4,
        "n_threads": args.threads, "n_tokens": args.tokens, "n_pairs": args.pairs,
    }  # fmt: skip
    found = {part: r for part, (r,) in interleaved(__file__, list(PARTS), lambda _: config, 1).items()}
    rows = []
    for part, r in found.items():
        title, target = TITLES[part]
        verdict = met(r["ratio"] >= target)
        speeds = [f"{statistics.median(r[side]):.1f}" for side in ("ours", "theirs")]
        rows.append([title, *speeds, f"{r['ratio']:.3f}x", spread(r["ratios"]), f"{target}x", verdict])
    say(f"Engine.stream, {args.shape} shape, {args.tokens} tokens a reply, medians of {args.pairs} pairs")
    print(table(["against", "ours, tokens/s", "theirs", "ours / theirs", "lowest..highest", "target", ""], rows))
    write_json(args.json, "engine", config, found)
    return 0 if all(row[-1] == "met" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
