"""The web chat as somebody sees it: two tabs of a headless browser. Asked for with `pytest -m browser`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import Server, serving

pytestmark = pytest.mark.browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium: one of the system's (`apt-get install chromium`), else what `playwright install chromium` brought."""
    from playwright.sync_api import sync_playwright  # of the extra `browser`: missing it must not hurt other tests

    path = next(filter(None, map(shutil.which, NAMES)), None)
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0  # then Chromium refuses to start in its sandbox
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"] if is_root else [])
        yield browser
        browser.close()


@pytest.fixture
def window(browser: Any) -> Iterator[Any]:
    """A window; what goes wrong in one of its pages fails the test."""
    window = browser.new_context(viewport={"width": 1200, "height": 760})
    wrong: list[str] = []
    window.on("weberror", lambda error: wrong.append(str(error.error)))
    window.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    yield window
    window.close()
    assert wrong == []


def expect(locator: Any) -> Any:
    """Assertions that wait for what they want."""
    from playwright.sync_api import expect

    return expect(locator)


def opened(window: Any, server: Server) -> Any:
    page = window.new_page()
    page.goto(server.url)
    ready(page)
    return page


def ready(page: Any) -> None:
    """Wait until it can be spoken to: it cannot while it answers."""
    page.wait_for_selector("#send:enabled")


def begin(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def say(page: Any, text: str) -> str:
    begin(page, text)
    ready(page)
    return str(page.locator(".assistant").last.inner_text())


def test_two_tabs_talk_fork_and_undo_and_the_map_shows_it(window: Any, server: Server, tmp_path: Path) -> None:
    anna, ben = opened(window, server), opened(window, server)
    begin(anna, "My name is Anelda.")
    begin(ben, "My name is Borvin.")
    ready(anna)
    ready(ben)
    say(anna, "My cat is called Sulan.")
    assert say(ben, "What is my name?") == "Your name is Borvin."
    assert say(anna, "What is my name?") == "Your name is Anelda."

    with window.expect_page() as popup:
        anna.click("#fork")
    branch = popup.value
    ready(branch)
    assert branch.title() == "tab 3 ← 1"
    assert branch.locator(".message").count() == 6
    say(branch, "My horse is called Bemor.")
    assert say(branch, "What is my cat called?") == "Your cat is called Sulan."
    assert say(anna, "What is my horse called?") == "You have not told me what your horse is called."

    for n_left in (6, 4, 2):
        anna.click("#undo")
        expect(anna.locator(".message")).to_have_count(n_left)
    assert say(anna, "My cat is called Mirto.") == "I will remember that."
    assert say(anna, "What is my cat called?") == "Your cat is called Mirto."

    expect(anna.locator("#rows .line")).to_have_count(3)
    anna.wait_for_selector("#tree .edge")
    assert anna.locator("#rows .me").inner_text().split("\n")[0] == "tab 1"
    assert "slots" in anna.inner_text("#n_rows")
    assert anna.inner_text("#between_tokens_p95_s").endswith(" ms")
    shot = tmp_path / "chat.png"
    anna.screenshot(path=shot)
    assert shot.stat().st_size > 10_000
    print(f"screenshot: {shot}")  # shown with `pytest -m browser -s`, to be looked at

    before = anna.inner_text("#said")
    anna.reload()
    ready(anna)
    assert anna.inner_text("#said") == before


def test_stop_keeps_what_was_said(window: Any) -> None:
    with serving(endless=True) as server:
        page = opened(window, server)
        begin(page, "Count.")
        expect(page.locator(".assistant")).not_to_be_empty()
        page.click("#stop")
        ready(page)
        assert page.inner_text("#note").startswith("stopped; ")
        assert page.locator(".message").count() == 2
        page.close()  # before the server goes, which it would ask for its map


def test_what_a_model_and_a_user_say_is_text(window: Any, server: Server) -> None:
    page = opened(window, server)
    say(page, "<img src=x onerror=alert(1)><b>bold</b>")
    assert page.locator(".user").inner_text() == "<img src=x onerror=alert(1)><b>bold</b>"
    assert page.locator("#said img, #said b").count() == 0


def test_errors_are_shown_and_can_be_recovered_from(browser: Any, server: Server) -> None:
    window = browser.new_context()  # whose console may complain: that a request was refused is its error, too
    page = opened(window, server)
    begin(page, "tea " * 20_000)
    page.wait_for_selector("#note.bad")
    assert "raise n_ctx" in page.inner_text("#note")
    ready(page)
    assert page.locator(".message").count() == 0
    page.fill("#text", "x" * 200_000)
    page.click("#send")
    page.wait_for_selector("#note.bad:has-text('at most 100000 bytes')")
    assert page.locator(".message").count() == 0
    assert len(page.input_value("#text")) == 200_000  # not lost
    assert say(page, "My name is Marelo.") == "Nice to meet you, Marelo."
    page.goto(server.url + "?tab=nobody")
    page.wait_for_selector("#note.bad:has-text('not known')")
    ready(page)
    window.close()
