"""What the README, the docs and the examples say can be run, is run; what they name, is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("[0-9]*.py"))


def run(*args: str, stdin: str | None = None) -> str:
    done = subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, input=stdin, timeout=120, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert not done.stderr, done.stderr[-3000:]
    return done.stdout


def test_the_readme_runs_as_it_stands() -> None:
    first, second, pooled, long = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    said = run("-c", long)
    name, window, prompt, exact = said.splitlines()
    assert (name, exact) == ("Your name is Marelo.", "True")
    assert window == "12 of 64 messages in the window"
    assert prompt.endswith(", approximate")
    assert "Nice to meet you, Marelo. {'prompt_tokens': " in run("-c", second)
    assert run("-c", pooled) == "Your name is Anelda. Your name is Borvin. Your name is Cemiro.\n"
    out = run("-c", first)
    assert re.search(r"\{'happy': (True|False)\}", out)
    assert "Nice to meet you, Marelo." in out
    assert "Your name is Marelo." in out
    assert "reused" in out
    assert "slots in use" in out


SAID = {
    "01_chat": ["Your name is Marelo.", "Your favourite drink is tea."],
    "02_two_sessions": ["Your dog is called Telmi.", "Your dog is called Orwas.", "The password is velora."],
    "03_fork": ["You have not told me what your horse is called.", "Your horse is called Bemor.", "called Mirto."],
    "04_own_sampling_loop": ["The key is in Tamoli."],
    "05_json": ["by a schema : Your name is Marelo. sure: ", "by a grammar: "],
    "06_wrap_existing_llama": ["Your name is Anelda.", "Your name is Borvin.", "Your cat is called Sulan.", "cached"],
    "07_tools": ["print{", "*** Your name is Marelo. ***", "'assistant', 'tool']", "\nYour name is Marelo."],
    "08_thinking": ["thinking 'You'", "content  'Your'", "'reasoning_content': ", "Your name is Marelo."],
    "09_more_sessions_than_slots": ["20 people, 3 slots, 17 parked", "Your name is Ilmera.", "tokens restored"],
    "10_shared_documents": ["Your horse is called Bemor.", "155 reused, 1 decoded", "cache [0, 144)", "[0, 144)"],
    "11_endless_chat": [
        "The password is velora.   [128 reused, 21 decoded, 49 evicted; 6 of 30 messages",
        "Your name is Anelda.",
        "You have not told me your favourite drink.",
        "exact: False\nexact once rebuilt: True",
    ],
    "12_summarise_on_evict": [
        "12 messages go. My name is Marelo. My favourite drink is tea. The key is in Tamoli.\n  10 messages go. ",
        "? Your name is Marelo.",
        "? Your favourite drink is tea.",
        "? The key is in Tamoli.",
        "? You have not told me where the map is.",
        "in the window begin with: My name is Marelo.",
    ],
    "13_pool": ["Your name is Ilmera.  the same words: True", "as it comes: Your| name| is|", "17 done, 1 cancelled"],
}


@pytest.mark.parametrize("name", SAID)
def test_an_example_says_what_it_should(name: str) -> None:
    out = run(f"examples/{name}.py")
    for text in SAID[name]:
        assert text in out


def test_every_example_is_tested_short_and_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    # The last serves until Ctrl-C: test_chat_server talks to it.
    assert [example.stem for example in EXAMPLES] == [*SAID, "14_async_chat_server"]
    for example in EXAMPLES:
        assert f"examples/{example.name}" in readme
        assert len(example.read_text().splitlines()) <= (60 if example.stem in SAID else 260)
        assert "--model" in example.read_text()


def test_the_demo_tells_its_story_and_mixes_nothing_up() -> None:
    out = run("-m", "llama_sessions", "demo")
    anna = [line for line in out.splitlines() if line.startswith("    Anna:")]
    ben = [line for line in out.splitlines() if line.startswith("     Ben:")]
    assert any("Your name is Anelda." in line for line in anna)
    assert any("Your name is Borvin." in line for line in ben)
    assert any("The password is velora." in line for line in anna)
    assert any("Your favourite drink is cocoa." in line for line in anna)
    assert any("You have not told me your favourite drink." in line for line in ben)
    assert re.search(r"Anna is parked: \d+ cells freed, \d+ tokens saved", out)
    assert "Your name is Anelda." in out.split("Anna is parked")[1]
    assert "Your list: candles, milk, rope." in out
    assert "Your list: candles, milk, soap." in out
    told, _ = out.split("6. Ben talks on")[1].split("Where everything is")
    for n in (8, 16, 24, 32):
        assert re.search(rf" {n} stories later: 16 of {16 + 2 * n} messages in the window, 70\d tokens in 1024, ", told)
    assert int(re.findall(r"(\d+) gone", told)[-1]) > 2 * 1024
    assert re.findall(r"(Ben|Anna|Ben'): .*\?  +(\S.*?\.)  ", told) == [
        ("Ben", "The password is velora."),
        ("Ben", "Your name is Borvin."),
        ("Ben", "Your list is empty."),
        ("Anna", "Your favourite drink is cocoa."),
        ("Ben'", "Your list: candles, milk, soap."),
    ]
    for line in anna + ben:
        assert re.search(r"\d+ reused +\d+ decoded +[\d.]+ ms$", line), line


def test_an_unknown_model_is_one_clear_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llama_sessions", "demo", "--model", "nowhere.gguf"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "ModelError: cannot read nowhere.gguf: No such file or directory\n"


def test_structures_names_every_module_and_no_other() -> None:
    source = ROOT / "src" / "llama_sessions"
    modules = {
        ".".join(path.relative_to(source).with_suffix("").parts)
        for path in source.rglob("*.py")
        if path.name != "__init__.py"
    }
    table = (ROOT / "docs" / "structures.md").read_text().split("## Data flow")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([\w.]+)`", row)}
    assert named == modules


def test_every_relative_link_of_the_docs_leads_somewhere() -> None:
    for page in [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"


def test_the_repo_names_no_machine() -> None:
    names = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False).stdout.split()
    for name in names:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ""} and path.is_file():
            assert not re.search(r"(?<![\w.])/(?:wo" + r"rk|ho" + r"me|ro" + r"ot)/", path.read_text()), name
