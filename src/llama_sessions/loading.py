"""What a manager is made of: a context, its vocabulary, its template, and how to free them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import OptionError
from .llama import log
from .llama.context import LlamaContext
from .llama.model import Model
from .llama.vocab import LlamaVocab
from .options import LoadOptions, checked_text
from .types import Constraint, Context, Formatter, Message, Vocab


def _nothing() -> None:
    pass


def _no_grammar(gbnf: str) -> Constraint:
    raise OptionError("there are no grammars without llama.cpp's own vocabulary")


def _grammars(vocab: LlamaVocab) -> Callable[[str], Constraint]:
    """Compiles grammars; what that needs is read when the first one is wanted: a fifth of the package's import."""
    made: list[Any] = []

    def new(gbnf: str) -> Constraint:
        if not made:
            from .llama.grammar import Grammars

            made.append(Grammars(vocab))
        grammar: Constraint = made[0].new(gbnf)
        return grammar

    return new


class Untemplated:
    """A formatter that puts contents together as they stand."""

    def render(self, messages: Sequence[Message], *, reply_header: bool = True, **variables: Any) -> str:
        return "".join(str(message.get("content") or "") for message in messages)


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """A context and what belongs to it; `close` frees what is ours. `is_gone`: somebody else freed the weights.
    `grammar` compiles GBNF for one reply."""

    context: Context
    vocab: Vocab
    formatter: Formatter
    close: Callable[[], None] = _nothing
    is_gone: Callable[[], bool] | None = None
    grammar: Callable[[str], Constraint] = _no_grammar


def load_parts(path: str | os.PathLike[str], options: LoadOptions, chat_template: str | None, *, quiet: bool) -> Parts:
    """Weights, context, vocabulary and template of a GGUF; all freed again if one of them cannot be had."""
    log.capture.quiet = quiet
    return _parts_over(Model.load(path, n_gpu_layers=options.n_gpu_layers), options, chat_template)


def borrow_parts(llm: Any, options: LoadOptions, chat_template: str | None, *, quiet: bool) -> Parts:
    """A context of our own over the weights of a `llama_cpp.Llama`, which is kept alive."""
    log.capture.quiet = quiet
    return _parts_over(Model.borrow(llm), options, chat_template)


def _parts_over(model: Model, options: LoadOptions, chat_template: str | None) -> Parts:
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

    is_gone = (lambda: model.is_gone) if model.is_lent else None
    return Parts(context, vocab, template, close, is_gone, _grammars(vocab))


def adopt_parts(ctx: Any, vocab: Any, chat_template: str | None) -> Parts:
    """Parts over a `llama_context_p` and `llama_vocab_p` of the caller's; nothing of it is ever freed here."""
    if chat_template is not None:
        checked_text("chat_template", chat_template)
    context = LlamaContext.adopt(ctx, vocab)
    words = context.model.vocab()
    template = context.model.template(words, chat_template)
    return Parts(context, words, template, words.close, grammar=_grammars(words))
