"""What is shown of a reply: whole characters, as soon as it is safe, and never a stop string or the start of one."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from llama_sessions.text_stream import TextStream


def shown_by(stops: Sequence[str], pieces: Sequence[bytes], *, final: bool = True) -> tuple[list[str], TextStream]:
    """What each piece made visible, the final flush last."""
    stream = TextStream(stops)
    shown = [stream.push(piece) for piece in pieces]
    if final:
        shown.append(stream.push(b"", final=True))
    return shown, stream


def splits(data: bytes) -> list[list[bytes]]:
    """Every way to cut the bytes in two, and one byte at a time."""
    return [[data[:i], data[i:]] for i in range(len(data) + 1)] + [[data[i : i + 1] for i in range(len(data))]]


def held(text: str, stops: Sequence[str]) -> int:
    """The oracle: characters at the end of `text` that are the beginning of a stop string, but not a whole one."""
    return max((n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)


def expected(text: str, stops: Sequence[str], n_safe: int) -> str:
    """The oracle: what is shown of `text`, read character by character until one completes a stop string."""
    for n in range(len(text) + 1):
        done = [stop for stop in stops if text[:n].endswith(stop)]
        if done:
            return text[: n - max(map(len, done))]
    return text[:n_safe]


# -- characters


@pytest.mark.parametrize("text", ["é", "日本", "👍🏽", "a👍b", "ß\n€"])
def test_half_a_character_is_never_shown(text: str) -> None:
    for pieces in splits(text.encode()):
        shown, _ = shown_by((), pieces)
        assert "".join(shown) == text
        assert all("\ufffd" not in part for part in shown)


def test_a_whole_character_is_shown_at_once() -> None:
    stream = TextStream()
    assert [stream.push(bytes([byte])) for byte in "é日".encode()] == ["", "é", "", "", "日"]


def test_bytes_that_are_no_character_are_shown_as_the_replacement_character() -> None:
    stream = TextStream()
    assert stream.push(b"a\xffb") == "a\ufffdb"


def test_a_character_that_never_ends_is_shown_as_the_replacement_character_by_the_final_flush() -> None:
    stream = TextStream()
    assert stream.push(b"a\xe6\x97") == "a"
    assert stream.push(b"", final=True) == "\ufffd"
    assert stream.text == "a\ufffd"


# -- stop strings


@pytest.mark.parametrize("stop", ["END", "\n\n", "日本", "aab", "👍!"])
def test_a_stop_string_is_found_however_the_bytes_are_split(stop: str) -> None:
    for pieces in splits(f"some text aa{stop} and more".encode()):
        shown, stream = shown_by((stop,), pieces)
        assert "".join(shown) == stream.text == "some text aa"
        assert stream.stopped


def test_nothing_is_shown_after_a_stop_string() -> None:
    stream = TextStream(["."])
    assert stream.push(b"One. Two") == "One"
    assert stream.push(b" Three.") == ""
    assert stream.push(b"!", final=True) == ""
    assert stream.text == "One"


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert shown_by(["later", "first"], [b"a first later"])[0][0] == "a "
    for pieces in splits(b"xa.b.c"):
        assert shown_by(["a.b.c", "b"], pieces)[1].text == "xa."


def test_of_two_stop_strings_at_one_place_nothing_is_shown() -> None:
    for stops in (["ab", "abc"], ["abc", "ab"]):
        assert shown_by(stops, [b"x", b"abc"])[1].text == "x"


def test_a_beginning_that_overlaps_itself_is_found() -> None:
    shown, stream = shown_by(["aab"], [b"a", b"a", b"a", b"b"])
    assert shown[:3] == ["", "", "a"]
    assert stream.stopped
    assert stream.text == "a"


def test_no_more_is_held_back_than_a_stop_string_could_begin_with() -> None:
    stream = TextStream(["</end>", "\nUser:"])
    assert stream.push(b"text <") == "text "
    assert stream.push(b"/e") == ""
    assert stream.push(b"x\n") == "</ex"
    assert stream.push(b"Us") == ""
    assert stream.push(b"\n") == "\nUs"


def test_of_several_stop_strings_the_longest_beginning_is_held_back() -> None:
    for stops in (["abc", "bcd"], ["bcd", "abc"]):
        assert shown_by(stops, [b"xab"], final=False)[0] == ["x"]


def test_what_was_held_back_is_shown_by_the_final_flush() -> None:
    stream = TextStream(["</end>"])
    assert stream.push(b"a </en") == "a "
    assert stream.push(b"", final=True) == "</en"
    assert not stream.stopped


def test_a_stop_string_completed_by_the_last_bytes_stops() -> None:
    stream = TextStream(["END"])
    assert stream.push(b"a EN") == "a "
    assert stream.push(b"D", final=True) == ""
    assert stream.stopped
    assert stream.text == "a "


def test_without_stop_strings_nothing_is_held_back() -> None:
    stream = TextStream()
    assert stream.push(b"a <") == "a <"


# -- any text, any stops, any split


@st.composite
def cut_bytes(draw: st.DrawFn) -> tuple[str, list[bytes]]:
    text = draw(st.text(alphabet=st.sampled_from("abé👍"), max_size=30))
    data = text.encode()
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return text, [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]


@settings(max_examples=400, deadline=None)
@given(cut_bytes(), st.lists(st.text(alphabet=st.sampled_from("abé👍"), min_size=1, max_size=4), max_size=3))
def test_any_text_is_shown_up_to_the_first_stop_string_and_held_back_no_more_than_needed(
    cut: tuple[str, list[bytes]], stops: list[str]
) -> None:
    text, pieces = cut
    stream = TextStream(stops)
    so_far, shown = b"", ""
    for piece in pieces:
        shown += stream.push(piece)
        so_far += piece
        whole = so_far.decode(errors="ignore")
        assert shown == stream.text == expected(whole, stops, len(whole) - held(whole, stops))
        assert stream.stopped == any(stop in whole for stop in stops)
    stream.push(b"", final=True)
    assert stream.text == expected(text, stops, len(text))
