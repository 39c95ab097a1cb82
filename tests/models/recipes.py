"""What each name means. The fields of `Recipe` are what `model_path` lets a test override."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from random_gguf.transformer import Shape
from random_gguf.vocab import CHATML, CHATML_CONTROLS, byte_level_bpe, sentencepiece, wordpiece
from random_gguf.weights import Metadata

from .templates import GEMMA, MISTRAL


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One model. `pre`: a bpe vocab's pre-tokenizer, by llama.cpp's name. `chat_template` None leaves the key out.

    `controls`: () is those of ChatML for bpe, none but the usual for spm.
    """

    arch: Literal["llama", "gemma3", "mamba", "falcon-h1", "bert"] = "llama"
    vocab: Literal["bpe", "spm", "wpm"] = "bpe"
    pre: str = "llama-bpe"
    controls: tuple[str, ...] = ()
    add_bos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = CHATML
    n_layer: int = 2
    n_embd: int = 64
    n_head: int = 4
    n_head_kv: int = 2
    n_ff: int = 128
    n_vocab: int = 640
    n_ctx_train: int = 2048
    n_swa: int = 64
    yarn_factor: float | None = None
    with_tensors: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        # An override that changes nothing would let a test believe in what it never tried.
        if self.vocab != "bpe" and self.pre != "llama-bpe":
            raise ValueError(f"pre={self.pre!r}: only a bpe vocab has a pre-tokenizer, and this one is {self.vocab}")

    @property
    def shape(self) -> Shape:
        return Shape(
            n_layer=self.n_layer,
            n_embd=self.n_embd,
            n_head=self.n_head,
            n_head_kv=self.n_head_kv,
            n_ff=self.n_ff,
            n_vocab=self.n_vocab,
            n_ctx=self.n_ctx_train,
        )

    def tokenizer(self) -> Metadata:
        """The `tokenizer.*` metadata, chat template included."""
        match self.vocab:
            case "bpe":
                controls = self.controls or CHATML_CONTROLS
                metadata = byte_level_bpe(self.n_vocab, pre=self.pre, add_bos=self.add_bos, controls=controls)
            case "spm":
                metadata = sentencepiece(
                    self.n_vocab,
                    add_bos=self.add_bos,
                    add_space_prefix=self.add_space_prefix,
                    controls=self.controls,
                )
            case "wpm":
                metadata = wordpiece(self.n_vocab)
        if self.chat_template is not None:
            metadata["tokenizer.chat_template"] = self.chat_template
        return metadata


RECIPES = {
    "llama-bpe": Recipe(),
    "llama-spm": Recipe(vocab="spm", add_bos=True, add_space_prefix=True, chat_template=MISTRAL),
    "llama-yarn": Recipe(yarn_factor=4.0),
    # Every sixth layer sees everything. With none of those a shift aborts the process, hence two periods.
    "gemma3": Recipe(
        arch="gemma3",
        vocab="spm",
        add_bos=True,
        controls=("<start_of_turn>", "<end_of_turn>"),
        chat_template=GEMMA,
        n_layer=12,
    ),
    "mamba": Recipe(arch="mamba"),
    "hybrid": Recipe(arch="falcon-h1"),
    "embedding": Recipe(arch="bert", vocab="wpm", chat_template=None, n_head_kv=4, n_ctx_train=512),
    "vocab-only": Recipe(with_tensors=False),
}
