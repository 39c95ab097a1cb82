"""Recipe -> hyperparameters and tensors, one function an architecture, named as in llama.cpp's `src/models/`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from random_gguf.transformer import NORM_EPS, Shape, attention, decoder, embeddings, feed_forward
from random_gguf.weights import Metadata, Weight, bias, matrix, norm

from .recipes import Recipe

Blueprint = tuple[Metadata, list[Weight]]

D_CONV = 4
D_STATE = 16
# Time steps are softplus(-3.5 +- 1.7), 0.005 to 0.15: a state fades over 70 to 2,000 tokens, so a lost one shows.
DT_BIAS = -3.5
DECAY_RATE = -0.1


def llama(recipe: Recipe) -> Blueprint:
    hparams = recipe.shape.hparams(rope_base=10000.0)
    if recipe.yarn_factor is not None:
        hparams |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": recipe.yarn_factor,
            "rope.scaling.original_context_length": round(recipe.n_ctx_train / recipe.yarn_factor),
        }
    return hparams, decoder(recipe.shape)


def gemma3(recipe: Recipe) -> Blueprint:
    """llama.cpp makes every sixth layer a full one by itself, in this architecture."""
    shape = recipe.shape
    weights = decoder(shape)
    for at in _layers(shape):
        weights += [
            norm(f"{at}.attn_q_norm", shape.head_dim),
            norm(f"{at}.attn_k_norm", shape.head_dim),
            norm(f"{at}.post_attention_norm", shape.n_embd),
            norm(f"{at}.post_ffw_norm", shape.n_embd),
        ]
    return shape.hparams(rope_base=1e6) | {"attention.sliding_window": recipe.n_swa}, weights


def mamba(recipe: Recipe) -> Blueprint:
    shape = recipe.shape
    d_inner, dt_rank = 2 * shape.n_embd, 8
    weights = embeddings(shape)
    for at in _layers(shape):
        weights += [
            norm(f"{at}.attn_norm", shape.n_embd),
            matrix(f"{at}.ssm_in", 2 * d_inner, shape.n_embd, gain=2.0),
            *_convolution(at, d_inner),
            matrix(f"{at}.ssm_x", dt_rank + 2 * D_STATE, d_inner, gain=2.0),
            matrix(f"{at}.ssm_dt", d_inner, dt_rank),
            bias(f"{at}.ssm_dt", d_inner, std=1.0, mean=DT_BIAS),
            Weight(f"{at}.ssm_a", (d_inner, D_STATE), 0.03, mean=DECAY_RATE),
            Weight(f"{at}.ssm_d", (d_inner,), 0.1),
            matrix(f"{at}.ssm_out", shape.n_embd, d_inner, gain=4.0),
        ]
    hparams = {
        "context_length": shape.n_ctx,
        "embedding_length": shape.n_embd,
        "block_count": shape.n_layer,
        "attention.layer_norm_rms_epsilon": NORM_EPS,
        "vocab_size": shape.n_vocab,
    }
    return hparams | _ssm_hparams(d_inner, dt_rank), weights


def falcon_h1(recipe: Recipe) -> Blueprint:
    """Attention and Mamba 2 side by side in every layer; here the time-step rank is the number of Mamba's heads."""
    shape = recipe.shape
    d_inner, n_head, n_group = 2 * shape.n_embd, 4, 1
    d_conv_in = d_inner + 2 * n_group * D_STATE
    weights = embeddings(shape)
    for layer, at in enumerate(_layers(shape)):
        weights += [
            *attention(layer, shape),
            # llama.cpp asks for this norm without the suffix.
            *(replace(w, name=w.name.replace("ffn_norm.weight", "ffn_norm")) for w in feed_forward(layer, shape)),
            matrix(f"{at}.ssm_in", d_inner + d_conv_in + n_head, shape.n_embd, gain=2.0),
            *_convolution(at, d_conv_in),
            bias(f"{at}.ssm_dt", n_head, std=1.0, mean=DT_BIAS),
            Weight(f"{at}.ssm_a", (n_head, 1), 0.03, mean=DECAY_RATE),
            Weight(f"{at}.ssm_d", (n_head, 1), 0.1),
            Weight(f"{at}.ssm_norm.weight", (n_group, d_inner // n_group), 0.1, mean=1.0),
            matrix(f"{at}.ssm_out", shape.n_embd, d_inner),
        ]
    hparams = shape.hparams(rope_base=10000.0) | _ssm_hparams(d_inner, n_head) | {"ssm.group_count": n_group}
    return hparams, weights


def bert(recipe: Recipe) -> Blueprint:
    shape = recipe.shape
    weights = [
        Weight("token_embd.weight", (shape.n_vocab, shape.n_embd), 1.0),
        Weight("token_types.weight", (2, shape.n_embd), 0.1),
        Weight("position_embd.weight", (shape.n_ctx, shape.n_embd), 0.3),
        *_layer_norm("token_embd_norm", shape.n_embd),
    ]
    for at in _layers(shape):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weights += [
                matrix(f"{at}.{name}", shape.n_embd, shape.n_embd, gain=2.0),
                bias(f"{at}.{name}", shape.n_embd),
            ]
        weights += [
            *_layer_norm(f"{at}.attn_output_norm", shape.n_embd),
            matrix(f"{at}.ffn_up", shape.n_ff, shape.n_embd),
            bias(f"{at}.ffn_up", shape.n_ff),
            matrix(f"{at}.ffn_down", shape.n_embd, shape.n_ff),
            bias(f"{at}.ffn_down", shape.n_embd),
            *_layer_norm(f"{at}.layer_output_norm", shape.n_embd),
        ]
    hparams: Metadata = {
        "context_length": shape.n_ctx,
        "embedding_length": shape.n_embd,
        "block_count": shape.n_layer,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.layer_norm_epsilon": NORM_EPS,
        "attention.causal": False,
        "pooling_type": 1,  # mean
    }
    return hparams, weights


ARCHITECTURES: dict[str, Callable[[Recipe], Blueprint]] = {
    "llama": llama,
    "gemma3": gemma3,
    "mamba": mamba,
    "falcon-h1": falcon_h1,
    "bert": bert,
}


def _layers(shape: Shape) -> list[str]:
    return [f"blk.{layer}" for layer in range(shape.n_layer)]


def _convolution(at: str, n: int) -> list[Weight]:
    return [matrix(f"{at}.ssm_conv1d", n, D_CONV, gain=1.5), bias(f"{at}.ssm_conv1d", n)]


def _layer_norm(name: str, n: int) -> list[Weight]:
    return [norm(name, n), bias(name, n)]


def _ssm_hparams(d_inner: int, dt_rank: int) -> Metadata:
    return {
        "ssm.conv_kernel": D_CONV,
        "ssm.inner_size": d_inner,
        "ssm.state_size": D_STATE,
        "ssm.time_step_rank": dt_rank,
    }
