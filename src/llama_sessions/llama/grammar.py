"""llama.cpp's grammar sampler without its aborts: what the grammar does not allow is never accepted.

`llama_sampler_accept` of such a token kills the process, as does any of it after the end but end-of-generation.
"""

from __future__ import annotations

import codecs
import ctypes
import logging
import math
import time
import weakref
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..errors import OptionError, StateError
from ..gbnf import check_gbnf
from ..memo import Memo
from ..options import checked_int
from ..types import CANDIDATE
from .deep_stack import on_a_deep_stack
from .log import capture
from .vocab import LlamaVocab

logger = logging.getLogger("llama_sessions")

_N_COMPILED = 32  # grammars that a vocabulary keeps, at most 4 MB each
# Seconds of processor time for one token, which takes 10 us, or 20 ms with 4000 stacks. Where long alternatives begin
# alike and hold the rule itself, stacks multiply with each round, which no check beforehand can exclude.
_LONGEST = 0.05
_UNSEEN, _WELL_FORMED, _MALFORMED = 0, 1, 2

# llama.cpp reads bytes without checking that they are UTF-8. After 0xE0, a token 0x80 0x80 is the code point 0 to it,
# which it takes for the token's end and lets through, only to abort on it where the grammar wants [\u0E00-\u0E7F] (read
# in llama-grammar.cpp); and [^"] lets 0xF0 0x80 through, which is no text (seen with 0.3.36). So what is no beginning
# of UTF-8 is never allowed here.
_decoder = codecs.getincrementaldecoder("utf-8")


def _unfinished(data: bytes) -> bytes | None:
    """The character that is not whole at the end of `data`; None for what begins no UTF-8 text."""
    decoder = _decoder()
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return None
    return decoder.getstate()[0]


class Grammar:
    """How far a text is in a grammar, over a vocabulary. One for each generation: `clone` the one that was compiled."""

    def __init__(self, vocab: LlamaVocab, gbnf: str) -> None:
        """Check and compile: some ms. Raises OptionError, with the place, for a grammar that llama.cpp cannot take."""
        self._begin(vocab, _compile(vocab, gbnf), np.zeros(vocab.n_tokens, np.uint8))

    def _begin(self, vocab: LlamaVocab, sampler: Any, seen: npt.NDArray[np.uint8]) -> None:
        self._vocab = vocab
        self._sampler = sampler
        self._seen = seen  # by token, shared by all clones: whether its bytes may begin a text
        self._pending = b""  # the beginning of a character
        self._is_out_of_hand = False
        weakref.finalize(self, llama_cpp.llama_sampler_free, sampler)  # memory of its own only
        self._array = llama_cpp.llama_token_data_array()
        self._one = llama_cpp.llama_token_data()
        self._array_of_one = llama_cpp.llama_token_data_array(ctypes.pointer(self._one), 1, -1, False)
        self._next: int | None = None  # a token that was found to be allowed here

    def clone(self) -> Grammar:
        """Another that is as far as this one. 30 us, and 50 ms for a choice of 3000 texts; compiles nothing."""
        twin = Grammar.__new__(Grammar)
        with self._vocab.held():
            twin._begin(self._vocab, llama_cpp.llama_sampler_clone(self._sampler), self._seen)
        twin._pending, twin._is_out_of_hand = self._pending, self._is_out_of_hand
        return twin

    def allows(self, token: int) -> bool:
        """Whether the text may go on with a token, or end, if it is one of end-of-generation. 6 us."""
        token = checked_int("a token", token, 0, self._vocab.n_tokens - 1)
        if token == self._next:
            return True
        if self._is_out_of_hand:
            return False
        self._one.id, self._one.logit = token, 0.0
        with self._vocab.held():
            llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(self._array_of_one))
        if not math.isfinite(self._one.logit) or not self._well_formed([token])[0]:
            return False
        self._next = token
        return True

    def restrict(self, candidates: npt.NDArray[Any], n: int) -> None:
        """Set the logit of each of the first `n` candidates that is not allowed to -inf.

        `candidates`: an array of `CANDIDATE`, one after the other in memory; ids in any order. For a vocabulary of 152k
        10 ms where few are allowed, 25 ms and 20 MB in free text, the first time 0.3 s more: so ask `allows` about the
        token you would like, and this only if it is not.
        """
        if candidates.dtype != CANDIDATE or candidates.ndim != 1 or not candidates.flags.c_contiguous:
            raise OptionError(f"candidates must be one contiguous array of {CANDIDATE}, not of {candidates.dtype}")
        checked_int("the number of candidates", n, 0, len(candidates))
        if not n:
            return
        ids = candidates["id"][:n]
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocab.n_tokens:  # it would throw through C
            raise OptionError(f"candidates hold a token outside the vocabulary of {self._vocab.n_tokens}")
        if self._is_out_of_hand:
            candidates["logit"][:n] = -np.inf
            return
        array = self._array
        array.data = ctypes.cast(candidates.ctypes.data, ctypes.POINTER(llama_cpp.llama_token_data))
        array.size, array.selected, array.sorted = n, -1, False
        with self._vocab.held():
            llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(array))
        logits = candidates["logit"][:n]
        # A token that may begin a text goes on with none in the middle of a character, which llama.cpp does see.
        left = np.flatnonzero((logits > -np.inf) & (self._seen[ids] != _WELL_FORMED))
        logits[left[~self._well_formed(ids[left].tolist())]] = -np.inf

    def _well_formed(self, tokens: list[int]) -> npt.NDArray[np.bool_]:
        """Which tokens may go on with a text that is UTF-8. 2 us each, for a whole character before it once."""
        buffer = ctypes.create_string_buffer(64)
        found = np.ones(len(tokens), np.bool_)
        with self._vocab.held() as handle:
            for i, token in enumerate(tokens):
                if self._pending or self._seen[token] == _UNSEEN:
                    n = llama_cpp.llama_token_to_piece(handle, token, buffer, 64, 0, True)
                    piece = buffer.raw[:n] if n >= 0 else self._vocab.piece(token)
                    found[i] = _unfinished(self._pending + piece) is not None or self._vocab.is_eog(token)
                    if not self._pending:
                        self._seen[token] = _WELL_FORMED if found[i] else _MALFORMED
                else:
                    found[i] = self._seen[token] == _WELL_FORMED
        return found

    def accept(self, token: int) -> None:
        """The text goes on with a token: 10 us. Raises StateError, and changes nothing, if that is not allowed.

        Where llama.cpp has more and more readings to follow, nothing is allowed any more, and the log says so.
        """
        if not self.allows(token):
            raise StateError(f"token {token} is not allowed by the grammar here; ask allows() first")
        start = time.thread_time()
        with self._vocab.held():
            self._next = None
            llama_cpp.llama_sampler_accept(self._sampler, int(token))
        if time.thread_time() - start > _LONGEST:
            self._is_out_of_hand = True
            logger.warning(
                "grammar: a token took more than %g s, as the text has more readings with each; nothing more is "
                "allowed. Write the grammar so that alternatives begin with different characters",
                _LONGEST,
            )
        if not self._vocab.is_eog(token):
            self._pending = _unfinished(self._pending + self._vocab.piece(token)) or b""


class Grammars:
    """The grammars of one vocabulary: the last 32 texts are compiled once."""

    def __init__(self, vocab: LlamaVocab) -> None:
        self._vocab = vocab
        self._compiled: Memo[str, Grammar] = Memo(_N_COMPILED, lambda _: 1)
        self._seen = np.zeros(vocab.n_tokens, np.uint8)

    def new(self, gbnf: str) -> Grammar:
        """A grammar at its beginning, yours alone. Raises OptionError as `Grammar` does."""
        compiled = self._compiled.get(gbnf) if isinstance(gbnf, str) else None
        if compiled is None:
            compiled = Grammar(self._vocab, gbnf)
            compiled._seen = self._seen
            self._compiled.keep(gbnf, compiled)
        return compiled.clone()


def _compile(vocab: LlamaVocab, gbnf: str) -> Any:
    """A `llama_sampler *` of a checked grammar. llama.cpp parses by recursion, so on a deep stack."""
    summary = check_gbnf(gbnf)

    def work() -> tuple[Any, str]:
        with vocab.held() as handle, capture as captured:
            for token in summary.tokens:
                # As its parser asks for it (llama-grammar.cpp, parse_token).
                text, ids = token.spelled.encode(), (ctypes.c_int32 * 2)()
                if llama_cpp.llama_tokenize(handle, text, len(text), ids, 2, False, True) != 1:
                    raise OptionError(f"grammar: {token.place}: {token.spelled!r} is no single token of this model")
            sampler = llama_cpp.llama_sampler_init_grammar(handle, gbnf.encode(), b"root")
            return sampler, captured.last_error

    sampler, error = on_a_deep_stack(work, "compiling a grammar needs")
    if not sampler:
        raise OptionError(f"grammar: llama.cpp refuses it: {error or 'see stderr'}")
    return sampler
