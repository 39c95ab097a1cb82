"""llama.cpp's own samplers over logits that we hold, so that it does not matter who decoded since."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Mapping
from typing import Any, TypeAlias

import llama_cpp
import numpy as np
import numpy.typing as npt

from ..errors import OptionError
from ..generation_options import GenerationOptions
from ..types import CANDIDATE, Constraint, FloatArray

_N_PENALTY = 64  # tokens of prompt and reply that the penalties look at
Ids: TypeAlias = npt.NDArray[np.intp]

_COLDEST = 1e-20  # below it logits divided by the temperature overflow: the same as greedy
_RANDOM_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED
_BLOCK = 128  # logits
_TRIED = 8  # times as many of the best are tried alone with a grammar
_STALE = 32  # times as many say that the floor is too low
_AIM = 3  # times as many contenders as are needed: so that the same floor serves the next tokens too


def floor_for(logits: FloatArray, k: int) -> float:
    """A number that at least `k` of the logits reach, and not many more: the `k`-th best of the bests of blocks.

    50 us at 152k. NaN where there are fewer blocks, or among the best is one.
    """
    n_blocks = len(logits) // _BLOCK
    if k > n_blocks:
        return math.nan
    best = logits[: n_blocks * _BLOCK].reshape(_BLOCK, n_blocks).max(axis=0)
    return float(np.partition(best, n_blocks - k)[n_blocks - k])


class Contenders:
    """Finds the few logits among which the `k` largest are. What the last ones reached is a good guess for the next:
    then it is one compare of all. 25 us at 152k, twice that when the logits are not in the cache."""

    def __init__(self, n_vocab: int, k: int) -> None:
        self._k = k
        self._most = n_vocab // 8
        self._mask = np.empty(n_vocab, np.bool_)
        self._floor = np.array(math.inf, np.float32)  # as an array it is compared with at once, as a float looked into

    def find(self, logits: FloatArray) -> Ids | None:
        """Their ids, (n,) ascending; None where that narrows nothing down, or for NaN."""
        ids = self._reaching(logits)
        if not self._k <= len(ids) <= _STALE * self._k:
            floor = floor_for(logits, _AIM * self._k)
            self._floor.fill(floor_for(logits, self._k) if math.isnan(floor) else floor)
            ids = self._reaching(logits)
        return ids if self._k <= len(ids) <= self._most else None

    def _reaching(self, logits: FloatArray) -> Ids:
        np.greater_equal(logits, self._floor, self._mask)
        ids: Ids = self._mask.nonzero()[0]
        return ids


class Bias:
    """What `logit_bias` adds. Done here and not by llama.cpp's sampler, which wants the whole vocabulary as candidates:
    50 us at 152k."""

    def __init__(self, bias: Mapping[int, float], n_vocab: int) -> None:
        outside = [token for token in bias if token >= n_vocab]
        if outside:
            raise OptionError(f"logit_bias names token {outside[0]}, outside the vocabulary of {n_vocab}")
        self._ids = np.fromiter(bias.keys(), np.intp, len(bias))
        self._added = np.fromiter(map(float, bias.values()), np.float32, len(bias))
        self._logits = np.empty(n_vocab, np.float32)

    def on(self, logits: FloatArray) -> FloatArray:
        """(n_vocab,) float32: the logits with it; good until the next call."""
        self._logits[:] = logits
        self._logits[self._ids] += self._added
        return self._logits


class Sampler:
    """One generation's sampler chain: bias, penalties, then greedy, or top-k, top-p, min-p, temperature and a draw.

    llama.cpp's samplers want the whole vocabulary as candidates, 1.8 MB to write at 152k. Where no penalties come
    before it, greedy needs none and top-k only its contenders: 10 and 60 us a token instead of 190.
    """

    def __init__(self, options: GenerationOptions, n_vocab: int) -> None:
        self._candidates = np.zeros(n_vocab, CANDIDATE)
        self._ids, self._logits = self._candidates["id"], self._candidates["logit"]
        self._in_order = False  # candidate i is token i
        self._array = llama_cpp.llama_token_data_array()
        self._data = ctypes.cast(self._candidates.ctypes.data, ctypes.POINTER(llama_cpp.llama_token_data))
        self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        weakref.finalize(self, llama_cpp.llama_sampler_free, self._chain)
        self._stateful = False
        self._greedy = self._takes_best = False
        self._n_best = 0  # all that the chain looks at; 0: at more than that
        self._contenders: Contenders | None = None
        self._bias = Bias(options.logit_bias, n_vocab) if options.logit_bias else None
        for sampler in self._samplers(options, n_vocab):
            llama_cpp.llama_sampler_chain_add(self._chain, sampler)

    def _samplers(self, o: GenerationOptions, n_vocab: int) -> list[Any]:
        chain: list[Any] = []
        if o.repeat_penalty != 1.0 or o.frequency_penalty or o.presence_penalty:
            self._stateful = True
            chain.append(
                llama_cpp.llama_sampler_init_penalties(
                    n_vocab, _N_PENALTY, o.repeat_penalty, o.frequency_penalty, o.presence_penalty
                )
            )
        if o.temperature < _COLDEST:
            self._greedy, self._takes_best = True, not chain
            self._n_best = int(self._takes_best)
            return [*chain, llama_cpp.llama_sampler_init_greedy()]
        if not chain and 0 < o.top_k <= n_vocab // _BLOCK:
            self._n_best, self._contenders = o.top_k, Contenders(n_vocab, o.top_k)
        return [
            *chain,
            llama_cpp.llama_sampler_init_top_k(o.top_k),
            llama_cpp.llama_sampler_init_top_p(o.top_p, 1),
            llama_cpp.llama_sampler_init_min_p(o.min_p, 1),
            llama_cpp.llama_sampler_init_temp(o.temperature),
            llama_cpp.llama_sampler_init_dist(_RANDOM_SEED if o.seed is None else o.seed),
        ]

    def begin(self, prompt: Any) -> None:
        """Show the penalties the end of the prompt (an int array or list)."""
        if self._stateful:
            for token in prompt[-_N_PENALTY:]:
                llama_cpp.llama_sampler_accept(self._chain, int(token))

    def sample(self, logits: FloatArray, grammar: Constraint | None = None) -> int | None:
        """Draw a token from (n_vocab,) float32 logits, for `accept`; None if every token is banned.

        A grammar is asked about the token that was drawn without it, which costs next to nothing; only if it says no,
        the draw is repeated among the tokens that it allows (as llama.cpp's own tools do).
        """
        if self._bias is not None:
            logits = self._bias.on(logits)
        token = self._draw(logits)
        if grammar is not None and (token is None or not grammar.allows(token)):
            token = self._draw_allowed(logits, grammar)
        return token

    def accept(self, token: int, grammar: Constraint | None = None) -> None:
        """The reply goes on with a token, drawn here or not."""
        if grammar is not None:
            grammar.accept(token)
        if self._stateful:
            llama_cpp.llama_sampler_accept(self._chain, token)

    def _draw(self, logits: FloatArray) -> int | None:
        if self._takes_best:
            best = int(logits.argmax())  # the first of equals, as llama.cpp's own
            if math.isfinite(logits[best]):
                return best
        return self._apply(self._fill(logits))

    def _apply(self, n: int) -> int | None:
        """What the chain makes of the first `n` candidates."""
        array = self._array
        array.data, array.size, array.selected, array.sorted = self._data, n, -1, False
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        at = array.selected
        if not 0 <= at < array.size:
            return None
        chosen = array.data[at]
        return int(chosen.id) if math.isfinite(chosen.logit) else None

    def _draw_allowed(self, logits: FloatArray, grammar: Constraint) -> int | None:
        """The same among the tokens that the grammar allows.

        The chain looks at its `n_best` best logits only, where it begins with top-k or takes the best: so the first
        few hundred are tried alone, as asking a grammar about a whole vocabulary of 152k takes milliseconds.
        """
        if self._n_best:
            floor = floor_for(logits, _TRIED * self._n_best)
            if not math.isnan(floor):
                ids = np.flatnonzero(logits >= floor)
                n = self._restrict(grammar, self._put(logits, ids)) if len(ids) <= len(logits) // 8 else 0
                if n >= self._n_best:
                    return self._apply(n)
        n = self._restrict(grammar, self._put(logits, np.arange(len(logits))))
        return self._apply(n) if n else None

    def _restrict(self, grammar: Constraint, n: int) -> int:
        """Of the first `n` candidates keep those that the grammar allows; returns how many."""
        cur = self._candidates
        grammar.restrict(cur, n)
        allowed = np.flatnonzero(cur["logit"][:n] > -np.inf)
        cur["id"][: len(allowed)], cur["logit"][: len(allowed)] = cur["id"][allowed], cur["logit"][allowed]
        return len(allowed)

    def _fill(self, logits: FloatArray) -> int:
        """Put the candidates in; returns how many."""
        ids = None if self._contenders is None else self._contenders.find(logits)
        if ids is not None:
            return self._put(logits, ids)
        cur = self._candidates
        if not self._in_order:
            cur["id"] = np.arange(len(cur), dtype=np.int32)
        cur["logit"] = logits
        self._in_order = self._greedy  # the others sort in place
        return len(cur)

    def _put(self, logits: FloatArray, ids: Ids) -> int:
        """Make `ids` the candidates; returns how many."""
        n = len(ids)
        self._ids[:n], self._logits[:n] = ids, logits[ids]
        self._in_order = False
        return n
