"""The tree against a scan of all its tokens, the order in which edges go against a sort, and every policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from interrupting import interrupted_everywhere

from llama_sessions import OptionError, StateError
from llama_sessions.kv.node import Node
from llama_sessions.kv.policy import Policy, Usage, gdsf, lfu, lru, policy_for, priority
from llama_sessions.kv.radix import RadixTree
from llama_sessions.types import TokenArray

Text = str  # one token a letter; the value of an edge is its own text
Tree = RadixTree[Text]


def ids(text: Text) -> TokenArray:
    return np.array([ord(letter) for letter in text], np.int32)


def halves(value: Text, n: int) -> tuple[Text, Text]:
    return value[:n], value[n:]


def new_tree(**options: Any) -> Tree:
    return RadixTree(**{"split": halves, "n_bytes": len, **options})


def put(tree: Tree, text: Text, namespace: object = None, **options: Any) -> Node[Text] | None:
    return tree.insert(namespace, ids(text), lambda q: text[q:], **options)


def grown(*texts: Text, **options: Any) -> Tree:
    tree = new_tree(**options)
    for text in texts:
        put(tree, text)
    return tree


def found(tree: Tree, text: Text, namespace: object = None) -> int:
    return tree.match(namespace, ids(text)).n_tokens


def node_at(tree: Tree, text: Text) -> Node[Text]:
    node = tree.match(None, ids(text)).node
    assert node is not None
    return node


def text_of(node: Node[Text]) -> Text:
    return "".join(reversed(["".join(map(chr, each.tokens)) for each in node.path()]))


def edges(tree: Tree) -> list[tuple[int, Text]]:
    return sorted((node.p0, text_of(node)[node.p0 :]) for node in tree.nodes())


def snapshot(tree: Tree) -> list[object]:
    """All that there is to see of a tree."""
    kept = [
        (v.namespace, v.depth, n.p0, n.tokens.tolist(), n.value, n.n_locks, n.n_uses, n.last_use, n.clock, id(n))
        for v in tree.walk()
        for n in [v.node]
    ]
    return [kept, tree.n_nodes, tree.n_tokens, tree.n_bytes, tree.namespaces()]


# -- match and insert


def test_a_new_tree_knows_nothing() -> None:
    match = new_tree().match(None, ids("hello"))
    assert (match.n_tokens, match.segments, match.node) == (0, (), None)


def test_a_match_may_end_inside_an_edge() -> None:
    tree = grown("hello there")
    assert [found(tree, text) for text in ("hello", "help", "hello there", "hello there!", "x")] == [5, 3, 11, 11, 0]
    assert tree.n_nodes == 1


def test_a_match_names_its_segments() -> None:
    tree = grown("hello there", "hello world")
    match = tree.match("none", ids("hello"))
    assert match.segments == ()
    match = tree.match(None, ids("hello wonder"))
    assert [(s.p0, s.p1, s.node.value) for s in match.segments] == [(0, 6, "hello "), (6, 8, "world")]
    assert match.n_tokens == 8
    assert match.node is match.segments[-1].node


def test_what_parts_is_divided_where_it_parts() -> None:
    tree = grown("hello there", "hello world", "help")
    assert edges(tree) == [(0, "hel"), (3, "lo "), (3, "p"), (6, "there"), (6, "world")]
    assert [v.node.value for v in tree.walk()] == ["hel", "lo ", "there", "world", "p"]
    assert (tree.n_nodes, tree.n_tokens, tree.n_bytes) == (5, 17, 17)


def test_ten_turns_of_one_chat_keep_each_token_once() -> None:
    tree = new_tree()
    chat = ""
    for turn in range(10):
        chat += f"turn {turn} and what was said in it. "
        put(tree, chat)
    assert (tree.n_nodes, tree.n_tokens, tree.n_bytes) == (10, len(chat), len(chat))
    assert found(tree, chat) == len(chat)


def test_an_insert_of_what_is_there_changes_nothing() -> None:
    tree = grown("hello there")
    before = snapshot(tree)
    for text in ("hello", "hello there", ""):
        assert tree.insert(None, ids(text), lambda q: pytest.fail("asked for a value")) is None
    assert snapshot(tree) == before


def test_an_insert_returns_the_node_that_ends_it() -> None:
    tree = grown("hello")
    node = put(tree, "help")
    assert node is not None
    assert (node.p0, node.p1, node.value, text_of(node)) == (3, 4, "p", "help")


def test_a_value_is_asked_for_what_is_new() -> None:
    tree, asked = grown("hello"), list[int]()
    tree.insert(None, ids("hello you"), lambda q: asked.append(q) or " you")  # type: ignore[func-returns-value]
    assert asked == [5]


def test_data_that_begin_behind_the_end_of_the_tree_are_refused() -> None:
    tree = grown("hello")
    with pytest.raises(StateError, match="holds 5 of the 6 tokens before the new ones; insert from 5 on"):
        put(tree, "hello you", p0=6)
    assert put(tree, "hello you", p0=5) is not None


def test_namespaces_share_nothing() -> None:
    tree = new_tree()
    put(tree, "hello", "a")
    put(tree, "hello", None)
    assert [found(tree, "hello", name) for name in ("a", "b", None)] == [5, 0, 5]
    assert tree.n_tokens == 10
    assert set(tree.namespaces()) == {"a", None}


def test_the_tree_keeps_ids_of_its_own() -> None:
    tree, tokens = new_tree(), ids("hello there")
    tree.insert(None, tokens, lambda q: "hello there")
    tokens[:] = 0
    put(tree, "hello you")
    assert found(tree, "hello there") == 11
    for node in tree.nodes():
        assert node.tokens.base is None  # nothing longer is kept alive
        with pytest.raises(ValueError, match="read-only"):
            node.tokens[0] = 1


@pytest.mark.parametrize(
    "tokens", [[1, 2], np.array([1, 2]), np.array([[1]], np.int32), np.array([1], ">i4"), None, np.float32([1])]
)
def test_tokens_that_are_no_int32_array_are_refused(tokens: Any) -> None:
    tree = grown("hello")
    before = snapshot(tree)
    for call in (tree.match, lambda name, t: tree.insert(name, t, lambda q: "")):
        with pytest.raises(OptionError, match="tokens must be an \\(n,\\) int32 array"):
            call(None, tokens)
    assert snapshot(tree) == before


def test_tokens_of_any_stride_are_read() -> None:
    tree = grown("hello")
    assert tree.match(None, np.repeat(ids("help"), 2)[::2]).n_tokens == 3
    tree.insert(None, np.repeat(ids("hey"), 3)[::3], lambda q: "y")
    assert found(tree, "hey") == 3


# -- locks, removal, values


def test_a_divided_node_stays_the_end_of_its_path() -> None:
    tree = grown("hello there")
    node = node_at(tree, "hello there")
    tree.lock(node)
    tree.touch(node)
    head = tree.divide(node, 5)
    assert (head.value, node.value, node.p0, head.n_locks, node.n_locks) == ("hello", " there", 5, 0, 1)
    assert (head.n_uses, head.last_use) == (node.n_uses, node.last_use) == (2, 2)
    assert node.parent is head
    assert text_of(node) == "hello there"


@pytest.mark.parametrize("n", [0, 5, -1, 6])
def test_a_border_lies_within_an_edge(n: int) -> None:
    tree = grown("hello")
    with pytest.raises(OptionError, match=f"an edge of 5 tokens cannot be divided behind {n}"):
        tree.divide(node_at(tree, "hello"), n)


def test_a_value_that_cannot_be_divided_stays_whole() -> None:
    tree = grown("hello there", "help", split=lambda value, n: (None, value))
    assert [v.node.value for v in tree.walk()] == [None, "hello there", "p"]
    put(tree, "he", "other")
    assert (tree.n_tokens, tree.n_bytes) == (14, 14)


def test_a_node_that_only_joins_goes_with_its_last_child() -> None:
    tree = grown("abcx", "abcy", split=lambda value, n: (None, value))
    assert tree.n_nodes == 3
    assert tree.evict(4) == ["abcx"]
    assert tree.n_nodes == 2
    assert tree.evict(1) == ["y"]
    assert (tree.n_nodes, tree.namespaces()) == (0, [])


def test_a_locked_join_stays_until_it_is_unlocked() -> None:
    tree = grown("abcx", "abcy", split=lambda value, n: (None, value))
    join = node_at(tree, "abc")
    tree.lock(join)
    assert tree.evict(5) == ["abcx", "y"]
    assert list(tree.nodes()) == [join]
    tree.check_integrity()
    tree.unlock(join)
    put(tree, "z")
    assert tree.evict(1) == ["z"]
    assert tree.n_nodes == 0


def test_what_is_locked_stays_with_its_path() -> None:
    tree = grown("hello there", "hello world", "other")
    node = node_at(tree, "hello there")
    tree.lock(node)
    tree.lock(node)
    assert sorted(tree.evict(10)) == ["other", "world"]
    assert tree.evict(1) == []
    tree.unlock(node)
    assert tree.evict(1) == []
    tree.unlock(node)
    assert tree.evict(11) == ["there", "hello "]


def test_an_unlock_without_a_lock_is_refused() -> None:
    tree = grown("hello")
    with pytest.raises(StateError, match=r"<Node \[0, 5\): 0 children> is not locked"):
        tree.unlock(node_at(tree, "hello"))


def test_a_node_that_is_gone_is_refused_everywhere() -> None:
    tree = grown("hello")
    node = node_at(tree, "hello")
    tree.lock(node)
    tree.unlock(node)
    tree.remove(node)
    calls: list[Callable[[], object]] = [
        lambda: tree.lock(node),
        lambda: tree.touch(node),
        lambda: tree.remove(node),
        lambda: tree.divide(node, 2),
        lambda: tree.replace(node, "x"),
    ]
    for call in calls:
        with pytest.raises(StateError, match="no longer in the tree; match again, and lock what must stay"):
            call()


def test_a_subtree_is_removed_unless_something_in_it_is_locked() -> None:
    tree = grown("hello there", "hello world", "other")
    stem, leaf = node_at(tree, "hello "), node_at(tree, "hello world")
    tree.lock(leaf)
    with pytest.raises(StateError, match="1 of the 3 nodes at and below"):
        tree.remove(stem)
    tree.unlock(leaf)
    assert sorted(tree.remove(stem)) == ["hello ", "there", "world"]
    assert (edges(tree), tree.n_bytes, leaf.parent) == ([(0, "other")], 5, None)


def test_clear_keeps_what_is_locked_and_other_namespaces() -> None:
    tree = grown("hello there", "hello world")
    put(tree, "hello", "a")
    put(tree, "hello", "b")
    leaf = node_at(tree, "hello world")
    tree.lock(leaf)
    assert tree.clear("a", "none", "a") == ["hello"]
    assert tree.clear(None) == ["there"]
    assert (found(tree, "hello world"), found(tree, "hello", "b"), tree.namespaces()) == (11, 5, [None, "b"])
    tree.unlock(leaf)
    assert sorted(tree.clear()) == ["hello", "hello ", "world"]
    assert snapshot(tree) == [[], 0, 0, 0, []]


def test_a_replaced_value_is_handed_back_and_counted() -> None:
    tree = grown("hello")
    node = node_at(tree, "hello")
    assert (tree.replace(node, "other value"), node.value, tree.n_bytes) == ("hello", "other value", 11)
    assert (tree.replace(node, None), node.value, tree.n_bytes) == ("other value", None, 0)
    put(tree, "x")
    tree.touch(node)
    assert tree.evict(1) == ["x"]
    tree.check_integrity()


# -- what goes


def test_leaves_go_first_and_no_more_than_is_needed() -> None:
    tree = grown("aaaa", "aaaabbbb", "cccc")
    assert tree.evict(3) == ["bbbb"]
    assert tree.evict(5) == ["aaaa", "cccc"]
    assert (tree.evict(1), tree.n_nodes, tree.n_bytes, tree.namespaces()) == ([], 0, 0, [])


@pytest.mark.parametrize("n_bytes", [0, -5])
def test_nothing_goes_for_nothing(n_bytes: int) -> None:
    assert grown("aaaa").evict(n_bytes) == []


def test_nothing_goes_where_all_is_not_enough() -> None:
    tree = grown("aaaa", "aaaabbbb", "cccc")
    before = snapshot(tree)
    assert tree.evict(13) == []
    assert snapshot(tree) == before
    assert len(tree.evict(12)) == 3


def test_the_least_recently_used_goes_first() -> None:
    tree = grown("aa", "bb", "cc")
    tree.touch(node_at(tree, "aa"))
    assert [tree.evict(1), tree.evict(1), tree.evict(1)] == [["bb"], ["cc"], ["aa"]]


def test_a_use_counts_for_the_whole_path() -> None:
    tree = grown("aab", "aac", "dd")
    tree.touch(node_at(tree, "aab"))
    stem = node_at(tree, "aa")
    assert (stem.last_use, stem.n_uses) == (4, 2)
    assert tree.evict(4) == ["c", "dd", "b"]


def test_the_least_often_used_goes_first_and_of_equals_the_older_use() -> None:
    tree = grown("aa", "bb", "cc", "dd", policy=lfu)
    for text in ("bb", "aa", "dd", "dd"):
        tree.touch(node_at(tree, text))
    assert [tree.evict(1)[0] for _ in range(4)] == ["cc", "bb", "aa", "dd"]


def test_gdsf_weighs_cost_against_size_and_lets_the_old_go() -> None:
    tree = new_tree(policy=gdsf, cost=lambda p0, p1: 100.0 if p0 == 0 else 1.0)
    put(tree, "dear")
    put(tree, "dear and cheap")
    assert tree.evict(1) == [" and cheap"]
    cheap = new_tree(policy=gdsf, cost=lambda p0, p1: 1.0)
    put(cheap, "used often")
    for _ in range(3):
        cheap.touch(node_at(cheap, "used often"))
    went = []
    for letter in "abcdefgh":
        put(cheap, letter * 9)
        went += cheap.evict(1)
    # 4 uses / 10 bytes are worth more than 1 / 9, until the clock has risen by three times that.
    assert went.index("used often") == 3
    assert went[:3] == ["a" * 9, "b" * 9, "c" * 9]


def test_what_frees_nothing_is_spared() -> None:
    tree = new_tree(n_bytes=lambda value: 4 if value == "aaaa" else 0 if value == "bbbb" else 2)
    for text in ("aaaabbbb", "cc"):
        put(tree, text)
    tree.touch(tree.divide(node_at(tree, "aaaabbbb"), 4))
    assert tree.evict(2) == ["cc"]  # "bbbb" is older
    assert edges(tree) == [(0, "aaaa"), (4, "bbbb")]
    tree.check_integrity()
    assert tree.evict(1) == ["bbbb", "aaaa"]


def test_what_goes_last_goes_after_all_others() -> None:
    tree = new_tree()
    put(tree, "keep", "own", goes_last=True)
    put(tree, "also", "two", goes_last=True)
    put(tree, "aa")
    put(tree, "bb")
    tree.touch(tree.tops("own")[0])
    assert tree.evict(5, also_last=False) == []
    assert tree.evict(1, also_last=False) == ["aa"]
    put(tree, "aa")
    tree.touch(node_at(tree, "bb"))
    assert tree.evict(4) == ["aa", "bb"]
    assert [tree.evict(1), tree.evict(1)] == [["also"], ["keep"]]


def test_a_half_of_what_goes_last_goes_last() -> None:
    tree = new_tree()
    node = put(tree, "keep", goes_last=True)
    assert node is not None
    assert tree.divide(node, 2).goes_last


def test_a_policy_of_the_users_own_decides() -> None:
    seen: list[Usage] = []

    def longest_first(usage: Usage) -> float:
        seen.append(usage)
        return -usage.n_tokens

    tree = grown("a", "bbb", "cc", policy=longest_first, n_bytes=lambda value: 10 * len(value))
    assert tree.evict(31) == ["bbb", "cc"]
    assert seen[1] == Usage(last_use=2, n_uses=1, n_tokens=3, n_bytes=30, cost=3.0, clock=0.0)


def test_a_policy_is_asked_once_for_each_leaf_that_changed() -> None:
    asked: list[int] = []
    tree = grown("a", "b", "c", "d", policy=lambda usage: asked.append(usage.last_use) or usage.last_use)  # type: ignore[func-returns-value]
    tree.evict(1)
    tree.touch(node_at(tree, "c"))
    tree.evict(1)
    assert asked == [1, 2, 3, 4, 5]


def test_a_policy_is_not_asked_about_thousands_again() -> None:
    asked: list[int] = []
    tree: RadixTree[int] = RadixTree(
        split=lambda value, n: (value, value),
        n_bytes=lambda value: 1,
        policy=lambda usage: asked.append(usage.last_use) or usage.last_use,  # type: ignore[func-returns-value]
    )
    for i in range(1500):
        tree.insert(None, np.array([i], np.int32), lambda q, i=i: i)  # type: ignore[misc]
    assert tree.evict(1) == [0]
    asked.clear()
    assert tree.evict(1) == [1]
    assert asked == []


def test_many_uses_do_not_fill_the_heap() -> None:
    tree = grown("a", "b", "c")
    for _ in range(3000):
        tree.touch(node_at(tree, "b"))
        assert tree.evict(1)
        put(tree, "c")
    assert len(tree._leaves._heap or []) < 1100


# -- failing


def fail(*_: object) -> Any:
    raise ZeroDivisionError("of the test")


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        (fail, "the policy fail raised ZeroDivisionError: of the test"),
        (lambda usage: "high", "what the policy <lambda> returns must be a number, not 'high'"),
        (lambda usage: None, "must be a number, not None"),
        (lambda usage: True, "must be a number, not True"),
        (lambda usage: float("nan"), "must be a finite number .*not nan"),
        (lambda usage: float("inf"), "must be a finite number .*not inf"),
        (lambda usage: 10**400, "must be a finite number"),
        (lambda usage: 1j, "must be a number, not 1j"),
    ],
)
def test_a_policy_that_fails_is_named_and_nothing_goes(policy: Policy, said: str) -> None:
    tree = grown("aaaa", "aaaabb", "cc", policy=policy)
    before = snapshot(tree)
    for _ in range(2):
        with pytest.raises(OptionError, match=said):
            tree.evict(1)
        assert snapshot(tree) == before
        tree.check_integrity()


def test_a_policy_that_fails_in_the_middle_costs_nothing() -> None:
    fails = True
    tree = grown("aaaa", "aaaabb", policy=lambda usage: fail() if fails and usage.n_tokens == 4 else 0)
    before = snapshot(tree)
    with pytest.raises(OptionError):
        tree.evict(5)  # "bb" is chosen by then
    assert snapshot(tree) == before
    fails = False
    assert tree.evict(5) == ["bb", "aaaa"]


def test_a_split_or_a_value_that_fails_costs_nothing() -> None:
    tree = grown("hello there", split=fail)
    before = snapshot(tree)
    for call in (lambda: put(tree, "hello you"), lambda: tree.divide(node_at(tree, "hello"), 2)):
        with pytest.raises(ZeroDivisionError):
            call()
    with pytest.raises(ZeroDivisionError):
        tree.insert(None, ids("hello there you"), fail)
    assert snapshot(tree) == before
    tree.check_integrity()


def test_a_size_that_fails_costs_nothing() -> None:
    tree = grown("hello there", n_bytes=lambda value: fail() if value.endswith("o") else 1)
    before = snapshot(tree)
    with pytest.raises(ZeroDivisionError):
        put(tree, "hello there, hello")
    with pytest.raises(ZeroDivisionError):
        put(tree, "helloyou")
    with pytest.raises(ZeroDivisionError):
        tree.replace(node_at(tree, "hello"), "o")
    assert snapshot(tree) == before
    tree.check_integrity()


def test_proof_finds_what_is_wrong() -> None:
    breaks: list[tuple[Callable[[Tree], object], str]] = [
        (lambda t: setattr(t, "n_tokens", 3), "2 nodes, 3 tokens, 5 bytes are booked, 2, 5, 5 are there"),
        (lambda t: setattr(node_at(t, "aa"), "p0", 1), "does not follow"),
        (lambda t: setattr(node_at(t, "aab"), "parent", None), "does not follow"),
        (lambda t: setattr(node_at(t, "aab"), "tokens", ids("xxx")), "stands under 98, which is not its first token"),
        (lambda t: setattr(node_at(t, "aa"), "n_locks", -1), "has -1 locks"),
        (lambda t: t._leaves._changed.clear(), "would never go"),
        (lambda t: setattr(t, "_unfinished", (t._roots[None], 97)), "a change was not finished"),
        (lambda t: t._roots[None].children.clear(), "the root of None is empty"),
    ]
    for wrong, said in breaks:
        tree = grown("x")
        tree.evict(1)  # from here on leaves are kept in a heap
        for text in ("aa", "aabbb"):
            put(tree, text)
        tree.check_integrity()
        wrong(tree)
        with pytest.raises(StateError, match=said):
            tree.check_integrity()


# -- policies


def usage(**known: Any) -> Usage:
    return Usage(**{"last_use": 7, "n_uses": 3, "n_tokens": 10, "n_bytes": 40, "cost": 20.0, "clock": 5.0, **known})


def test_each_policy_says_what_its_formula_says() -> None:
    assert (lru(usage()), lfu(usage()), gdsf(usage())) == (7.0, 3.0, 6.5)
    assert gdsf(usage(n_bytes=0)) == 65.0


def test_policies_are_known_by_name() -> None:
    assert [policy_for(name) for name in ("lru", "lfu", "gdsf")] == [lru, lfu, gdsf]
    assert policy_for(fail) is fail
    with pytest.raises(OptionError, match="policy must be one of 'lru', 'lfu', 'gdsf', not 'mru'"):
        policy_for("mru")


def test_numbers_of_any_kind_are_priorities() -> None:
    for number in (3, np.int64(3), np.float32(3), 3.0):
        assert priority(lambda _, n=number: n, usage()) == 3.0  # type: ignore[misc]


# -- against a scan

LETTERS = st.text(alphabet="ab", min_size=1, max_size=9)
SPACES = st.sampled_from([None, "x"])
POLICIES: dict[str, Policy] = {"lru": lru, "lfu": lfu, "gdsf": gdsf, "longest": lambda u: -u.n_tokens}


class AgainstAScan(RuleBasedStateMachine):
    """The oracle is the set of all prefixes that should be known, and a search through all nodes for what goes next."""

    @initialize(name=st.sampled_from(list(POLICIES)))
    def begin(self, name: str) -> None:
        self.policy = POLICIES[name]
        self.failing = False
        self.tree: Tree = new_tree(split=self.split, policy=self.rank, cost=lambda p0, p1: p1 * (p1 - p0))
        self.known: dict[object, set[Text]] = {None: set(), "x": set()}
        self.locked: list[Node[Text]] = []

    def split(self, value: Text, n: int) -> tuple[Text, Text]:
        return fail() if self.failing else halves(value, n)  # type: ignore[no-any-return]

    def rank(self, usage: Usage) -> float:
        return fail() if self.failing else self.policy(usage)  # type: ignore[no-any-return]

    def longest(self, namespace: object, text: Text) -> int:
        return max((n for n in range(len(text) + 1) if text[:n] in self.known[namespace]), default=0)

    def pick(self, i: int) -> Node[Text] | None:
        nodes = list(self.tree.nodes())
        return nodes[i % len(nodes)] if nodes else None

    @rule(namespace=SPACES, text=LETTERS)
    def insert(self, namespace: object, text: Text) -> None:
        node = put(self.tree, text, namespace)
        assert (node is None) == (text in self.known[namespace])
        assert node is None or text_of(node) == text
        self.known[namespace] |= {text[:n] for n in range(1, len(text) + 1)}

    @rule(namespace=SPACES, text=LETTERS)
    def match(self, namespace: object, text: Text) -> None:
        before = snapshot(self.tree)
        match = self.tree.match(namespace, ids(text))
        assert snapshot(self.tree) == before
        assert match.n_tokens == self.longest(namespace, text)
        at = 0
        for segment in match.segments:
            node = segment.node
            assert (segment.p0, node.p0) == (at, at)
            assert text_of(node)[:at] == text[:at]
            assert (node.value or "")[: segment.p1 - at] == text[at : segment.p1]
            at = segment.p1
        assert at == match.n_tokens

    @rule(i=st.integers(0, 99))
    def touch(self, i: int) -> None:
        node = self.pick(i)
        if node is not None:
            before = [(each.n_uses, each.last_use) for each in node.path()]
            self.tree.touch(node)
            assert [each.n_uses for each in node.path()] == [n + 1 for n, _ in before]
            assert all(each.last_use == self.tree._tick for each in node.path())

    @rule(i=st.integers(0, 99), n=st.integers(1, 8))
    def divide(self, i: int, n: int) -> None:
        node = self.pick(i)
        if node is not None and n < len(node.tokens):
            text = text_of(node)
            head = self.tree.divide(node, n)
            assert text_of(node) == text
            assert head.value == text[head.p0 : head.p1]

    @rule(i=st.integers(0, 99))
    def lock(self, i: int) -> None:
        node = self.pick(i)
        if node is not None and len(self.locked) < 3:
            self.tree.lock(node)
            self.locked.append(node)

    @rule(i=st.integers(0, 99))
    def unlock(self, i: int) -> None:
        if self.locked:
            self.tree.unlock(self.locked.pop(i % len(self.locked)))

    def expected(self, n_bytes: int) -> list[Node[Text]]:
        """Who goes, one after the other, by a look at everybody."""
        left, gone, freed = list(self.tree.nodes()), list[Node[Text]](), 0
        while freed < n_bytes:
            free = [n for n in left if not n.n_locks and not any(c in left for c in n.children.values())]
            if not free:
                return []
            gone.append(min(free, key=lambda n: (self.policy(self.tree._usage(n)), n.last_use, -n.p0)))
            left.remove(gone[-1])
            freed += len(gone[-1].value or "")
        return gone

    @rule(n_bytes=st.integers(1, 12))
    def evict(self, n_bytes: int) -> None:
        expected = self.expected(n_bytes)
        values = [node.value for node in expected]
        paths = [(next(v.namespace for v in self.tree.walk() if v.node is n), text_of(n), n.p0) for n in expected]
        went = self.tree.evict(n_bytes)
        assert went == values
        self.forget(paths)

    @rule(n_bytes=st.integers(1, 12), text=LETTERS)
    def fail_to_do(self, n_bytes: int, text: Text) -> None:
        before = snapshot(self.tree)
        self.failing = True
        try:
            if self.tree.evict(n_bytes):
                return self.forget_by_walk()
            put(self.tree, text)
            self.known[None] |= {text[:n] for n in range(1, len(text) + 1)}
        except (OptionError, ZeroDivisionError):
            assert snapshot(self.tree) == before
        finally:
            self.failing = False
        return None

    @rule(i=st.integers(0, 99))
    def remove(self, i: int) -> None:
        node = self.pick(i)
        if node is None:
            return
        below = node.subtree()
        if any(each.n_locks for each in below):
            with pytest.raises(StateError):
                self.tree.remove(node)
            return
        assert sorted(self.tree.remove(node)) == sorted(each.value or "" for each in below)
        self.forget_by_walk()

    @rule(namespaces=st.lists(st.sampled_from([None, "x", "unknown"]), max_size=2))
    def clear(self, namespaces: list[object]) -> None:
        names = namespaces or [None, "x"]
        kept = {id(each) for node in self.locked for each in node.path()}
        expected = [v.node for v in self.tree.walk() if v.namespace in names and id(v.node) not in kept]
        assert sorted(self.tree.clear(*namespaces)) == sorted(node.value or "" for node in expected)
        self.forget_by_walk()

    def forget(self, paths: Sequence[tuple[object, Text, int]]) -> None:
        for namespace, text, p0 in paths:
            self.known[namespace] -= {text[:n] for n in range(p0 + 1, len(text) + 1)}

    def forget_by_walk(self) -> None:
        self.known = {None: set(), "x": set()}
        for visit in self.tree.walk():
            text = text_of(visit.node)
            self.known[visit.namespace] |= {text[:n] for n in range(1, len(text) + 1)}

    @invariant()
    def it_adds_up(self) -> None:
        self.tree.check_integrity()
        there: dict[object, set[Text]] = {None: set(), "x": set()}
        for visit in self.tree.walk():
            text = text_of(visit.node)
            assert visit.node.value == text[visit.node.p0 :]
            there[visit.namespace] |= {text[:n] for n in range(1, len(text) + 1)}
        assert there == self.known
        assert self.tree.n_tokens == sum(len(prefixes) for prefixes in self.known.values())
        assert all(node.parent is not None for node in self.locked)


def test_the_tree_behaves_as_a_scan_of_everything() -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        AgainstAScan, settings=settings(max_examples=120, stateful_step_count=40, deadline=None)
    )


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=6), max_size=20))
def test_ids_of_all_32_bits_are_told_apart(prompts: list[list[int]]) -> None:
    tree: RadixTree[int] = RadixTree(split=lambda value, n: (value, value), n_bytes=lambda value: 1)
    for i, prompt in enumerate(prompts):
        tokens = np.array(prompt, np.int32)
        expected = max((n for n in range(len(prompt) + 1) for old in prompts[:i] if old[:n] == prompt[:n]), default=0)
        assert tree.match(None, tokens).n_tokens == expected
        tree.insert(None, tokens, lambda q, i=i: i)  # type: ignore[misc]
    tree.check_integrity()


# -- interrupts


@pytest.mark.parametrize("deed", ["insert", "divide", "replace", "evict", "remove", "clear", "touch", "unlock"])
def test_an_interrupt_costs_at_most_the_edge_it_was_about(deed: str) -> None:
    def start() -> Tree:
        tree = grown("aaaa", "aaaabb", "aaaacc", "dddd")
        tree.lock(node_at(tree, "aaaabb"))
        assert tree.evict(6) == ["cc", "dddd"]  # and the heap has passed the locked one by
        put(tree, "aaaacc")
        put(tree, "dddd")
        return tree

    def act(tree: Tree) -> None:
        if deed == "insert":
            put(tree, "aaxx")
        elif deed == "divide":
            tree.divide(node_at(tree, "aaaa"), 2)
        elif deed == "replace":
            tree.replace(node_at(tree, "aaaabb"), None)
        elif deed == "evict":
            tree.evict(3)
        elif deed == "remove":
            tree.remove(node_at(tree, "aaaacc"))
        elif deed == "clear":
            tree.clear(None)
        elif deed == "unlock":
            tree.unlock(node_at(tree, "aaaabb"))
        else:
            tree.touch(node_at(tree, "aaaacc"))

    def check(tree: Tree) -> None:
        assert found(tree, "aaaabb") in (0, 2, 4, 6)  # never more than is right
        put(tree, "zz")
        tree.check_integrity()
        for node in tree.nodes():
            assert node.value in (text_of(node)[node.p0 :], None if deed == "replace" else "")
        if deed in ("replace", "touch", "remove", "insert", "divide"):
            assert found(tree, "dddd") == 4

    assert interrupted_everywhere(start, act, check) > 10


@pytest.mark.parametrize(
    "act",
    [
        lambda tree, node: put(tree, "x"),
        lambda tree, node: tree.touch(node),
        lambda tree, node: tree.lock(node),
        lambda tree, node: tree.divide(node, 2),
        lambda tree, node: tree.replace(node, "aaaa"),
        lambda tree, node: tree.evict(1),
        lambda tree, node: tree.remove(node),
        lambda tree, node: tree.clear("unknown"),
    ],
)
def test_every_change_first_mends_what_was_left(act: Callable[[Tree, Node[Text]], object]) -> None:
    tree = grown("aaaa", "bb")
    tree._unfinished = (tree._roots[None], ord("b"))
    assert (found(tree, "aaaa"), found(tree, "bb")) == (0, 0)
    act(tree, tree.tops(None)[0])
    assert found(tree, "bb") == 0
    tree.check_integrity()
