"""Which saved KV goes first: a policy is one small function from the record of an edge's use to a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from ..errors import OptionError
from ..options import checked_choice, checked_float, function_name


@dataclass(frozen=True, slots=True)
class Usage:
    """What is known of one edge of the tree when something has to go.

    `last_use`: tick of its last use (ticks count uses of the tree, they are no seconds). `n_uses`: how often, its
    insertion included. `n_tokens`: its own tokens. `n_bytes`: what would become free. `cost`: what computing its tokens
    again would cost, in whatever unit the owner of the tree measures (by default tokens). `clock`: the highest priority
    of all that went before its last use.
    """

    last_use: int
    n_uses: int
    n_tokens: int
    n_bytes: int
    cost: float
    clock: float


Policy: TypeAlias = Callable[[Usage], float]
"""The lowest number goes first; of equal ones, the least recently used. It must follow from the record alone."""


def lru(usage: Usage) -> float:
    """The least recently used goes first."""
    return float(usage.last_use)


def lfu(usage: Usage) -> float:
    """The least often used goes first."""
    return float(usage.n_uses)


def gdsf(usage: Usage) -> float:
    """GreedyDual-Size-Frequency: what saves least time a byte goes first, and what is not used again grows old.

    Cherkasova 1998: priority = clock + frequency * cost / size, the clock being the last victim's priority.
    """
    return usage.clock + usage.n_uses * usage.cost / max(1, usage.n_bytes)


POLICIES: dict[str, Policy] = {"lru": lru, "lfu": lfu, "gdsf": gdsf}


def policy_for(policy: str | Policy) -> Policy:
    """The function of that name, or the user's own; OptionError for a name that there is not."""
    return policy if callable(policy) else POLICIES[checked_choice("policy", policy, tuple(POLICIES))]


def priority(policy: Policy, usage: Usage) -> float:
    """What `policy` says of `usage`; OptionError that names it, where it raises or says no finite number."""
    name = function_name(policy)
    try:
        value = policy(usage)
    except Exception as e:
        raise OptionError(f"the policy {name} raised {type(e).__name__}: {e}; it was given {usage}") from e
    return checked_float(f"what the policy {name} returns", value, -math.inf)
