"""KV on its way into the cache and back: in order, not before llama.cpp has it, through a scratch that stays empty."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conversations import Loader, assert_exact, over_fake, prepared, said, sources
from interrupting import interrupted_behind

from llama_sessions import ContextManager, MemoryKind, Session, SnapshotError
from llama_sessions.kv.segments import SegmentLayout
from llama_sessions.llama.context import LlamaContext
from llama_sessions.testing import FakeContext, FakeMemory
from llama_sessions.types import ByteArray

SCRATCH = 1


def scratch_is_empty(cm: ContextManager) -> bool:
    return cm._store.context.memory.pos_max(SCRATCH) is None


# -- the order of cells


def test_a_row_whose_cells_are_out_of_order_is_saved_by_position(load: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    cm = load(n_ctx=512)
    in_front, row = prepared(cm, "~" * 150, "Who are you? " * 4)
    in_front.messages[0]["content"] = "~"
    cm.prepare(in_front)  # its cells before those of the row are free now
    row.add_assistant("I am nobody. " * 4)
    row.add_user("Really? " * 4)
    cm.prepare(row)
    found: list[list[int]] = []
    real = SegmentLayout.put_in_order

    def watched(self: SegmentLayout, blob: ByteArray) -> None:
        found.append(self.positions(blob).tolist())
        real(self, blob)

    monkeypatch.setattr(SegmentLayout, "put_in_order", watched)
    cm.park(row)
    (positions,) = found
    assert positions != sorted(positions)  # else this test would show nothing
    part = said("Who are you? " * 4, "I am nobody. " * 3 + "Or am I?", "x")
    cm.prepare(part)
    assert "cache" in sources(part)
    assert_exact(cm, part)
    cm.release(part)
    assert_exact(cm, row)


# -- what llama.cpp has put off


@pytest.fixture(params=["llama.cpp", "fake"])
def streams(request: pytest.FixtureRequest, load: Loader) -> ContextManager:
    if request.param == "fake":
        return over_fake(n_ctx=1200, max_sessions=4, unified=False)
    return load(kv_unified=False, n_ctx=2048)


@pytest.mark.parametrize("how", ["park", "flush", "release"])
def test_a_branch_is_saved_after_its_cells_were_copied(streams: ContextManager, how: str) -> None:
    cm = streams
    (parent,) = prepared(cm, "Who are you? " * 6)
    branch = cm.fork(parent)
    getattr(cm, how)(branch)  # the first that saves these tokens, and nothing was decoded since the fork
    for session in (parent, branch):
        cm.release(session)
    again = said("Who are you? " * 6, "I am.", "x")
    cm.prepare(again)
    assert sources(again) == ["cache", "decode"]
    assert_exact(cm, again)


def test_a_branch_is_restored_after_its_cells_were_copied(streams: ContextManager) -> None:
    cm = streams
    told = ("Who are you? " * 6, "I am nobody. " * 3, "Really?")
    (parent,) = prepared(cm, told[0])  # first, in a stream in which nothing of the longer one ever was
    longer = said(*told)
    cm.prepare(longer)
    cm.release(longer)
    branch = cm.fork(parent)
    branch.add_assistant(told[1])
    branch.add_user(told[2])
    cm.prepare(branch)  # only grows: nothing is saved before, which would let the copies be made
    assert sources(branch) == ["cache", "decode"]
    for session in (branch, parent):
        assert_exact(cm, session)


# -- the scratch


def saved_part(cm: ContextManager) -> Session:
    """A session whose beginning is in the cache already: its rear is saved through the scratch."""
    first, second = prepared(cm, "The stem of both. " * 4, "The stem of both. " * 4 + "More " * 10)
    cm.flush(first)
    cm.flush(second)
    return second


def test_the_scratch_is_empty_after_a_part_of_a_row_passed_through_it(load: Loader) -> None:
    cm = load()
    cm.set_system("Be brief. " * 6)
    session = saved_part(cm)
    assert scratch_is_empty(cm)
    cm.park(session)
    cm.prepare(session)
    assert "cache" in sources(session)  # behind the prefix, so through the scratch
    assert scratch_is_empty(cm)
    assert_exact(cm, session)


def test_the_scratch_is_empty_after_copies_were_finished(streams: ContextManager) -> None:
    (parent,) = prepared(streams, "Who are you? " * 6)
    streams.flush(streams.fork(parent))
    assert scratch_is_empty(streams)


@pytest.mark.parametrize("error", [SnapshotError("llama_state_seq_get_data_ext", 0, "no luck"), KeyboardInterrupt()])
def test_the_scratch_is_empty_after_a_save_failed(
    load: Loader, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    cm = load()
    first, second = prepared(cm, "The stem of both. " * 4, "The stem of both. " * 4 + "More " * 10)
    cm.flush(first)
    seen: list[bool] = []

    def fails(self: LlamaContext, seq_id: int, out: Any) -> None:
        seen.append(seq_id == SCRATCH and not scratch_is_empty(cm))
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(LlamaContext, "save_state", fails)
        if isinstance(error, SnapshotError):
            assert cm.flush(second) == 0
        else:
            with pytest.raises(KeyboardInterrupt):
                cm.flush(second)
    assert seen == [True]
    assert scratch_is_empty(cm)
    assert cm.flush(second) > 0
    cm.park(second)
    assert_exact(cm, second)


def test_what_an_interrupt_left_in_the_scratch_goes_before_anything_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    cm = over_fake(max_sessions=3)
    stem = "The stem of all. " * 4
    first, second, third = prepared(cm, stem, stem + "More " * 10, stem + "~" * 60)
    cm.flush(first)
    real = FakeMemory.seq_rm

    def interrupted(self: FakeMemory, seq_id: int, *args: Any) -> bool:
        if seq_id == SCRATCH:
            raise KeyboardInterrupt
        return real(self, seq_id, *args)

    with monkeypatch.context() as patched:
        patched.setattr(FakeMemory, "seq_rm", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cm.flush(second)
    assert not scratch_is_empty(cm)
    assert cm.flush(third) > 60
    assert scratch_is_empty(cm)
    cm.park(third)
    cm.park(second)
    assert_exact(cm, third)


def test_the_token_that_ends_what_is_pending_is_nobodys_though_an_interrupt_follows_it() -> None:
    cm = over_fake()
    (session,) = prepared(cm, "Who are you? " * 6)
    cm._store.note_shift()
    n_decoded = cm.stats().n_tokens_decoded
    with interrupted_behind(FakeMemory, "seq_rm"):
        cm.flush(session)
    cm.check_integrity()
    assert cm.stats().n_tokens_decoded == n_decoded


# -- blobs whose layout is not known


def test_blobs_are_cut_and_joined_where_and_only_where_it_is_proven(load: Loader) -> None:
    for options, cuts in (({}, True), ({"flash_attn": False}, False), ({"kv_unified": False, "n_ctx": 2048}, False)):
        assert (load(**options)._snapshots._layout is not None) is cuts, options


@pytest.mark.parametrize("lie", ["cut", "join", "learn"])
def test_where_cuts_are_not_llama_cpps_own_blobs_stay_whole(
    load: Loader, monkeypatch: pytest.MonkeyPatch, lie: str
) -> None:
    """As if llama.cpp had changed what it writes."""
    real_cut, real_join = SegmentLayout.cut, SegmentLayout.join

    def cut(self: SegmentLayout, blob: ByteArray, a: int, b: int) -> ByteArray:
        out = real_cut(self, blob, a, b)
        out[-1] ^= 1
        return out

    def join(self: SegmentLayout, parts: Any, out: ByteArray) -> None:
        real_join(self, parts, out)
        out[-1] ^= len(parts) > 1

    if lie == "learn":
        monkeypatch.setattr(SegmentLayout, "learn", classmethod(lambda cls, blob: None))
    else:
        monkeypatch.setattr(SegmentLayout, lie, {"cut": cut, "join": join}[lie])
    cm = load()
    assert cm._snapshots._layout is None
    assert cm.stats().radix.kind == "range"
    stem = said("The stem of both. " * 4, "Yes. " * 4, "one " * 6)
    n = cm.prepare(stem)
    cm.release(stem)
    other = said("The stem of both. " * 4, "Yes. " * 4, "two " * 6)
    cm.prepare(other)  # of the first blob a part
    assert sources(other) == ["cache", "decode"]
    assert_exact(cm, other)
    cm.release(other)
    cm.prepare(other)  # two blobs, one after the other
    assert sources(other) == ["cache", "decode"]
    assert other.last_prepare is not None
    assert other.last_prepare.n_decoded == 1
    assert_exact(cm, other)
    assert cm.stats().radix.n_tokens > n


@pytest.mark.parametrize(("type_k", "type_v"), [(8, 8), (2, 2), (8, None)])
def test_quantised_kv_is_cut_and_joined_and_comes_back_as_it_was(load: Loader, type_k: int, type_v: int | None) -> None:
    heads = {"n_embd": 128, "n_head": 2, "n_head_kv": 2}
    cm, anew = (
        load(model=heads, type_k=type_k, type_v=type_v, flash_attn=True, radix=radix) for radix in (True, False)
    )
    assert cm._snapshots._layout is not None
    stem = "The stem of both. " * 4
    first, second = prepared(cm, stem + "one " * 6, stem + "two " * 6)
    for session in (first, second):
        cm.release(session)
    for session in (first, second):
        cm.prepare(session)
        assert sources(session) == ["cache", "decode"]
        assert session.last_prepare is not None
        assert session.last_prepare.n_decoded == 1
        alone = said(session.messages[0]["content"])
        anew.prepare(alone)
        np.testing.assert_array_equal(anew.tokens(alone), cm.tokens(session))
        np.testing.assert_allclose(cm.logits(session), anew.logits(alone), atol=0.02)
        cm.release(session)


# -- restores that fail


def test_a_restore_that_leaves_a_part_behind_is_cleaned_up(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in (MemoryKind.FULL, MemoryKind.WINDOW, MemoryKind.HYBRID):
        cm = over_fake(kind=kind)
        context = cm._store.context
        assert isinstance(context, FakeContext)
        (session,) = prepared(cm, "Who are you? " * 5)
        cm.release(session)
        context.fails_to_load = True
        cm.prepare(session)
        assert sources(session) == ["decode"]
        cm.check_integrity()
        assert_exact(cm, session)


def test_a_system_prompt_that_nobody_else_used_is_kept_when_asked_for(load: Loader) -> None:
    cm = load()
    n = cm.set_system("The first rules. " * 4)
    cm.set_system("Others. " * 4, keep_cache=True)
    assert cm.stats().radix.n_tokens == n
    session = said("Who?", system="The first rules. " * 4)
    cm.prepare(session)
    assert "cache" in sources(session)
    assert_exact(cm, session)
