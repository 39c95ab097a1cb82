"""What is shown of a text: as soon as it is safe, and never a stop string or the start of one."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from llama_sessions.stops import StopFilter


def shown_by(stops: Sequence[str], pieces: Sequence[str], *, final: bool = True) -> tuple[list[str], StopFilter]:
    """What each piece made visible, the final flush last."""
    stream = StopFilter(stops)
    shown = [stream.push(piece) for piece in pieces]
    if final:
        shown.append(stream.push("", final=True))
    return shown, stream


def splits(text: str) -> list[list[str]]:
    """Every way to cut a text in two, and one character at a time."""
    return [[text[:i], text[i:]] for i in range(len(text) + 1)] + [list(text)]


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


@pytest.mark.parametrize("stop", ["END", "\n\n", "日本", "aab", "👍!"])
def test_a_stop_string_is_found_however_the_text_is_split(stop: str) -> None:
    for pieces in splits(f"some text aa{stop} and more"):
        shown, stream = shown_by((stop,), pieces)
        assert "".join(shown) == "some text aa"
        assert stream.stopped


def test_nothing_is_shown_after_a_stop_string() -> None:
    stream = StopFilter(["."])
    assert stream.push("One. Two") == "One"
    assert stream.push(" Three.") == ""
    assert stream.push("!", final=True) == ""


def test_the_stop_string_that_is_complete_first_wins() -> None:
    assert shown_by(["later", "first"], ["a first later"])[0][0] == "a "
    for pieces in splits("xa.b.c"):
        assert "".join(shown_by(["a.b.c", "b"], pieces)[0]) == "xa."


def test_of_two_stop_strings_at_one_place_nothing_is_shown() -> None:
    for stops in (["ab", "abc"], ["abc", "ab"]):
        assert "".join(shown_by(stops, ["x", "abc"])[0]) == "x"


def test_a_beginning_that_overlaps_itself_is_found() -> None:
    shown, stream = shown_by(["aab"], ["a", "a", "a", "b"])
    assert shown == ["", "", "a", "", ""]
    assert stream.stopped


def test_no_more_is_held_back_than_a_stop_string_could_begin_with() -> None:
    stream = StopFilter(["</end>", "\nUser:"])
    assert stream.push("text <") == "text "
    assert stream.push("/e") == ""
    assert stream.push("x\n") == "</ex"
    assert stream.push("Us") == ""
    assert stream.push("\n") == "\nUs"


def test_of_several_stop_strings_the_longest_beginning_is_held_back() -> None:
    for stops in (["abc", "bcd"], ["bcd", "abc"]):
        assert shown_by(stops, ["xab"], final=False)[0] == ["x"]


def test_what_was_held_back_is_shown_by_the_final_flush() -> None:
    stream = StopFilter(["</end>"])
    assert stream.push("a </en") == "a "
    assert stream.push("", final=True) == "</en"
    assert not stream.stopped


def test_a_stop_string_completed_by_the_last_text_stops() -> None:
    stream = StopFilter(["END"])
    assert stream.push("a EN") == "a "
    assert stream.push("D", final=True) == ""
    assert stream.stopped


def test_without_stop_strings_nothing_is_held_back() -> None:
    stream = StopFilter()
    assert stream.push("a <") == "a <"


# -- any text, any stops, any split


@st.composite
def cut_text(draw: st.DrawFn) -> tuple[str, list[str]]:
    text = draw(st.text(alphabet=st.sampled_from("abé👍"), max_size=30))
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return text, [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]


@settings(max_examples=400, deadline=None)
@given(cut_text(), st.lists(st.text(alphabet=st.sampled_from("abé👍"), min_size=1, max_size=4), max_size=3))
def test_any_text_is_shown_up_to_the_first_stop_string_and_held_back_no_more_than_needed(
    cut: tuple[str, list[str]], stops: list[str]
) -> None:
    text, pieces = cut
    stream = StopFilter(stops)
    so_far = shown = ""
    for piece in pieces:
        shown += stream.push(piece)
        so_far += piece
        assert shown == expected(so_far, stops, len(so_far) - held(so_far, stops))
        assert stream.stopped == any(stop in so_far for stop in stops)
    shown += stream.push("", final=True)
    assert shown == expected(text, stops, len(text))
