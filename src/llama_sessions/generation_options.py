"""Options of one reply, in llama-cpp-python's words, and presets of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

from .errors import OptionError
from .options import build_options, check_known, checked_bool, checked_choice, checked_float, checked_int, checked_text

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "balanced": {},  # the defaults
        "precise": {"temperature": 0.2, "top_k": 20, "top_p": 0.9},
        "creative": {"temperature": 1.1, "top_k": 0, "top_p": 0.98, "min_p": 0.05, "presence_penalty": 0.3},
        "code": {"temperature": 0.1, "top_k": 20, "top_p": 0.95, "min_p": 0.0},
        "fast": {"temperature": 0.0},  # greedy: no candidates are sorted
        "thinking": {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0},  # Qwen3's and R1's own advice
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """Options of one generation, in llama-cpp-python's words and defaults.

    Penalties look at the last 64 tokens of prompt and reply. `temperature` 0 is greedy. `seed` None: a random one.
    `logit_bias` maps token ids to what is added to their logit (-inf bans a token). `stop`: texts that end the reply
    and are not shown; they do not count within the thinking. `grammar` (GBNF) or `json_schema` (a dict, or JSON text)
    is what the reply must be; after the thinking, where the reply header has opened one, and where the model would end
    the reply in it, the thinking is closed instead. What a schema binds is content and never a tool call; what a
    grammar binds may be one in a format whose opening tag stands in the grammar. `think_budget`: tokens after which
    thinking is closed, unless the grammar is about it and refuses that. `logprobs`: how many alternatives to report
    with each token (0: only its own). `timeout_s`: seconds after which the reply ends as it stands. `continue_last`: go
    on with the last message, which is the assistant's, within its thinking if it got no further. `preset`: one of
    `PRESETS`, under what is given beside it.
    """

    max_tokens: int = 2048
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    grammar: str | None = None
    json_schema: Mapping[str, Any] | str | None = None
    think_budget: int | None = None
    logprobs: int | None = None
    timeout_s: float | None = None
    continue_last: bool = False

    def __post_init__(self) -> None:
        checked_int("max_tokens", self.max_tokens, 1)
        checked_float("temperature", self.temperature, 0.0)
        checked_int("top_k", self.top_k, 0, 2**31 - 1)
        checked_float("top_p", self.top_p, 0.0, 1.0)
        checked_float("min_p", self.min_p, 0.0, 1.0)
        # 0 would divide by zero inside the sampler.
        checked_float("repeat_penalty", self.repeat_penalty, 0.01, 100.0)
        checked_float("frequency_penalty", self.frequency_penalty, -100.0, 100.0)
        checked_float("presence_penalty", self.presence_penalty, -100.0, 100.0)
        if self.seed is not None:
            checked_int("seed", self.seed, 0, 2**32 - 2)
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise OptionError(f"logit_bias must map token ids to numbers, not {self.logit_bias!r}")
            for token, bias in self.logit_bias.items():
                checked_int("a token id in logit_bias", token, 0)
                if bias != -math.inf:
                    checked_float(f"logit_bias[{token}]", bias, -1e30, 1e30)  # it is a 32-bit float in C
        self._check_form()
        if self.think_budget is not None:
            checked_int("think_budget", self.think_budget, 0)
        if self.logprobs is not None:
            checked_int("logprobs", self.logprobs, 0, 1000)
        if self.timeout_s is not None:
            checked_float("timeout_s", self.timeout_s, 0.0)
        checked_bool("continue_last", self.continue_last)
        _ = self.stops

    def _check_form(self) -> None:
        if self.grammar is not None:
            checked_text("grammar", self.grammar)
            if self.json_schema is not None:
                raise OptionError("grammar and json_schema both say what the reply must be; pass one of them")
        if self.json_schema is not None and not isinstance(self.json_schema, Mapping | str):
            raise OptionError(f"json_schema must be a dict or JSON text, not {self.json_schema!r}")

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, none of them empty."""
        if self.stop is None:
            return ()
        if not isinstance(self.stop, Sequence):  # an iterator would be empty the second time
            raise OptionError(f"stop must be a text or a list of texts, not {self.stop!r}")
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        for stop in stops:
            if not checked_text("a stop string", stop):
                raise OptionError("a stop string must not be empty: every text contains it")
        return stops

    @classmethod
    def build(cls, options: Mapping[str, Any]) -> GenerationOptions:
        check_known("generation option", options, [*(f.name for f in fields(cls)), "preset"])
        preset = options.get("preset")
        base = {} if preset is None else PRESETS[checked_choice("preset", preset, tuple(PRESETS))]
        return build_options(cls, "generation option", {**base, **{k: v for k, v in options.items() if k != "preset"}})
