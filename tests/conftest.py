"""Fixtures. After every test, `check_integrity()` runs on each manager that the test left open, and closes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from models import model_path

from llama_sessions import ContextManager

# How long an example takes, or its invention, says nothing on a machine that does other things as well.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

opened: list[ContextManager] = []
_original_start = ContextManager._start


def _tracked_start(self: ContextManager, *args: Any) -> None:
    _original_start(self, *args)
    opened.append(self)


ContextManager._start = _tracked_start  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def every_manager_adds_up() -> Iterator[None]:
    opened.clear()
    yield
    managers = list(opened)
    opened.clear()
    for cm in managers:
        if not cm.is_closed:
            cm.check_integrity()
            cm.close()


@pytest.fixture
def load() -> Callable[..., ContextManager]:
    """Load a test model by name with a small context: `load("llama-bpe", n_ctx=512)`."""

    def open_model(
        name: str = "llama-bpe", /, *, model: dict[str, Any] | None = None, **options: Any
    ) -> ContextManager:
        settings: dict[str, Any] = {"n_ctx": 1024, "max_sessions": 4, "n_threads": 1, "n_batch": 256}
        settings.update(options)
        return ContextManager.load(model_path(name, **(model or {})), **settings)

    return open_model


@pytest.fixture(scope="session")
def tiny_chat() -> Path:
    from llama_sessions import builtin_model

    return Path(builtin_model())
