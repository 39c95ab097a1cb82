"""Chat templates of our own, each with a habit that real ones have, and vocabularies whose control tokens they write.

    from templates import TEMPLATES, load_vocab, formatter
    vocab, plain = load_vocab("bpe")
    Renderer(formatter("llama2", vocab), vocab)

Vocabularies are loaded without weights: a few milliseconds each.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import llama_cpp
import models  # noqa: F401 (puts tools/ on the path)
import numpy as np
import numpy.typing as npt
from gguf import TokenType
from oracle import Oracle
from random_gguf.vocab import byte_level_bpe, sentencepiece
from random_gguf.weights import write_gguf

from llama_sessions.llama import log
from llama_sessions.llama.template import ChatTemplate
from llama_sessions.llama.vocab import LlamaVocab

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# BOS and EOS in every turn, [INST] as plain text; the system text is put before the first user's, then all is stripped.
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}{% set system = false %}{% endif %}
{% for m in loop_messages %}
{% if loop.index0 == 0 and system %}{% set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + m['content'] %}{% else %}{% set content = m['content'] %}{% endif %}
{% if m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% else %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% endif %}
{% endfor %}"""  # noqa: E501

# [INST] as control tokens; the system text goes into the last user turn.
MISTRAL = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% elif loop.last and system is defined %}{{ '[INST]' + system + '\\n\\n' + m.content + '[/INST]' }}"
    "{% else %}{{ '[INST]' + m.content + '[/INST]' }}{% endif %}{% endfor %}"
)

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
    " + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}"
    "{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

TWO_BOS = "{{ bos_token }}{{ bos_token }}" + CHATML

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"
    "{% endif %}" + CHATML
)

# The system text is put before the first user's, in its turn.
FOLDS_SYSTEM = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + (system if loop.first else '') + m['content'] + '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

REFUSES_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    "{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# Reasoning is taken out of all turns but those after the last user's; the header that asks for a reply has more in it
# than the one in the history.
REASONING = """{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{% for m in messages %}
{% if m.role == 'assistant' %}
{% set content = m.content %}{% set reasoning = '' %}
{% if '</think>' in content %}{% set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}
{% if loop.index0 > ns.last and reasoning %}{{ '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}{% else %}{{ '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}{% endif %}
{% else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""  # noqa: E501

TRIM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content | trim }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# Content through every way that Jinja has to put text together.
STRING_WORK = """{% for m in messages %}
{% set c = m.content %}
{{ '<|im_start|>' ~ m.role ~ '\\n' }}{% if c.startswith('/') %}{{ 'command ' ~ c[1:] }}{% elif c.startswith('<') %}{{ 'tag ' ~ c }}{% elif c.endswith('?') %}{{ ['Q', c] | join(': ') }}{% elif ';' in c %}{% for part in c.split(';') %}{{ '- %s\\n' % part }}{% endfor %}{% elif c | length > 200 %}{{ c[:100] + '...' + c[-100:] }}{% elif m.role == 'tool' %}{{ c | tojson }}{% else %}{{ '%s' | format(c) }}{% endif %}
{{- '<|im_end|>' -}}
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""  # noqa: E501

PLAIN_HEADERS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\\n\\n' }}"
    "{% else %}{{ '### ' + m.role | capitalize + ':\\n' + m.content + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)

# What a macro writes is text before the template looks at it again.
MACRO = """{% macro shown(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}{{ part.text }}{% endfor %}{% endif %}{% endmacro %}
{% for m in messages %}
{% set content = shown(m.content) | trim %}
{% if m.role == 'assistant' %}{% if '</think>' in content and not loop.last %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}{% endif %}
{{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""  # noqa: E501

# Text is looked at after it was put together: nothing but the value of a content can pass here.
LOOKS_AGAIN = """{% for m in messages %}
{% set line %}{{ m.role }}: {{ m.content }}{% endset %}
{% set said = m.role ~ m.content %}
{{ '<|im_start|>' }}{% if said.startswith('user/') %}{{ 'command' }}{% elif line | length > 60 %}{{ line[:30] ~ '...' ~ line[-20:] }}{% elif line.endswith('!') %}{{ line | upper }}{% else %}{{ line }}{% endif %}{{ '<|im_end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"""  # noqa: E501

TOOLS = """{% if tools %}{{ '<|im_start|>system\\n# Tools\\n' }}{% for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.name is defined %}{{ ' name=' + m.name }}{% endif %}{{ '\\n' }}{% if m.content %}{{ m.content }}{% endif %}{% if m.tool_calls %}{% for call in m.tool_calls %}{{ '\\n<tool_call>' ~ call.function.name ~ ' ' ~ call.function.arguments | tojson ~ ' ' ~ call.function.arguments.keys() | join(',') ~ '</tool_call>' }}{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""  # noqa: E501

TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "llama3": LLAMA3,
    "two-bos": TWO_BOS,
    "default-system": DEFAULT_SYSTEM,
    "folds-system": FOLDS_SYSTEM,
    "refuses-system": REFUSES_SYSTEM,
    "reasoning": REASONING,
    "trim": TRIM,
    "string-work": STRING_WORK,
    "plain-headers": PLAIN_HEADERS,
    "macro": MACRO,
    "looks-again": LOOKS_AGAIN,
    "tools": TOOLS,
}
REFUSING = frozenset({"gemma", "refuses-system"})

# What the templates write as control tokens.
CONTROLS = (
    *("<|im_start|>", "[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|end|>"),
    "<|im_end|>",
)  # fmt: skip
SOFT = ("<think>", "</think>")  # user-defined tokens: cut out of any text, control or not
_N_VOCAB = 900

VOCABS: dict[str, dict[str, Any]] = {
    "bpe": {"kind": "bpe"},
    "bpe-bos": {"kind": "bpe", "add_bos": True},
    "spm": {"kind": "spm", "add_bos": True, "add_space_prefix": True},
    "spm-bare": {"kind": "spm", "add_bos": False, "add_space_prefix": False},
    # llama.cpp has control tokens swallow the white space behind them where the model's name says phi-3.
    "spm-strips": {"kind": "spm", "add_bos": True, "add_space_prefix": True, "name": "phi-3?"},
    # It has <mask> swallow the white space before it where the pre-tokenizer says jina; and one token begins another.
    "bpe-strips": {"kind": "bpe", "pre": "jina-v2-code", "more": ("<mask>", "<|end|>>")},
    # Reasoning in control tokens.
    "bpe-hard-think": {"kind": "bpe", "soft": ()},
}


class PlainVocab(Oracle):
    """The oracle's tokeniser alone, over a vocabulary without weights."""

    def __init__(self, handle: Any) -> None:
        self.vocab = handle

    def prompt(self, text: str) -> list[int]:
        """The plain call over a whole prompt, with exactly one BOS where the vocabulary adds one."""
        tokens = self.tokenize(text, special=True)
        if not llama_cpp.llama_vocab_get_add_bos(self.vocab):
            return tokens
        bos = llama_cpp.llama_vocab_bos(self.vocab)
        while tokens[:1] == [bos]:
            tokens = tokens[1:]
        return [bos, *tokens]


@cache
def load_vocab(name: str) -> tuple[LlamaVocab, PlainVocab]:
    """Ours and the oracle, over the same native vocabulary; kept for the whole run."""
    recipe = VOCABS[name]
    soft, pre = recipe.get("soft", SOFT), recipe.get("pre", "qwen2")
    if recipe["kind"] == "bpe":
        controls = ("<|begin_of_text|>", "<unk>", *SOFT, *recipe.get("more", ()), *CONTROLS)
        tokenizer = byte_level_bpe(_N_VOCAB, pre=pre, add_bos=recipe.get("add_bos", False), controls=controls)
    else:
        tokenizer = sentencepiece(
            _N_VOCAB,
            add_bos=recipe["add_bos"],
            add_space_prefix=recipe["add_space_prefix"],
            controls=("<|endoftext|>", *SOFT, *CONTROLS),
        )
    tokens, types = tokenizer["tokenizer.ggml.tokens"], tokenizer["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert isinstance(types, list)
    for text in soft:
        types[tokens.index(text)] = int(TokenType.USER_DEFINED)
    shape = {
        "context_length": 512, "embedding_length": 8, "block_count": 1, "feed_forward_length": 8,
        "attention.head_count": 1, "attention.layer_norm_rms_epsilon": 1e-6, "vocab_size": _N_VOCAB,
        "rope.dimension_count": 8,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vocab.gguf"
        write_gguf(path, "llama", hparams=shape, tokenizer=tokenizer, weights=[], seed=0)
        if "name" in recipe:
            path.write_bytes(path.read_bytes().replace(b"random", recipe["name"].encode(), 1))
        params = llama_cpp.llama_model_default_params()
        params.vocab_only = True
        log.install()
        with log.capture:
            model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, f"the vocabulary {name} did not load"
    _loaded.append(model)
    handle = llama_cpp.llama_model_get_vocab(model)
    return LlamaVocab(handle, pre), PlainVocab(handle)


_loaded: list[Any] = []


@cache
def formatter(template: str, vocab: LlamaVocab) -> ChatTemplate:
    """The chat template of that name (or Jinja source), with the BOS and EOS of a vocabulary."""
    assert vocab.bos is not None
    assert vocab.eos is not None
    return ChatTemplate(TEMPLATES.get(template, template), bos=vocab.text(vocab.bos), eos=vocab.text(vocab.eos))


def in_pieces(plain: Oracle, text: str, size: int) -> tuple[int, ...]:
    """Ids that spell `text` but differ from the plain call's: `size` characters at a time, 0 for byte by byte.

    Only where the vocabulary puts no space before what it is given.
    """
    ids: list[int] = []
    if size:
        for i in range(0, len(text), size):
            ids += plain.tokenize(text[i : i + size], special=False)
        return tuple(ids)
    by_byte = _byte_tokens(plain)
    return tuple(by_byte[byte] for byte in text.encode())


@cache
def _byte_tokens(plain: Oracle) -> dict[int, int]:
    n = llama_cpp.llama_vocab_n_tokens(plain.vocab)
    pieces = ((plain.detokenize([token]), token) for token in range(n))
    return {piece[0]: token for piece, token in reversed(list(pieces)) if len(piece) == 1}


def count_controls(vocab: LlamaVocab, tokens: npt.NDArray[np.int32]) -> dict[int, int]:
    """How often each control token is in a prompt."""
    ids, counts = np.unique(tokens[np.isin(tokens, list(vocab.control.values()))], return_counts=True)
    return dict(zip(ids.tolist(), counts.tolist(), strict=True))
