"""Train the built-in model and write it as GGUF.

    python tools/train_tiny_chat.py --minutes 70 --out src/llama_sessions/data/tiny-chat.gguf

Needs `torch`, `tokenizers`, `gguf` and `numpy`. The data is synthetic (`tiny_chat_data.py`); nothing is downloaded.
A Llama with interleaved RoPE, so the weights go into the GGUF as they are.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
from tiny_chat_data import CHAT_TEMPLATE, Turn, dialogue
from torch import Tensor, nn
from torch.nn import functional as fn

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Qwen2's pre-tokenizer: llama.cpp knows it by name and its splitter does not recurse on long runs.
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class Shape:
    n_vocab: int = 640
    n_embd: int = 192
    n_layer: int = 4
    n_head: int = 6
    n_head_kv: int = 2
    n_ff: int = 576
    n_ctx: int = 1024
    rope_base: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head


def train_tokenizer(n_vocab: int, seed: int) -> tokenizers.Tokenizer:
    """A byte-level BPE over sample dialogues, with ChatML's control tokens."""
    rng = random.Random(seed)
    texts = [text for _ in range(1500) for _, text in dialogue(rng, 4000, len).messages()]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(PRE_TOKENIZER), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


class Encoder:
    """Dialogues to token rows with a mask over what the assistant says."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.start, self.end = (tokenizer.token_to_id(t) for t in SPECIAL[1:])
        self.newline = tokenizer.encode("\n").ids
        self.roles = {r: tokenizer.encode(r + "\n").ids for r in ("system", "user", "assistant")}

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text).ids) + 5

    def message(self, role: str, text: str) -> tuple[list[int], list[bool]]:
        head = [self.start, *self.roles[role]]
        body = [*self.tokenizer.encode(text).ids, self.end]
        said = role == "assistant"
        return head + body + self.newline, [False] * len(head) + [said] * len(body) + [False] * len(self.newline)

    def row(self, seed: int, n_tokens: int, **options: object) -> tuple[np.ndarray, np.ndarray]:
        ids: list[int] = []
        mask: list[bool] = []
        rng = random.Random(seed)
        for role, text in dialogue(rng, n_tokens, self.count, **options).messages():  # type: ignore[arg-type]
            more, said = self.message(role, text)
            ids += more
            mask += said
        return np.array(ids[: n_tokens + 1], np.int64), np.array(mask[: n_tokens + 1])


def rope(n_ctx: int, dim: int, base: float) -> Tensor:
    freq = base ** (-torch.arange(0, dim, 2).float() / dim)
    angle = torch.outer(torch.arange(n_ctx).float(), freq)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Interleaved RoPE; x (batch, head, token, dim)."""
    cos, sin = table[0], table[1]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


class Layer(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        kv = s.n_head_kv * s.head_dim
        self.attn_norm, self.ffn_norm = (nn.RMSNorm(s.n_embd, s.norm_eps) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(s.n_embd, n, bias=False) for n in (s.n_embd, kv, kv))
        self.o = nn.Linear(s.n_embd, s.n_embd, bias=False)
        self.gate, self.up = (nn.Linear(s.n_embd, s.n_ff, bias=False) for _ in range(2))
        self.down = nn.Linear(s.n_ff, s.n_embd, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        s = self.s
        b, n, _ = x.shape
        h = self.attn_norm(x)
        q = rotate(self.q(h).view(b, n, s.n_head, s.head_dim).transpose(1, 2), table)
        k = rotate(self.k(h).view(b, n, s.n_head_kv, s.head_dim).transpose(1, 2), table)
        v = self.v(h).view(b, n, s.n_head_kv, s.head_dim).transpose(1, 2)
        rep = s.n_head // s.n_head_kv
        k, v = (t.repeat_interleave(rep, 1) for t in (k, v))
        a = fn.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(b, n, -1))
        h = self.ffn_norm(x)
        return x + self.down(fn.silu(self.gate(h)) * self.up(h))


class Model(nn.Module):
    def __init__(self, s: Shape) -> None:
        super().__init__()
        self.s = s
        self.embd = nn.Embedding(s.n_vocab, s.n_embd)
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.n_layer))
        self.norm = nn.RMSNorm(s.n_embd, s.norm_eps)
        self.register_buffer("table", rope(s.n_ctx, s.head_dim, s.rope_base), persistent=False)
        for p in self.parameters():
            if p.dim() == 2:
                nn.init.normal_(p, std=0.02 if p is self.embd.weight else p.shape[1] ** -0.5)
        for layer in self.layers:
            for p in (layer.o.weight, layer.down.weight):  # type: ignore[union-attr]
                nn.init.normal_(p, std=0.3 * p.shape[1] ** -0.5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embd(ids)
        for layer in self.layers:
            x = layer(x, self.table[:, : ids.shape[1]])
        return fn.linear(self.norm(x), self.embd.weight)


def write_gguf(path: Path, model: Model, tokenizer: tokenizers.Tokenizer) -> None:
    """f16 matrices, f32 norms; the tokenizer and the chat template go with them."""
    s = model.s
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name("tiny-chat")
    w.add_description("A tiny chat model that remembers what it is told; trained by tools/train_tiny_chat.py")
    w.add_license("MIT")
    w.add_context_length(s.n_ctx)
    w.add_embedding_length(s.n_embd)
    w.add_block_count(s.n_layer)
    w.add_feed_forward_length(s.n_ff)
    w.add_head_count(s.n_head)
    w.add_head_count_kv(s.n_head_kv)
    w.add_rope_dimension_count(s.head_dim)
    w.add_rope_freq_base(s.rope_base)
    w.add_layer_norm_rms_eps(s.norm_eps)
    w.add_vocab_size(s.n_vocab)
    w.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    bpe = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("qwen2")
    w.add_token_list(tokens)
    w.add_token_types([gguf.TokenType.CONTROL if t in SPECIAL else gguf.TokenType.NORMAL for t in tokens])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    w.add_eos_token_id(bpe["vocab"]["<|im_end|>"])
    w.add_pad_token_id(bpe["vocab"]["<|endoftext|>"])
    w.add_bos_token_id(bpe["vocab"]["<|endoftext|>"])  # never added; without it llama.cpp takes id 11 for one
    w.add_add_bos_token(False)
    w.add_chat_template(CHAT_TEMPLATE)

    def add(name: str, tensor: Tensor) -> None:
        data = tensor.detach().float().numpy()
        w.add_tensor(name + ".weight", data.astype(np.float16) if data.ndim == 2 else data)

    add("token_embd", model.embd.weight)
    add("output_norm", model.norm.weight)
    for i, layer in enumerate(model.layers):
        for ours, theirs in (("attn_norm", "attn_norm"), ("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"),
                             ("o", "attn_output"), ("ffn_norm", "ffn_norm"), ("gate", "ffn_gate"), ("up", "ffn_up"),
                             ("down", "ffn_down")):  # fmt: skip
            add(f"blk.{i}.{theirs}", getattr(layer, ours).weight)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def recall_rows(enc: Encoder, n_rows: int, n_tokens: int) -> list[tuple[list[int], list[tuple[int, int, Turn]]]]:
    """Held-out dialogues with the token span of each answer to a question."""
    rows = []
    for seed in range(n_rows):
        d = dialogue(random.Random(f"held-out-{seed}"), n_tokens, enc.count, held_out=True)
        ids: list[int] = [] if d.system is None else enc.message("system", d.system)[0]
        spans = []
        for turn in d.turns:
            ids += enc.message("user", turn.user)[0]
            more, said = enc.message("assistant", turn.assistant)
            first = len(ids) + said.index(True)
            if turn.key is not None and first + sum(said) <= n_tokens:
                spans.append((first, first + sum(said), turn))
            ids += more
        rows.append((ids[:n_tokens], spans))
    return rows


@torch.no_grad()
def recall(model: nn.Module, enc: Encoder, n_ctx: int, n_rows: int = 48) -> str:
    """Share of whole answers right (teacher-forced) on held-out dialogues, known and unknown apart, by position."""
    hits: dict[tuple[bool, int], list[bool]] = {}
    rows = recall_rows(enc, n_rows, n_ctx)
    for i in range(0, n_rows, 16):
        part = rows[i : i + 16]
        ids = torch.tensor([ids for ids, _ in part])
        with torch.autocast("cpu", torch.bfloat16):
            best = model(ids).argmax(-1)
        for (_, spans), b, row in zip(part, best, ids, strict=True):
            for a, z, turn in spans:
                right = bool((b[a - 1 : z - 1] == row[a:z]).all())
                hits.setdefault((turn.known, a * 4 // n_ctx), []).append(right)
    return " ".join(
        f"{'known' if known else 'unknown'}@{q + 1}/4={sum(h) / len(h):.3f}" for (known, q), h in sorted(hits.items())
    )


def feed(enc: Encoder, seed: int, n_ctx: int, n_rows: int, queue: multiprocessing.Queue) -> None:  # type: ignore[type-arg]
    while True:
        rows = [enc.row(seed + i, n_ctx) for i in range(n_rows)]
        seed += n_rows
        queue.put((np.stack([r[0] for r in rows]), np.stack([r[1] for r in rows])))


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    ap.add_argument("--out", type=Path, required=True)
    ap.add_argument("--minutes", type=float, default=70.0, help="wall-clock budget; the schedule ends with it")
    ap.add_argument("--warm-share", type=float, default=0.2, help="share of the time on quarter-length rows")
    ap.add_argument("--lr", type=float, default=4e-3)
    ap.add_argument("--batch-tokens", type=int, default=8192)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--checkpoint", type=Path, default=Path("/tmp/tiny-chat.pt"))
    ap.add_argument("--resume", action="store_true")
    args = ap.parse_args()
    torch.manual_seed(args.seed)
    shape = Shape()
    tokenizer = train_tokenizer(shape.n_vocab, args.seed)
    enc = Encoder(tokenizer)
    model = Model(shape)
    if args.resume:
        model.load_state_dict(torch.load(args.checkpoint)["model"])
    print(asdict(shape), f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    matrices = [p for layer in model.layers for p in layer.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    step_model = torch.compile(model)
    start, step, n_seen = time.time(), 0, 0
    seed = 1_000_000 * (args.seed + 7 * args.resume)
    for n_ctx, until in ((shape.n_ctx // 4, args.warm_share), (shape.n_ctx, 1.0)):
        queue: multiprocessing.Queue = multiprocessing.Queue(8)  # type: ignore[type-arg]
        feeder = multiprocessing.Process(
            target=feed, args=(enc, seed + n_ctx * 1_000_000, n_ctx, args.batch_tokens // n_ctx, queue), daemon=True
        )
        feeder.start()
        losses: list[float] = []
        while (done := (time.time() - start) / (60 * args.minutes)) < until:
            ids, mask = (torch.from_numpy(a) for a in queue.get())
            scale = min(1.0, (step + 1) / 50) * (
                0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * max(0.0, done * 1.25 - 0.25)))
            )
            for opt in optimizers:
                for group in opt.param_groups:
                    group["lr"] = args.lr * scale
            with torch.autocast("cpu", torch.bfloat16):
                logits = step_model(ids[:, :-1])
            picked = mask[:, 1:]
            loss = fn.cross_entropy(logits[picked].float(), ids[:, 1:][picked])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for opt in optimizers:
                opt.step()
                opt.zero_grad(set_to_none=True)
            step += 1
            n_seen += ids[:, 1:].numel()
            losses.append(loss.item())
            if step % 50 == 0:
                rate = n_seen / (time.time() - start)
                loss_now = float(np.mean(losses[-50:]))
                seen = f"{n_seen / 1e6:.1f} M tokens {rate:.0f}/s"
                print(f"{done:6.1%} step {step} ctx {n_ctx} loss {loss_now:.4f} {seen}", flush=True)
            if step % 250 == 0:
                print("   ", recall(model, enc, n_ctx), flush=True)
                torch.save({"model": model.state_dict()}, args.checkpoint)
        feeder.terminate()
    print("   ", recall(model, enc, shape.n_ctx, 96), flush=True)
    torch.save({"model": model.state_dict()}, args.checkpoint)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_gguf(args.out, model, tokenizer)
    print(f"{args.out}: {args.out.stat().st_size / 2**20:.2f} MiB", flush=True)


if __name__ == "__main__":
    main()
