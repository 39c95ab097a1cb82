"""Tiny random-weight models, one for each kind of memory and vocabulary, written when first asked for.

    from models import model_path
    path = model_path("gemma3", n_ctx_train=4096)

| name | memory | vocabulary, template |
|---|---|---|
| llama-bpe | full attention | byte-level BPE, ChatML |
| llama-spm | full attention | SentencePiece, BOS and space prefix added; Mistral's, which writes BOS itself |
| llama-yarn | full attention, rope magnitude above 1 | as llama-bpe |
| gemma3 | sliding window of 64 on 10 of 12 layers | SentencePiece, BOS added; Gemma's, which writes BOS itself |
| mamba | recurrent | as llama-bpe |
| hybrid | attention and recurrent in each layer (Falcon-H1) | as llama-bpe |
| embedding | none (BERT, mean pooling) | WordPiece, no template |
| vocab-only | no tensors: loads with `vocab_only` alone | as llama-bpe |

Their logits are finite, spread over a few units, and moved by every token of the context; what they say is noise.

recipes        what each name means, and what may be overridden
templates      the chat templates
architectures  recipe -> hyperparameters and tensors
cache          recipe -> file, written once
"""

import sys
from pathlib import Path

# The parts shared with benchmarks/make_model.py.
sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

from .cache import model_path
from .recipes import RECIPES, Recipe

__all__ = ["RECIPES", "Recipe", "model_path"]
