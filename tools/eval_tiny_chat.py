"""How well the built-in model recalls: by distance, greedy, on names, words and seeds kept out of training.

    python tools/eval_tiny_chat.py [--model PATH] [--trials 200]

For each bin of 128 tokens: `known`, a fact told that many tokens before it is asked for, and never mentioned in
between; `unknown`, a fact never told, asked for in a dialogue of that length; `password`, told in the system prompt of
a dialogue of that length. A trial counts only if the whole answer is right, to the letter.
"""

from __future__ import annotations

import argparse
import random

from tiny_chat_data import Dialogue, Turn, Words, ask, dialogue, keys, tell, value_for

from llama_sessions import ContextManager, Engine, Session, builtin_model

BIN = 128
RESERVE = 48  # tokens for the question and its answer


class Trial:
    """One conversation that ends with a question, and the right answer."""

    def __init__(self, cm: ContextManager, seed: str, low: int, kind: str) -> None:
        self.rng = random.Random(seed)
        self.words = Words(self.rng, held_out=True)
        self.cm = cm
        n_ctx = cm.n_ctx_seq
        aim = self.rng.randrange(low, min(low + BIN, n_ctx - RESERVE))
        key = "password" if kind == "password" else self.rng.choice(keys())
        value = None if kind == "unknown" else value_for(key, self.words)
        self.system: str | None = None
        head: list[Turn] = []
        body = dialogue(self.rng, max(1, aim), self.count, held_out=True, without=key)
        if kind == "password":
            self.system = f"You are a helpful assistant. The password is {value}."
        elif kind == "known":
            before = self.rng.randrange(0, max(1, n_ctx - RESERVE - aim - 30)) if self.rng.random() < 0.5 else 0
            if before > 60:
                head = self.fitting(dialogue(self.rng, before, self.count, held_out=True, without=key), before)
            head.append(Turn(*tell(key, str(value), self.rng)))
        else:
            self.system = body.system
        n_system = 0 if self.system is None or kind == "known" else self.count(self.system)
        self.turns = head + self.fitting(body, aim - n_system)
        self.question, self.answer = ask(key, value, self.rng)

    def count(self, text: str) -> int:
        """Tokens of a message with its frame: two control tokens, the role, two line feeds."""
        return len(self.cm.vocab.tokenize(text)) + len(self.cm.vocab.tokenize("assistant\n")) + 3

    def fitting(self, said: Dialogue, n_tokens: int) -> list[Turn]:
        """As many turns as fit into `n_tokens`."""
        turns, n = [], 0
        for turn in said.turns:
            n += self.count(turn.user) + self.count(turn.assistant)
            if n > n_tokens:
                break
            turns.append(turn)
        return turns

    def run(self) -> bool:
        session = Session(self.system)
        for turn in self.turns:
            session.add_user(turn.user)
            session.add_assistant(turn.assistant)
        reply = Engine(self.cm).chat(session, self.question, temperature=0, max_tokens=40)
        self.cm.release(session)
        return reply.text == self.answer


def manager(path: str) -> ContextManager:
    """Without headroom: what is told first must not be evicted before it is asked for."""
    return ContextManager.load(path, max_sessions=2, n_threads=1, headroom=0)


def recall(cm: ContextManager, kind: str, low: int, n_trials: int) -> float:
    """The share of trials of a kind in the bin from `low` on that are right."""
    return sum(Trial(cm, f"eval-{kind}-{low}-{i}", low, kind).run() for i in range(n_trials)) / n_trials


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    ap.add_argument("--model", default=builtin_model())
    ap.add_argument("--trials", type=int, default=200)
    args = ap.parse_args()
    with manager(args.model) as cm:
        print(f"{args.model}: n_ctx {cm.n_ctx_seq}, {args.trials} trials a bin")
        print(f"{'tokens':>12} {'known':>8} {'unknown':>8} {'password':>9}")
        for low in range(0, cm.n_ctx_seq, BIN):
            row = [recall(cm, kind, low, args.trials) for kind in ("known", "unknown", "password")]
            print(f"{low:5d}..{low + BIN:5d} {row[0]:8.1%} {row[1]:8.1%} {row[2]:9.1%}", flush=True)


if __name__ == "__main__":
    main()
