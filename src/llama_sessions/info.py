"""`python -m llama_sessions info`: what a model's memory and template can do, and what they do not forgive."""

from __future__ import annotations

from collections.abc import Iterator

from .errors import TemplateError
from .manager import ContextManager
from .types import Capabilities, MemoryKind, Message

_KINDS = {
    MemoryKind.FULL: "attention over everything: any common beginning is reused",
    MemoryKind.WINDOW: "some layers see a window only: a row may be cut as long as its window is there",
    MemoryKind.RECURRENT: "a state that cannot go back: a conversation is reused as a whole, or not",
    MemoryKind.HYBRID: "attention beside a state that cannot go back: a conversation is reused as a whole, or not",
}
_TALK: list[Message] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "<think>hm</think>two"},
    {"role": "user", "content": "three"},
]


def describe(cm: ContextManager) -> Iterator[str]:
    """Lines about a loaded model: memory, sizes, shifting, template."""
    caps = cm.capabilities
    yield caps.model
    yield f"memory     {caps.kind.value}: {_KINDS[caps.kind]}"
    yield f"context    {caps.n_ctx} tokens now, trained for {caps.n_ctx_train}; {caps.n_vocab} tokens in the vocabulary"
    yield from _sizes(caps)
    yield f"shifting   {'allowed' if caps.can_shift else f'not allowed: {caps.shift_refused_because}'}"
    yield f"eviction   {_eviction(caps)}"
    form = cm.reply_format
    yield f"replies    thinking in {form.think_open} {form.think_close}; tools: {', '.join(form.tool_formats)}"
    warnings = list(template_warnings(cm))
    yield "template   " + ("; ".join(warnings) if warnings else "nothing to warn of")


def _eviction(caps: Capabilities) -> str:
    """What becomes of a conversation that is longer than the context."""
    if caps.n_row_max is None:
        return "never needed: a state takes no more room as it goes on"
    if not caps.can_have_holes:
        return "decoded anew: whatever stays when something has to go"
    if caps.can_shift:
        return "shift: what stands behind a hole moves up"
    return f"gap: positions go on to {caps.n_ctx_train} (so choose a smaller n_ctx), then the window is decoded anew"


def _sizes(caps: Capabilities) -> Iterator[str]:
    if caps.n_swa:
        yield f"window     {caps.n_swa} tokens, {'kept whole' if caps.swa_full else 'older ones are dropped'}"
    if caps.kv_bytes_per_token:
        whole = caps.kv_bytes_per_token * caps.n_ctx / 2**20
        yield f"KV         {caps.kv_bytes_per_token:,} bytes a token, {whole:,.0f} MiB for the whole context"
    else:
        yield "KV         0 bytes a token: a session is a state of one size, however long it is"


def template_warnings(cm: ContextManager) -> Iterator[str]:
    """What a chat template does that costs its users something."""
    renderer = cm.renderer
    system: Message = {"role": "system", "content": "S"}
    try:
        renderer.render([system, _TALK[0]])
    except TemplateError:
        yield "refuses a system text (system_fallback='user' puts it into the first user message)"
    try:
        first, second = renderer.render(_TALK[:1]), renderer.render(_TALK)
    except TemplateError as e:
        yield f"fails on a plain conversation ({e})"
        return
    replied = first.text + _TALK[1]["content"]
    if not second.text.startswith(replied):
        yield "rewrites its past (a reply or its header changes with the next turn, and is decoded again)"
    if not any(stretch.control is not None for stretch in second.stretches):
        yield "writes no control tokens (a user's text can look like the template's own, and all is tokenised anew)"
