"""Finding a prompt among the saved ones, and adding one.

    python benchmarks/radix.py            # about 2 minutes on 2 cores, 2 GB
    python benchmarks/radix.py --quick    # a tenth of the entries: to try, not to quote

A prompt of 32,768 tokens is looked for among 10,000 entries of 500 to 8,000 tokens (half of them branch off another,
half off one of 20 stems), and new entries are added. No KV is involved: this is the search alone.

long      the prompt begins like an entry of about 8,000 tokens, and goes on unlike any
turns     the prompt is one chat, saved turn by turn in 256 pieces of 128 tokens
none      nothing of the prompt is known
insert    a new entry that branches off inside another; at most 2 ms
full      the same into a full cache: something has to go, blobs are cut (8 bytes a token)

place     blobs of 1 to 74 MB into an arena of 512 MB that is full: how full it stays, and how long the longest insert
          takes, with the limit to what may be moved for a place, with none, and with nothing moved at all

Beside it: `llama_cpp.LlamaRAMCache`, by its own `_find_longest_prefix_key`; a plain trie with a dict a token, which
has to do with a fiftieth of the entries, since all of them would take tens of gigabytes; and the limit, one numpy
compare of 32,768 ids.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import Result, interleaved, median, met, say, serve_part, spread, table, write_json

N_PROMPT, N_TURN, N_VOCAB = 32768, 128, 32000
MATCHES = ("long", "turns", "none")
TARGETS = {"long": 1.0, "turns": 1.0, "none": 1.0, "insert": 2.0, "full": 2.0}  # ms
Ids = npt.NDArray[np.int32]


class Workload:
    """Entries and prompts, the same in every process."""

    def __init__(self, n_entries: int) -> None:
        self.rng = np.random.default_rng(1)
        self.stems = [self.some(400) for _ in range(20)]
        self.entries: list[Ids] = []
        for _ in range(n_entries):
            self.entries.append(self.new_entry())
        self.chat = self.some(N_PROMPT)

    def some(self, n: int) -> Ids:
        return self.rng.integers(0, N_VOCAB, n, dtype=np.int32)

    def new_entry(self) -> Ids:
        n = int(self.rng.integers(500, 8001))
        base = self.stems[int(self.rng.integers(len(self.stems)))]
        if self.entries and self.rng.random() < 0.5:
            base = self.entries[int(self.rng.integers(len(self.entries)))]
        begin = base[: int(self.rng.integers(1, min(n, len(base)) + 1))]
        return np.concatenate([begin, self.some(n - len(begin))])

    def prompts(self, kind: str, n: int) -> list[tuple[Ids, int]]:
        """Prompts, and how many tokens of each are known at least."""
        found = []
        longest = sorted(self.entries, key=len)[-100:]
        for i in range(n):
            if kind == "long":
                known = longest[i % len(longest)]
            elif kind == "turns":
                known = self.chat
            else:
                known = np.full(1, N_VOCAB + i, np.int32)
            prompt = np.concatenate([known, self.some(N_PROMPT - len(known))])
            found.append((prompt, 0 if kind == "none" else len(known)))
        return found


def timed(call: Callable[[Any], Any], arguments: Sequence[Any]) -> tuple[list[float], list[Any]]:
    """Milliseconds of each call, and what came back."""
    times, results = [], []
    gc.collect()
    gc.disable()
    for argument in arguments:
        started = time.perf_counter()
        result = call(argument)
        times.append((time.perf_counter() - started) * 1e3)
        results.append(result)
    gc.enable()
    return times, results


def summary(kind: str, times: list[float]) -> Result:
    return {kind: statistics.median(times), f"{kind}_p99": float(np.percentile(times, 99))}


# -- ours


class ByToken:
    """A cutter of blobs that are laid out by token."""

    def n_bytes(self, n_tokens: int) -> int:
        return 8 * n_tokens

    def cut(self, blob: npt.NDArray[np.uint8], a: int, b: int) -> npt.NDArray[np.uint8]:
        return blob[8 * a : 8 * b].copy()


class NoKv:
    """A saver that has nothing to save."""

    def n_bytes(self, p0: int, p1: int) -> int:
        return 8 * (p1 - p0)

    def save(self, p0: int, p1: int, out: npt.NDArray[np.uint8]) -> None:
        out[:] = 0


def tree_side(config: Result) -> Result:
    from llama_sessions import RadixOptions
    from llama_sessions.kv.cache import RadixCache
    from llama_sessions.kv.radix import RadixTree

    work = Workload(config["n_entries"])
    tree: RadixTree[int] = RadixTree(split=lambda value, n: (value, value), n_bytes=lambda value: 1)
    for entry in [*work.entries, *(work.chat[:n] for n in range(N_TURN, N_PROMPT + 1, N_TURN))]:
        tree.insert(None, entry, lambda q: q)
    out: Result = {"n_entries": len(work.entries), "n_nodes": tree.n_nodes, "n_tokens": tree.n_tokens}
    for kind in MATCHES:
        prompts = work.prompts(kind, config["n_times"])
        times, found = timed(lambda prompt: tree.match(None, prompt), [p for p, _ in prompts])
        assert all(m.n_tokens >= known for m, (_, known) in zip(found, prompts, strict=True))
        out |= summary(kind, times) | {f"{kind}_edges": max(len(m.segments) for m in found)}
    news = [work.new_entry() for _ in range(config["n_times"])]
    times, added = timed(lambda entry: tree.insert(None, entry, lambda q: q), news)
    assert all(node is not None for node in added)
    out |= summary("insert", times)
    tree.check_integrity()

    cache = RadixCache(RadixOptions(max_bytes=8 * int(0.5 * tree.n_tokens)), cutter=ByToken())
    saver = NoKv()
    for entry in work.entries:
        cache.save(None, entry, saver)
    before = cache.stats()
    assert before.n_tokens_evicted > 0
    times, added = timed(lambda entry: cache.save(None, entry, saver), news)
    out |= summary("full", times) | {"full_tokens_evicted": cache.stats().n_tokens_evicted - before.n_tokens_evicted}
    cache.check_integrity()
    return out


# -- finding a place


class Touched(NoKv):
    """Saves of 12.3 kB a token, that touch each page and no more."""

    def n_bytes(self, p0: int, p1: int) -> int:
        return 12300 * (p1 - p0)

    def save(self, p0: int, p1: int, out: npt.NDArray[np.uint8]) -> None:
        out[::4096] = 1


def place_side(config: Result) -> Result:
    from llama_sessions import RadixOptions
    from llama_sessions.kv import blob_store
    from llama_sessions.kv.cache import RadixCache

    blob_store.MOST_MOVED = config["most_moved"]
    rng = np.random.default_rng(2)
    cache, saver = RadixCache(RadixOptions()), Touched()
    prompts = [rng.integers(0, N_VOCAB, int(rng.integers(100, 6001)), dtype=np.int32) for _ in range(config["n_blobs"])]
    for old, new in zip(prompts[::2], prompts[1::2], strict=False):
        n = max(0, min(len(old), len(new)) - 50)
        new[:n] = old[:n]
    full: list[float] = []
    times, _ = timed(
        lambda prompt: (cache.save(None, prompt, saver), full.append(cache.stats().n_bytes / cache.stats().max_bytes)),
        prompts,
    )
    cache.check_integrity()
    third = len(prompts) // 3  # it fills up first
    return {"full": statistics.mean(full[third:]), "mean": statistics.mean(times[third:]), "worst": max(times[third:])}


# -- peers and the limit


def ram_cache_side(config: Result) -> Result:
    from llama_cpp import LlamaRAMCache

    work = Workload(config["n_entries"])
    ids = list(range(N_VOCAB + config["n_times"]))  # one object an id: else the keys alone take gigabytes

    def key(tokens: Ids) -> tuple[int, ...]:
        return tuple(map(ids.__getitem__, tokens.tolist()))

    cache = LlamaRAMCache(capacity_bytes=2**60)
    for entry in [*work.entries, work.chat]:
        cache.cache_state[key(entry)] = SimpleNamespace(llama_state_size=1)  # __setitem__ sums all sizes each time
    out: Result = {"n_entries": len(work.entries)}
    for kind in MATCHES:
        prompts = work.prompts(kind, config["n_times"] // 10)
        times, found = timed(cache._find_longest_prefix_key, [key(p) for p, _ in prompts])
        assert all(bool(k) == bool(known) for k, (_, known) in zip(found, prompts, strict=True))
        out |= summary(kind, times)
    news = [key(work.new_entry()) for _ in range(config["n_times"] // 10)]
    state = SimpleNamespace(llama_state_size=1)
    times, _ = timed(lambda k: cache.__setitem__(k, state), news)
    return out | summary("insert", times)


def trie_side(config: Result) -> Result:
    work = Workload(config["n_entries"] // 50)
    root: dict[int, Any] = {}

    def insert(tokens: list[int]) -> None:
        node = root
        for token in tokens:
            below = node.get(token)
            if below is None:
                below = node[token] = {}
            node = below

    def match(tokens: list[int]) -> int:
        node: dict[int, Any] | None = root
        for n, token in enumerate(tokens):
            node = node.get(token)  # type: ignore[union-attr]
            if node is None:
                return n
        return len(tokens)

    for entry in [*work.entries, work.chat]:
        insert(entry.tolist())
    out: Result = {"n_entries": len(work.entries)}
    for kind in MATCHES:
        prompts = work.prompts(kind, config["n_times"])
        times, found = timed(match, [p.tolist() for p, _ in prompts])
        assert all(n >= known for n, (_, known) in zip(found, prompts, strict=True))
        out |= summary(kind, times)
    times, _ = timed(insert, [work.new_entry().tolist() for _ in range(config["n_times"])])
    return out | summary("insert", times)


def limit_side(config: Result) -> Result:
    rng = np.random.default_rng(1)
    a = rng.integers(0, N_VOCAB, N_PROMPT, dtype=np.int32)
    times, _ = timed(lambda b: int((a != b).argmax()), [a.copy() for _ in range(config["n_times"])])
    return summary("compare", times)


PLACES = {"place-4": 4.0, "place-any": 1e9, "place-none": 0.0}  # times the blob that may be moved
PARTS = {
    **dict.fromkeys(PLACES, place_side),
    "tree": tree_side,
    "ram-cache": ram_cache_side,
    "trie": trie_side,
    "limit": limit_side,
}


def main() -> int:
    if serve_part(PARTS):
        return 0
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the entries, one round: to try, not to quote")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="PATH")
    args = parser.parse_args()
    config = {"n_entries": 1000 if args.quick else 10000, "n_times": 100 if args.quick else 300}
    config["n_blobs"] = 400 if args.quick else 1500
    n_rounds = 1 if args.quick else args.rounds
    results = interleaved(__file__, list(PARTS), lambda p: {**config, "most_moved": PLACES.get(p)}, n_rounds)

    ours = results["tree"]
    say(f"Finding a prompt of {N_PROMPT} tokens among {config['n_entries']} entries, and adding one")
    rows: list[list[object]] = []
    for kind, target in TARGETS.items():
        value = median(ours, kind)
        what = f"match, {kind}" if kind in MATCHES else f"insert, {kind}" if kind == "full" else kind
        detail = f"99 % under {median(ours, f'{kind}_p99'):.3f} ms"
        if kind in MATCHES:
            detail += f", {median(ours, f'{kind}_edges'):.0f} edges"
        cells = [f"{value:.3f} ms", spread([r[kind] for r in ours]), detail, f"{target:g} ms", met(value <= target)]
        rows.append([what, *cells])
    print(table(["", "median", "lowest..highest", "detail", "target", ""], rows))

    print()
    limit = median(results["limit"], "compare")
    names = {"tree": "llama-sessions", "ram-cache": "LlamaRAMCache", "trie": "trie, a dict a token"}
    rows = []
    for part, name in names.items():
        each = results[part]
        times = [f"{median(each, kind):.3f}" for kind in (*MATCHES, "insert")]
        rows.append([name, f"{median(each, 'n_entries'):.0f}", *times])
    rows.append([f"limit: one compare of {N_PROMPT} ids", "1", f"{limit:.3f}", f"{limit:.3f}", "0", ""])
    print(table(["milliseconds, medians", "entries", "long", "turns", "none", "insert"], rows))

    print()
    labels = ["at most 4 times the blob (as it is)", "as much as it takes", "nothing: more goes instead"]
    rows = []
    for part, label in zip(PLACES, labels, strict=True):
        each = results[part]
        full, mean, worst = (median(each, key) for key in ("full", "mean", "worst"))
        rows.append([label, f"{100 * full:.0f} %", f"{mean:.1f} ms", f"{worst:.0f} ms"])
    print(table(["what may be moved for a place", "arena in use", "mean insert", "worst"], rows))
    write_json(args.json, "radix", vars(args) | config, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
