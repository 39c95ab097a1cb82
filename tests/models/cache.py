"""Recipe -> file, written once and kept."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import random_gguf
from random_gguf.weights import write_gguf

from .architectures import ARCHITECTURES
from .recipes import RECIPES, Recipe

DEFAULT_DIRECTORY = Path(__file__).parent / ".cache"


def model_path(name: str, **overrides: Any) -> Path:
    """The GGUF of that name, with some fields of its `Recipe` changed: a file of 1 to 2 MB, written in 10 ms.

    The same arguments give the same bytes. The file's name holds a hash of the recipe and of the code that writes
    it, so a stale one is never used; it appears whole or not at all, so test processes may run side by side. It lies
    in `tests/models/.cache`, or where `LLAMA_SESSIONS_TEST_MODELS` says. Only read it: others share it.

    Raises KeyError for an unknown name, TypeError for an unknown override.
    """
    recipe = dataclasses.replace(RECIPES[name], **overrides)
    path = _directory() / f"{name}-{_digest(recipe)}.gguf"
    if not path.exists():
        hparams, weights = ARCHITECTURES[recipe.arch](recipe)
        write_gguf(
            path,
            recipe.arch,
            hparams=hparams,
            tokenizer=recipe.tokenizer(),
            weights=weights if recipe.with_tensors else [],
            seed=recipe.seed,
        )
    return path


def _directory() -> Path:
    """Where the files lie; made on first use, with a .gitignore of its own."""
    directory = Path(os.environ.get("LLAMA_SESSIONS_TEST_MODELS", DEFAULT_DIRECTORY))
    if not (directory / ".gitignore").exists():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".gitignore").write_text("*\n")
    return directory


def _digest(recipe: Recipe) -> str:
    return hashlib.sha256(_sources() + repr(recipe).encode()).hexdigest()[:12]


@functools.cache
def _sources() -> bytes:
    """All code that decides what is in a file."""
    folders = (Path(__file__).parent, Path(random_gguf.__file__).parent)
    return b"".join(source.read_bytes() for folder in folders for source in sorted(folder.glob("*.py")))
