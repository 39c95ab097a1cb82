"""A row beside the prompt it was cut from."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from llama_sessions.kv.alignment import Alignment, ranges_of, without


def ids(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def test_a_row_that_is_the_whole_prompt_is_straight() -> None:
    row = Alignment.straight(ids(1, 2, 3))
    assert row.is_straight
    assert row.place(1, 3) == (1, 3)
    assert not row.cut_out([(0, 1)]).is_straight
    assert row.followed_by(ids(1, 2, 9)).tokens.tolist() == [1, 2, 9]


def test_a_message_goes_and_its_first_tokens_stay() -> None:
    # system 1 2, a message 3 4 5 6, another 7 8; two tokens of the first one are sinks.
    row = Alignment.straight(ids(1, 2, 3, 4, 5, 6, 7, 8)).cut_out([(4, 6)]).shortened([(2, 6)])
    assert row.whole.tolist() == [1, 2, 7, 8]
    assert row.tokens.tolist() == [1, 2, 3, 4, 7, 8]
    assert row.source.tolist() == [0, 1, -1, -1, 2, 3]
    assert row.place(2, 4) == (4, 6)
    after = row.followed_by(ids(1, 2, 7, 8, 9))
    assert after.tokens.tolist() == [1, 2, 3, 4, 7, 8, 9]
    assert after.source.tolist() == [0, 1, -1, -1, 2, 3, 4]
    # A prompt that goes another way right behind the system text has no use for them.
    assert row.followed_by(ids(1, 2, 8)).tokens.tolist() == [1, 2, 8]


def test_a_part_that_is_cut_out_stays_out_only_where_the_row_goes_on_behind_it() -> None:
    row = Alignment.straight(ids(1, 2, 3, 4, 5, 6)).cut_out([(2, 4)])
    assert row.followed_by(ids(1, 2, 3, 4, 5, 6, 7)).tokens.tolist() == [1, 2, 5, 6, 7]
    assert row.followed_by(ids(1, 2, 3, 4, 5, 9)).tokens.tolist() == [1, 2, 5, 9]
    assert row.followed_by(ids(1, 2, 3, 4, 9)).tokens.tolist() == [1, 2, 3, 4, 9]
    assert row.followed_by(ids(1, 9)).tokens.tolist() == [1, 9]


def test_what_was_said_since_belongs_to_both() -> None:
    row = Alignment.straight(ids(1, 2, 3)).cut_out([(1, 2)]).grown(ids(8, 9))
    assert row.whole.tolist() == [1, 2, 3, 8, 9]
    assert row.tokens.tolist() == [1, 3, 8, 9]
    assert row.followed_by(ids(1, 2, 3, 8, 9, 7)).tokens.tolist() == [1, 3, 8, 9, 7]


ranges = st.lists(st.booleans(), min_size=1, max_size=40).map(lambda marks: (len(marks), ranges_of(np.array(marks))))


@given(ranges, ranges, st.data())
def test_whatever_goes_every_token_of_the_row_stands_where_it_says(
    first: tuple[int, tuple[tuple[int, int], ...]], second: tuple[int, tuple[tuple[int, int], ...]], data: st.DataObject
) -> None:
    n, holes = first
    whole = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), np.int32)
    row = Alignment.straight(whole).cut_out(holes)
    gone = [(p0, min(p1, n)) for p0, p1 in second[1] if p0 < min(p1, n)]
    row = row.shortened(gone)
    assert row.whole.tolist() == whole[without(gone, n)].tolist()
    assert row.tokens.tolist() == whole[without(holes, n)].tolist()
    known = row.source >= 0
    assert (row.whole[row.source[known]] == row.tokens[known]).all()
    assert (np.diff(row.source[known]) > 0).all()
    # And a prompt that follows is, with what was cut out of it put back, that prompt.
    following = np.array(data.draw(st.lists(st.integers(0, 3), max_size=10)), np.int32)
    keep = data.draw(st.integers(0, len(row.whole)))
    target = np.concatenate([row.whole[:keep], following])
    after = row.followed_by(target)
    known = after.source >= 0
    assert (after.whole[after.source[known]] == after.tokens[known]).all()
    assert (np.diff(after.source[known]) > 0).all()
    assert after.whole.tolist() == target.tolist()
    if len(target):
        assert not len(after.tokens) or after.source[-1] == len(target) - 1 or not len(following)
