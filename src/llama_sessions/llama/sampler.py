"""llama.cpp's own samplers over logits that we hold, so that it does not matter who decoded since."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections import deque
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


_NOTHING: Ids = np.empty(0, np.intp)


def reaching(logits: FloatArray, floor: Any, moved: Ids, mask: Any = None) -> Ids:
    """Ids, (n,) ascending, of the logits that reach a floor, and all of `moved`. `mask`: (n_vocab,) bool to work in."""
    mask = np.greater_equal(logits, floor, mask)
    if len(moved):
        mask[moved] = True
    ids: Ids = mask.nonzero()[0]
    return ids


class Contenders:
    """Finds the few logits among which the best are. What the last ones reached is a good guess for the next: then it
    is one compare of all. 25 us at 152k, twice that when the logits are not in the cache."""

    def __init__(self, n_vocab: int) -> None:
        self._most = n_vocab // 8
        self._mask = np.empty(n_vocab, np.bool_)
        self._floor = np.array(math.inf, np.float32)  # as an array it is compared with at once, as a float looked into

    def find(self, logits: FloatArray, k: int, moved: Ids) -> Ids | None:
        """Ids, (n,) ascending: all of `moved`, and the `k` largest of the others; None where that narrows nothing down,
        or for NaN."""
        n = k + len(moved)
        if n > len(logits) // _BLOCK:
            return None
        ids = reaching(logits, self._floor, moved, self._mask)
        if not n <= len(ids) <= _STALE * n:
            floor = floor_for(logits, _AIM * n)
            self._floor.fill(floor_for(logits, n) if math.isnan(floor) else floor)
            ids = reaching(logits, self._floor, moved, self._mask)
        return ids if n <= len(ids) <= self._most else None


class Bias:
    """What `logit_bias` adds. Done here and not by llama.cpp's sampler, which looks for each of them among all
    candidates where these are not the whole vocabulary. 50 us at 152k."""

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

    llama.cpp's samplers want the whole vocabulary as candidates, 1.8 MB to write at 152k. Greedy needs none where no
    penalties come before it, and what looks at the `k` best needs the contenders alone: these, and the tokens that the
    penalties are about. 10 and 60 us a token instead of 190, and of 600 with penalties.
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
        self._last: deque[int] = deque(maxlen=_N_PENALTY)  # the penalties', if there are any
        self._greedy = self._takes_best = False
        self._n_best = 0  # all that the chain looks at; 0: at more than that
        self._contenders = Contenders(n_vocab)
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
            self._n_best = 1
            return [*chain, llama_cpp.llama_sampler_init_greedy()]
        self._n_best = o.top_k
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
                self._remember(int(token))

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
            self._remember(token)

    def _remember(self, token: int) -> None:
        self._last.append(token)
        llama_cpp.llama_sampler_accept(self._chain, token)

    def _moved(self) -> Ids:
        """Tokens whose logits the penalties change; some maybe twice."""
        return np.fromiter(self._last, np.intp, len(self._last)) if self._last else _NOTHING

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

        Where the chain looks at its `n_best` best logits only, the first few hundred are tried alone, as asking a
        grammar about a whole vocabulary of 152k takes milliseconds.
        """
        if self._n_best:
            moved = self._moved()
            n_wanted = self._n_best + len(moved)
            floor = floor_for(logits, _TRIED * n_wanted)
            if not math.isnan(floor):
                ids = reaching(logits, floor, moved)
                n = self._restrict(grammar, self._put(logits, ids)) if len(ids) <= len(logits) // 8 else 0
                if n >= n_wanted:
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
        ids = self._contenders.find(logits, self._n_best, self._moved()) if self._n_best else None
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
