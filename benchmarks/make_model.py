"""Write a random-weight GGUF of a given shape: by default Qwen2.5-0.5B's, in q8_0. Nothing is downloaded.

    python benchmarks/make_model.py /tmp/qwen2-0.5b-shape.gguf
    python benchmarks/make_model.py /tmp/small.gguf --n-layer 4 --n-vocab 16384 --type f16
    python benchmarks/make_model.py /tmp/words.gguf --words-only

Speed and memory are those of a real model of that shape; what it says is noise. `--words-only`: the noise is whole
words, so its text becomes the same tokens again, and it never ends a turn. Needs `gguf` and `numpy`.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import get_args

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from harness import described
from random_gguf.transformer import Shape, decoder
from random_gguf.vocab import CHATML, byte_level_bpe, n_used
from random_gguf.weights import Kind, Metadata, Weight, write_gguf

QWEN2_0_5B = Shape(n_layer=24, n_embd=896, n_head=14, n_head_kv=2, n_ff=4864, n_vocab=151936, n_ctx=32768)
MUTED = 1 / 64  # of the size of a row that can win


@dataclass(frozen=True, slots=True)
class Embedding(Weight):
    """A token table whose rows are small, but for the `spoken` ones: no other token is ever the best."""

    spoken: tuple[int, ...] = ()

    def draw(self, seed: int) -> np.ndarray:
        values = Weight.draw(self, seed)
        muted = np.ones(self.shape[0], bool)
        muted[list(self.spoken)] = False
        rows = values.reshape(self.shape[0], -1)
        if self.kind == "q8_0":
            rows["scale"][muted] *= MUTED
        else:
            rows[muted] *= MUTED
        return values


def make_model(
    path: Path, shape: Shape = QWEN2_0_5B, *, kind: Kind = "q8_0", seed: int = 0, words_only: bool = False
) -> Path:
    """Write the model to `path` and return it. The same shape, kind, seed and `words_only` give the same bytes.

    The default shape takes about 3 s and 529 MB of disk, one tensor at a time in memory.
    """
    tokenizer = byte_level_bpe(shape.n_vocab, pre="qwen2")
    weights = decoder(shape, n_used=n_used(tokenizer), tied=True, qkv_bias=True, kind=kind)
    if words_only:
        weights = [_speaking(w, tokenizer) if w.name == "token_embd.weight" else w for w in weights]
    write_gguf(
        path,
        "qwen2",
        hparams=shape.hparams(rope_base=1e6),
        tokenizer=tokenizer | {"tokenizer.chat_template": CHATML},
        weights=weights,
        seed=seed,
    )
    return path


def _speaking(table: Weight, tokenizer: Metadata) -> Embedding:
    """The same table where only words with a space before them (spelled "Ġword") can be said."""
    tokens = tokenizer["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    spoken = tuple(i for i, t in enumerate(tokens) if str(t)[0] == "Ġ" and str(t)[1:].isalpha() and len(str(t)) > 3)
    return Embedding(**{field.name: getattr(table, field.name) for field in fields(Weight)}, spoken=spoken)


def main() -> None:
    parser = described(__doc__)
    parser.add_argument("path", type=Path)
    names = [field.name for field in fields(Shape)]
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(QWEN2_0_5B, name))
    parser.add_argument("--type", choices=get_args(Kind)[1:], default="q8_0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--words-only", action="store_true", help="it says whole words and never ends a turn")
    args = parser.parse_args()

    shape = replace(QWEN2_0_5B, **{name: getattr(args, name) for name in names})
    start = time.perf_counter()
    make_model(args.path, shape, kind=args.type, seed=args.seed, words_only=args.words_only)
    print(f"{args.path}: {args.path.stat().st_size / 1e6:.0f} MB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
