"""The cache: what it restores is always the bytes of exactly those tokens at exactly those positions.

Blobs here are laid out as llama.cpp's are, by layer and not by token, and each row names its token, layer and position.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from interrupting import interrupted_everywhere

from llama_sessions import OptionError, RadixOptions, RadixStats, StateError
from llama_sessions.kv.arena import ByteArray
from llama_sessions.kv.cache import Inserted, KvMatch, RadixCache
from llama_sessions.types import BlobKind, TokenArray

N_HEAD, N_LAYER, N_ROW = 4, 2, 3
N_PER_TOKEN = N_LAYER * N_ROW


def ids(text: str) -> TokenArray:
    return np.array([ord(letter) for letter in text], np.int32)


def blob_of(text: str, p0: int = 0) -> ByteArray:
    """The blob of the positions `[p0, len(text))`."""
    rows = [[ord(text[p]), layer, p % 256] for layer in range(N_LAYER) for p in range(p0, len(text))]
    return np.concatenate([np.array([len(text) - p0, 0, 0, 0], np.uint8), np.array(rows, np.uint8).reshape(-1)])


class Cutter:
    """`fails`: raise at the next cut."""

    fails = False
    n_cuts = 0

    def n_bytes(self, n_tokens: int) -> int:
        return N_HEAD + n_tokens * N_PER_TOKEN

    def cut(self, blob: ByteArray, a: int, b: int) -> ByteArray:
        if self.fails:
            raise ZeroDivisionError("of the test")
        self.n_cuts += 1
        layers = blob[N_HEAD:].reshape(N_LAYER, -1, N_ROW)[:, a:b]
        return np.concatenate([np.array([b - a, 0, 0, 0], np.uint8), layers.reshape(-1)])


class RowSaver:
    """A row that says `text`; `asked` remembers what was saved."""

    def __init__(self, text: str, *, fails: bool = False) -> None:
        self.text = text
        self.fails = fails
        self.asked: list[tuple[int, int]] = []

    def n_bytes(self, p0: int, p1: int) -> int:
        return len(blob_of(self.text[:p1], p0))

    def save(self, p0: int, p1: int, out: ByteArray) -> None:
        self.asked.append((p0, p1))
        out[:] = 0
        if self.fails:
            raise ZeroDivisionError("of the test")
        out[:] = blob_of(self.text[:p1], p0)


def size(n_tokens: int) -> int:
    return Cutter().n_bytes(n_tokens)


def new_cache(
    max_bytes: int = 10_000, kind: BlobKind = BlobKind.RANGE, *, cuts: bool = True, min_tokens: int = 1, **options: Any
) -> RadixCache:
    cutter = Cutter() if cuts and kind is BlobKind.RANGE else None
    return RadixCache(RadixOptions(max_bytes=max_bytes, min_tokens=min_tokens, **options), kind=kind, cutter=cutter)


def put(cache: RadixCache, text: str, namespace: str | None = None) -> Inserted:
    return cache.save(namespace, ids(text), RowSaver(text))


def match(cache: RadixCache, text: str, namespace: str | None = None) -> KvMatch:
    return cache.match(namespace, ids(text))


def found(cache: RadixCache, text: str, namespace: str | None = None) -> int:
    return match(cache, text, namespace).n_tokens


def restored(cache: RadixCache, found: KvMatch) -> list[list[int]]:
    """The rows (token, layer, position) that a restore of the match would give, by layer."""
    layers: list[list[Any]] = [[] for _ in range(N_LAYER)]
    at = 0
    for part in cache.read(found):
        assert part.p0 == at
        assert part.view[0] == part.n_tokens >= part.p1 - part.p0
        assert part.view.shape == (size(part.n_tokens),)
        for rows, blob_rows in zip(layers, part.view[N_HEAD:].reshape(N_LAYER, part.n_tokens, N_ROW), strict=True):
            rows.extend(blob_rows[: part.p1 - part.p0].tolist())
        at = part.p1
    assert at == found.n_tokens
    return [row for rows in layers for row in rows]


def expected(text: str) -> list[list[int]]:
    return [[ord(letter), layer, p % 256] for layer in range(N_LAYER) for p, letter in enumerate(text)]


def assert_restores(cache: RadixCache, text: str, n: int, namespace: str | None = None) -> None:
    """`text` is matched for n tokens, and they are the right ones."""
    hit = match(cache, text, namespace)
    assert hit.n_tokens == n
    assert restored(cache, hit) == expected(text[:n])


ALL = [(BlobKind.RANGE, True), (BlobKind.RANGE, False), (BlobKind.ROW, False), (BlobKind.STATE, False)]
every_kind = pytest.mark.parametrize(("kind", "cuts"), ALL)
ranges = pytest.mark.parametrize("cuts", [True, False])


@pytest.fixture(autouse=True)
def every_cache_adds_up(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    caches: list[RadixCache] = []
    original = RadixCache.__init__

    def remembered(self: RadixCache, *args: Any, **options: Any) -> None:
        original(self, *args, **options)
        caches.append(self)

    monkeypatch.setattr(RadixCache, "__init__", remembered)
    yield
    for cache in caches[-5:] if "proof" not in request.node.name else []:
        cache.check_integrity()


# -- what is kept


@ranges
def test_ten_turns_of_one_chat_keep_each_token_once(cuts: bool) -> None:
    cache, chat = new_cache(cuts=cuts), ""
    for turn in range(10):
        chat += f"turn {turn}: said so. "
        put(cache, chat)
    assert cache.stats().n_bytes == size(len(chat)) + 9 * N_HEAD
    assert_restores(cache, chat, len(chat))
    assert len(cache.read(match(cache, chat))) == 10
    assert_restores(cache, chat[:100] + "!", 100)


def test_a_longer_row_takes_the_place_of_the_shorter() -> None:
    cache, chat = new_cache(kind=BlobKind.ROW), ""
    for turn in range(10):
        chat += f"turn {turn}: said so. "
        put(cache, chat)
    assert cache.stats().n_bytes == size(len(chat))
    assert_restores(cache, chat[:100] + "!", 100)


def test_a_row_serves_every_prompt_that_begins_like_it() -> None:
    cache = new_cache(kind=BlobKind.ROW)
    put(cache, "hello there")
    put(cache, "hello world")
    put(cache, "hello")
    assert cache.stats().n_bytes == 2 * size(11)
    for text, n in (("hello wonder", 8), ("hello", 5), ("help", 3), ("hello there!", 11)):
        assert_restores(cache, text, n)
        (part,) = cache.read(match(cache, text))
        assert (part.p0, part.p1, part.n_tokens) == (0, n, 11)


def test_a_state_is_found_only_at_its_very_end() -> None:
    cache = new_cache(kind=BlobKind.STATE)
    put(cache, "hello there")
    assert found(cache, "hello") == 0
    put(cache, "hello")  # within the edge of the longer one
    put(cache, "hello you")
    assert cache.stats().n_bytes == size(11) + size(5) + size(9)
    for text, n in (("hello", 5), ("hello there", 11), ("hello you", 9), ("hello yours", 9), ("hello world", 5)):
        assert_restores(cache, text, n)
        (part,) = cache.read(match(cache, text))
        assert part.n_tokens == n
    assert [segment.p1 for segment in match(cache, "hello world").segments] == [5]
    assert found(cache, "hell") == 0


@every_kind
def test_what_is_there_is_not_saved_again(kind: BlobKind, cuts: bool) -> None:
    cache = new_cache(kind=kind, cuts=cuts)
    put(cache, "hello there")
    put(cache, "other")
    again = RowSaver("hello there")
    assert cache.save(None, ids("hello there"), again) == Inserted()
    assert again.asked == []
    assert [line.split("used ")[1] for line in cache.describe() if "[0, 11)" in line] == ["2 times (namespace None)"]


@ranges
def test_only_what_is_new_is_asked_for(cuts: bool) -> None:
    cache = new_cache(cuts=cuts)
    put(cache, "hello there")
    saver = RowSaver("hello you")
    assert cache.save(None, ids("hello you"), saver) == Inserted(n_tokens=3, n_bytes=size(3))
    assert saver.asked == [(6, 9)]


@pytest.mark.parametrize("kind", [BlobKind.ROW, BlobKind.STATE])
def test_a_whole_row_is_asked_for_where_ranges_cannot_be_saved(kind: BlobKind) -> None:
    cache = new_cache(kind=kind)
    put(cache, "hello there")
    saver = RowSaver("hello you")
    assert cache.save(None, ids("hello you"), saver).n_bytes == size(9)
    assert saver.asked == [(0, 9)]


@ranges
def test_a_blob_that_begins_before_what_is_new_is_taken(cuts: bool) -> None:
    cache = new_cache(cuts=cuts)
    cache.insert(None, ids("hello there"), 0, blob_of("hello there"))
    done = cache.insert(None, ids("hello you"), 3, blob_of("hello you", 3))
    assert (done.n_tokens, done.n_bytes) == (3, size(3) if cuts else size(6))
    assert_restores(cache, "hello you", 9)
    assert_restores(cache, "hello there", 11)


@ranges
def test_tokens_that_would_leave_a_gap_are_refused(cuts: bool) -> None:
    cache = new_cache(cuts=cuts)
    put(cache, "hello there")
    done = cache.insert(None, ids("hello you!"), 8, blob_of("hello you!", 8))
    assert done == Inserted(refused="only 6 of the 8 tokens before the new ones are here")
    assert found(cache, "hello you!") == 6


@every_kind
def test_fewer_new_tokens_than_min_tokens_are_refused(kind: BlobKind, cuts: bool) -> None:
    cache = new_cache(kind=kind, cuts=cuts, min_tokens=4)
    assert put(cache, "abc").refused == "3 new tokens are fewer than min_tokens=4"
    assert put(cache, "abcd").refused == ""
    assert put(cache, "abcdefg").refused == "3 new tokens are fewer than min_tokens=4"
    assert put(cache, "abcdefgh").n_tokens == 4
    assert cache.save_private("me", ids("abc"), RowSaver("abc"), exact=True).n_tokens == 3


@every_kind
def test_nothing_is_kept_of_nothing(kind: BlobKind, cuts: bool) -> None:
    cache = new_cache(kind=kind, cuts=cuts)
    assert put(cache, "") == Inserted()
    assert cache.read(match(cache, "x")) == []
    assert cache.stats() == RadixStats(max_bytes=10_000, kind=kind.value)


@every_kind
def test_namespaces_share_nothing(kind: BlobKind, cuts: bool) -> None:
    cache = new_cache(kind=kind, cuts=cuts)
    for name in ("a", "b", None):
        assert put(cache, "hello", name).n_tokens == 5
    put(cache, "other", "b")
    assert cache.clear("b") == 10
    assert [found(cache, "hello", name) for name in ("a", "b", None)] == [5, 0, 5]


# -- splits and what they free


def test_a_split_copies_nothing_and_frees_what_it_should() -> None:
    cache = new_cache(size(8) + size(4))
    put(cache, "aaaabbbb")
    put(cache, "aaaacccc")
    assert cache.stats().n_bytes == size(8) + size(4)
    assert len(cache.read(match(cache, "aaaabbbb"))) == 1  # one blob still
    done = put(cache, "dd")
    assert (done.n_tokens_evicted, done.refused) == (4, "")
    assert cache.stats().n_bytes == size(4) + size(4) + size(2)
    assert_restores(cache, "aaaabbbb", 4)
    assert_restores(cache, "aaaacccc", 8)
    assert_restores(cache, "dd", 2)


def test_a_blob_that_cannot_be_cut_counts_until_its_last_part_goes() -> None:
    cache = new_cache(size(8) + size(4), cuts=False)
    put(cache, "aaaabbbb")
    put(cache, "aaaacccc")
    done = put(cache, "dd")  # "bbbb" alone would free nothing
    assert done.n_tokens_evicted == 4
    assert_restores(cache, "aaaabbbb", 8)
    assert_restores(cache, "aaaacccc", 4)
    put(cache, "aaaacc")
    cache.touch(match(cache, "dd"), n_hit=2, n_miss=0)
    assert put(cache, "e" * 8).refused == ""
    assert found(cache, "aaaa") == 0


def test_many_cuts_of_one_blob_leave_its_front_right() -> None:
    text, cutter = "abcdefghijklmnopqrstuvwxyz", Cutter()
    deepest_first = RadixOptions(max_bytes=size(26) + 12 * size(1), min_tokens=1, policy=lambda usage: -usage.cost)
    cache = RadixCache(deepest_first, cutter=cutter, cost=lambda p0, p1: p1)
    put(cache, text)
    for n in range(24, 2, -2):
        put(cache, text[:n] + "!")
    lengths = []
    for n in range(24, 2, -1):
        lengths.append(found(cache, text))
        assert_restores(cache, text, lengths[-1])
        assert put(cache, chr(n)).refused == ""
        cache.check_integrity()
    assert lengths == sorted(lengths, reverse=True)
    assert (len(set(lengths)), lengths[-1]) == (cutter.n_cuts + 1, 6)


def full_of_forty(oldest: list[int], save: Callable[[RadixCache, int, str], object]) -> RadixCache:
    """40 blobs of 4 tokens side by side, and no room beside them."""
    cache = new_cache(40 * size(4))
    for i in range(40):
        save(cache, i, 4 * chr(65 + i))
    for i in range(40):
        if i not in oldest:
            hit = cache.private(i) or match(cache, 4 * chr(65 + i))
            cache.touch(hit, n_hit=4, n_miss=0)
    return cache


def test_what_is_free_in_pieces_is_brought_together() -> None:
    cache = full_of_forty([10, 12], lambda cache, i, text: put(cache, text))
    assert put(cache, "x" * 8).n_tokens_evicted == 8  # no more than is needed
    assert_restores(cache, "x" * 8, 8)
    for i in range(40):
        assert_restores(cache, 4 * chr(65 + i), 0 if i in (10, 12) else 4)


def test_a_little_more_goes_where_too_much_would_have_to_move() -> None:
    cache = full_of_forty([0, 39], lambda cache, i, text: put(cache, text))
    assert put(cache, "x" * 8).n_tokens_evicted == 12  # the next oldest lies beside the first
    assert_restores(cache, "x" * 8, 8)
    for i in range(40):
        assert_restores(cache, 4 * chr(65 + i), 0 if i in (0, 1, 39) else 4)


@pytest.mark.parametrize(("exact", "lost"), [(True, (0, 39, 1)), (False, (0, 39))])
def test_for_the_sake_of_a_place_no_approximate_row_goes(exact: bool, lost: tuple[int, ...]) -> None:
    cache = full_of_forty([0, 39], lambda c, i, text: c.save_private(i, ids(text), RowSaver(text), exact=exact))
    assert put(cache, "x" * 8).lost == lost
    assert_restores(cache, "x" * 8, 8)
    for i in range(40):
        row = cache.private(i)
        assert (row is None) == (i in lost)
        assert row is None or restored(cache, row) == expected(4 * chr(65 + i))


# -- no room


@every_kind
def test_what_is_larger_than_the_budget_is_refused_and_nothing_goes_for_it(kind: BlobKind, cuts: bool) -> None:
    cache = new_cache(size(10), kind, cuts=cuts)
    put(cache, "aaaa")
    done = put(cache, "b" * 11)
    assert done == Inserted(refused=f"{size(11)} bytes are more than max_bytes={size(10)}", no_room=True)
    assert_restores(cache, "aaaa", 4)


@every_kind
def test_a_cache_full_of_locked_nodes_says_no(kind: BlobKind, cuts: bool) -> None:
    cache = new_cache(size(8), kind, cuts=cuts)
    put(cache, "aaaabb")
    hit = match(cache, "aaaabb")
    cache.lock(hit)
    cache.lock(hit)
    for _ in range(2):
        done = put(cache, "cccc")
        assert (
            done.refused
            == f"{size(4)} bytes are needed, {2 * N_PER_TOKEN} are free, and too much of the rest is locked"
        )
        assert (done.n_tokens, done.n_tokens_evicted) == (0, 0)
        assert_restores(cache, "aaaabb", 6)
        cache.unlock(hit)
    assert put(cache, "cccc").n_tokens == 4


@every_kind
def test_what_a_new_edge_hangs_on_does_not_go_for_it(kind: BlobKind, cuts: bool) -> None:
    cache = new_cache(size(6) + size(2) - 1, kind, cuts=cuts)
    put(cache, "aaaa")
    put(cache, "bb")
    cache.touch(match(cache, "bb"), n_hit=2, n_miss=0)
    # A whole row hangs on nothing, and may take the place of what it begins with.
    assert put(cache, "aaaacc").n_tokens_evicted == (2 if kind is BlobKind.RANGE else 6)
    assert_restores(cache, "aaaacc", 6)


@every_kind
def test_a_lock_keeps_what_was_found_whatever_else_is_put_in(kind: BlobKind, cuts: bool) -> None:
    cache = new_cache(size(8) + 3 * size(4), kind, cuts=cuts)
    put(cache, "aaaabbbb")
    hit = match(cache, "aaaabbbb")
    cache.lock(hit)
    for text in ("aaaac", "aadd", "abcd", "dddd", "eeee", "ffff", "aaaabbbbgg", "gggg", "aaaabb"):
        put(cache, text)
        assert restored(cache, hit) == expected("aaaabbbb")
        cache.check_integrity()
    assert cache.clear() > 0
    assert restored(cache, hit) == expected("aaaabbbb")
    cache.unlock(hit)
    cache.clear()
    assert cache.stats().n_bytes == 0


@every_kind
def test_what_has_gone_cannot_be_read_or_locked(kind: BlobKind, cuts: bool) -> None:
    cache = new_cache(kind=kind, cuts=cuts)
    put(cache, "aaaa")
    hit = match(cache, "aaaa")
    cache.clear()
    with pytest.raises(StateError, match="no longer in the cache; match again, and lock what must stay"):
        cache.read(hit)
    for call in (cache.lock, lambda m: cache.touch(m, n_hit=1, n_miss=0)):
        with pytest.raises(StateError, match="no longer in the tree"):
            call(hit)
    with pytest.raises(StateError, match="is not locked"):
        cache.unlock(hit)


def test_nothing_found_needs_no_lock() -> None:
    cache = new_cache()
    nothing = match(cache, "aaaa")
    cache.lock(nothing)
    cache.unlock(nothing)
    cache.unlock(nothing)


# -- what belongs to one owner


@every_kind
def test_an_owners_row_is_found_by_nobody_else(kind: BlobKind, cuts: bool) -> None:
    cache = new_cache(kind=kind, cuts=cuts)
    assert cache.private("me") is None
    assert cache.save_private("me", ids("mine"), RowSaver("mine"), exact=False).n_bytes == size(4)
    assert [found(cache, "mine", name) for name in (None, "me")] == [0, 0]
    hit = cache.private("me")
    assert hit is not None
    assert (hit.n_tokens, cache.private("you")) == (4, None)
    assert restored(cache, hit) == expected("mine")
    assert (cache.stats().n_bytes, cache.stats().n_bytes_private) == (size(4), size(4))
    assert cache.clear() == 0
    assert cache.drop_private("me")
    assert not cache.drop_private("me")
    assert (cache.private("me"), cache.stats().n_bytes, cache.stats().n_bytes_private) == (None, 0, 0)


def test_an_owner_has_one_row_at_a_time() -> None:
    cache = new_cache(size(6))
    cache.save_private("me", ids("first"), RowSaver("first"), exact=False)
    assert cache.save_private("me", ids("second"), RowSaver("second"), exact=False).refused == ""
    hit = cache.private("me")
    assert hit is not None
    assert restored(cache, hit) == expected("second")


def test_an_approximate_row_goes_last_and_its_owner_is_named() -> None:
    cache = new_cache(3 * size(4))
    cache.save_private("old", ids("aaaa"), RowSaver("aaaa"), exact=False)
    put(cache, "bbbb")
    cache.save_private("young", ids("cccc"), RowSaver("cccc"), exact=False)
    assert put(cache, "dddd") == Inserted(4, size(4), n_tokens_evicted=4)
    assert found(cache, "bbbb") == 0
    assert put(cache, "e" * 5) == Inserted(5, size(5), n_tokens_evicted=8, lost=("old",))
    assert cache.private("old") is None
    assert cache.private("young") is not None


def test_an_exact_row_goes_in_its_turn() -> None:
    cache = new_cache(2 * size(4))
    cache.save_private("me", ids("aaaa"), RowSaver("aaaa"), exact=True)
    put(cache, "bbbb")
    assert put(cache, "cccc").lost == ("me",)
    assert found(cache, "bbbb") == 4


def test_a_locked_row_stays_and_is_not_dropped() -> None:
    cache = new_cache(size(4))
    cache.save_private("me", ids("aaaa"), RowSaver("aaaa"), exact=False)
    hit = cache.private("me")
    assert hit is not None
    cache.lock(hit)
    assert put(cache, "bbbb").refused
    with pytest.raises(StateError, match="what is kept for 'me' is locked; unlock it first"):
        cache.drop_private("me")
    cache.unlock(hit)
    assert put(cache, "bbbb").lost == ("me",)


# -- errors


@pytest.mark.parametrize("namespace", [5, b"a", ("a",), "\ud800"])
def test_a_namespace_is_text(namespace: Any) -> None:
    cache = new_cache()
    calls: list[Callable[[], object]] = [
        lambda: cache.match(namespace, ids("a")),
        lambda: cache.save(namespace, ids("a"), RowSaver("a")),
        lambda: cache.insert(namespace, ids("a"), 0, blob_of("a")),
        lambda: cache.clear(namespace),
    ]
    for call in calls:
        with pytest.raises(OptionError, match="namespace"):
            call()


def test_a_blob_of_another_size_than_its_tokens_have_is_refused() -> None:
    cache = new_cache()
    with pytest.raises(OptionError, match=f"a blob of 5 tokens has {size(5)} bytes, not {size(4)}"):
        cache.insert(None, ids("hello"), 0, blob_of("hell"))


@every_kind
@pytest.mark.parametrize("p0", [-1, 6, 3])
def test_a_blob_begins_where_its_kind_may(kind: BlobKind, cuts: bool, p0: int) -> None:
    cache = new_cache(kind=kind, cuts=cuts)
    if p0 == 3 and kind is BlobKind.RANGE:
        assert cache.insert(None, ids("hello"), p0, blob_of("hello", p0)).refused
    else:
        with pytest.raises(OptionError, match=f"a blob of 5 tokens of kind '{kind.value}' cannot begin at {p0}"):
            cache.insert(None, ids("hello"), p0, blob_of("hello"))


def test_a_cutter_is_for_ranges() -> None:
    with pytest.raises(OptionError, match="a cutter is of no use where blobs are of kind 'row'"):
        RadixCache(RadixOptions(), kind=BlobKind.ROW, cutter=Cutter())


def test_a_save_without_bytes_is_refused() -> None:
    cache, saver = new_cache(), RowSaver("")
    saver.n_bytes = lambda p0, p1: 0  # type: ignore[method-assign]
    with pytest.raises(OptionError, match="the size of a blob must be at least 1, not 0"):
        cache.save(None, ids("hello"), saver)
    assert found(cache, "hello") == 0


@every_kind
def test_a_save_that_fails_keeps_nothing_and_harms_nothing(kind: BlobKind, cuts: bool) -> None:
    cache = new_cache(kind=kind, cuts=cuts)
    put(cache, "aaaabb")
    before = cache.stats()
    for text in ("cccc", "aaaacc", "aaaabbcc"):
        with pytest.raises(ZeroDivisionError):
            cache.save(None, ids(text), RowSaver(text, fails=True))
        assert cache.stats() == before
        cache.check_integrity()
        assert_restores(cache, "aaaabb", 6)
        assert not any("locked" in line for line in cache.describe())


def test_a_policy_that_fails_costs_nothing() -> None:
    def broken(usage: object) -> float:
        raise ZeroDivisionError

    cache = new_cache(size(6) + size(4), policy=broken)
    put(cache, "aaaabb")
    put(cache, "cccc")
    before = cache.stats()
    with pytest.raises(OptionError, match="the policy broken raised ZeroDivisionError"):
        put(cache, "dddd")
    assert cache.stats() == before
    assert_restores(cache, "aaaabb", 6)


@pytest.mark.parametrize("how", ["raises", "wrong size"])
def test_a_cut_that_fails_costs_only_the_blob_that_was_cut(how: str) -> None:
    cutter = Cutter()
    cache = RadixCache(RadixOptions(max_bytes=size(8) + 2 * size(4), min_tokens=1), cutter=cutter)
    for text in ("aaaabbbb", "aaaacccc", "dddd"):
        put(cache, text)
    if how == "raises":
        cutter.fails = True
    else:
        cutter.cut = lambda blob, a, b: blob[:7]  # type: ignore[method-assign]
    with pytest.raises((ZeroDivisionError, StateError)):
        put(cache, "ee")
    cache.check_integrity()
    assert (found(cache, "aaaa"), found(cache, "ee")) == (0, 0)
    assert_restores(cache, "dddd", 4)
    assert put(cache, "ee").refused == ""


# -- counting and showing


def test_hits_and_misses_are_counted_in_tokens() -> None:
    cache = new_cache(size(5) + size(4))
    put(cache, "hello")
    hit = match(cache, "hello you")
    before = cache.stats()
    assert (before.n_hit_tokens, before.n_miss_tokens) == (0, 0)
    cache.touch(hit, n_hit=4, n_miss=5)
    cache.touch(match(cache, "xy"), n_hit=0, n_miss=2)
    put(cache, "othe")
    put(cache, "new!")
    stats = cache.stats()
    assert (stats.n_hit_tokens, stats.n_miss_tokens, stats.n_tokens_evicted) == (4, 7, 5)
    assert (stats.n_nodes, stats.n_tokens, stats.n_bytes) == (2, 8, 2 * size(4))
    assert (stats.max_bytes, stats.kind) == (size(5) + size(4), "range")


def test_only_a_hit_is_a_use() -> None:
    cache = new_cache(2 * size(4))
    put(cache, "aaaa")
    put(cache, "bbbb")
    cache.touch(match(cache, "aaaa"), n_hit=0, n_miss=4)
    put(cache, "cccc")
    assert found(cache, "aaaa") == 0


def test_the_map_shows_edges_below_each_other() -> None:
    cache = new_cache()
    put(cache, "hello there")
    put(cache, "hello you")
    put(cache, "x", "tenant")
    cache.save_private(7, ids("mine"), RowSaver("mine"), exact=True)
    cache.lock(match(cache, "hello you"))
    assert list(cache.describe()) == [
        "[0, 6) 40 bytes, used 1 times (namespace None)",
        "  [6, 11) 30 bytes, used 1 times",
        "  [6, 9) 22 bytes, used 1 times, locked 1 times",
        "[0, 1) 10 bytes, used 1 times (namespace 'tenant')",
        "[0, 4) 28 bytes, used 1 times (owner 7)",
    ]


def test_a_match_changes_nothing() -> None:
    cache = new_cache(2 * size(4))
    put(cache, "aaaa")
    put(cache, "bbbb")
    before = (cache.stats(), list(cache.describe()))
    for text in ("aaaa", "aa", "aac"):
        cache.read(match(cache, text))
    assert (cache.stats(), list(cache.describe())) == before
    put(cache, "cccc")
    assert found(cache, "aaaa") == 0  # it was looked at last, and that was no use


def test_pages_are_given_back_when_all_is_cleared() -> None:
    cache = new_cache()
    put(cache, "hello")
    view = cache.read(match(cache, "hello"))[0].view
    cache.clear()
    put(cache, "hello")
    assert not np.shares_memory(view, cache.read(match(cache, "hello"))[0].view)


def test_the_cost_of_decoding_reaches_the_policy() -> None:
    seen = []
    options = RadixOptions(max_bytes=size(4), min_tokens=1, policy=lambda usage: seen.append(usage.cost) or 0.0)
    cache = RadixCache(options, cutter=Cutter(), cost=lambda p0, p1: 100.0 * p0 + p1)
    put(cache, "aaaa")
    put(cache, "bbbb")
    assert seen == [4.0]


def test_proof_finds_what_is_wrong() -> None:
    breaks: list[tuple[Callable[[RadixCache], object], str]] = [
        (lambda c: c._store.arena.allocate(3), "the tree knows 1 blobs of 34 bytes, the arena has 2 of 37"),
        (lambda c: setattr(next(c._tree.nodes()).value.blob, "n_tokens", 4), "a piece is not within its blob"),
        (
            lambda c: setattr(next(c._tree.nodes()).value.blob.extent, "n_bytes", 33),
            "a blob of 33 bytes is counted as 34",
        ),
        (lambda c: setattr(c._store, "suspect", True), "a change was not finished"),
        (lambda c: setattr(next(c._tree.nodes()), "p0", 1), "holds Piece"),
    ]
    for wrong, said in breaks:
        cache = new_cache()
        put(cache, "hello")
        cache.check_integrity()
        wrong(cache)
        with pytest.raises(StateError, match=said):
            cache.check_integrity()


# -- everything in random order

TEXTS = st.text(alphabet="ab", max_size=10)
OWNERS = st.sampled_from(["me", "you"])


class Everything(RuleBasedStateMachine):
    """What is found must be the bytes of these tokens, whatever was done before; nothing else is said of what goes.

    `said`: for each namespace what was ever put in. While nothing went, all of it must be found.
    """

    @initialize(
        which=st.sampled_from(ALL),
        n_tokens=st.integers(2, 60),
        policy=st.sampled_from(["lru", "lfu", "gdsf"]),
        min_tokens=st.sampled_from([1, 1, 3]),
    )
    def begin(self, which: tuple[BlobKind, bool], n_tokens: int, policy: str, min_tokens: int) -> None:
        self.kind, cuts = which
        self.cache = new_cache(size(n_tokens), self.kind, cuts=cuts, min_tokens=min_tokens, policy=policy)
        self.min_tokens = min_tokens
        self.said: dict[str | None, set[str]] = {None: set(), "x": set()}
        self.all_is_there = True
        self.own: dict[Hashable, str] = {}
        self.locked: list[tuple[KvMatch, str]] = []

    def took(self, done: Inserted) -> None:
        if done.n_tokens_evicted:
            self.all_is_there = False
        for owner in done.lost:
            del self.own[owner]

    def longest(self, namespace: str | None, text: str) -> int:
        ends = self.said[namespace]
        if self.kind is BlobKind.STATE:
            return max((len(end) for end in ends if text.startswith(end)), default=0)
        return max(
            (n for end in ends for n in range(len(text) + 1) if end[:n] == text[:n] and n <= len(end)), default=0
        )

    @rule(namespace=st.sampled_from([None, "x"]), text=TEXTS, p0=st.one_of(st.none(), st.integers(0, 10)))
    def put(self, namespace: str | None, text: str, p0: int | None) -> None:
        before = found(self.cache, text, namespace)
        if p0 is None or p0 > len(text) or (p0 and self.kind is not BlobKind.RANGE):
            done = put(self.cache, text, namespace)
        else:
            done = self.cache.insert(namespace, ids(text), p0, blob_of(text, p0))
        assert bool(done.n_tokens) == bool(done.n_bytes)
        assert done.n_tokens in (0, len(text) - before)
        assert found(self.cache, text, namespace) == before + done.n_tokens
        if done.refused:
            assert done == Inserted(refused=done.refused, no_room="bytes" in done.refused)
        else:
            assert before + done.n_tokens == len(text)
            self.said[namespace] |= {text} - {""}
        self.took(done)

    @rule(namespace=st.sampled_from([None, "x"]), text=TEXTS)
    def fail_to_put(self, namespace: str | None, text: str) -> None:
        before = self.cache.stats()
        saver = RowSaver(text, fails=True)
        try:
            self.took(self.cache.save(namespace, ids(text), saver))
        except ZeroDivisionError:
            after = self.cache.stats()
            if after != before:
                self.all_is_there = False
            self.own = {owner: row for owner, row in self.own.items() if self.cache.private(owner)}
        assert self.cache.stats().n_tokens <= before.n_tokens

    @rule(namespace=st.sampled_from([None, "x"]), text=TEXTS)
    def look(self, namespace: str | None, text: str) -> None:
        hit = match(self.cache, text, namespace)
        assert restored(self.cache, hit) == expected(text[: hit.n_tokens])
        longest = self.longest(namespace, text)
        assert hit.n_tokens <= longest
        if self.all_is_there:
            assert hit.n_tokens == longest
        self.cache.touch(hit, n_hit=hit.n_tokens, n_miss=len(text) - hit.n_tokens)

    @rule(namespace=st.sampled_from([None, "x"]), text=TEXTS)
    def lock(self, namespace: str | None, text: str) -> None:
        hit = match(self.cache, text, namespace)
        if len(self.locked) < 2:
            self.cache.lock(hit)
            self.locked.append((hit, text[: hit.n_tokens]))

    @rule(i=st.integers(0, 1))
    def unlock(self, i: int) -> None:
        if i < len(self.locked):
            self.cache.unlock(self.locked.pop(i)[0])

    @rule(owner=OWNERS, text=TEXTS.filter(bool), exact=st.booleans())
    def keep_own(self, owner: str, text: str, exact: bool) -> None:
        self.own.pop(owner, None)
        done = self.cache.save_private(owner, ids(text), RowSaver(text), exact=exact)
        self.took(done)
        if not done.refused:
            self.own[owner] = text

    @rule(owner=OWNERS)
    def drop_own(self, owner: str) -> None:
        assert self.cache.drop_private(owner) == (self.own.pop(owner, None) is not None)

    @rule(names=st.lists(st.sampled_from([None, "x"]), max_size=1))
    def clear(self, names: list[str | None]) -> None:
        self.cache.clear(*names)
        if not self.locked:
            for name in names or self.said:
                self.said[name] = set()
        self.all_is_there = self.all_is_there and not self.locked

    @invariant()
    def it_adds_up(self) -> None:
        self.cache.check_integrity()
        assert self.cache.stats().n_bytes <= self.cache.stats().max_bytes
        for hit, text in self.locked:
            assert restored(self.cache, hit) == expected(text)
        for owner in ("me", "you"):
            row = self.cache.private(owner)
            assert (row is None) == (owner not in self.own)
            if row is not None:
                assert restored(self.cache, row) == expected(self.own[owner])


def test_what_is_found_is_right_whatever_was_done_before() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        Everything, settings=settings(max_examples=150, stateful_step_count=40, deadline=None)
    )


# -- interrupts


def test_what_a_change_has_left_is_mended_at_the_next() -> None:
    cache = new_cache(2 * size(4))
    put(cache, "aaaa")
    cache.save_private("me", ids("mine"), RowSaver("mine"), exact=True)
    hit = match(cache, "aaaa")
    acts: list[Callable[[], object]] = [
        lambda: cache.lock(hit),
        lambda: cache.unlock(hit),
        lambda: cache.touch(hit, n_hit=1, n_miss=0),
        lambda: cache.clear("unknown"),
        lambda: cache.drop_private("unknown"),
        lambda: put(cache, "aaaa"),
    ]
    cache.drop_private("me")
    for act in acts:
        assert cache._arena.allocate(3) is not None  # nobody's
        cache._store.suspect = True
        assert (found(cache, "aaaa"), cache.private("me")) == (0, None)
        with pytest.raises(StateError, match="no longer in the cache"):
            cache.read(hit)
        act()
        cache.check_integrity()
        assert_restores(cache, "aaaa", 4)


@every_kind
@pytest.mark.parametrize("deed", ["put", "branch", "own", "drop", "clear"])
def test_an_interrupt_anywhere_leaves_what_is_right_or_nothing(kind: BlobKind, cuts: bool, deed: str) -> None:
    def start() -> RadixCache:
        cache = new_cache(3 * size(8) + size(4), kind, cuts=cuts)
        for text in ("aaaabbbb", "cccc", "aaaadd"):
            put(cache, text)
        cache.save_private("me", ids("mine"), RowSaver("mine"), exact=False)
        return cache

    def act(cache: RadixCache) -> None:
        if deed == "put":
            put(cache, "e" * 10)  # something goes, something is cut, something is moved
        elif deed == "branch":
            put(cache, "aaff")
        elif deed == "own":
            cache.save_private("me", ids("mine too"), RowSaver("mine too"), exact=True)
        elif deed == "drop":
            cache.drop_private("me")
        else:
            cache.clear()

    def check(cache: RadixCache) -> None:
        for _ in range(2):
            for text in ("aaaabbbb", "cccc", "aaaadd", "e" * 10, "aaff"):
                hit = match(cache, text)
                assert restored(cache, hit) == expected(text[: hit.n_tokens])
            row = cache.private("me")
            assert row is None or restored(cache, row) in (expected("mine"), expected("mine too"))
            put(cache, "z")
            cache.check_integrity()
        assert put(cache, "y" * 20).refused == ""  # nothing has leaked
        cache.check_integrity()

    assert interrupted_everywhere(start, act, check, step=11) > 15
