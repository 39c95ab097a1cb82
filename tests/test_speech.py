"""The tokens of a reply as text: whole characters, as soon as they are there."""

from __future__ import annotations

import pytest

from llama_sessions.reply_format import ReplyFormat
from llama_sessions.reply_parser import ReplyParser
from llama_sessions.speech import Speech


def speech(reply_format: ReplyFormat | None = None, **options: bool) -> Speech:
    return Speech(ReplyParser(reply_format, tools=False, **options))


def shown_by(said: Speech, pieces: list[bytes]) -> list[str]:
    """What each piece made visible."""
    return ["".join(part.text for part in said.push(0, piece)) for piece in pieces]


@pytest.mark.parametrize("text", ["é", "日本", "👍🏽", "a👍b", "ß\n€"])
def test_half_a_character_is_never_shown(text: str) -> None:
    data = text.encode()
    for pieces in [[data[:i], data[i:]] for i in range(len(data) + 1)] + [[bytes([byte]) for byte in data]]:
        shown = shown_by(speech(), pieces)
        assert "".join(shown) == text
        assert all("\ufffd" not in part for part in shown)


def test_a_whole_character_is_shown_at_once() -> None:
    assert shown_by(speech(), [bytes([byte]) for byte in "é日".encode()]) == ["", "é", "", "", "日"]


def test_bytes_that_are_no_character_are_shown_as_the_replacement_character() -> None:
    assert shown_by(speech(), [b"a\xffb"]) == ["a\ufffdb"]


def test_a_character_that_never_ends_is_shown_as_the_replacement_character_at_the_end() -> None:
    said = speech()
    assert shown_by(said, [b"a\xe6\x97"]) == ["a"]
    assert [part.text for part in said.end()] == ["\ufffd"]
    assert said.text == "a\ufffd"
    assert said.end() == []


def test_a_character_that_was_cut_is_not_said() -> None:
    said = speech()
    assert shown_by(said, [b"a\xe6\x97"]) == ["a"]
    assert said.end(cut=True) == []
    assert said.text == "a"


def test_without_stop_strings_and_marks_nothing_is_held_back() -> None:
    assert shown_by(speech(), [b" ", b"<think>", b"a <", b" \n"]) == [" ", "<think>", "a <", " \n"]


@pytest.mark.parametrize(
    ("pieces", "n_closed"),
    [([b"hm"], 0), ([b"hm <"], 1), ([b"<"], 1), ([b"</", b"thi"], 5), ([b"</thi", b"\xe2"], 0), ([b"</x"], 0)],
)
def test_how_much_of_the_closing_tag_is_there(pieces: list[bytes], n_closed: int) -> None:
    said = speech(ReplyFormat(), thinking_open=True)
    shown_by(said, pieces)
    assert said.is_thinking
    assert said.n_closed == n_closed


@pytest.mark.parametrize(
    ("before", "piece", "behind"),
    [
        (b"hm", b"</think>", ""),
        (b"hm", b"</think>\n\n", ""),
        (b"hm</thi", b"nk>So", "So"),
        (b"</", b"think> So \n", "So"),
        (b"hm", b"x</think", ""),
        (b"hm</think\xe2", b"\x82\xac>So", ""),
        (b"hm", b"</think>\xe2", "\ufffd"),
    ],
)
def test_what_a_token_would_say_behind_the_thinking_is_known_before_it_comes(
    before: bytes, piece: bytes, behind: str
) -> None:
    said = speech(ReplyFormat(), thinking_open=True)
    shown_by(said, [before])
    assert said.said_behind(piece) == behind
