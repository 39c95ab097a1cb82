"""A JSON object cut anywhere: the scan ends where it does, knows its values, and sees what cannot be."""

from __future__ import annotations

import json
import sys
from collections.abc import Container, Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from llama_sessions.json_scan import MAX_DEPTH, JsonScan, loads_object, loads_string

TRICKY = r"""{"name": "a\"}\\", "n\u0061": {"}": "{[", "x": [1, -2.5e+3, [], {}, [{"y": null}]]},
 "\\": "\ud83d\ude00é", "t" :true , "e": {}, "z":0}"""


def scanned(pieces: Sequence[str], keys: Container[str] | None = None) -> tuple[JsonScan, int]:
    """A scan of the pieces, and how many characters it took."""
    scan, n_taken = JsonScan(keys), 0
    for piece in pieces:
        if scan.over:
            break
        at = scan.push(piece)
        n_taken += at
        assert scan.over or at == len(piece)
    return scan, n_taken


def splits(text: str) -> list[list[str]]:
    """Whole, cut in two everywhere, and one character at a time."""
    return [[text], list(text), *([text[:i], text[i:]] for i in range(1, len(text)))]


def facts(scan: JsonScan) -> tuple[Any, ...]:
    return scan.done, scan.wrong, scan.text, {key: (value.text, value.whole) for key, value in scan.values.items()}


def test_an_object_ends_at_its_own_bracket_however_it_is_cut() -> None:
    for pieces in splits(TRICKY + ' {"and": "more"}'):
        scan, n_taken = scanned(pieces)
        assert scan.done
        assert n_taken == len(TRICKY)
        assert scan.text == TRICKY


def test_values_are_the_texts_that_stand_behind_the_objects_own_keys() -> None:
    for pieces in splits(TRICKY):
        scan, _ = scanned(pieces)
        texts = {key: value.text for key, value in scan.values.items()}
        assert {key: json.loads(text) for key, text in texts.items()} == json.loads(TRICKY)
        assert texts["na"] == '{"}": "{[", "x": [1, -2.5e+3, [], {}, [{"y": null}]]}'
        assert (texts["t"], texts["z"]) == ("true", "0")
        assert all(value.whole for value in scan.values.values())


def test_a_value_is_known_while_it_is_being_written() -> None:
    scan = JsonScan()
    scan.push('{"name": "f", "arguments": {"a": [1')
    assert scan.values["name"].whole
    assert scan.values["arguments"].text == '{"a": [1'
    assert not scan.values["arguments"].whole
    scan.push(", 2]}")
    assert scan.values["arguments"].text == '{"a": [1, 2]}'
    assert scan.values["arguments"].whole
    assert not scan.over


def test_a_scan_begins_where_it_is_told() -> None:
    scan = JsonScan()
    assert scan.push('xx{"a": 1}yy', 2) == 10
    assert scan.text == '{"a": 1}'
    assert scan.values["a"].text == "1"


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("[1]", 0),
        (' {"a": 1}', 0),
        ("{a: 1}", 1),
        ('{"a" 1}', 5),
        ('{"a": }', 6),
        ('{"a": 1,}', 8),
        ('{"a": 1 2}', 8),
        ('{"a": [1,]}', 9),
        ('{"a": [1}', 8),
        ('{"a": {]}', 7),
        ('{"a": "x\ny"}', 8),
        ('{"a": "x\x00"}', 8),
        ("{\"a\": 'x'}", 6),
        ('{"a": None}', 6),
        ('{"a": 1, "b": 2, "a": 3}', 19),
        (r'{"a": 1, "\u0061": 3}', 16),
        (r'{"\x": 1}', 4),
        ("{,}", 1),
        ('{"a": 1]', 7),
    ],
)
def test_it_stops_at_the_first_character_that_cannot_be_however_it_is_cut(text: str, at: int) -> None:
    for pieces in splits(text):
        scan, n_taken = scanned(pieces)
        assert scan.wrong
        assert not scan.done
        assert n_taken == at
        assert scan.text == text[:at]


def test_a_key_that_is_not_among_the_known_ones_is_wrong_at_its_end_but_not_deeper() -> None:
    for pieces in splits('{"a": {"b": 1}, "b": 2}'):
        scan, n_taken = scanned(pieces, keys={"a"})
        assert scan.wrong
        assert n_taken == 18
        assert set(scan.values) == {"a"}


def test_what_is_cut_off_is_neither_done_nor_wrong() -> None:
    for n in range(len(TRICKY)):
        assert not scanned([TRICKY[:n]])[0].over


@pytest.mark.parametrize("opened", ["[", '{"a":'])
def test_nesting_is_bounded(opened: str) -> None:
    def nested(depth: int) -> str:
        return '{"a":' + opened * (depth - 1) + "1" + ("]" if opened == "[" else "}") * (depth - 1) + "}"

    scan, _ = scanned([nested(MAX_DEPTH)])
    assert scan.done
    assert loads_object(scan.text) == json.loads(nested(MAX_DEPTH))
    for depth in (MAX_DEPTH + 1, 10_000):
        for pieces in ([nested(depth)], list(nested(depth))):
            scan, n_taken = scanned(pieces)
            assert scan.wrong
            assert n_taken <= len('{"a":') * (MAX_DEPTH + 1)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": NaN}', '{"a": -Infinity}', '{"a": 01}', '{"a": tru}', r'{"a": "\x"}', "[]", "null", "", '{"a": 1',
        '{"a": ' + "9" * 5000 + "}", "[" * 100_000, '{"a":' * 100_000,
    ],
)  # fmt: skip
def test_what_is_no_object_by_the_letter_is_none(text: str) -> None:
    if "9" * 5000 in text and not hasattr(sys, "get_int_max_str_digits"):
        pytest.skip("this Python reads integers of any length")
    assert loads_object(text) is None


def test_a_string_is_what_stands_in_its_quotes() -> None:
    assert loads_string(r'"\u0061\n\"é"') == 'a\n"é'
    assert loads_string("1") is None
    assert loads_string('"a') is None


# -- any object, any split

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@st.composite
def cut(draw: st.DrawFn, text: str) -> list[str]:
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=150, deadline=None)
@given(st.data(), st.dictionaries(st.text(max_size=4), values, max_size=4), st.booleans(), st.sampled_from([None, 1]))
def test_any_object_is_read_as_json_reads_it(
    data: st.DataObject, value: dict[str, Any], ascii_only: bool, indent: int | None
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=indent)
    scan, n_taken = scanned(data.draw(cut(text + "}]")))
    assert scan.done
    assert n_taken == len(text)
    assert {key: json.loads(found.text) for key, found in scan.values.items()} == value


@settings(max_examples=150, deadline=None)
@given(
    st.data(),
    st.lists(st.sampled_from(['"', "\\", "{", "}", "[", "]", ",", ":", "a", "1", " ", '"a":', "\n"]), max_size=16),
)
def test_any_text_is_read_alike_however_it_is_cut(data: st.DataObject, bits: list[str]) -> None:
    text = "{" + "".join(bits)
    whole, n_taken = scanned([text])
    again, n_again = scanned(data.draw(cut(text)))
    assert facts(again) == facts(whole)
    assert n_again == n_taken
    try:
        pairs, end = json.JSONDecoder(object_pairs_hook=list).raw_decode(text)
    except ValueError:
        return
    keys = [key for key, _ in pairs]
    assert (whole.done, whole.wrong) == (len(set(keys)) == len(keys), len(set(keys)) < len(keys))
    assert n_taken == end or whole.wrong
