"""What a manager is made of: a context, its vocabulary, its template, and how to free them."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .llama import log
from .llama.context import LlamaContext
from .llama.model import Model
from .options import LoadOptions, checked_text
from .types import Context, Formatter, Vocab


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Parts:
    """A context and what belongs to it; `close` frees what is ours."""

    context: Context
    vocab: Vocab
    formatter: Formatter
    close: Callable[[], None] = _nothing


def load_parts(path: str | os.PathLike[str], options: LoadOptions, chat_template: str | None, *, quiet: bool) -> Parts:
    """Weights, context, vocabulary and template of a GGUF; all freed again if one of them cannot be had."""
    log.capture.quiet = quiet
    model = Model.load(path, n_gpu_layers=options.n_gpu_layers)
    context = None
    try:
        vocab = model.vocab()
        template = model.template(vocab, chat_template)
        context = LlamaContext.create(model, options)
    except BaseException:
        model.close()
        raise

    def close() -> None:
        vocab.close()
        context.close()
        model.close()

    return Parts(context, vocab, template, close)


def adopt_parts(ctx: Any, vocab: Any, chat_template: str | None) -> Parts:
    """Parts over a `llama_context_p` and `llama_vocab_p` of the caller's; nothing of it is ever freed here."""
    if chat_template is not None:
        checked_text("chat_template", chat_template)
    context = LlamaContext.adopt(ctx, vocab)
    words = context.model.vocab()
    return Parts(context, words, context.model.template(words, chat_template), words.close)
