"""How much of a prompt goes into a step: against steps whose cost is known to the second."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from llama_sessions.pace import Pace

Cost = Callable[[int, int], float]  # seconds of a step with so many single and so many prompt tokens


def linear(n_next: int, n_prompt: int) -> float:
    return 0.1 + 0.005 * n_next + 0.002 * n_prompt


def steps(pace: Pace, n_next: int, n: int, cost: Cost = linear, n_left: int = 500) -> list[int]:
    """Prompt tokens of `n` steps beside so many who talk, all while more of a prompt waits."""
    given = []
    for _ in range(n):
        given.append(pace.n_prompt(n_next, n_left))
        pace.note(n_next, given[-1], cost(n_next, given[-1]))
    return given


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_prompt_takes_its_share_of_the_time_and_no_more(share: float) -> None:
    given = steps(Pace(share), 8, 100)
    alone = linear(8, 0)
    times = [linear(8, n) - alone for n in given[20:] if n]
    assert max(times) <= alone * share / (1 - share)
    assert min(times) >= 0.8 * alone * share / (1 - share)


def test_what_others_take_alone_is_seen_once_for_each_number_of_them() -> None:
    pace = Pace(0.5)
    assert [n == 0 for n in steps(pace, 8, 3)] == [True, False, False]
    assert [n == 0 for n in steps(pace, 7, 3)] == [True, False, False]  # no guess from 8 would be as good
    assert all(steps(pace, 8, 3))


def test_it_is_seen_again_now_and_then_as_rows_grow() -> None:
    pace = Pace(0.5)
    before = steps(pace, 8, 60)[-1]
    given = steps(pace, 8, 400, lambda n_next, n_prompt: 2 * linear(n_next, 0) + 0.002 * n_prompt)
    assert 1 <= given.count(0) <= 400 // 20
    assert given[-1] > 1.5 * before


def test_a_prompt_token_of_a_full_batch_says_nothing_about_one_beside_others() -> None:
    def cost(n_next: int, n_prompt: int) -> float:
        return linear(n_next, n_prompt if not n_next else 3 * n_prompt)

    pace = Pace(0.5)
    steps(pace, 8, 40, cost)
    settled = pace.n_prompt(8, 500)
    steps(pace, 0, 20, cost)
    assert pace.n_prompt(8, 500) == settled


def test_one_step_that_something_else_held_up_changes_nothing() -> None:
    pace = Pace(0.5)
    steps(pace, 8, 40)
    settled = pace.n_prompt(8, 500)
    pace.note(8, settled, 100 * linear(8, settled))
    assert pace.n_prompt(8, 500) == settled


def test_where_nobody_talks_or_prompts_have_it_all_they_fill_the_batch() -> None:
    assert steps(Pace(0.5), 0, 2) == [500, 500]
    assert steps(Pace(1.0), 8, 2) == [500, 500]


def test_a_prompt_goes_on_however_dear_it_is_and_never_beyond_the_batch() -> None:
    assert steps(Pace(0.01), 8, 50)[-1] == 1
    assert steps(Pace(0.99), 8, 50, n_left=20)[-1] == 20
    assert steps(Pace(0.5), 8, 3, n_left=0) == [0, 0, 0]


@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_one_step_of_talkers_alone_moves_little(factor: float) -> None:
    pace = Pace(0.5)
    steps(pace, 8, 40)
    settled = pace.n_prompt(8, 500)
    pace.note(8, 0, factor * linear(8, 0))
    assert 0 < abs(pace.n_prompt(8, 500) - settled) <= 0.1 * settled + 4


def test_a_prompt_that_seems_to_cost_nothing_is_not_believed() -> None:
    pace = Pace(0.5)
    pace.note(8, 0, 1.0)
    pace.note(8, 8, 0.5)  # faster than without: the clock, or the others, went wrong
    assert 100 <= pace.n_prompt(8, 500) <= 300  # a twentieth of the step, and no less
    pace = Pace(0.5)
    pace.note(8, 0, 0.0)
    pace.note(8, 8, 0.0)
    assert pace.n_prompt(8, 500) == 1


@pytest.mark.parametrize("n_next", range(1, 12))
def test_the_first_prompt_tokens_are_few_and_the_next_fill_whole_rows(n_next: int) -> None:
    pace = Pace(0.5)
    assert steps(pace, n_next, 2) == [0, 8]
    n_allowed = int(linear(n_next, 0) * 0.9 / ((linear(n_next, 8) - linear(n_next, 0)) / 8))
    given = pace.n_prompt(n_next, 500)
    assert (n_next + given) % 4 == 0
    assert given - n_allowed == [0, -1, -2, 1][(n_next + n_allowed) % 4]  # the nearest, and rather less


@pytest.mark.parametrize(("seconds", "n"), [(0.4, 2), (0.28, 3)])
def test_fewer_than_a_row_are_as_many_as_are_allowed(seconds: float, n: int) -> None:
    pace = Pace(0.5)
    pace.note(8, 0, 1.0)
    pace.note(8, 10, 1.0 + 10 * seconds)
    assert pace.n_prompt(8, 500) == n
