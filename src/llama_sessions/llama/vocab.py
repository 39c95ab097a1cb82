"""The vocabulary: text to token ids and back. Nothing here can run llama.cpp's tokenizer out of stack."""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np

from ..errors import NativeError, OptionError, StateError
from ..options import checked_int, checked_text
from ..types import TokenArray
from .deep_stack import on_a_deep_stack

_UNKNOWN, _CONTROL, _LSTRIP, _RSTRIP = 1 << 0, 1 << 3, 1 << 7, 1 << 8  # llama_token_attr
_BPE = 2  # LLAMA_VOCAB_TYPE_BPE

# Pre-tokenizers that llama.cpp splits by hand-written code. The others go through std::regex, whose recursion grows
# with the run of one character class (30,000 x "a" with deepseek-llm kills the process: seen with 0.3.36).
_SPLIT_BY_HAND = frozenset(
    [
        "llama3",
        "llama-v3",
        "llama-bpe",
        "falcon3",
        "falcon-h1",
        "pixtral",
        "midm-2.0",
        "lfm2",
        "jina-v5-nano",
        "qwen2",
        "gpt-2",
    ]
)
# Its stack: 325 bytes a character of a run, whichever pre-tokenizer and class (measured; 380 characters kill a thread
# of 128 KiB, which is musl's default).
_SHALLOW = 128  # characters that any stack survives
_DEEPEST = 200_000  # characters of one run, an eighth of what such a stack survives
_LONG_RUN = re.compile(rf"\S{{{_DEEPEST}}}|\s{{{_DEEPEST}}}")
_LONG_LINE = re.compile(rf"[^\n]{{{_DEEPEST}}}")
_NEEDED = "this tokenizer needs for long text"
_RUNS_OF_WORDS = frozenset(["exaone-moe"])  # words with one space between them are one run there


class LlamaVocab:
    """Over a `llama_vocab_p`. Token ids are int32; text is encoded as UTF-8."""

    def __init__(self, handle: Any, pre_tokenizer: str = "", is_gone: Callable[[], bool] | None = None) -> None:
        """`is_gone`: whether somebody else has freed the model."""
        self._handle = handle
        self._is_gone = is_gone
        self._using = threading.RLock()  # questions may come from any thread, without the manager's lock
        self.n_tokens = int(llama_cpp.llama_vocab_n_tokens(handle))
        bos = int(llama_cpp.llama_vocab_bos(handle))
        eos = int(llama_cpp.llama_vocab_eos(handle))
        self.bos = None if bos < 0 else bos
        self.eos = None if eos < 0 else eos
        self.adds_bos = bool(llama_cpp.llama_vocab_get_add_bos(handle)) and self.bos is not None
        self._recursive = int(llama_cpp.llama_vocab_type(handle)) == _BPE and pre_tokenizer not in _SPLIT_BY_HAND
        self._too_deep = _LONG_LINE if pre_tokenizer in _RUNS_OF_WORDS else _LONG_RUN
        self._pieces: dict[int, bytes] = {}
        self._ends: dict[int, bool] = {}
        self._strips: dict[int, tuple[bool, bool]] = {}
        self.control: dict[str, int] = {}
        get_attr = llama_cpp.llama_vocab_get_attr
        for token in range(self.n_tokens):
            attr = get_attr(handle, token)
            if attr & (_CONTROL | _UNKNOWN):
                text = self.text(token)
                if text:
                    self.control[text] = token
                    self._strips[token] = (bool(attr & _LSTRIP), bool(attr & _RSTRIP))
        self.adds_space_prefix = b"".join(map(self.piece, self.tokenize("a"))).startswith(b" ")

    def text(self, token: int) -> str:
        """The token's own spelling in the vocabulary (not its text in a reply: see `piece`)."""
        with self._using:
            text = bytes(llama_cpp.llama_vocab_get_text(self._live(), self._known(token)))
        return text.decode("utf-8", "replace")

    def _known(self, token: int) -> int:
        return checked_int("a token", token, 0, self.n_tokens - 1)

    def _live(self) -> Any:
        if self._handle is None or (self._is_gone is not None and self._is_gone()):
            raise StateError("the vocabulary belongs to a manager that is closed; load the model again")
        return self._handle

    def close(self) -> None:
        """The model is about to be freed: wait for who is asking, and from now on every question is a StateError."""
        with self._using:
            self._handle = None

    @contextmanager
    def held(self) -> Iterator[Any]:
        """The `llama_vocab_p`, which is not freed while this is entered. Raises StateError after `close`."""
        with self._using:
            yield self._live()

    def strips(self, token: int) -> tuple[bool, bool]:
        """Whether a control token swallows white space on its left, on its right."""
        return self._strips.get(token, (False, False))

    def is_eog(self, token: int) -> bool:
        """Whether a token ends a reply; kept after the first call."""
        ends = self._ends.get(token)
        if ends is None:
            with self._using:
                ends = bool(llama_cpp.llama_vocab_is_eog(self._live(), self._known(token)))
            self._ends[token] = ends
        return ends

    def piece(self, token: int) -> bytes:
        """The token's bytes in running text, control tokens included; kept after the first call."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._piece(token)
        return piece

    def _piece(self, token: int) -> bytes:
        self._known(token)
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            with self._using:
                n = int(llama_cpp.llama_token_to_piece(self._live(), token, buffer, size, 0, True))
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def tokenize(self, text: str, *, special: bool = False) -> TokenArray:
        """The ids of `text`, no BOS added. `special`: control tokens spelled in it become those tokens.

        About 0.5 us a byte, in C++. Raises OptionError for text without a UTF-8 form or of 2 GiB and more.
        """
        data = checked_text("the text", text).encode()
        if len(data) >= 2**31 - 1:
            raise OptionError(f"{len(data)} bytes of text are more than llama.cpp takes at once (2 GiB)")
        if not self._recursive or len(text) <= _SHALLOW:
            return self._tokenize(data, special)
        if not self._too_deep.search(text):
            return on_a_deep_stack(lambda: self._tokenize(data, special), _NEEDED)
        # No stack is deep enough: such a run is tokenised in pieces, each within what the stack survives.
        parts = [text[i : i + _DEEPEST].encode() for i in range(0, len(text), _DEEPEST)]
        pieces = on_a_deep_stack(lambda: [self._tokenize(part, special) for part in parts], _NEEDED)
        return np.concatenate(pieces)

    def _tokenize(self, data: bytes, special: bool) -> TokenArray:
        buffer = np.empty(len(data) + 2, np.int32)  # one a call: calls may come from several threads
        while True:
            into = buffer.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            with self._using:
                n = int(llama_cpp.llama_tokenize(self._live(), data, len(data), into, len(buffer), False, special))
            if n >= 0:
                found: TokenArray = buffer[:n].copy()
                return found
            if n == -(2**31):
                raise NativeError("llama_tokenize", n, "the text has more tokens than an int32 counts")
            buffer = np.empty(-n, np.int32)
