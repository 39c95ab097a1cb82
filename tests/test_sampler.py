"""What is drawn: the same as llama.cpp's own chain draws, by whichever short way."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from typing import Any

import llama_cpp
import numpy as np
import pytest

from llama_sessions.generation_options import GenerationOptions
from llama_sessions.llama.sampler import Sampler

N_VOCAB = 20_000
BIAS = {7: -math.inf, 8: 3.5, 9: -2.0, **dict.fromkeys(range(100, 140), -math.inf)}


def drawn_by_llama(options: GenerationOptions, many_logits: list[np.ndarray]) -> Iterator[int]:
    """What llama.cpp's samplers make of each, one after the other, with the whole vocabulary as candidates."""
    o, bias = options, options.logit_bias or {}
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    biases = (llama_cpp.llama_logit_bias * len(bias))(*bias.items())
    samplers = [llama_cpp.llama_sampler_init_logit_bias(N_VOCAB, len(bias), biases)]
    if o.temperature:
        samplers += [
            llama_cpp.llama_sampler_init_top_k(o.top_k),
            llama_cpp.llama_sampler_init_top_p(o.top_p, 1),
            llama_cpp.llama_sampler_init_min_p(o.min_p, 1),
            llama_cpp.llama_sampler_init_temp(o.temperature),
            llama_cpp.llama_sampler_init_dist(o.seed),
        ]
    else:
        samplers.append(llama_cpp.llama_sampler_init_greedy())
    for sampler in samplers:
        llama_cpp.llama_sampler_chain_add(chain, sampler)
    data = (llama_cpp.llama_token_data * N_VOCAB)()
    for logits in many_logits:
        for token, logit in enumerate(logits.tolist()):
            data[token].id, data[token].logit = token, logit
        array = llama_cpp.llama_token_data_array(data, N_VOCAB, -1, False)
        llama_cpp.llama_sampler_apply(chain, ctypes.byref(array))
        yield int(array.data[array.selected].id)
    llama_cpp.llama_sampler_free(chain)


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"seed": 5}, {"seed": 5, "top_k": 0, "top_p": 0.7}])
def test_a_token_is_the_one_that_llama_cpps_own_chain_draws(options: dict[str, Any], bias: Any) -> None:
    """Of logits flat and steep, high and low, so that no floor serves the next."""
    rng = np.random.default_rng(1)
    scales = [(1, 0), (1, 0), (8, 0), (0.1, 50), (3, -50), (3, -50)] * 3
    many = [(rng.standard_normal(N_VOCAB) * wide + high).astype(np.float32) for wide, high in scales]
    checked = GenerationOptions.build({**options, "logit_bias": bias})
    sampler = Sampler(checked, N_VOCAB)
    before = [logits.copy() for logits in many]
    assert [sampler.sample(logits) for logits in many] == list(drawn_by_llama(checked, many))
    np.testing.assert_array_equal(many, before)


def test_a_bias_leaves_the_short_way_open(monkeypatch: pytest.MonkeyPatch) -> None:
    applied: list[int] = []
    apply = Sampler._apply
    monkeypatch.setattr(Sampler, "_apply", lambda self, n: applied.append(n) or apply(self, n))
    logits = np.random.default_rng(1).standard_normal(N_VOCAB).astype(np.float32)
    for options in ({"temperature": 0.0}, {"seed": 5}):
        Sampler(GenerationOptions.build({**options, "logit_bias": BIAS}), N_VOCAB).sample(logits)
    assert len(applied) == 1  # greedy needs no candidates at all
    assert applied[0] < N_VOCAB // 8
