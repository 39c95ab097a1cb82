"""Vocabularies as GGUF metadata. Each function returns the `tokenizer.*` keys for exactly `n_vocab` tokens.

What the words do not fill is padded with unused tokens (`[PAD640]`), as converters do.
"""

from __future__ import annotations

import string

from gguf import TokenType

from random_gguf.english import merges
from random_gguf.weights import Metadata

CHATML_CONTROLS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPACE = "▁"


def byte_level_bpe(
    n_vocab: int, *, pre: str, add_bos: bool = False, controls: tuple[str, ...] = CHATML_CONTROLS
) -> Metadata:
    """256 bytes, then merges, then `controls`: the first is BOS and padding, the last ends a turn.

    `pre` names the pre-tokenizer, by which llama.cpp picks its splitting rules.
    """
    spelling = _byte_spelling()
    ranked = merges(n_vocab - len(spelling) - len(controls), spelling)
    normal = list(dict.fromkeys([*spelling.values(), *(left + right for left, right in ranked)]))
    tokens, types = _padded(n_vocab, [*normal, *controls], [TokenType.NORMAL] * len(normal) + _control(controls))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in ranked],
        "tokenizer.ggml.bos_token_id": tokens.index(controls[0]),
        "tokenizer.ggml.padding_token_id": tokens.index(controls[0]),
        "tokenizer.ggml.eos_token_id": tokens.index(controls[-1]),
        "tokenizer.ggml.add_bos_token": add_bos,
    }


def sentencepiece(
    n_vocab: int, *, add_bos: bool = True, add_space_prefix: bool = True, controls: tuple[str, ...] = ()
) -> Metadata:
    """`<unk>`, `<s>`, `</s>`, more `controls`, 256 bytes, then pieces with "▁" for the space, better scores first."""
    special = ["<unk>", "<s>", "</s>", *controls]
    n_bytes = 256
    chars = [char for char in string.printable if char.isprintable() and char != " "] + [SPACE]
    ranked = merges(n_vocab - len(special) - n_bytes - len(chars), {" ": SPACE})
    # Llama's vocabulary knows a line break as a byte only.
    pieces = [*dict.fromkeys(left + right for left, right in ranked if "\n" not in left + right), *chars]
    tokens, types = _padded(
        n_vocab,
        [*special, *(f"<0x{byte:02X}>" for byte in range(n_bytes)), *pieces],
        [TokenType.UNKNOWN, *_control(special[1:]), *[TokenType.BYTE] * n_bytes, *[TokenType.NORMAL] * len(pieces)],
    )
    n_before = len(special) + n_bytes
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.scores": [float(min(0, n_before - i)) for i in range(n_vocab)],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": add_bos,
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }


def wordpiece(n_vocab: int) -> Metadata:
    """BERT's: `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]`, `[MASK]`, then pieces; "▁" begins a word."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    chars = string.ascii_lowercase + string.digits + string.punctuation
    single = [*(SPACE + char for char in chars), *chars]
    ranked = merges(n_vocab - len(special) - len(single), {" ": SPACE})
    lower = [left + right for left, right in ranked if (left + right).islower()]
    pieces = list(dict.fromkeys([*single, *lower]))
    tokens, types = _padded(n_vocab, [*special, *pieces], _control(special) + [TokenType.NORMAL] * len(pieces))
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.seperator_token_id": 3,  # llama.cpp's own spelling
        "tokenizer.ggml.mask_token_id": 4,
    }


def n_used(tokenizer: Metadata) -> int:
    """How many tokens come before the padding."""
    types = tokenizer["tokenizer.ggml.token_type"]
    assert isinstance(types, list)
    return sum(kind != TokenType.UNUSED for kind in types)


def _byte_spelling() -> dict[str, str]:
    """GPT-2's printable stand-in for each byte: itself where printable, else the next code point from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)}


def _control(tokens: list[str] | tuple[str, ...]) -> list[int]:
    return [TokenType.CONTROL] * len(tokens)


def _padded(n_vocab: int, tokens: list[str], types: list[int]) -> tuple[list[str], list[int]]:
    if len(tokens) > n_vocab:
        raise ValueError(f"n_vocab {n_vocab} is too small: the vocabulary needs at least {len(tokens)} tokens")
    pads = [f"[PAD{i}]" for i in range(len(tokens), n_vocab)]
    return [*tokens, *pads], [int(kind) for kind in types] + [int(TokenType.UNUSED)] * len(pads)
