"""Tokens taken out of the middle of a row: what is left is what llama.cpp makes of a row of its own.

The oracle does the same `seq_rm` and `seq_add` in a fresh context of one sequence, through bare calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import llama_cpp
import numpy as np
import pytest
from models import model_path
from oracle import Oracle, oracle_for

from llama_sessions import ContextManager, Session
from llama_sessions.kv.holes import Holes
from llama_sessions.kv.row import Row
from llama_sessions.seats import Prompt

TEXT = "It was a bright cold day in April, and the clocks were striking thirteen. " * 4
HOLES = ((20, 45), (60, 61), (80, 110))


class BareRow:
    """One row in the oracle's context, changed as llama.cpp's own examples do."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self.memory = llama_cpp.llama_get_memory(oracle.ctx)
        llama_cpp.llama_memory_clear(self.memory, True)
        self.end = 0

    def decode(self, tokens: Sequence[int]) -> Any:
        batch = self.oracle.batch
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = int(token), self.end + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i == len(tokens) - 1
        batch.n_tokens = len(tokens)
        assert llama_cpp.llama_decode(self.oracle.ctx, batch) == 0
        self.end += len(tokens)
        pointer = llama_cpp.llama_get_logits_ith(self.oracle.ctx, len(tokens) - 1)
        return np.ctypeslib.as_array(pointer, (self.oracle.n_vocab,)).copy()

    def cut_out(self, holes: Sequence[tuple[int, int]], *, shift: bool) -> None:
        """Positions, from behind, one after the other."""
        for p0, p1 in reversed(holes):
            assert llama_cpp.llama_memory_seq_rm(self.memory, 0, p0, p1)
            if shift:
                llama_cpp.llama_memory_seq_add(self.memory, 0, p1, -1, p0 - p1)
                self.end -= p1 - p0


def begun(cm: ContextManager, text: str = TEXT) -> tuple[Session, Row]:
    session = Session.raw(text)
    cm.prepare(session)
    return session, row_of(cm, session)


def row_of(cm: ContextManager, session: Session) -> Row:
    seat = cm._seats.get(session, reading=True)
    assert seat is not None
    seat.prompt = Prompt()  # what is done here to rows nobody tells the manager
    return seat.row


def left_of(tokens: Any, holes: Sequence[tuple[int, int]]) -> list[int]:
    return [int(t) for i, t in enumerate(tokens) if not any(p0 <= i < p1 for p0, p1 in holes)]


@contextmanager
def as_bare(cm: ContextManager, row: Row, holes: Sequence[tuple[int, int]], *, shift: bool) -> Iterator[None]:
    """What happens within does to the row what the bare calls do: its next logits say so."""
    oracle = oracle_for(model_path("llama-bpe"))
    before = row.tokens.copy()
    yield
    assert row.tokens.tolist() == left_of(before, holes)
    bare = BareRow(oracle)
    bare.decode(before.tolist())
    bare.cut_out(holes, shift=shift)
    wanted = [bare.decode([t]) for t in (65, 66)]
    (session,) = [s for s, seat in cm._seats.items() if seat.row is row]
    found = []
    for token in (65, 66):
        cm.append(session, token)
        found.append(cm.logits(session))
        worst = float(np.abs(found[-1] - wanted[len(found) - 1]).max())
        assert worst <= 2 * max(oracle.model_spread, 2e-3), worst
    assert row.end == bare.end


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("holes", [HOLES, ((1, 30),), ((0, 10), (50, 70))])
def test_a_row_of_its_own(load: Callable[..., ContextManager], holes: Any, shift: bool, unified: bool) -> None:
    cm = load("llama-bpe", kv_unified=unified)
    _, row = begun(cm)
    with as_bare(cm, row, holes, shift=shift):
        assert Holes(cm._store).cut_out(row, holes, shift=shift)
    assert row.n_exact == holes[0][0]
    assert bool(row.jumps) is not shift


@pytest.mark.parametrize("first", ["child", "parent"])
def test_a_fork_is_shifted_and_its_twin_is_as_before(load: Callable[..., ContextManager], first: str) -> None:
    cm = load("llama-bpe")
    parent, row = begun(cm)
    child = cm.fork(parent)
    pair = {"parent": (parent, row), "child": (child, row_of(cm, child))}
    mine, other = pair.pop(first), pair.popitem()[1]
    holes = Holes(cm._store)
    assert holes.demand(mine[1], row.n, HOLES, 0, shift=True).n_to_copy == row.n - 20 - sum(p1 - p0 for p0, p1 in HOLES)
    with as_bare(cm, mine[1], HOLES, shift=True):
        assert holes.cut_out(mine[1], HOLES, shift=True)
    oracle = oracle_for(model_path("llama-bpe"))
    cm.append(other[0], 67)
    oracle.assert_exact(cm.logits(other[0]), cm.tokens(other[0]))
    assert other[1].is_exact
    # And now the twin, which has what was shared to itself.
    assert holes.demand(other[1], other[1].n, HOLES, 0, shift=True).n_to_copy == 0
    with as_bare(cm, other[1], HOLES, shift=True):
        assert holes.cut_out(other[1], HOLES, shift=True)


def test_a_copy_waits_for_the_shift_that_is_pending(load: Callable[..., ContextManager]) -> None:
    cm = load("llama-bpe")
    _, row = begun(cm)
    second, other = begun(cm, TEXT[::-1])
    cm.fork(second)
    holes = Holes(cm._store)
    assert holes.cut_out(row, HOLES, shift=True)
    assert cm._store.is_pending
    with as_bare(cm, other, HOLES, shift=True):
        assert holes.cut_out(other, HOLES, shift=True)
    assert cm._store.n_shifts == 2


def test_several_shifts_are_one_rotation(load: Callable[..., ContextManager]) -> None:
    cm = load("llama-bpe")
    rows = [begun(cm, text) for text in (TEXT, TEXT[::-1], TEXT.upper())]
    for _, row in rows:
        assert Holes(cm._store).cut_out(row, HOLES, shift=True)
    cm.append(rows[0][0], 65)
    assert cm._store.n_shifts == 1


def test_a_row_is_cut_out_of_again_and_again(load: Callable[..., ContextManager]) -> None:
    """Shift after gap, gap after shift: each keeps its own account of positions."""
    oracle = oracle_for(model_path("llama-bpe"))
    cm = load("llama-bpe")
    session, row = begun(cm)
    before = row.tokens.tolist()
    holes = Holes(cm._store)
    assert holes.cut_out(row, ((10, 20),), shift=False)
    assert holes.cut_out(row, ((30, 40),), shift=True)
    cm.append(session, 65)
    assert holes.cut_out(row, ((15, 25),), shift=False)
    cm.append(session, 66)
    bare = BareRow(oracle)
    bare.decode(before)
    rm, add = llama_cpp.llama_memory_seq_rm, llama_cpp.llama_memory_seq_add
    rm(bare.memory, 0, 10, 20)
    rm(bare.memory, 0, 40, 50)  # tokens 30..40 of what is left
    add(bare.memory, 0, 50, -1, -10)
    bare.end -= 10
    bare.decode([65])
    rm(bare.memory, 0, 25, 35)  # tokens 15..25
    worst = float(np.abs(bare.decode([66]) - cm.logits(session)).max())
    assert worst <= 2 * max(oracle.model_spread, 2e-3)
    assert (row.end, row.n, row.offset) == (bare.end, bare.end - 20, 20)
