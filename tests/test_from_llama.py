"""A context of our own over the weights of a `llama_cpp.Llama`, which stays as usable as it was."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import llama_cpp
import pytest
from models import model_path
from oracle import oracle_for
from scripted import only_text

from llama_sessions import ContextManager, Engine, LlamaSessionsError, ModelError, OptionError, Session, StateError
from llama_sessions.testing import FakeContext, fake_parts

PROMPT = "Once upon a time"


@pytest.fixture
def llm() -> Iterator[llama_cpp.Llama]:
    llm = llama_cpp.Llama(str(model_path("llama-bpe")), n_ctx=256, n_threads=1, verbose=False)
    yield llm
    llm.close()


def says(llm: llama_cpp.Llama) -> Any:
    return llm.create_completion(PROMPT, max_tokens=5, temperature=0.0)["choices"][0]["text"]


def test_both_work_side_by_side(llm: llama_cpp.Llama) -> None:
    before = says(llm)
    with ContextManager.from_llama(llm, n_ctx=512, max_sessions=2, n_threads=1) as cm:
        session = Session()
        stream = Engine(cm).stream(session, "Who?", max_tokens=6, temperature=0.0)
        next(stream)
        assert says(llm) == before
        rest = list(stream)
        assert rest[-1].reply is not None
        oracle_for(model_path("llama-bpe")).assert_exact(cm.logits(session), cm.tokens(session))
    assert says(llm) == before


def test_it_keeps_the_llama_alive() -> None:
    cm = ContextManager.from_llama(
        llama_cpp.Llama(str(model_path("llama-bpe")), n_ctx=256, n_threads=1, verbose=False), n_ctx=256, n_threads=1
    )
    gc.collect()
    assert Engine(cm).complete("Who?", max_tokens=3, logit_bias=only_text(cm)).n_generated == 3
    cm.close()


def test_a_llama_closed_first_is_said_and_nothing_crashes(llm: llama_cpp.Llama) -> None:
    cm = ContextManager.from_llama(llm, n_ctx=256, n_threads=1)
    session = Session()
    cm.prepare(session)
    llm.close()
    session.add_user("Who?")
    for call in (lambda: cm.prepare(session), cm.stats, lambda: cm.tokens(session)):
        with pytest.raises(StateError, match="the Llama whose weights this manager uses was closed"):
            call()
    with pytest.raises(StateError, match="the vocabulary belongs to a manager that is closed"):
        cm.vocab.tokenize("hello")
    cm.close()
    assert cm.is_closed
    with pytest.raises(OptionError, match="the Llama is closed"):
        ContextManager.from_llama(llm)


@pytest.mark.parametrize("form", [{}, {"grammar": "root ::= [a-z]+"}])
def test_a_llama_closed_under_a_stream_ends_it_with_what_was_said(llm: llama_cpp.Llama, form: Any) -> None:
    cm = ContextManager.from_llama(llm, n_ctx=256, n_threads=1)
    session = Session()
    stream = Engine(cm).stream(session, "Who?", logit_bias=only_text(cm), **form)
    said = next(stream).text + next(stream).text
    llm.close()
    with pytest.raises(StateError, match="the Llama whose weights this manager uses was closed"):
        next(stream)
    assert session.messages[-1] == {"role": "assistant", "content": said}
    del stream
    cm.close()


def test_a_llama_closed_while_a_call_waits_for_its_turn_is_said_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gone, inside, go_on, waits = (threading.Event() for _ in range(4))
    cm = ContextManager.over(replace(fake_parts(), is_gone=gone.is_set))
    first, second = Session(), Session()
    first.add_user("Who?")
    errors: list[str] = []

    def slow_decode(*_: Any) -> int:
        inside.set()
        assert go_on.wait(10)
        return 2

    def call(act: Callable[[], object]) -> None:
        try:
            act()
        except LlamaSessionsError as e:
            errors.append(str(e))

    def fork() -> None:
        waits.set()
        call(lambda: cm.fork(second))

    monkeypatch.setattr(FakeContext, "decode", slow_decode)
    threads = [threading.Thread(target=call, args=(lambda: cm.prepare(first),)), threading.Thread(target=fork)]
    threads[0].start()
    assert inside.wait(10)
    threads[1].start()
    assert waits.wait(10)
    time.sleep(0.05)  # now it stands at the door
    gone.set()
    go_on.set()
    for thread in threads:
        thread.join(10)
    assert len(errors) == 2  # the first call's decode failed
    assert "was closed" in errors[1]
    cm.close()


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        ("model.gguf", {}, "from_llama takes a llama_cpp.Llama, not 'model.gguf'"),
        (None, {"n_gpu_layers": 0}, "n_gpu_layers was decided when the Llama was loaded"),
        (None, {"no_such": 1}, "unknown option 'no_such'"),
        (None, {"n_ctx": 0}, "n_ctx must be"),
    ],
)
def test_wrong_arguments_are_refused(llm: llama_cpp.Llama, given: Any, options: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ContextManager.from_llama(given or llm, **options)


def test_what_sessions_go_without_is_said(llm: llama_cpp.Llama, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"n_ctx": 256, "n_threads": 1}
    with caplog.at_level("WARNING", "llama_sessions"):
        ContextManager.from_llama(llm, **settings).close()
        assert caplog.text == ""
        llm.lora_path = "tuned.gguf"
        ContextManager.from_llama(llm, **settings).close()
        assert "own context: LoRA tuned.gguf\n" in caplog.text
        path = str(model_path("llama-bpe"))
        stretched = llama_cpp.Llama(path, rope_freq_base=1e6, rope_freq_scale=0.5, verbose=False, **settings)
        ContextManager.from_llama(stretched, **settings).close()
        assert "own context: rope_freq_base, rope_freq_scale\n" in caplog.text


def test_a_llama_without_weights_is_refused() -> None:
    llm = llama_cpp.Llama(str(model_path("llama-bpe")), vocab_only=True, verbose=False)
    with pytest.raises(ModelError, match="it has no weights"):
        ContextManager.from_llama(llm)
