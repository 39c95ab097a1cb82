"""What the benchmarks run on: models made once and kept in a cache directory, and texts that repeat to the letter."""

from __future__ import annotations

import os
import random
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

from make_model import QWEN2_0_5B, make_model
from random_gguf.transformer import Shape
from random_gguf.weights import Kind

SHAPES: dict[str, tuple[Shape, Kind]] = {
    "0.5b": (QWEN2_0_5B, "q8_0"),
    "small": (Shape(n_layer=4, n_embd=256, n_head=4, n_head_kv=2, n_ff=768, n_vocab=16384, n_ctx=32768), "q8_0"),
    # The model in the box, but for its training length.
    "builtin": (Shape(n_layer=4, n_embd=192, n_head=6, n_head_kv=2, n_ff=576, n_vocab=640, n_ctx=32768), "f16"),
    # All the vocabulary and next to no layers: what does not depend on the model can be measured in seconds.
    "flat": (replace(QWEN2_0_5B, n_layer=1, n_embd=64, n_head=1, n_head_kv=1, n_ff=64), "q8_0"),
}

_COMMON = (
    "the have that with this from they will would there their what about which when make can like time just know take "
    "people into year your good some could them see other than then now look only come its over think also back after "
    "use two how our work first well way even new want because any these give day most was been has had did said made "
    "went got came very much many more where why here through before between under while again never always often "
    "sometimes each every both few same own such too still might must should may shall let put keep tell ask seem feel "
    "try leave call need become mean find show hear play run move live believe hold bring happen write provide sit"
)
WORDS = _COMMON.split()


def model_file(shape: str) -> Path:
    """The words-only model of a shape of `SHAPES`, made at the first call."""
    root = Path(os.environ.get("LLAMA_SESSIONS_BENCH_DIR") or Path(tempfile.gettempdir()) / "llama-sessions-bench")
    made_for, kind = SHAPES[shape]
    numbers = "-".join(str(n) for n in asdict(made_for).values())
    path = root / f"{shape}-{kind}-{numbers}-words.gguf"
    return path if path.exists() else make_model(path, made_for, kind=kind, words_only=True)


def text(n_words: int, seed: str, first: str | None = None) -> str:
    """`n_words` words, the same for the same seed; `first` is the first of them, capitalised."""
    chosen = random.Random(seed).choices(WORDS, k=n_words)
    if first is not None:
        chosen[0] = first.capitalize()
    return " ".join(chosen)


def user_texts(n_sessions: int, n_turns: int, n_words: int) -> list[list[str]]:
    """One text for each session and turn. Each begins with a word of its own, so no prefix is shared by chance."""
    if n_sessions * n_turns > len(WORDS):
        raise ValueError(f"{n_sessions} x {n_turns} texts need as many first words; there are {len(WORDS)}")
    return [[text(n_words, f"user {s} {t}", WORDS[s * n_turns + t]) for t in range(n_turns)] for s in range(n_sessions)]
