"""FakeMemory is only worth something if it does what llama.cpp does: the same calls, side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from models import model_path

from llama_sessions.llama.context import LlamaContext
from llama_sessions.llama.model import Model
from llama_sessions.options import LoadOptions
from llama_sessions.testing import FakeAbort, FakeContext, FakeMemory, fake_capabilities, fresh_logits
from llama_sessions.types import ByteArray, Capabilities, MemoryKind, Run

AnyContext = LlamaContext | FakeContext

SEQ = st.integers(0, 3)
POS = st.none() | st.integers(0, 40)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("decode"), SEQ, st.integers(1, 20)),
        st.tuples(st.just("rm"), SEQ, POS, POS),
        st.tuples(st.just("cp"), SEQ, SEQ, POS, POS),
        st.tuples(st.just("cp_all"), SEQ, SEQ),
        st.tuples(st.just("fill"), SEQ),
    ),
    max_size=25,
)


def play(operation: tuple[Any, ...], context: AnyContext) -> Any:
    """Do one operation; what it returned."""
    memory, (name, *args) = context.memory, operation
    if name in ("decode", "fill"):
        seq_id = args[0]
        end = memory.pos_max(seq_id)
        n = args[1] if name == "decode" else 100
        return context.decode([Run(seq_id, 0 if end is None else end + 1, np.arange(n, dtype=np.int32), True)])
    if name == "rm":
        return memory.seq_rm(*args)
    if name == "cp_all":
        if args[0] != args[1]:
            memory.seq_rm(args[1])
            memory.seq_cp(*args)
        return None
    src, dst, p0, p1 = args
    # Positions twice in a row are no question anybody asks: the target's are taken out first.
    if src != dst and context.capabilities.unified and not context.capabilities.keeps_state:
        memory.seq_rm(dst)
        memory.seq_cp(src, dst, p0, p1)
    return None


def real_context(model: str, unified: bool) -> LlamaContext:
    options = LoadOptions(n_ctx=256 if unified else 1024, max_sessions=2, n_batch=128, n_threads=1, kv_unified=unified)
    return LlamaContext.create(Model.load(model_path(model)), options)


@pytest.fixture(scope="module")
def streams() -> Iterator[LlamaContext]:
    context = real_context("llama-bpe", unified=False)
    yield context
    context.close()
    context.model.close()


@pytest.mark.parametrize(
    ("model", "unified"),
    [("llama-bpe", True), ("llama-bpe", False), ("mamba", True), ("hybrid", True)],
    ids=["full", "streams", "state", "hybrid"],
)
def test_fake_memory_answers_as_llama_cpp_does(model: str, unified: bool) -> None:
    real = real_context(model, unified)

    @settings(max_examples=20 if model == "hybrid" else 60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(OPERATIONS)
    def compare(operations: list[tuple[Any, ...]]) -> None:
        real.memory.clear()
        fake = FakeContext(real.capabilities)
        for operation in operations:
            assert play(operation, real) == play(operation, fake), operation
            for seq_id in range(4):
                ends = fake.memory.pos_min(seq_id), fake.memory.pos_max(seq_id)
                assert (real.memory.pos_min(seq_id), real.memory.pos_max(seq_id)) == ends, (operation, seq_id)

    compare()
    real.close()
    real.model.close()


def ids(n: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.arange(n, dtype=np.int32)


def decoded(caps: Capabilities, n: int, seq_id: int = 0) -> FakeContext:
    context = FakeContext(caps)
    assert context.decode([Run(seq_id, 0, ids(n), True)]) == 0
    return context


def test_a_shift_of_a_shared_cell_moves_it_for_every_owner() -> None:
    context = decoded(fake_capabilities(), 20)
    context.memory.seq_cp(0, 1)
    context.memory.seq_rm(1, 5, 10)
    context.memory.seq_add(1, 10, None, -5)
    assert context.memory.pos_max(0) == 14
    assert context.decode([Run(0, 20, ids(1), True)]) == -1


def test_a_shift_is_pending_until_the_next_decode() -> None:
    context = decoded(fake_capabilities(), 20)
    context.memory.seq_rm(0, 0, 5)
    context.memory.seq_add(0, 5, None, -5)
    assert all(cell.shift == -5 for cell in context.memory.row(0))
    assert context.decode([Run(1, 0, ids(1), True)]) == 0
    assert all(cell.shift == 0 for cell in context.memory.cells)


def test_a_full_cache_returns_1_and_leaves_the_memory_as_it_was() -> None:
    context = decoded(fake_capabilities(n_ctx=64, n_batch=64), 60)
    cells = [(c.pos, sorted(c.owners)) for c in context.memory.cells]
    assert context.decode([Run(1, 0, ids(5), True)]) == 1
    assert [(c.pos, sorted(c.owners)) for c in context.memory.cells] == cells


def test_a_window_model_gives_away_cells_outside_every_window() -> None:
    context = decoded(fake_capabilities(n_ctx=64, n_batch=64, n_swa=16, kind=MemoryKind.WINDOW), 60)
    assert context.decode([Run(1, 0, ids(30), True)]) == 0
    first = context.memory.pos_min(0)
    assert first is not None
    assert first > 0


def test_of_a_window_model_a_save_takes_along_what_the_last_token_sees() -> None:
    real = real_context("gemma3", True)
    for context in (real, FakeContext(replace(real.capabilities, n_batch=256))):
        assert context.decode([Run(0, 0, ids(100), True)]) == 0
        blob = np.zeros(context.state_size(0), np.uint8)
        context.save_state(0, blob)
        assert context.memory.pos_min(0) == 0
        context.load_state(1, blob)
        assert (context.memory.pos_min(1), context.memory.pos_max(1)) == (100 - real.capabilities.n_swa, 99)
    real.close()
    real.model.close()


def test_what_would_abort_is_no_exception_that_anybody_catches() -> None:
    memory = FakeMemory(fake_capabilities(unified=False, n_ctx=600))
    for call in (
        lambda: memory.seq_rm(-1),
        lambda: memory.pos_max(6),
        lambda: FakeContext(fake_capabilities(n_batch=8)).decode([Run(0, 0, ids(9), True)]),
        lambda: FakeMemory(fake_capabilities(kind=MemoryKind.RECURRENT)).seq_add(0, 0, None, 1),
    ):
        with pytest.raises(FakeAbort):
            call()
    assert not issubclass(FakeAbort, Exception)


def test_a_part_of_a_stream_cannot_be_shared() -> None:
    context = decoded(fake_capabilities(unified=False, n_ctx=600), 20)
    with pytest.raises(FakeAbort, match="full KV buffers"):
        context.memory.seq_cp(0, 1, 0, 10)


def test_wrong_cells_show_in_the_logits() -> None:
    caps = fake_capabilities()
    context = decoded(caps, 20)
    context.memory.seq_rm(0, 3, 4)
    assert context.decode([Run(0, 20, ids(1), True)]) == 0
    assert not np.allclose(context.logits(0), fresh_logits(caps, np.append(ids(20), np.int32(0))))


# -- what is pending until the next decode


def saved(context: AnyContext, seq_id: int) -> ByteArray:
    out = np.empty(context.state_size(seq_id), np.uint8)
    context.save_state(seq_id, out)
    return out


def flush(context: AnyContext) -> None:
    assert context.decode([Run(2, 0, ids(1), True)]) == 0
    context.memory.seq_rm(2)


def save_the_copy(context: AnyContext, others: ByteArray) -> int:
    blob = saved(context, 1)
    flush(context)
    context.load_state(1, blob)
    return 1


def save_the_source(context: AnyContext, others: ByteArray) -> int:
    blob = saved(context, 0)
    flush(context)
    context.load_state(0, blob)
    return 0


def load_the_source(context: AnyContext, others: ByteArray) -> int:
    context.load_state(0, others)
    return 1


def load_the_copy(context: AnyContext, others: ByteArray) -> int:
    context.load_state(1, saved(context, 0))
    context.load_state(0, others)  # so that what is copied over it is not the same
    return 1


def drop_the_source(context: AnyContext, others: ByteArray) -> int:
    context.memory.seq_rm(0)
    return 1


def go_on_in_the_source(context: AnyContext, others: ByteArray) -> int:
    context.memory.seq_rm(0, 5)
    assert context.decode([Run(0, 5, ids(10), True)]) == 0
    return 1


def copy_the_copy(context: AnyContext, others: ByteArray) -> int:
    context.memory.seq_cp(1, 3)
    return 3


@pytest.mark.parametrize("flushed", [False, True], ids=["at once", "after a decode"])
@pytest.mark.parametrize(
    ("deed", "is_a_trap"),
    [
        (save_the_copy, True),
        (load_the_source, True),
        (load_the_copy, True),
        (save_the_source, False),
        (drop_the_source, False),
        (go_on_in_the_source, False),
        (copy_the_copy, False),
    ],
)
def test_a_copy_between_streams_is_as_lazy_as_llama_cpps(
    streams: LlamaContext, deed: Callable[..., int], is_a_trap: bool, flushed: bool
) -> None:
    expected = not (is_a_trap and not flushed)
    for context in (streams, FakeContext(streams.capabilities)):
        context.memory.clear()
        assert context.decode([Run(0, 0, ids(20), True), Run(1, 0, ids(20) + 50, True), Run(3, 0, ids(21), True)]) == 0
        fresh = context.logits(60).copy()
        others = saved(context, 1)
        for seq_id in (1, 3):
            context.memory.seq_rm(seq_id)
        context.memory.seq_cp(0, 1)
        if flushed:
            flush(context)
        seq_id = deed(context, others)
        assert context.decode([Run(seq_id, 20, np.array([20], np.int32), True)]) == 0
        off = float(np.abs(context.logits(0) - fresh).max())
        assert (off < 0.1) is expected, (type(context).__name__, off)


def test_a_save_before_a_shift_is_done_comes_back_wrong() -> None:
    outcomes = []
    for flushed in (True, False):
        context = decoded(fake_capabilities(), 20)
        context.memory.seq_rm(0, 0, 5)
        context.memory.seq_add(0, 5, None, -5)
        if flushed:
            flush(context)
        context.load_state(1, saved(context, 0))
        assert context.decode([Run(0, 15, ids(1), True), Run(1, 15, ids(1), True)]) == 0
        outcomes.append(np.array_equal(context.logits(0), context.logits(1)))
    assert outcomes == [True, False]
