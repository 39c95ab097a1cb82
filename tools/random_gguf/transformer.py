"""The shape of a decoder, its hyperparameters and its tensors, as Llama and Qwen2 have them.

Gains are chosen so that random logits are like a model's: finite, spread over a few units, moved by every token of
the context.
"""

from __future__ import annotations

from dataclasses import dataclass

from random_gguf.weights import Kind, Metadata, Weight, bias, matrix, norm

# Attention scores then spread over 1.4 units: some tokens matter more, yet each of a hundred can still be seen.
QK_GAIN = 1.2
# An average over many tokens is small; this brings it back to the size of the residual stream.
VALUE_GAIN = 2.0
LOGIT_STD = 2.0
NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Shape:
    """Counts in the words of GGUF; `n_ff` is the width of the feed-forward layer, `n_ctx` the trained length."""

    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    n_ctx: int

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head or self.n_head % self.n_head_kv:
            raise ValueError(f"n_embd must be a multiple of n_head, and that of n_head_kv: {self}")

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    def hparams(self, *, rope_base: float) -> Metadata:
        return {
            "context_length": self.n_ctx,
            "embedding_length": self.n_embd,
            "block_count": self.n_layer,
            "feed_forward_length": self.n_ff,
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "attention.key_length": self.head_dim,
            "attention.value_length": self.head_dim,
            "attention.layer_norm_rms_epsilon": NORM_EPS,
            "rope.dimension_count": self.head_dim,
            "rope.freq_base": rope_base,
            "vocab_size": self.n_vocab,
        }


def embeddings(shape: Shape, *, n_used: int | None = None, tied: bool = False, kind: Kind = "f32") -> list[Weight]:
    """Token embeddings and the output. Tied, the rows are short, so that a token does not simply predict itself.

    Tokens from `n_used` on have logit 0, well below the best: else most of what a padded vocabulary says is padding.
    """
    names = ["token_embd"] if tied else ["token_embd", "output"]
    tables = [matrix(name, shape.n_vocab, shape.n_embd, gain=LOGIT_STD, kind=kind, n_used=n_used) for name in names]
    return [*tables, norm("output_norm", shape.n_embd)]


def attention(layer: int, shape: Shape, *, qkv_bias: bool = False, kind: Kind = "f32") -> list[Weight]:
    """Norm, query, key, value and output of one layer; grouped heads where `n_head_kv` is the smaller."""
    at = f"blk.{layer}"
    n_q, n_kv = shape.n_head * shape.head_dim, shape.n_head_kv * shape.head_dim
    weights = [
        norm(f"{at}.attn_norm", shape.n_embd),
        matrix(f"{at}.attn_q", n_q, shape.n_embd, gain=QK_GAIN, kind=kind),
        matrix(f"{at}.attn_k", n_kv, shape.n_embd, gain=QK_GAIN, kind=kind),
        matrix(f"{at}.attn_v", n_kv, shape.n_embd, gain=VALUE_GAIN, kind=kind),
        matrix(f"{at}.attn_output", shape.n_embd, n_q, gain=VALUE_GAIN, kind=kind),
    ]
    if qkv_bias:
        weights += [bias(f"{at}.attn_q", n_q), bias(f"{at}.attn_k", n_kv), bias(f"{at}.attn_v", n_kv)]
    return weights


def feed_forward(layer: int, shape: Shape, *, kind: Kind = "f32") -> list[Weight]:
    """Norm, gate, up and down of one layer."""
    at = f"blk.{layer}"
    return [
        norm(f"{at}.ffn_norm", shape.n_embd),
        matrix(f"{at}.ffn_gate", shape.n_ff, shape.n_embd, kind=kind),
        matrix(f"{at}.ffn_up", shape.n_ff, shape.n_embd, kind=kind),
        matrix(f"{at}.ffn_down", shape.n_embd, shape.n_ff, kind=kind),
    ]


def decoder(
    shape: Shape,
    *,
    n_used: int | None = None,
    tied: bool = False,
    qkv_bias: bool = False,
    kind: Kind = "f32",
) -> list[Weight]:
    """All tensors of a Llama, or of a Qwen2 with `qkv_bias`."""
    weights = embeddings(shape, n_used=n_used, tied=tied, kind=kind)
    for layer in range(shape.n_layer):
        weights += attention(layer, shape, qkv_bias=qkv_bias, kind=kind)
        weights += feed_forward(layer, shape, kind=kind)
    return weights
