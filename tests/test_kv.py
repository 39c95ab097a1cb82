"""The pure half of kv/: which tokens come from where, which ids are free, and what a row remembers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from llama_sessions import Capabilities, MemoryKind, NoFreeSlot, Slots, StateError
from llama_sessions.kv.costs import Costs
from llama_sessions.kv.plan import Cached, Plan, Restore, Share, Source, Wanted, can_be_cut, make_plan
from llama_sessions.kv.row import Jumps, Row, common_prefix
from llama_sessions.kv.segments import SegmentLayout
from llama_sessions.types import BlobKind, TokenArray

FULL = Capabilities(
    kind=MemoryKind.FULL, unified=True, n_ctx=1024, n_ctx_seq=1024, n_ctx_train=1024, n_batch=64, n_ubatch=64,
    n_seq_max=6, n_vocab=100, n_swa=0, swa_full=True, can_shift=True, shift_refused_because="", kv_bytes_per_token=1,
    model="none", fingerprint="none",
)  # fmt: skip
STREAMS = replace(FULL, unified=False)
WINDOW = replace(FULL, kind=MemoryKind.WINDOW, n_swa=4)
RECURRENT = replace(FULL, kind=MemoryKind.RECURRENT)
HYBRID = replace(FULL, kind=MemoryKind.HYBRID)


def ids(text: str) -> TokenArray:
    """One token a letter."""
    return np.array([ord(letter) for letter in text], np.int32)


def plan(
    target: str,
    own: str = "",
    *others: Source,
    caps: Capabilities = FULL,
    has_logits: bool = False,
    wants_logits: bool = True,
    first_pos: int = 0,
) -> Plan:
    row = Source("row", 2, ids(own), first_pos)
    wanted = Wanted(ids(target), has_logits=has_logits, wants_logits=wants_logits)
    return make_plan(wanted, row, others, caps)


def prefix(text: str, first_pos: int = 0) -> Source:
    return Source("prefix", 0, ids(text), first_pos)


def live(text: str, seq_id: int = 3, first_pos: int = 0) -> Source:
    return Source("live", seq_id, ids(text), first_pos)


# -- common_prefix


@given(st.lists(st.integers(0, 2), max_size=40), st.lists(st.integers(0, 2), max_size=40), st.integers(0, 40))
def test_common_prefix_equals_a_loop(a: list[int], b: list[int], shared: int) -> None:
    b = a[:shared] + b
    expected = 0
    while expected < min(len(a), len(b)) and a[expected] == b[expected]:
        expected += 1
    assert common_prefix(np.array(a, np.int32), np.array(b, np.int32)) == expected


# -- plan: full attention


def test_a_new_conversation_is_decoded_whole() -> None:
    assert plan("hello") == Plan(5, 0, None)
    assert plan("hello").n_decode == 5


def test_what_the_own_row_holds_is_kept() -> None:
    assert plan("hello there", "hello") == Plan(11, 5)
    assert plan("hello there", "help") == Plan(11, 3)


def test_one_token_is_left_to_decode_where_logits_are_not_known() -> None:
    assert plan("hello", "hello") == Plan(5, 4)
    assert plan("hello", "hello there") == Plan(5, 4)
    assert plan("hello", "", live("hello there")) == Plan(5, 0, Share("live", 3, 0, 4))


def test_an_unchanged_row_with_its_logits_needs_no_decode() -> None:
    assert plan("hello", "hello", has_logits=True) == Plan(5, 5)
    assert plan("hello", "hello", has_logits=True).n_decode == 0


def test_logits_of_a_longer_row_are_of_no_use() -> None:
    assert plan("hello", "hello there", has_logits=True) == Plan(5, 4)


def test_a_prompt_that_wants_no_logits_may_be_reused_whole() -> None:
    assert plan("hello", "hello", wants_logits=False) == Plan(5, 5)
    assert plan("hello", "", prefix("hello!"), wants_logits=False) == Plan(5, 0, Share("prefix", 0, 0, 5))


def test_an_empty_prompt_needs_nothing() -> None:
    assert plan("", "old", wants_logits=False) == Plan(0, 0)
    assert plan("", "", prefix("abc")) == Plan(0, 0)


def test_the_own_row_comes_before_others_that_hold_as_much() -> None:
    assert plan("hello there", "hello ", prefix("hello "), live("hello !")) == Plan(11, 6)


def test_the_prefix_comes_before_live_rows_that_hold_as_much() -> None:
    assert plan("hello there", "", prefix("hello"), live("hello")).share == Share("prefix", 0, 0, 5)


def test_the_longest_of_all_rows_is_taken() -> None:
    found = plan("hello there", "he", prefix("hello"), live("hello t", 3), live("hello the", 4), live("hello th", 5))
    assert found == Plan(11, 2, Share("live", 4, 2, 9))


def test_what_the_own_row_lacks_is_shared_behind_what_it_keeps() -> None:
    found = plan("hello there", "hello", live("hello thing"))
    assert found == Plan(11, 5, Share("live", 3, 5, 8))
    assert (found.n_reused, found.n_decode) == (8, 3)


def test_a_full_row_that_lost_its_beginning_is_not_used() -> None:
    assert plan("hello", "", live("hello!", first_pos=1)) == Plan(5, 0)


# -- plan: streams, windows, states


def test_a_row_of_a_stream_is_shared_from_its_beginning() -> None:
    assert plan("hello there", "hello", live("hello thing"), caps=STREAMS) == Plan(11, 0, Share("live", 3, 0, 8))


def test_a_stream_that_holds_no_more_than_the_own_row_is_not_copied() -> None:
    assert plan("hello there", "hello t", live("hello t"), caps=STREAMS) == Plan(11, 7)


@pytest.mark.parametrize(("n", "first_pos", "may"), [(10, 7, True), (10, 8, False), (3, 0, True), (3, 1, False)])
def test_a_row_with_a_window_may_be_cut_where_the_window_of_the_next_token_is_whole(
    n: int, first_pos: int, may: bool
) -> None:
    assert can_be_cut(live("x" * 12, first_pos=first_pos), n, WINDOW) is may


@pytest.mark.parametrize(
    ("jumps", "first"), [((), 7), (((8, 5),), 13), (((3, 5),), 12), (((2, 1), (7, 6)), 14), (((10, 5),), 7)]
)
def test_a_window_that_begins_in_a_gap_begins_behind_it(jumps: Jumps, first: int) -> None:
    """Of ten tokens the next one looks at four positions, its own included; a gap behind the last does not count."""
    for first_pos in (first, first + 1):
        source = Source("row", 2, ids("x" * 12), first_pos, jumps)
        assert can_be_cut(source, 10, WINDOW) is (first_pos == first)


def test_an_own_row_whose_window_is_gone_is_decoded_anew() -> None:
    assert plan("hello there", "hello them", caps=WINDOW, first_pos=7) == Plan(11, 0)
    assert plan("hello there", "hello them", caps=WINDOW, first_pos=6) == Plan(11, 9)


def test_a_window_comes_from_one_row() -> None:
    found = plan("hello there", "hello", live("hello thing"), caps=WINDOW)
    assert found == Plan(11, 0, Share("live", 3, 0, 8))


def test_of_rows_with_a_window_the_longest_that_is_whole_is_taken() -> None:
    found = plan("hello there", "", live("hello the", 3, first_pos=7), live("hello th", 4, first_pos=5), caps=WINDOW)
    assert found.share == Share("live", 4, 0, 8)


@pytest.mark.parametrize("caps", [RECURRENT, HYBRID])
def test_a_state_is_kept_only_as_a_whole(caps: Capabilities) -> None:
    assert plan("hello there", "hello", caps=caps) == Plan(11, 5)
    assert plan("hello there", "help", caps=caps) == Plan(11, 0)
    assert plan("hello", "hello", caps=caps) == Plan(5, 0)
    assert plan("hello", "hello", caps=caps, has_logits=True) == Plan(5, 5)


@pytest.mark.parametrize("caps", [RECURRENT, HYBRID])
def test_a_state_is_shared_only_as_a_whole(caps: Capabilities) -> None:
    found = plan("hello there", "help", prefix("hel"), live("hello them"), live("hello ", 4), caps=caps)
    assert found == Plan(11, 0, Share("live", 4, 0, 6))


@pytest.mark.parametrize("caps", [RECURRENT, HYBRID])
def test_the_own_state_comes_before_a_shorter_one(caps: Capabilities) -> None:
    assert plan("hello there", "hello", prefix("hel"), caps=caps) == Plan(11, 5)


def test_nothing_can_always_be_cut_to_and_never_more_than_there_is() -> None:
    for caps in (FULL, STREAMS, WINDOW, RECURRENT, HYBRID):
        assert can_be_cut(live("abc", first_pos=2), 0, caps)
        assert not can_be_cut(live("abc"), 4, caps)


texts = st.text(alphabet="ab", max_size=12)


@settings(max_examples=200, deadline=None)
@given(texts, texts, st.lists(texts, max_size=4), st.booleans(), st.booleans(), st.sampled_from([FULL, STREAMS]))
def test_a_plan_decodes_exactly_what_no_row_holds(
    target: str, own: str, rows: list[str], has_logits: bool, wants_logits: bool, caps: Capabilities
) -> None:
    sources = [live(text, 3 + i) for i, text in enumerate(rows)]
    found = plan(target, own, *sources, caps=caps, has_logits=has_logits, wants_logits=wants_logits)
    longest = max(common_prefix(ids(target), ids(text)) for text in [own, *rows])
    if has_logits and own == target:
        assert found.n_decode == 0
    else:
        assert found.n_decode == len(target) - min(longest, max(0, len(target) - wants_logits))
    assert own.startswith(target[: found.n_keep])
    if found.share is not None:
        assert rows[found.share.seq_id - 3].startswith(target[: found.share.p1])
        assert found.share.p0 == found.n_keep


# -- slots


def test_the_lowest_free_id_is_handed_out_first() -> None:
    slots = Slots(5, 2)
    assert [slots.acquire() for _ in range(3)] == [2, 3, 4]
    slots.release(4)
    slots.release(2)
    assert [slots.acquire(), slots.acquire()] == [2, 4]


def test_capacity_counts_sessions_only() -> None:
    slots = Slots(5, 2)
    slots.acquire()
    assert (slots.capacity, slots.n_free, slots.used()) == (3, 2, {2})


def test_no_free_slot_says_how_many_there_are_and_what_to_do() -> None:
    slots = Slots(4, 2)
    slots.acquire(), slots.acquire()
    with pytest.raises(NoFreeSlot) as raised:
        slots.acquire()
    assert str(raised.value) == "no free slot: 2 of 2 in use; raise max_sessions, release or park a session"
    assert (raised.value.needed, raised.value.available, raised.value.unit) == (1, 0, "slots")
    assert (slots.n_free, slots.used()) == (0, {2, 3})


def test_reserved_ids_are_never_handed_out() -> None:
    slots = Slots(4, 2)
    assert [slots.is_reserved(i) for i in (-1, 0, 1, 2, 3)] == [False, True, True, False, False]
    assert {slots.acquire(), slots.acquire()} == {2, 3}


@pytest.mark.parametrize("seq_id", [0, 2, 7, -1])
def test_an_id_that_was_not_handed_out_cannot_be_released(seq_id: int) -> None:
    slots = Slots(4, 2)
    slots.release(slots.acquire())
    with pytest.raises(StateError, match=f"slot {seq_id} is not in use"):
        slots.release(seq_id)
    assert slots.n_free == 2


@given(st.lists(st.integers(0, 5), max_size=60), st.integers(1, 5))
def test_slots_behave_as_a_sorted_set(moves: Sequence[int], n: int) -> None:
    slots, free, used = Slots(n + 1, 1), set(range(1, n + 1)), set[int]()
    for move in moves:
        if move == 0 and free:
            expected = min(free)
            assert slots.acquire() == expected
            free.remove(expected)
            used.add(expected)
        elif move in used:
            slots.release(move)
            used.remove(move)
            free.add(move)
        assert (slots.n_free, slots.used()) == (len(free), used)


# -- rows


def test_a_row_grows_and_keeps_what_it_held() -> None:
    row = Row(3)
    expected: list[int] = []
    for n in (1, 255, 1, 600, 3000):
        row.write(row.n, np.arange(n, dtype=np.int32), np.arange(n, dtype=np.int64) + row.n)
        row.n += n
        expected += range(n)
    assert row.tokens.tolist() == expected
    assert row.cells.tolist() == list(range(len(expected)))
    assert (row.tokens.dtype, row.cells.dtype) == (np.int32, np.int64)


@pytest.mark.parametrize("n", [10, 1000])
def test_what_is_written_is_not_in_the_row_before_it_is_committed(n: int) -> None:
    row = Row(3)
    row.write(0, ids("abc"), np.arange(3))
    row.n = 3
    row.write(3, np.zeros(n, np.int32), np.zeros(n, np.int64))
    assert row.tokens.tolist() == ids("abc").tolist()
    assert row.cells.tolist() == [0, 1, 2]


def test_a_row_that_is_cut_is_written_over() -> None:
    row = Row(3)
    row.write(0, ids("abcdef"), np.arange(6))
    row.n = 2
    row.write(2, ids("XY"), np.array([7, 8]))
    row.n = 4
    assert row.tokens.tolist() == ids("abXY").tolist()
    assert row.cells.tolist() == [0, 1, 7, 8]


# -- plan: what the cache has


def planned(
    target: str, own: str, live: str, n_cached: int, *, kind: BlobKind = BlobKind.RANGE, caps: Capabilities = FULL,
    has_logits: bool = False, costs: Costs | None = None,
) -> Plan:  # fmt: skip
    others = [Source("live", 3, ids(live))] if live else []
    cached = Cached(kind, n_cached, has_logits)
    return make_plan(Wanted(ids(target)), Source("row", 2, ids(own)), others, caps, cached=cached, costs=costs)


def test_what_the_cache_has_beyond_live_rows_is_restored() -> None:
    assert planned("abcdefgh", "ab", "abcd", 6) == Plan(8, 2, Share("live", 3, 2, 4), Restore(4, 6))
    assert planned("abcdefgh", "", "", 6) == Plan(8, 0, None, Restore(0, 6))
    assert planned("abcdefgh", "abcdef", "", 6) == Plan(8, 6)  # live cells before copies


def test_what_is_restored_and_what_is_decoded_needs_cells() -> None:
    assert planned("abcdefgh", "ab", "abcd", 6).n_new_cells == 4  # of which two are restored
    assert planned("abcdefgh", "ab", "", 6).n_new_cells == 6
    assert planned("abcdefgh", "", "", 6).n_new_cells == 8
    assert planned("abcdefgh", "abcdefg", "", 6).n_new_cells == 1


def test_a_token_is_left_to_decode_after_a_restore() -> None:
    assert planned("abcd", "", "", 4) == Plan(4, 0, None, Restore(0, 3))


def test_whole_rows_are_restored_in_place_of_the_own_row() -> None:
    plan = planned("abcdefgh", "ab", "abcd", 6, kind=BlobKind.ROW, caps=STREAMS)
    assert plan == Plan(8, 0, None, Restore(0, 6))
    assert plan.n_new_cells == 8
    assert planned("abcdefgh", "abcdefg", "", 6, kind=BlobKind.ROW, caps=STREAMS) == Plan(8, 7)


def test_what_another_row_has_is_shared_again_after_a_whole_row() -> None:
    share = Share("live", 3, 0, 4)
    for kind, caps in ((BlobKind.ROW, FULL), (BlobKind.STATE, WINDOW)):
        for own in ("", "ab", "abcde"):  # also where the own row has more of it than the other one
            plan = planned("abcdefgh", own, "abcd", 6, kind=kind, caps=caps)
            assert plan == Plan(8, 0, None, Restore(0, 6), share), (kind, own)
            assert (plan.n_new_cells, plan.n_decode) == (8, 2)
    assert planned("abcdefgh", "ab", "xy", 6, kind=BlobKind.ROW).reshare is None
    assert planned("abcdefgh", "", "abcd", 6, kind=BlobKind.ROW, caps=STREAMS).reshare is None
    assert planned("abcdefgh", "", "abcd", 6, kind=BlobKind.STATE, caps=HYBRID).reshare is None


def test_a_whole_row_is_restored_only_where_all_its_bytes_cost_less_than_what_it_adds() -> None:
    costs = Costs()
    for _ in range(3):
        costs.note_decode(100, 100 * 2e-3)
        costs.note_restore(100, 100 * 1e-3)
    few = planned("a" * 100, "a" * 60, "", 80, kind=BlobKind.ROW, caps=STREAMS, costs=costs)
    assert few == Plan(100, 60)  # 80 restored for 20 decoded
    many = planned("a" * 100, "a" * 10, "", 80, kind=BlobKind.ROW, caps=STREAMS, costs=costs)
    assert many.restore == Restore(0, 80)
    part = planned("a" * 100, "a" * 60, "", 80, costs=costs)
    assert part.restore == Restore(60, 80)


def test_a_state_at_the_very_end_needs_its_logits() -> None:
    assert planned("abcd", "", "", 4, kind=BlobKind.STATE, caps=RECURRENT) == Plan(4, 0)
    with_logits = planned("abcd", "", "", 4, kind=BlobKind.STATE, caps=RECURRENT, has_logits=True)
    assert (with_logits.restore, with_logits.n_decode) == (Restore(0, 4), 0)
    assert planned("abcdef", "", "", 4, kind=BlobKind.STATE, caps=RECURRENT).restore == Restore(0, 4)


def test_a_window_may_lose_its_last_token() -> None:
    assert planned("abcd", "", "", 4, kind=BlobKind.STATE, caps=WINDOW) == Plan(4, 0, None, Restore(0, 3))


def measured(operation: float, restored: float, decoded: float) -> Costs:
    costs = Costs()
    for _ in range(3):
        costs.operation.add(operation)
        costs.note_restore(100, 100 * restored)
        costs.note_decode(100, 100 * decoded)
    return costs


def test_what_costs_more_than_it_brings_is_decoded() -> None:
    dear = measured(operation=1e-3, restored=1e-6, decoded=2e-4)
    assert planned("abcdefgh", "", "", 6, costs=dear) == Plan(8, 0)  # 1.2 ms of decoding, 2 ms of operations
    assert planned("abcdefgh", "", "abcd", 0, costs=dear) == Plan(8, 0)
    cheap = measured(operation=1e-5, restored=1e-6, decoded=2e-4)
    assert planned("abcdefgh", "", "", 6, costs=cheap).restore == Restore(0, 6)
    assert planned("abcdefgh", "", "abcd", 0, costs=cheap).share == Share("live", 3, 0, 4)


def test_what_another_row_adds_to_the_own_one_is_worth_an_operation_or_decoded() -> None:
    dear = measured(operation=1e-3, restored=1e-9, decoded=2e-4)  # an operation costs what five tokens do
    assert planned("abcdefghijklmn", "abcd", "abcdefgh", 0, costs=dear) == Plan(14, 4)
    assert planned("abcdefghijklmn", "ab", "abcdefgh", 0, costs=dear) == Plan(14, 2, Share("live", 3, 2, 8))


def test_a_few_tokens_are_not_shared_again_after_a_whole_row() -> None:
    dear = measured(operation=1e-3, restored=1e-9, decoded=2e-4)
    for live, again in (("a" * 4, None), ("a" * 8, Share("live", 3, 0, 8))):
        plan = planned("a" * 50, "", live, 40, kind=BlobKind.ROW, costs=dear)
        assert plan == Plan(50, 0, None, Restore(0, 40), again)


def test_nothing_measured_means_that_reuse_is_worth_while() -> None:
    assert Costs().is_worth_sharing(1)
    assert Costs().is_worth_restoring(1)


def test_averages_follow_what_is_measured() -> None:
    costs = measured(operation=1.0, restored=1.0, decoded=1.0)
    for _ in range(60):
        costs.note_decode(50, 50 * 3.0)
        costs.note_decode(1, 1000.0)  # one alone says nothing of many
    assert costs.decode(2) == pytest.approx(6.0, rel=1e-3)


# -- segments


def a_blob(n: int, *, n_layer: int = 2, row: int = 5, first: int = 0) -> np.ndarray:
    """As llama.cpp lays it out, with bytes that tell token and tensor."""
    cells = b"".join(np.array([first + i, 1, 7], np.int32).tobytes() for i in range(n))
    data = np.array([99, 7, 1, n], np.uint32).tobytes() + cells + np.array([0, n_layer], np.uint32).tobytes()
    for tensor in range(2 * n_layer):
        data += np.int32(1).tobytes() + np.uint64(row + tensor).tobytes()
        data += b"".join(bytes([(17 * (first + i) + tensor) % 256]) * (row + tensor) for i in range(n))
    return np.frombuffer(data, np.uint8).copy()


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))
def test_cuts_and_joins_are_what_a_save_of_the_part_would_be(n: int, a: int, b: int) -> None:
    blob = a_blob(n)
    layout = SegmentLayout.learn(blob)
    assert layout is not None
    assert layout.n_bytes(n) == len(blob)
    a, b = sorted((a % (n + 1), b % (n + 1)))
    if a < b:
        np.testing.assert_array_equal(layout.cut(blob, a, b), a_blob(b - a, first=a))
    parts = [(layout.cut(blob, 0, a), 0, a)] if a else []
    parts += [(blob, a, n)] if a < n else []
    joined = np.empty(len(blob), np.uint8)
    layout.join(parts, joined)
    np.testing.assert_array_equal(joined, blob)


def test_cells_are_put_in_order() -> None:
    blob = a_blob(4)
    layout = SegmentLayout.learn(blob)
    assert layout is not None
    mixed = np.empty(len(blob), np.uint8)
    layout.join([(blob, 2, 3), (blob, 0, 1), (blob, 3, 4), (blob, 1, 2)], mixed)
    assert layout.positions(mixed).tolist() == [2, 0, 3, 1]
    layout.put_in_order(mixed)
    np.testing.assert_array_equal(mixed, blob)


@pytest.mark.parametrize("change", [lambda b: b[:10], lambda b: b[:-1], lambda b: np.append(b, np.uint8(0))], ids=str)
def test_what_is_laid_out_otherwise_is_not_cut(change: Any) -> None:
    assert SegmentLayout.learn(change(a_blob(3))) is None


def test_v_transposed_or_several_streams_are_not_cut() -> None:
    for at, value in ((8, 2), (16 + 12 * 3, 1)):
        blob = a_blob(3)
        blob[at] = value
        assert SegmentLayout.learn(blob) is None


def test_one_stall_switches_nothing_off() -> None:
    costs = measured(operation=1e-5, restored=1e-6, decoded=2e-4)
    costs.operation.add(0.2)
    costs.note_restore(100, 1.0)
    assert costs.is_worth_sharing(4)
    assert costs.is_worth_restoring(100)
    first = Costs()
    first.note_decode(100, 100 * 2e-4)
    first.note_restore(32, 1.0)
    assert first.is_worth_restoring(100)
