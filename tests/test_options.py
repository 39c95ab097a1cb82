"""Options are checked at the door: every bound, every type, every relation, with a message that says which and how."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from llama_sessions import ContextManager, OptionError, RadixOptions
from llama_sessions.generation_options import GenerationOptions
from llama_sessions.options import LoadOptions, ManagerOptions

BUILDERS = {"manager": ManagerOptions, "load": LoadOptions, "sampling": GenerationOptions, "radix": RadixOptions}
NO_INTEGER = [True, False, 1.0, "1", None, [1], math.nan]
NO_NUMBER = [True, "0.5", b"1", None, [0.5], 1j, math.nan, math.inf, 10**400]

# kind, name, smallest, largest (None: none)
INTEGERS: list[tuple[str, str, int, int | None]] = [
    ("manager", "headroom", 0, None),
    ("manager", "n_sink", 0, None),
    ("load", "n_ctx", 10, 2**31 - 256),  # not below the ten sequences of eight sessions
    ("load", "max_sessions", 1, 254),
    ("load", "n_batch", 10, 2**20),
    ("load", "n_ubatch", 1, 2**20),
    ("load", "n_threads", 1, 512),
    ("load", "n_gpu_layers", -1, 2**31 - 1),
    ("load", "type_k", 0, 63),
    ("load", "type_v", 0, 63),
    ("sampling", "max_tokens", 1, None),
    ("sampling", "top_k", 0, 2**31 - 1),
    ("sampling", "seed", 0, 2**32 - 2),
    ("sampling", "think_budget", 0, None),
    ("sampling", "logprobs", 0, 1000),
    ("radix", "max_bytes", 1, None),
    ("radix", "min_tokens", 1, None),
]
# kind, name, smallest, largest, just outside
NUMBERS: list[tuple[str, str, float, float | None]] = [
    ("manager", "idle_park_after_s", 0.0, None),
    ("sampling", "temperature", 0.0, None),
    ("sampling", "top_p", 0.0, 1.0),
    ("sampling", "min_p", 0.0, 1.0),
    ("sampling", "repeat_penalty", 0.01, 100.0),
    ("sampling", "frequency_penalty", -100.0, 100.0),
    ("sampling", "presence_penalty", -100.0, 100.0),
    ("sampling", "timeout_s", 0.0, None),
]
BOOLS = [("manager", "no_think"), ("manager", "log"), ("load", "swa_full"), ("load", "kv_unified")]
BOOLS += [("sampling", "continue_last")]
CHOICES: list[tuple[str, str, list[Any]]] = [
    ("manager", "eviction", ["message", "fifo", len]),
    ("manager", "overflow", ["shift", "gap", "reprefill"]),
    ("manager", "system_fallback", [None, "user"]),
    ("manager", "radix", [True, False, RadixOptions(max_bytes=1)]),
    ("load", "flash_attn", ["auto", True, False]),
    ("radix", "policy", ["lru", "lfu", "gdsf", len]),
]
MAY_BE_NONE = ["headroom", "n_ctx", "n_threads", "type_k", "type_v", "seed", "idle_park_after_s"]
MAY_BE_NONE += ["think_budget", "logprobs", "timeout_s"]


def build(kind: str, **options: Any) -> Any:
    if kind == "load" and "max_sessions" in options:
        options.setdefault("n_batch", 512)
    return BUILDERS[kind](**options)


# -- bounds


@pytest.mark.parametrize(("kind", "name", "low", "high"), INTEGERS)
def test_an_integer_within_its_bounds_is_taken(kind: str, name: str, low: int, high: int | None) -> None:
    for value in (low, high if high is not None else 2**40, np.int32(low)):
        assert getattr(build(kind, **{name: value}), name) == value


@pytest.mark.parametrize(("kind", "name", "low", "high"), INTEGERS)
def test_an_integer_outside_its_bounds_is_refused(kind: str, name: str, low: int, high: int | None) -> None:
    for value in (low - 1, *([] if high is None else [high + 1])):
        with pytest.raises(OptionError, match=rf"{name}.*{value}"):
            build(kind, **{name: value})


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name, *_ in INTEGERS])
def test_what_is_no_integer_is_refused(kind: str, name: str) -> None:
    for value in NO_INTEGER:
        if value is None and name in MAY_BE_NONE:
            continue
        with pytest.raises(OptionError, match=f"{name} must be an integer"):
            build(kind, **{name: value})


@pytest.mark.parametrize(("kind", "name", "low", "high"), NUMBERS)
def test_a_number_within_its_bounds_is_taken(kind: str, name: str, low: float, high: float | None) -> None:
    for value in (low, high if high is not None else 1e30, 1, np.float32(0.5), Decimal("0.5")):
        assert getattr(build(kind, **{name: value}), name) == value


@pytest.mark.parametrize(("kind", "name", "low", "high"), NUMBERS)
def test_a_number_outside_its_bounds_is_refused(kind: str, name: str, low: float, high: float | None) -> None:
    for value in (low - 0.01, *([] if high is None else [high + 0.01])):
        with pytest.raises(OptionError, match=name):
            build(kind, **{name: value})


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name, *_ in NUMBERS])
def test_what_is_no_finite_number_is_refused(kind: str, name: str) -> None:
    for value in NO_NUMBER:
        if value is None and name in MAY_BE_NONE:
            continue
        with pytest.raises(OptionError, match=f"{name} must be a (finite )?number"):
            build(kind, **{name: value})


def test_a_repeat_penalty_of_zero_would_divide_by_zero_and_is_refused() -> None:
    with pytest.raises(OptionError, match=r"repeat_penalty must be a finite number from 0\.01 to 100"):
        GenerationOptions(repeat_penalty=0)


@pytest.mark.parametrize(("kind", "name"), BOOLS)
def test_only_true_and_false_are_bools(kind: str, name: str) -> None:
    for value in (True, False):
        assert getattr(build(kind, **{name: value}), name) is value
    for wrong in (0, 1, None, "yes", np.bool_(True)):
        with pytest.raises(OptionError, match=f"{name} must be True or False"):
            build(kind, **{name: wrong})


@pytest.mark.parametrize(("kind", "name", "choices"), CHOICES)
def test_a_choice_is_one_of_the_known(kind: str, name: str, choices: list[Any]) -> None:
    for value in choices:
        assert getattr(build(kind, **{name: value}), name) is value
    for wrong in ("", "SHIFT", 0, 1, 1.0, [], {}):
        with pytest.raises(OptionError, match=f"{name} must be .*{repr(choices[0]).strip('()')}"):
            build(kind, **{name: wrong})


# -- names


@pytest.mark.parametrize(
    ("cls", "what", "more"), [(ManagerOptions, "option", []), (GenerationOptions, "generation option", ["preset"])]
)
def test_an_unknown_option_is_refused_with_a_list_of_the_known(cls: Any, what: str, more: list[str]) -> None:
    with pytest.raises(OptionError) as raised:
        cls.build({"no_such": 1})
    assert str(raised.value) == f"unknown {what} 'no_such'; known: {', '.join([*cls.__dataclass_fields__, *more])}"


def test_an_unknown_option_of_load_is_refused_before_the_file_is_looked_at() -> None:
    known = {*LoadOptions.__dataclass_fields__, *ManagerOptions.__dataclass_fields__}
    with pytest.raises(OptionError, match="unknown option 'n_contex'; known: ") as raised:
        ContextManager.load("no such file", n_contex=1)
    assert known <= set(str(raised.value).split("known: ")[1].split(", "))


@pytest.mark.parametrize(("cls", "options"), [(ManagerOptions, {"n_sink": 9}), (GenerationOptions, {"top_k": 9})])
def test_known_options_are_built_from_a_mapping(cls: Any, options: dict[str, int]) -> None:
    assert cls.build(options) == cls(**options) != cls()


def test_the_defaults_are_those_of_the_contract() -> None:
    manager, load, sampling = ManagerOptions(), LoadOptions(), GenerationOptions()
    assert (manager.headroom, manager.n_sink, manager.eviction, manager.overflow) == (None, 4, "message", "shift")
    assert (manager.no_think, manager.system_fallback, manager.radix) == (False, None, True)
    assert (manager.idle_park_after_s, manager.log) == (None, True)
    assert (load.n_ctx, load.max_sessions, load.n_batch, load.n_ubatch, load.n_threads) == (None, 8, 512, 512, None)
    assert (load.n_gpu_layers, load.type_k, load.type_v, load.flash_attn) == (-1, None, None, "auto")
    assert (load.swa_full, load.kv_unified, load.n_seq_max) == (True, True, 10)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (2048, 0.8, 40, 0.95)
    assert (sampling.min_p, sampling.repeat_penalty, sampling.frequency_penalty) == (0.05, 1.0, 0.0)
    assert (sampling.presence_penalty, sampling.logit_bias, sampling.seed, sampling.stops) == (0.0, None, None, ())


# -- relations


def test_a_batch_smaller_than_the_number_of_sequences_is_refused_with_the_remedy() -> None:
    with pytest.raises(OptionError, match=r"n_batch=17 is below the 18 sequences.*raise n_batch to at least 18"):
        LoadOptions(max_sessions=16, n_batch=17)
    assert LoadOptions(max_sessions=16, n_batch=18).n_seq_max == 18


def test_a_context_smaller_than_the_number_of_sequences_is_refused() -> None:
    with pytest.raises(OptionError, match="n_ctx=9 is below the 10 sequences"):
        LoadOptions(n_ctx=9)


@pytest.mark.parametrize(("n_ctx_seq", "headroom"), [(8192, 256), (1024, 256), (1000, 250), (3, 0)])
def test_headroom_is_256_tokens_or_a_quarter_of_a_small_context(n_ctx_seq: int, headroom: int) -> None:
    assert ManagerOptions().headroom_for(n_ctx_seq) == headroom


def test_headroom_leaves_room_for_at_least_one_token() -> None:
    assert ManagerOptions(headroom=99).headroom_for(100) == 99
    with pytest.raises(OptionError, match="headroom must be from 0 to 99, not 100"):
        ManagerOptions(headroom=100).headroom_for(100)


# -- stop strings and logit_bias


@pytest.mark.parametrize(
    ("stop", "stops"), [(None, ()), ("a", ("a",)), (["a", "b"], ("a", "b")), (("ab",), ("ab",)), ([], ())]
)
def test_stop_strings_may_be_none_one_or_many(stop: Any, stops: tuple[str, ...]) -> None:
    assert GenerationOptions(stop=stop).stops == stops


@pytest.mark.parametrize("stop", ["", ["a", ""], [b"a"], b"a", ["\ud800"], 5, [None], {"a": 1}, iter(["a"])])
def test_what_cannot_be_found_in_text_is_no_stop_string(stop: Any) -> None:
    with pytest.raises(OptionError, match="stop"):
        GenerationOptions(stop=stop)


def test_logit_bias_takes_numbers_and_minus_infinity() -> None:
    bias = {0: 1, 5: -2.5, 7: -math.inf, 9: np.float32(1.5)}
    assert GenerationOptions(logit_bias=bias).logit_bias == bias


@pytest.mark.parametrize(
    "bias",
    [{0: math.nan}, {0: math.inf}, {0: "1"}, {0: None}, {0: True}, {-1: 0.0}, {"a": 0.0}, {1.5: 0.0}, [(0, 1.0)], 3],
)
def test_a_logit_bias_that_is_none_is_refused(bias: Any) -> None:
    with pytest.raises(OptionError, match="logit_bias"):
        GenerationOptions(logit_bias=bias)


@pytest.mark.parametrize("options", [ManagerOptions(), LoadOptions(), GenerationOptions(), RadixOptions()])
def test_options_cannot_be_changed_after_the_check(options: Any) -> None:
    name = next(iter(options.__dataclass_fields__))
    with pytest.raises(AttributeError):
        setattr(options, name, -1)


def test_one_form_for_a_reply_is_enough() -> None:
    with pytest.raises(OptionError, match="grammar and json_schema both say what the reply must be; pass one"):
        GenerationOptions(grammar="root ::= [a]", json_schema={})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grammar": 7}, "grammar must be text"),
        ({"json_schema": 7}, "json_schema must be a dict or JSON text, not 7"),
        ({"json_schema": True}, "json_schema must be a dict or JSON text, not True"),
    ],
)
def test_a_form_is_text_or_a_schema(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        GenerationOptions(**options)


def test_what_is_given_beside_a_preset_wins() -> None:
    options = GenerationOptions.build({"preset": "creative", "top_p": 0.5})
    assert (options.temperature, options.top_p) == (1.1, 0.5)
