"""The sampler against llama.cpp's own chain over the whole vocabulary, token after token.

The vocabulary is large enough for what only large ones take: a few contenders instead of all.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_sessions.generation_options import GenerationOptions
from llama_sessions.llama.sampler import Contenders, Sampler
from llama_sessions.types import FloatArray

N_VOCAB = 16384
N_TOKENS = 6


class Chain:
    """llama.cpp's samplers as `GenerationOptions` names them, over all candidates."""

    def __init__(self, o: GenerationOptions) -> None:
        self._chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
        bias = o.logit_bias or {}
        biases = (llama_cpp.llama_logit_bias * len(bias))(*bias.items())
        penalties = (o.repeat_penalty, o.frequency_penalty, o.presence_penalty)
        self._add(llama_cpp.llama_sampler_init_logit_bias(N_VOCAB, len(biases), biases))
        self._add(llama_cpp.llama_sampler_init_penalties(N_VOCAB, 64, *penalties))
        if o.temperature == 0:
            self._add(llama_cpp.llama_sampler_init_greedy())
            return
        self._add(llama_cpp.llama_sampler_init_top_k(o.top_k))
        self._add(llama_cpp.llama_sampler_init_top_p(o.top_p, 1))
        self._add(llama_cpp.llama_sampler_init_min_p(o.min_p, 1))
        self._add(llama_cpp.llama_sampler_init_temp(o.temperature))
        self._add(llama_cpp.llama_sampler_init_dist(o.seed))

    def _add(self, sampler: Any) -> None:
        llama_cpp.llama_sampler_chain_add(self._chain, sampler)

    def accept(self, token: int) -> None:
        llama_cpp.llama_sampler_accept(self._chain, token)

    def sample(self, logits: FloatArray) -> int:
        data = (llama_cpp.llama_token_data * N_VOCAB)(*[(i, x, 0.0) for i, x in enumerate(logits.tolist())])
        array = llama_cpp.llama_token_data_array(data=data, size=N_VOCAB, selected=-1, sorted=False)
        llama_cpp.llama_sampler_apply(self._chain, ctypes.byref(array))
        return int(array.data[array.selected].id)

    def __del__(self) -> None:
        llama_cpp.llama_sampler_free(self._chain)


def logits_of(seed: int) -> Iterator[FloatArray]:
    """What a model might say, token after token: much the same, at times flatter or steeper, higher or lower."""
    rng = np.random.default_rng(seed)
    base, wide, high = rng.standard_normal(N_VOCAB), 3.0, 0.0
    while True:
        if rng.random() < 0.3:
            base, wide, high = rng.standard_normal(N_VOCAB), rng.choice([0.1, 1.0, 8.0]), rng.choice([-50.0, 0.0, 50.0])
        yield (base * wide + rng.standard_normal(N_VOCAB) * 0.1 + high).astype(np.float32)


ids = st.integers(0, N_VOCAB - 1)
biases = st.dictionaries(ids, st.sampled_from([-math.inf, -3.0, 2.0, 25.0]), max_size=8)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), bias=biases, prompt=st.lists(ids, max_size=80), top_k=st.sampled_from([1, 5, 40, 0]),
    temperature=st.sampled_from([0.0, 0.8]), top_p=st.sampled_from([0.95, 0.7]),
    repeat=st.sampled_from([1.0, 1.3, 0.8]), frequency=st.sampled_from([0.0, 0.5, -2.0]),
    presence=st.sampled_from([0.0, 1.0, -20.0]),
)  # fmt: skip
def test_every_token_is_that_of_the_whole_vocabulary(
    seed: int, bias: dict[int, float], prompt: Sequence[int], top_k: int, temperature: float, top_p: float,
    repeat: float, frequency: float, presence: float,
) -> None:  # fmt: skip
    options = GenerationOptions(
        logit_bias=bias, top_k=top_k, top_p=top_p, temperature=temperature, seed=seed, repeat_penalty=repeat,
        frequency_penalty=frequency, presence_penalty=presence,
    )  # fmt: skip
    ours, oracle = Sampler(options, N_VOCAB), Chain(options)
    ours.begin(prompt)
    for token in prompt[-64:]:
        oracle.accept(token)
    for logits, _ in zip(logits_of(seed), range(N_TOKENS), strict=False):
        before = logits.copy()
        token = ours.sample(logits)
        np.testing.assert_array_equal(logits, before)
        assert token == oracle.sample(logits)
        ours.accept(token)
        oracle.accept(token)


class Only:
    """A constraint that allows some tokens, ever."""

    def __init__(self, allowed: FloatArray) -> None:
        self._allowed = allowed

    def allows(self, token: int) -> bool:
        return bool(self._allowed[token])

    def restrict(self, candidates: Any, n: int) -> None:
        candidates["logit"][:n][~self._allowed[candidates["id"][:n]]] = -np.inf

    def accept(self, token: int) -> None:
        assert self.allows(token)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31), bias=biases, n_allowed=st.sampled_from([1, 30, 3000]),
    temperature=st.sampled_from([0.0, 0.8]), top_k=st.sampled_from([1, 5, 40]),
    presence=st.sampled_from([0.0, 3.0, -20.0]),
)  # fmt: skip
def test_a_second_draw_is_that_of_all_that_is_allowed(
    seed: int, bias: dict[int, float], n_allowed: int, temperature: float, top_k: int, presence: float
) -> None:
    allowed = np.random.default_rng(seed).permutation(N_VOCAB) < n_allowed
    allowed[[token for token, x in bias.items() if x == -math.inf]] = False
    if not allowed.any():
        allowed[next(t for t in range(N_VOCAB) if t not in bias)] = True
    options = GenerationOptions(
        logit_bias=bias, temperature=temperature, seed=seed, top_k=top_k, presence_penalty=presence
    )
    ours, oracle, only = Sampler(options, N_VOCAB), Chain(options), Only(allowed)
    for logits, _ in zip(logits_of(seed), range(N_TOKENS), strict=False):
        expected = oracle.sample(logits)
        if not allowed[expected]:
            expected = oracle.sample(np.where(allowed, logits, -np.inf).astype(np.float32))
        token = ours.sample(logits, only)
        assert token == expected
        ours.accept(token, only)
        oracle.accept(token)


@pytest.mark.parametrize("options", [
    {}, {"logit_bias": dict.fromkeys(range(5000), -math.inf)}, {"presence_penalty": -40.0},
    {"temperature": 0.0, "logit_bias": {7: -math.inf, N_VOCAB - 1: 30.0}},
    {"temperature": 0.0, "repeat_penalty": 1.2, "logit_bias": {3: 1.0}},
])  # fmt: skip
def test_few_candidates_are_laid_out(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each token would cost the writing of all of them."""
    sampler = Sampler(GenerationOptions(seed=1, **options), N_VOCAB)
    sizes: list[int] = []
    put = sampler._apply
    monkeypatch.setattr(sampler, "_apply", lambda n: sizes.append(n) or put(n))
    sampler.begin(range(100, 180))
    for logits, _ in zip(logits_of(5), range(N_TOKENS), strict=False):
        token = sampler.sample(logits)
        assert token is not None
        sampler.accept(token)
    assert all(n < N_VOCAB / 8 for n in sizes)
    assert bool(sizes) != ("temperature" in options and "repeat_penalty" not in options)  # then not even one


def test_contenders_are_the_best_and_whatever_is_moved() -> None:
    contenders = Contenders(N_VOCAB)
    moved = np.array([0, 5, 5, N_VOCAB - 1], np.intp)
    for logits, _ in zip(logits_of(2), range(N_TOKENS), strict=False):
        found = contenders.find(logits, 40, moved)
        assert found is not None
        others = np.setdiff1d(np.arange(N_VOCAB), moved)
        best = others[np.argsort(logits[others])[-40:]]
        assert set(best) | set(moved) <= set(found)
        assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("k", [0, 40])
def test_logits_that_are_none_are_no_contenders(k: int) -> None:
    nothing = np.empty(0, np.intp)
    assert Contenders(N_VOCAB).find(np.full(N_VOCAB, np.nan, np.float32), max(1, k), nothing) is None
    assert Contenders(N_VOCAB).find(np.zeros(N_VOCAB, np.float32), 129, nothing) is None  # more than there are blocks
    options = GenerationOptions(seed=1, top_k=k, logit_bias={5: -math.inf})
    logits = np.full(N_VOCAB, -np.inf, np.float32)
    logits[5] = 1.0
    assert Sampler(options, N_VOCAB).sample(logits) is None
