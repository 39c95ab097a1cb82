"""The arena against a list of bytes: never over budget, never two owners of a byte, contents survive every move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from interrupting import interrupted_everywhere

from llama_sessions import OptionError, StateError
from llama_sessions.kv.arena import Arena, Extent

ArenaAndExtents = tuple[Arena, list[Extent]]


def take(arena: Arena, n: int, fill: int | None = None) -> Extent:
    extent = arena.allocate(n)
    assert extent is not None
    if fill is not None:
        arena.view(extent)[:] = fill
    return extent


def three_of_ten() -> tuple[Arena, Extent, Extent, Extent]:
    """10 bytes: 3, 3, 3, and one free."""
    arena = Arena(10)
    return arena, take(arena, 3, 1), take(arena, 3, 2), take(arena, 3, 3)


def test_a_new_arena_is_free() -> None:
    arena = Arena(100)
    assert (arena.max_bytes, arena.n_free, arena.n_used, arena.n_largest, arena.n_extents) == (100, 100, 0, 100, 0)


def test_untouched_bytes_cost_no_memory() -> None:
    resident = _resident_bytes()
    if resident is None:
        pytest.skip("this system does not say how much memory is resident")
    arena = Arena(2**30)
    arena.view(take(arena, 2**20))[:] = 1
    used = (_resident_bytes() or 0) - resident
    assert used < 2**26, f"{used} bytes became resident for one of 2**20"


def _resident_bytes() -> int | None:
    try:
        with open("/proc/self/statm") as f:
            return int(f.read().split()[1]) * 4096
    except OSError:
        return None


def test_the_lowest_place_that_is_large_enough_is_taken() -> None:
    arena, a, b, c = three_of_ten()
    assert [e.start for e in (a, b, c)] == [0, 3, 6]
    arena.free(a)
    arena.free(c)
    assert take(arena, 2).start == 0  # both would do
    assert take(arena, 4).start == 6
    assert (arena.n_free, arena.n_used, arena.n_largest) == (1, 9, 1)


def test_no_place_is_none_and_changes_nothing() -> None:
    arena, a, _, c = three_of_ten()
    arena.free(a)
    arena.free(c)
    assert (arena.n_free, arena.n_largest) == (7, 4)
    assert arena.allocate(5) is None
    assert (arena.n_free, arena.n_extents) == (7, 1)


def test_free_neighbours_become_one() -> None:
    for order in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]):
        arena, *extents = three_of_ten()
        for i in order:
            arena.free(extents[i])
            arena.check_integrity()
        assert arena.n_largest == 10


def test_a_view_is_the_extents_bytes() -> None:
    arena, a, b, _ = three_of_ten()
    assert (arena.view(b).dtype, arena.view(b).shape) == (np.uint8, (3,))
    arena.view(a)[:] = 9
    assert arena.view(b).tolist() == [2, 2, 2]
    assert np.shares_memory(arena.view(a), arena.view(a))
    assert not np.shares_memory(arena.view(a), arena.view(b))


def test_a_split_copies_nothing_and_both_parts_are_freed_alone() -> None:
    arena = Arena(10)
    extent = take(arena, 8)
    arena.view(extent)[:] = range(8)
    head, tail = arena.split(extent, 3)
    assert head is extent
    assert (arena.view(head).tolist(), arena.view(tail).tolist()) == ([0, 1, 2], [3, 4, 5, 6, 7])
    assert (arena.n_used, arena.n_extents) == (8, 2)
    arena.free(head)
    assert (arena.n_free, arena.n_largest) == (5, 3)
    arena.free(tail)
    assert arena.n_largest == 10


@pytest.mark.parametrize("n", [0, 3, -1, 4, 1.0])
def test_both_parts_of_a_split_have_bytes(n: Any) -> None:
    arena, a, _, _ = three_of_ten()
    with pytest.raises(OptionError):
        arena.split(a, n)
    assert arena.n_extents == 3


def test_a_rewrite_frees_what_is_left() -> None:
    arena, a, b, _ = three_of_ten()
    arena.rewrite(b, np.array([7], np.uint8))
    assert (arena.view(a).tolist(), arena.view(b).tolist(), arena.n_free) == ([1, 1, 1], [7], 3)
    arena.rewrite(b, np.array([8], np.uint8))
    assert (arena.view(b).tolist(), arena.n_free, arena.torn) == ([8], 3, None)
    arena.check_integrity()


@pytest.mark.parametrize("n", [0, 4])
def test_a_rewrite_is_no_longer_than_what_was_there(n: int) -> None:
    arena, _, b, _ = three_of_ten()
    with pytest.raises(OptionError, match=f"the length of data must be from 1 to 3, not {n}"):
        arena.rewrite(b, np.zeros(n, np.uint8))
    assert arena.view(b).tolist() == [2, 2, 2]


def test_bytes_are_taken_back_once_and_only_by_their_arena() -> None:
    arena, a, b, _ = three_of_ten()
    arena.free(a)
    foreign = take(Arena(10), 3)
    calls: list[Callable[[Extent], object]] = [
        arena.free,
        arena.view,
        lambda extent: arena.split(extent, 1),
        lambda extent: arena.rewrite(extent, np.zeros(1, np.uint8)),
    ]
    for extent in (a, foreign, Extent(b.start, b.n_bytes)):
        for call in calls:
            with pytest.raises(StateError, match="is not in use here: it was freed, or belongs to another arena"):
                call(extent)
    assert arena.n_used == 6
    arena.check_integrity()


@pytest.mark.parametrize("n", [0, -1, 1.5, True, "9", None])
def test_sizes_are_checked(n: Any) -> None:
    for call in (Arena, Arena(10).allocate, Arena(10).compact, Arena(10).n_to_move):
        with pytest.raises(OptionError):
            call(n)


@pytest.mark.parametrize("n", [2**62, 2**70])
def test_a_budget_beyond_the_address_space_is_refused(n: int) -> None:
    with pytest.raises(OptionError, match=f"no address space for max_bytes={n}; lower it"):
        Arena(n)


# -- compacting


def test_compacting_brings_together_what_is_free() -> None:
    arena, a, b, c = three_of_ten()
    arena.free(a)
    assert arena.allocate(4) is None
    assert (arena.n_to_move(4), arena.n_to_move(3)) == (6, 0)
    assert arena.compact(4) == 6
    assert (b.start, c.start, arena.n_largest) == (0, 3, 4)
    assert (arena.view(b).tolist(), arena.view(c).tolist()) == ([2] * 3, [3] * 3)
    arena.check_integrity()
    assert take(arena, 4).start == 6


def test_compacting_moves_nothing_where_there_is_a_place() -> None:
    arena, a, b, _ = three_of_ten()
    arena.free(a)
    arena.free(b)
    assert arena.compact(6) == 0
    assert arena.n_largest == 6


def test_compacting_moves_as_little_as_it_can() -> None:
    arena = Arena(100)
    extents = [take(arena, n, i) for i, n in enumerate([5, 40, 5, 3, 5, 30, 5, 7])]
    for i in (0, 2, 4, 6):
        arena.free(extents[i])
    assert arena.compact(10) == 3  # the one of three bytes, and no other
    assert [extents[i].start for i in (1, 3, 5, 7)] == [5, 45, 58, 93]
    assert all((arena.view(extents[i]) == i).all() for i in (1, 3, 5, 7))


def test_what_is_moved_is_what_lies_between_and_not_what_is_free() -> None:
    arena = Arena(100)
    extents = [take(arena, n, i) for i, n in enumerate([5, 3, 5, 50, 2, 5, 9, 21])]
    for i in (0, 2, 4, 6):
        arena.free(extents[i])
    assert arena.compact(10) == 3  # and not the five bytes with more room around them


def test_compacting_cannot_make_bytes() -> None:
    arena, a, _, _ = three_of_ten()
    with pytest.raises(StateError, match="2 bytes cannot be brought together: 1 are free"):
        arena.compact(2)
    arena.free(a)
    arena.compact(4)
    with pytest.raises(StateError, match="5 bytes cannot be brought together: 4 are free"):
        arena.compact(5)


# -- recovery, giving back, proof


def test_what_nobody_claims_is_free_again() -> None:
    arena, a, b, c = three_of_ten()
    arena.torn = a
    arena.recover([b])
    assert (arena.n_free, arena.n_extents, arena.torn, arena.view(b).tolist()) == (7, 1, None, [2] * 3)
    with pytest.raises(StateError):
        arena.free(c)
    arena.check_integrity()
    arena.recover([])
    assert arena.n_largest == 10
    arena, a, b, c = three_of_ten()
    arena.recover([a, b, c, take(arena, 1)])
    assert (arena.n_free, arena.n_extents) == (0, 4)
    arena.check_integrity()


def test_pages_are_given_back_when_nothing_is_left() -> None:
    arena, a, b, c = three_of_ten()
    old = arena.view(c)
    assert not arena.give_back()
    assert np.shares_memory(arena.view(c), old)
    for extent in (a, b, c):
        arena.free(extent)
    assert arena.give_back()
    assert not np.shares_memory(arena.view(take(arena, 10)), old)


def test_proof_finds_what_is_wrong() -> None:
    breaks: list[tuple[Callable[[Arena, Extent, Extent], object], str]] = [
        (lambda arena, a, b: setattr(a, "n_bytes", 2), "1 bytes at 2 are nobody's"),
        (lambda arena, a, b: setattr(a, "n_bytes", 4), "1 bytes at 3 are two's"),
        (lambda arena, a, b: setattr(b, "n_bytes", 0), "a used range of 0 bytes"),
        (lambda arena, a, b: arena._free.clear(), "the ranges end at 9, not at 10"),
        (lambda arena, a, b: arena._free.append((10, 1)), "beyond 10"),
        (lambda arena, a, b: setattr(arena, "torn", a), r"<Extent \[0, 3\)> is torn"),
        (lambda arena, a, b: (arena.free(b), setattr(arena, "_free", arena._free[::-1])), "out of order"),
        (lambda arena, a, b: (arena._used.remove(b), arena._free.extend([(3, 1), (4, 2)])), "before it are two"),
    ]
    for wrong, said in breaks:
        arena, a, b, _ = three_of_ten()
        arena.check_integrity()
        wrong(arena, a, b)
        with pytest.raises(StateError, match=said):
            arena.check_integrity()


# -- against a list


class AgainstAList(RuleBasedStateMachine):
    """Each extent is filled with a number of its own, which must be there whatever is done to others."""

    @initialize(n=st.integers(1, 60))
    def begin(self, n: int) -> None:
        self.arena = Arena(n)
        self.contents: dict[Extent, list[int]] = {}
        self.n_filled = 0

    def pick(self, i: int) -> Extent | None:
        return list(self.contents)[i % len(self.contents)] if self.contents else None

    def largest(self) -> int:
        owned = [False] * self.arena.max_bytes
        for extent in self.contents:
            owned[extent.start : extent.end] = [True] * extent.n_bytes
        runs = "".join("x" if taken else "." for taken in owned).split("x")
        return max(map(len, runs))

    @rule(n=st.integers(1, 20))
    def allocate(self, n: int) -> None:
        fits = self.largest() >= n
        extent = self.arena.allocate(n)
        assert (extent is not None) == fits
        if extent is not None:
            self.n_filled += 1
            self.contents[extent] = [(self.n_filled * 7 + i) % 251 for i in range(n)]
            self.arena.view(extent)[:] = self.contents[extent]

    @rule(i=st.integers(0, 99))
    def free(self, i: int) -> None:
        extent = self.pick(i)
        if extent is not None:
            self.arena.free(extent)
            del self.contents[extent]
            with pytest.raises(StateError):
                self.arena.free(extent)

    @rule(i=st.integers(0, 99), n=st.integers(1, 19))
    def split(self, i: int, n: int) -> None:
        extent = self.pick(i)
        if extent is not None and n < extent.n_bytes:
            head, tail = self.arena.split(extent, n)
            whole = self.contents.pop(extent)
            self.contents |= {head: whole[:n], tail: whole[n:]}

    @rule(i=st.integers(0, 99), n=st.integers(1, 19))
    def rewrite(self, i: int, n: int) -> None:
        extent = self.pick(i)
        if extent is not None and n <= extent.n_bytes:
            self.contents[extent] = self.contents[extent][-n:]
            self.arena.rewrite(extent, self.arena.view(extent)[-n:])  # data may overlap what is rewritten

    @rule(n=st.integers(1, 30))
    def compact(self, n: int) -> None:
        if n > self.arena.n_free:
            with pytest.raises(StateError):
                self.arena.compact(n)
        else:
            fitted, expected = self.largest() >= n, self.arena.n_to_move(n)
            moved = self.arena.compact(n)
            assert moved == expected
            assert (moved == 0) == fitted
            assert self.largest() >= n

    @invariant()
    def it_adds_up(self) -> None:
        self.arena.check_integrity()
        assert self.arena.n_used == sum(map(len, self.contents.values())) <= self.arena.max_bytes
        assert (self.arena.n_free, self.arena.n_largest) == (self.arena.max_bytes - self.arena.n_used, self.largest())
        for extent, content in self.contents.items():
            assert self.arena.view(extent).tolist() == content


def test_the_arena_behaves_as_a_list_of_bytes() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        AgainstAList, settings=settings(max_examples=100, stateful_step_count=40, deadline=None)
    )


@pytest.mark.parametrize("deed", ["allocate", "free", "split", "rewrite", "compact"])
def test_an_interrupt_never_gives_a_byte_to_two(deed: str) -> None:
    def start() -> ArenaAndExtents:
        arena = Arena(40)
        extents = [take(arena, 5, i) for i in range(8)]
        for i in (0, 3, 4, 6):
            arena.free(extents[i])
        return arena, [extents[i] for i in (1, 2, 5, 7)]

    def act(things: ArenaAndExtents) -> None:
        arena, extents = things
        if deed == "allocate":
            arena.allocate(4)
        elif deed == "free":
            arena.free(extents.pop(1))
        elif deed == "split":
            arena.split(extents[2], 3)
        elif deed == "rewrite":
            arena.rewrite(extents[3], np.full(2, 7, np.uint8))
        else:
            arena.compact(15)

    def check(things: ArenaAndExtents) -> None:
        arena, extents = things
        claimed = [extent for extent in extents if extent is not arena.torn]
        assert len(claimed) >= 3
        arena.recover(claimed)
        arena.check_integrity()
        for extent in claimed:
            assert len(set(arena.view(extent).tolist())) == 1
        assert arena.n_free == 40 - sum(extent.n_bytes for extent in claimed)

    assert interrupted_everywhere(start, act, check) > 10
