"""The sides of `turns.py`. Each takes the config, plays all turns in turn, and says what every turn took.

A turn is `{session, turn, first_s, total_s, n_prompt, n_decoded, n_generated}`: `n_decoded` are the prompt tokens it
put through the model. The last token sampled in a reply is decoded, and counted, with the next turn, on every side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from bare import Bare, plain_buffers, sampler_chain
from harness import Result


def order(config: Result) -> Iterator[tuple[int, int]]:
    """Sessions take turns: (session, turn)."""
    for turn in range(config["n_turns"]):
        for session in range(config["n_sessions"]):
            yield session, turn


def played(turns: list[Result], setup_s: float, n_setup: int, total_s: float, cpu_s: float, **more: Any) -> Result:
    """One side's result. `setup_s`, `n_setup`: the shared system prompt, where it is encoded ahead of the turns;
    `cpu_s`: CPU seconds of all threads."""
    return {
        "turns": turns,
        "setup_s": setup_s,
        "total_s": total_s,
        "cpu_s": cpu_s,
        "first_turn_s": _median([t["first_s"] for t in turns if t["turn"] == 0]),
        "later_turn_s": _median([t["first_s"] for t in turns if t["turn"] > 0]),
        "n_prompt": sum(t["n_prompt"] for t in turns),
        "n_decoded": n_setup + sum(t["n_decoded"] for t in turns),
        "n_generated": sum(t["n_generated"] for t in turns),
        **more,
    }


def _median(values: list[float]) -> float:
    ordered = sorted(values)
    n = len(ordered)
    return (ordered[n // 2] + ordered[(n - 1) // 2]) / 2 if n else 0.0


def ours(config: Result) -> Result:
    """`Engine.stream`. Also returns the tokens of every turn, which the limit plays again."""
    from llama_sessions import ContextManager, Engine, Session

    names = ("n_ctx", "n_batch", "n_ubatch", "n_threads")
    options = {name: config[name] for name in names}
    with ContextManager.load(config["model"], max_sessions=config["n_sessions"], **options) as cm:
        engine = Engine(cm)
        sessions = [Session() for _ in range(config["n_sessions"])]
        banned = {t: float("-inf") for t in config["banned"]}
        turns, script = [], []
        started, cpu = time.perf_counter(), time.process_time()
        cm.set_system(config["system"])
        setup = time.perf_counter() - started
        for i, turn in order(config):
            begun, first = time.perf_counter(), 0.0
            stream = engine.stream(
                sessions[i],
                config["users"][i][turn],
                max_tokens=config["n_reply"],
                temperature=0.0,
                logit_bias=banned or None,
            )
            for _ in stream:
                first = first or time.perf_counter() - begun
            ended = time.perf_counter()
            reply = stream.reply
            assert reply is not None
            turns.append(
                {
                    "session": i,
                    "turn": turn,
                    "first_s": first,
                    "total_s": ended - begun,
                    "n_prompt": reply.n_prompt,
                    "n_decoded": reply.n_decoded,
                    "n_generated": reply.n_generated,
                }
            )
            row = cm.tokens(sessions[i]).tolist()
            script.append({"prompt": row[: reply.n_prompt], "reply": list(reply.tokens)})
        total, cpu = time.perf_counter() - started, time.process_time() - cpu
        recorded = {"n_prefix": cm.prefix.n_tokens, "turns": script}
        return played(turns, setup, cm.prefix.n_tokens, total, cpu, script=recorded)


def limit(config: Result) -> Result:
    """Bare `llama_decode` of only the new tokens of a recorded run of ours; the prefix is shared by `seq_cp`.

    It samples like the others; the recorded reply goes on, so that it decodes the very same tokens.
    """
    bare = Bare(config)
    script = config["script"]
    turns_todo, n_prefix = script["turns"], script["n_prefix"]
    chain = sampler_chain(bare.n_vocab, config["banned"])
    prefix = bare.batches(turns_todo[0]["prompt"][:n_prefix], 0, 0)
    ends = [0] * config["n_sessions"]
    work = []
    for (i, turn), tokens in zip(order(config), turns_todo, strict=True):
        n_there = ends[i] or n_prefix
        n = len(tokens["prompt"])
        prompt = bare.batches(tokens["prompt"][n_there:], n_there, 2 + i)
        reply = [bare.batches([t], n + j, 2 + i)[0] for j, t in enumerate(tokens["reply"][:-1])]
        ends[i] = n + len(reply)
        work.append((i, turn, prompt, reply, n - n_there, tokens))

    turns, n_other = [], 0
    started, cpu = time.perf_counter(), time.process_time()
    for batch in prefix:
        bare.decode(batch)
    setup = time.perf_counter() - started
    for i, turn, prompt, reply, n_decoded, tokens in work:
        begun = time.perf_counter()
        if turn == 0:
            bare.share(0, 2 + i, 0, n_prefix)
        for batch in prompt:
            bare.decode(batch)
        sampled = [bare.sample(chain)]
        first = time.perf_counter() - begun
        for batch in reply:
            bare.decode(batch)
            sampled.append(bare.sample(chain))
        total = time.perf_counter() - begun
        n_other += sum(a != b for a, b in zip(sampled, tokens["reply"], strict=True))
        turns.append(
            {
                "session": i,
                "turn": turn,
                "first_s": first,
                "total_s": total,
                "n_prompt": len(tokens["prompt"]),
                "n_decoded": n_decoded,
                "n_generated": len(sampled),
            }
        )
    whole, cpu = time.perf_counter() - started, time.process_time() - cpu
    noted = {"n_sampled_otherwise": n_other, "has_plain_buffers": bare.has_plain_buffers}
    return played(turns, setup, n_prefix, whole, cpu, **noted)


def llama(config: Result) -> Result:
    """`llama_cpp.Llama.create_chat_completion(stream=True)`: one sequence, its own prefix match."""
    return _llama(config, cached=False)


def llama_cache(config: Result) -> Result:
    """The same with `LlamaRAMCache`."""
    return _llama(config, cached=True)


def _llama(config: Result, *, cached: bool) -> Result:
    import llama_cpp

    has_plain_buffers = plain_buffers()

    class Counting(llama_cpp.Llama):  # type: ignore[misc]
        """Notes the prompt it is given, and what it evaluates before the first sample."""

        n_prompt = n_decoded = 0
        _is_prompt = False

        def generate(self, tokens: Any, *args: Any, **kwargs: Any) -> Any:
            self.n_prompt, self._is_prompt = len(tokens), True
            return super().generate(tokens, *args, **kwargs)

        def eval(self, tokens: Any) -> None:
            if self._is_prompt:
                self.n_decoded, self._is_prompt = len(tokens), False
            super().eval(tokens)

    llm = Counting(
        config["model"],
        n_ctx=config["n_ctx"],
        n_batch=config["n_batch"],
        n_ubatch=config["n_ubatch"],
        n_threads=config["n_threads"],
        n_threads_batch=config["n_threads"],
        flash_attn=True,
        no_perf=True,
        verbose=False,
    )
    if cached:
        llm.set_cache(llama_cpp.LlamaRAMCache())

    def answer(messages: list[dict[str, str]], session: int) -> Iterator[str]:
        for chunk in llm.create_chat_completion(
            messages,
            stream=True,
            max_tokens=config["n_reply"],
            temperature=0.0,
            logit_bias={t: float("-inf") for t in config["banned"]} or None,
        ):
            yield chunk["choices"][0]["delta"].get("content") or ""

    return chat_turns(config, answer, lambda: (llm.n_prompt, llm.n_decoded), has_plain_buffers=has_plain_buffers)


def chat_turns(
    config: Result,
    answer: Callable[[list[dict[str, str]], int], Iterator[str]],
    counts: Callable[[], tuple[int, int]],
    cpu_seconds: Callable[[], float] = time.process_time,
    **more: Any,
) -> Result:
    """All turns through something that takes messages and gives out text; `counts`: (prompt, decoded) afterwards."""
    chats = [[{"role": "system", "content": config["system"]}] for _ in range(config["n_sessions"])]
    turns = []
    started, cpu = time.perf_counter(), cpu_seconds()
    for i, turn in order(config):
        begun, first = time.perf_counter(), 0.0
        chats[i].append({"role": "user", "content": config["users"][i][turn]})
        pieces = []
        for piece in answer(chats[i], i):
            if piece:
                first = first or time.perf_counter() - begun
                pieces.append(piece)
        total = time.perf_counter() - begun
        chats[i].append({"role": "assistant", "content": "".join(pieces)})
        n_prompt, n_decoded = counts()
        turns.append(
            {
                "session": i,
                "turn": turn,
                "first_s": first,
                "total_s": total,
                "n_prompt": n_prompt,
                "n_decoded": n_decoded,
                "n_generated": len(pieces),
            }
        )
    return played(turns, 0.0, 0, time.perf_counter() - started, cpu_seconds() - cpu, **more)
