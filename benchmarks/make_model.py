"""Write a random-weight GGUF of a given shape: by default Qwen2.5-0.5B's, in q8_0. Nothing is downloaded.

    python benchmarks/make_model.py /tmp/qwen2-0.5b-shape.gguf
    python benchmarks/make_model.py /tmp/small.gguf --n-layer 4 --n-vocab 16384 --type f16

Speed and memory are those of a real model of that shape; what it says is noise. Needs `gguf` and `numpy`.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import get_args

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from random_gguf.transformer import Shape, decoder
from random_gguf.vocab import CHATML, byte_level_bpe, n_used
from random_gguf.weights import Kind, write_gguf

QWEN2_0_5B = Shape(n_layer=24, n_embd=896, n_head=14, n_head_kv=2, n_ff=4864, n_vocab=151936, n_ctx=32768)


def make_model(path: Path, shape: Shape = QWEN2_0_5B, *, kind: Kind = "q8_0", seed: int = 0) -> Path:
    """Write the model to `path` and return it. The same shape, kind and seed give the same bytes.

    The default shape takes about 3 s and 529 MB of disk, one tensor at a time in memory.
    """
    tokenizer = byte_level_bpe(shape.n_vocab, pre="qwen2")
    write_gguf(
        path,
        "qwen2",
        hparams=shape.hparams(rope_base=1e6),
        tokenizer=tokenizer | {"tokenizer.chat_template": CHATML},
        weights=decoder(shape, n_used=n_used(tokenizer), tied=True, qkv_bias=True, kind=kind),
        seed=seed,
    )
    return path


def main() -> None:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path)
    names = [field.name for field in fields(Shape)]
    for name in names:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(QWEN2_0_5B, name))
    parser.add_argument("--type", choices=get_args(Kind)[1:], default="q8_0")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    shape = replace(QWEN2_0_5B, **{name: getattr(args, name) for name in names})
    start = time.perf_counter()
    make_model(args.path, shape, kind=args.type, seed=args.seed)
    print(f"{args.path}: {args.path.stat().st_size / 1e6:.0f} MB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
