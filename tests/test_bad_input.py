"""Invariant 8 from the outside: whatever a user passes, the process lives, the error is the right one and says what
to do, and the manager works on.

What might abort runs in a child process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from child import run_child
from models import model_path
from oracle import oracle_for

from llama_sessions import (
    ContextManager,
    ContextOverflow,
    Engine,
    LlamaSessionsError,
    ModelError,
    NoFreeSlot,
    OptionError,
    Pool,
    RadixOptions,
    Session,
    TemplateError,
)

Loader = Callable[..., ContextManager]


@pytest.fixture
def cm(load: Loader) -> ContextManager:
    return load(n_ctx=512, max_sessions=3)


def said(text: Any, **options: Any) -> Session:
    session = Session(**options)
    session.add_user(text)
    return session


def works(cm: ContextManager) -> bool:
    """Whether the manager still gives exact logits to a newcomer, and gives everything back."""
    cm.check_integrity()
    free = cm.slots.n_free
    session = said("Still there?")
    cm.prepare(session)
    oracle_for(model_path("llama-bpe")).assert_exact(cm.logits(session), cm.tokens(session))
    return cm.release(session) and cm.slots.n_free == free


# -- the file


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("/nonexistent/model.gguf", "cannot read .*No such file"),
        (Path(__file__).parent, "is a directory; name a GGUF file in it"),
        (__file__, "is not a GGUF file: it starts with b.*convert the model first"),
        ("/dev/null", "no regular file"),
        ("", "directory|cannot read"),
        ("a\0b", "cannot read"),
    ],
)
def test_what_is_no_gguf_file_is_a_model_error(path: Any, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        ContextManager.load(path)


@pytest.mark.parametrize("path", [None, 5, b"bytes", ["x"]])
def test_what_is_no_path_is_an_option_error(path: Any) -> None:
    with pytest.raises(OptionError, match="must be text or a path"):
        ContextManager.load(path)


def test_an_empty_file_and_a_pipe_are_refused_and_do_not_hang(tmp_path: Path) -> None:
    empty, pipe = tmp_path / "empty.gguf", tmp_path / "pipe.gguf"
    empty.touch()
    os.mkfifo(pipe)
    with pytest.raises(ModelError, match="not a GGUF file: it starts with b''"):
        ContextManager.load(empty)
    with pytest.raises(ModelError, match="no regular file"):
        ContextManager.load(pipe)


def test_a_model_without_weights_or_without_chat_is_a_model_error_and_silent() -> None:
    out = run_child("""
        import os
        from models import model_path
        from llama_sessions import ContextManager, ModelError

        os.dup2(1, 2)  # what anybody writes to stderr is seen below
        for name in ("vocab-only", "embedding"):
            try:
                ContextManager.load(model_path(name), n_threads=1)
            except ModelError as e:
                print(name, "|", e, flush=True)
    """)
    lines = out.splitlines()
    assert len(lines) == 2, out
    assert "tensor 'token_embd.weight' not found" in lines[0]
    assert "damaged" in lines[0]
    assert "keeps no KV to chat with (an embedding model?); use a decoder-only model" in lines[1]


DAMAGE = """
    import os, random, signal, sys
    from models import model_path
    from llama_sessions import ContextManager, ModelError, LlamaSessionsError, Session

    name, target, seed = sys.argv[1:4]
    data = model_path(name).read_bytes()
    n_header = data.find(b"token_embd.weight") + 20_000
    rng = random.Random(int(seed))

    def damaged(kind):
        broken = bytearray(data)
        if kind == "cut":
            return broken[: rng.randrange(4, len(broken))]
        for _ in range(int(kind)):
            broken[rng.randrange(4, n_header)] = rng.randrange(256)
        return broken

    def attempt():
        try:
            cm = ContextManager.load(target, n_ctx=256, max_sessions=2, n_threads=1)
            session = Session()
            session.add_user("Hello")
            cm.prepare(session)
            return 0
        except LlamaSessionsError as e:
            return 10 if str(e) else 11
        except BaseException as e:
            print(repr(e), flush=True)
            return 12

    counts = {}
    for kind in ["cut", "1", "8", "64"] * int(sys.argv[4]):
        with open(target, "wb") as f:
            f.write(damaged(kind))
        pid = os.fork()  # llama.cpp has not run in this process, so the child is whole
        if pid == 0:
            signal.alarm(20)
            os._exit(attempt())
        _, status = os.waitpid(pid, 0)
        assert os.WIFEXITED(status), f"seed {seed}: {kind} ended with signal {os.WTERMSIG(status)}; see {target}"
        counts[kind, os.WEXITSTATUS(status)] = counts.get((kind, os.WEXITSTATUS(status)), 0) + 1
    print(counts)
"""


@pytest.mark.parametrize(("name", "seed"), [("llama-bpe", 1), ("gemma3", 2)])
def test_a_cut_or_damaged_file_is_a_model_error_or_loads(name: str, seed: int, tmp_path: Path) -> None:
    counts = eval(run_child(DAMAGE, name, str(tmp_path / "damaged.gguf"), str(seed), "8"))
    assert {code for _, code in counts} <= {0, 10}
    assert counts["cut", 10] == 8
    assert sum(n for (_, code), n in counts.items() if code == 10) > 16


@pytest.mark.xfail(strict=True, reason="llama.cpp asserts on it while loading (llama-vocab.cpp: GGML_ASSERT)")
def test_a_vocabulary_with_the_same_token_twice_is_a_model_error(tmp_path: Path) -> None:
    run_child(
        """
        import sys
        from models import model_path
        from llama_sessions import ContextManager, ModelError

        data = model_path("llama-bpe", n_vocab=700).read_bytes()
        assert b"[PAD690]" in data and b"[PAD691]" in data
        with open(sys.argv[1], "wb") as f:
            f.write(data.replace(b"[PAD691]", b"[PAD690]"))
        try:
            ContextManager.load(sys.argv[1])
        except ModelError:
            pass
        """,
        str(tmp_path / "twice.gguf"),
    )


# -- options of the context


BAD_LOAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    ({"n_ctx": 0}, "n_ctx must be from 1 to"),
    ({"n_ctx": -1}, "n_ctx must be from 1 to"),
    ({"n_ctx": 2**40}, "n_ctx must be from 1 to 2147483392, not 1099511627776"),
    ({"n_ctx": 1.5}, "n_ctx must be an integer"),
    ({"n_ctx": "512"}, "n_ctx must be an integer"),
    ({"n_ctx": True}, "n_ctx must be an integer"),
    ({"n_ctx": 1}, "n_ctx=1 is below the 4 sequences of max_sessions=2; raise n_ctx"),
    ({"n_ctx": 255, "max_sessions": 254, "n_batch": 256}, "n_ctx=255 is below the 256 sequences"),
    ({"n_ctx": 10**9}, r"n_ctx=1000000000 needs [\d.]+ GiB of KV and this machine has [\d.]+ GiB; lower n_ctx"),
    ({"n_ctx": 10**9, "kv_unified": False}, r"n_ctx=1000000000 needs [\d.]+ GiB"),
    ({"max_sessions": 0}, "max_sessions must be from 1 to 254"),
    ({"max_sessions": -3}, "max_sessions must be from 1 to 254"),
    ({"max_sessions": 255}, "max_sessions must be from 1 to 254"),
    ({"max_sessions": None}, "max_sessions must be an integer"),
    ({"n_batch": 0}, "n_batch must be from 1"),
    ({"n_batch": -1}, "n_batch must be from 1"),
    ({"n_batch": 2**40}, "n_batch must be from 1"),
    ({"n_batch": 4, "max_sessions": 16}, "n_batch=4 is below the 18 sequences .* raise n_batch to at least 18"),
    ({"n_ubatch": 0}, "n_ubatch must be from 1"),
    ({"n_ubatch": 2**40}, "n_ubatch must be from 1"),
    ({"n_threads": 0}, "n_threads must be from 1 to 512"),
    ({"n_threads": -1}, "n_threads must be from 1 to 512"),
    ({"n_threads": 10**6}, "n_threads must be from 1 to 512"),
    ({"n_gpu_layers": -2}, "n_gpu_layers must be from -1"),
    ({"n_gpu_layers": 2**40}, "n_gpu_layers must be from -1"),
    ({"type_k": 99}, "type_k must be from 0 to 63"),
    ({"type_k": 4}, "type_k=4 is no KV type of llama.cpp; known ggml types"),
    ({"type_v": "f16"}, "type_v must be an integer"),
    ({"flash_attn": "yes"}, "flash_attn must be"),
    ({"flash_attn": None}, "flash_attn must be"),
    ({"swa_full": 1}, "swa_full must be True or False"),
    ({"kv_unified": "no"}, "kv_unified must be True or False"),
    ({"headroom": -1}, "headroom must be at least 0"),
    ({"headroom": 256}, "headroom must be from 0 to 255"),
    ({"n_sink": -1}, "n_sink must be at least 0"),
    ({"eviction": "lru"}, "eviction must be one of 'message', 'fifo'"),
    ({"overflow": "cut"}, "overflow must be one of 'shift', 'gap', 'reprefill'"),
    ({"no_think": 1}, "no_think must be True or False"),
    ({"system_fallback": "assistant"}, "system_fallback must be one of None, 'user'"),
    ({"radix": 5}, "radix must be True, False or RadixOptions"),
    ({"idle_park_after_s": -1}, "idle_park_after_s must be a finite number at least 0"),
    ({"idle_park_after_s": float("nan")}, "idle_park_after_s must be a finite number"),
    ({"log": 1}, "log must be True or False"),
    ({"nctx": 512}, "unknown option 'nctx'; known: n_ctx, max_sessions"),
    ({"chat_template": 5}, r"chat_template must be text \(str\), not int"),
]


@pytest.mark.parametrize(("options", "match"), BAD_LOAD_OPTIONS, ids=lambda v: str(v)[:50])
def test_an_option_out_of_range_is_refused_with_its_bounds(options: dict[str, Any], match: str) -> None:
    with pytest.raises(OptionError, match=match):
        ContextManager.load(model_path("llama-bpe"), **{"n_ctx": 256, "max_sessions": 2, "n_threads": 1, **options})


def test_options_of_the_cache_are_checked_too() -> None:
    for options in ({"max_bytes": 0}, {"min_tokens": 0}, {"policy": "random"}):
        with pytest.raises(OptionError, match=next(iter(options))):
            RadixOptions(**options)  # type: ignore[arg-type]


def test_options_at_their_limits_and_against_one_another_live_or_are_refused_but_never_abort() -> None:
    out = run_child("""
        import itertools
        from models import model_path
        from llama_sessions import ContextManager, LlamaSessionsError, Session

        n_loaded = 0
        for name in ("llama-bpe", "gemma3", "mamba"):
            for n_ctx, max_sessions, n_batch, unified in itertools.product(
                (3, 300), (1, 2, 254), (4, 256, 2**20), (True, False)
            ):
                try:
                    cm = ContextManager.load(
                        model_path(name), n_ctx=n_ctx, max_sessions=max_sessions, n_batch=n_batch,
                        n_ubatch=2**20, kv_unified=unified, n_threads=1,
                    )
                except LlamaSessionsError:
                    continue
                session = Session()
                session.add_user("Hello")
                cm.prepare(session)
                cm.append(cm.fork(session) if max_sessions > 1 else session, 65)
                cm.check_integrity()
                cm.close()
                n_loaded += 1
        for options in ({"n_threads": 512}, {"n_ubatch": 1}, {"type_k": 2}, {"type_v": 8, "flash_attn": False},
                        {"type_k": 30}, {"type_k": 0, "type_v": 0}):
            try:
                with ContextManager.load(model_path("llama-bpe"), **{"n_ctx": 256, "n_threads": 1, **options}) as cm:
                    session = Session()
                    session.add_user("Hello")
                    cm.prepare(session)
            except LlamaSessionsError as e:
                print(type(e).__name__, "|", e)
        # A recurrent model keeps no cells: no length is too long for the machine.
        with ContextManager.load(model_path("mamba"), n_ctx=10**9, max_sessions=2, n_threads=1) as cm:
            session = Session()
            session.add_user("Hello")
            cm.prepare(session)
        print(n_loaded)
    """)
    *errors, n_loaded = out.splitlines()
    assert [line.split(" |")[0] for line in errors] == ["ModelError", "ModelError"]
    assert "quantized V cache requires flash_attn" in errors[1]
    assert int(n_loaded) > 40


def test_a_failed_load_leaves_nothing_behind(load: Loader) -> None:
    for options in ({"headroom": 10**6}, {"chat_template": "{% if"}, {"type_k": 2}):
        with pytest.raises(LlamaSessionsError):
            load(**options)
    assert works(load())


# -- a context of the user's own


def test_a_context_that_is_none_is_refused() -> None:
    run_child("""
        from llama_sessions import ContextManager, OptionError

        for ctx in (None, 0, 5, 4095, -1):
            try:
                ContextManager(ctx, ctx)
            except OptionError as e:
                assert "ctx must be a live llama.cpp pointer, not NULL" in str(e), e
            else:
                raise SystemExit(f"{ctx!r} was let through")
        for ctx in ("ctx", b"ctx", 1.5, object(), [], {}, True, ContextManager):
            try:
                ContextManager(ctx, ctx)
            except OptionError as e:
                assert "ctx must be a pointer from llama_cpp's own functions, not" in str(e), e
            else:
                raise SystemExit(f"{ctx!r} was let through")
    """)


def test_a_vocabulary_that_is_none_or_of_another_model_is_refused() -> None:
    run_child("""
        import ctypes, llama_cpp
        from models import model_path
        from llama_sessions import ContextManager, OptionError, ModelError, Session

        def bare(name, **settings):
            model = llama_cpp.llama_model_load_from_file(
                str(model_path(name)).encode(), llama_cpp.llama_model_default_params()
            )
            p = llama_cpp.llama_context_default_params()
            p.n_ctx, p.n_threads, p.n_threads_batch = 256, 1, 1
            for key, value in settings.items():
                setattr(p, key, value)
            return llama_cpp.llama_init_from_model(model, p), llama_cpp.llama_model_get_vocab(model)

        ctx, vocab = bare("llama-bpe")
        other_ctx, other_vocab = bare("gemma3")
        for wrong, match in (
            (None, "vocab must be a live"), (0, "vocab must be a live"), ("v", "vocab must be a pointer"),
            (other_vocab, "vocab is not that of the context's model"),
        ):
            try:
                ContextManager(ctx, wrong)
            except OptionError as e:
                assert match in str(e), e
            else:
                raise SystemExit(f"{wrong!r} was let through")
        for unfit in (bare("embedding"), bare("llama-bpe", attention_type=1)):  # no memory; not causal
            try:
                ContextManager(*unfit)
            except ModelError as e:
                assert "keeps no KV to chat with" in str(e) and "use a decoder-only model" in str(e), e
            else:
                raise SystemExit("an embedding context was let through")
        for options in ({"n_ctx": 5}, {"chat_template": 5}, {"headroom": -1}):
            try:
                ContextManager(ctx, vocab, **options)
            except OptionError:
                continue
            raise SystemExit(f"{options} was let through")
        for given in ((ctx, vocab), (ctypes.c_void_p(ctx), ctypes.c_void_p(vocab))):
            with ContextManager(*given) as cm:
                session = Session()
                session.add_user("Hello")
                cm.prepare(session)
    """)


# -- what is said


@pytest.mark.parametrize(
    ("message", "match"),
    [
        ({"role": "king", "content": "x"}, "message 0 has the role 'king'; known roles: system, user, assistant, tool"),
        ({"content": "x"}, "message 0 has the role None"),
        ({"role": ["user"], "content": "x"}, "message 0 has the role"),
        ({"role": np.array(["user", "x"]), "content": "x"}, "message 0 has the role"),
        ({"role": "user"}, "content of message 0 must be text"),
        ({"role": "user", "content": 5}, "content of message 0 must be text"),
        ({"role": "user", "content": b"x"}, "content of message 0 must be text"),
        ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "content of message 0 must be text"),
        ({"role": "assistant", "content": None}, "content of message 0 must be text"),
        ({"role": "system", "content": 5}, "content of message 0 must be text"),
        ({"role": "user", "content": "\ud800"}, "message 0 holds a lone surrogate at character 0"),
        ("hello", "message 0 must be a dict"),
        (None, "message 0 must be a dict"),
    ],
)
def test_a_message_that_is_none_is_refused_by_its_number(cm: ContextManager, message: Any, match: str) -> None:
    session = Session()
    session.messages.append(message)
    for call in (cm.prepare, cm.preview, cm.begin):
        with pytest.raises(OptionError, match=match):
            call(session)
    assert cm.stats().slots_free == 3
    assert session.messages == [message]
    assert works(cm)


def test_fields_of_ones_own_beside_role_and_content_hurt_nobody(cm: ContextManager) -> None:
    session = Session()
    session.messages.append({"role": "user", "content": "Hello", 5: 6, "vector": np.arange(3.0), "None": None})
    cm.prepare(session)
    session.messages[0]["vector"] = np.arange(4.0)
    cm.prepare(session)
    Engine(cm).chat(session, "Again", max_tokens=2)
    assert works(cm)


@pytest.mark.parametrize("messages", [None, 5, "text", {}, ()])
def test_a_message_list_that_is_none_is_refused(cm: ContextManager, messages: Any) -> None:
    session = Session()
    session.messages = messages
    engine = Engine(cm)
    for call in (cm.prepare, engine.chat, lambda s: engine.chat(s, "x"), engine.regenerate):
        with pytest.raises(OptionError, match=r"session\.messages must be a list of messages"):
            call(session)
    assert works(cm)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s: s.add("king", "x"), "role 'king'"),
        (lambda s: s.add_user(5), "content of the message must be text"),
        (lambda s: s.add_user("\udfff"), "lone surrogate .* decode the bytes it came from with errors='replace'"),
        (lambda s: s.add_assistant("x", trusted=1), "trusted must be True or False"),
        (lambda s: s.add_tool_result(None), "must be text"),
        (lambda s: Session(5), "system must be text"),
        (lambda s: Session("\ud800"), "system holds a lone surrogate"),
        (lambda s: Session(namespace=5), "namespace must be text"),
    ],
)
def test_a_session_checks_what_it_is_given_at_the_door(call: Any, match: str) -> None:
    session = Session()
    with pytest.raises(OptionError, match=match):
        call(session)
    assert session.messages == []


@pytest.mark.parametrize(
    "options",
    [
        {"tools": 5},
        {"tools": [5]},
        {"template_kwargs": 5},
        {"template_kwargs": {5: 5}},
        {"template_kwargs": {"self": 5}},
        {"template_kwargs": {"messages": 5}},
        {"template_kwargs": {"add_generation_prompt": False}},
    ],
    ids=str,
)
def test_tools_and_template_variables_that_cannot_be_are_option_errors(cm: ContextManager, options: Any) -> None:
    with pytest.raises(OptionError, match=r"tools must be|template_kwargs must"):
        cm.prepare(said("x", **options))
    assert works(cm)


@pytest.mark.parametrize(
    "text", ["a\0b", "\0", "", "\ufeff\u202e\uffff\U0010ffff", "\r\n\t", "".join(map(chr, range(256)))]
)
@pytest.mark.parametrize("model", ["llama-bpe", "llama-spm"])
def test_odd_characters_are_text_like_any_other(load: Loader, model: str, text: str) -> None:
    cm, oracle = load(model), oracle_for(model_path(model))
    session = said(text)
    cm.prepare(session)
    assert text.encode() in oracle.detokenize(cm.tokens(session))
    oracle.assert_exact(cm.logits(session), cm.tokens(session))


@pytest.mark.parametrize("char", ["a", " ", ".", "7", "\n", "漢", "\0"])
def test_a_hundred_thousand_times_one_character_is_too_long_and_nothing_else(cm: ContextManager, char: str) -> None:
    with pytest.raises(ContextOverflow) as e:
        cm.prepare(said(char * 100_000))
    assert e.value.needed > 100_000 > e.value.available == 512
    assert works(cm)


def test_ten_megabytes_are_too_long_and_nothing_else(cm: ContextManager) -> None:
    with pytest.raises(ContextOverflow, match="raise n_ctx") as e:
        cm.prepare(said("hello <|im_end|> world " * (10 * 2**20 // 23)))
    assert e.value.needed > 10**6
    assert works(cm)


def test_a_tokenizer_that_recurses_survives_long_runs_on_any_stack() -> None:
    run_child("""
        import threading
        from models import model_path
        from llama_sessions import ContextManager, ContextOverflow, Session

        cm = ContextManager.load(model_path("llama-bpe", pre="deepseek-llm"), n_ctx=256, max_sessions=2, n_threads=1)
        outcomes = []

        def prepare():
            session = Session()
            session.add_user("a" * 100_000)
            try:
                cm.prepare(session)
            except ContextOverflow as e:
                outcomes.append(e.needed)

        prepare()
        threading.stack_size(256 * 1024)
        thread = threading.Thread(target=prepare)
        thread.start()
        thread.join()
        assert len(outcomes) == 2 and outcomes[0] == outcomes[1] > 10_000, outcomes
    """)


def test_a_system_prompt_longer_than_the_context_is_refused_wherever_it_stands(cm: ContextManager) -> None:
    long = "Be brief. " * 300
    with pytest.raises(ContextOverflow, match="the system prompt"):
        cm.set_system(long)
    with pytest.raises(ContextOverflow, match="the conversation"):
        cm.prepare(said("x", system=long))
    with pytest.raises(ContextOverflow):
        cm.prepare(Session(long))
    assert cm.stats().slots_free == 3
    assert cm.prefix.text is None
    assert works(cm)


@pytest.mark.parametrize("system", [5, b"x", "\ud800"])
def test_a_system_text_that_is_none_is_refused_at_prepare(cm: ContextManager, system: Any) -> None:
    session = said("x")
    session.system = system
    with pytest.raises(OptionError, match="the session's system text"):
        cm.prepare(session)
    assert works(cm)


# -- templates


@pytest.mark.parametrize("template", ["{% if", "{{ messages | nofilter }}", "{% endfor %}", "{{"])
def test_a_template_that_does_not_parse_is_refused_at_the_load(load: Loader, template: str) -> None:
    with pytest.raises(TemplateError, match=r"does not parse, line 1: .*; pass chat_template=\.\.\."):
        load(chat_template=template)


@pytest.mark.parametrize(
    ("template", "match"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[99].content.x }}", "UndefinedError"),
        ("{{ undefined_function() }}", "'undefined_function' is undefined"),
        ("{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{% include 'x' %}", "TemplateNotFound"),
        ("", "rendered to nothing"),
    ],
)
def test_a_template_that_fails_is_a_template_error_and_the_manager_works_on(
    load: Loader, template: str, match: str
) -> None:
    cm = load(chat_template=template)
    session = said("Hello")
    for call in (cm.prepare, cm.preview):
        with pytest.raises(TemplateError, match=match):
            call(session)
    with pytest.raises(TemplateError):
        cm.set_system("Be brief.")
    with pytest.raises(TemplateError):
        Engine(cm).chat(session, "Again")
    cm.check_integrity()
    assert cm.stats().slots_free == 4
    assert session.messages == [{"role": "user", "content": "Hello"}]


def test_a_template_that_fails_on_some_messages_serves_the_others(load: Loader) -> None:
    cm = load(
        chat_template="{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('bad') }}{% endif %}"
        "<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
    )
    good, bad = said("good"), said("good")
    cm.prepare(good)
    cm.prepare(bad)
    logits = cm.logits(bad).copy()
    bad.messages[0]["content"] = "bad"
    with pytest.raises(TemplateError):
        cm.prepare(bad)
    np.testing.assert_array_equal(cm.logits(bad), logits)
    assert works(cm)


def test_a_template_that_refuses_the_system_role_says_what_to_do(load: Loader) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
    )
    cm = load(chat_template=template)
    with pytest.raises(TemplateError, match="pass system_fallback='user'"):
        cm.prepare(said("x", system="Be brief."))
    assert works(cm)
    cm = load(chat_template=template, system_fallback="user")
    cm.prepare(said("x", system="Be brief."))


# -- calls


def test_without_a_free_slot_the_error_names_the_remedy(cm: ContextManager) -> None:
    sessions = [said(f"{i}") for i in range(3)]
    for session in sessions:
        cm.prepare(session)
        cm.pin(session)
    for call in (cm.prepare, cm.begin, Engine(cm).chat):
        with pytest.raises(NoFreeSlot, match="3 of 3 in use; raise max_sessions, release or park a session"):
            call(said("one more"))
    cm.release(sessions.pop())
    assert works(cm)


@pytest.mark.parametrize(
    "token", [-1, -(2**31), 640, 2**31, 2**63, 2**200, 0.5, float("nan"), "1", None, np.float32(1)]
)
def test_a_token_out_of_range_reaches_no_batch(cm: ContextManager, token: Any) -> None:
    session = said("Hello")
    cm.prepare(session)
    n_decodes = cm.stats().n_decodes
    with pytest.raises(OptionError, match="token must be"):
        cm.append(session, token)
    assert cm.stats().n_decodes == n_decodes
    assert works(cm)


@pytest.mark.parametrize("token", [0, 639])
def test_the_first_and_the_last_token_are_in_range(cm: ContextManager, token: int) -> None:
    session = said("Hello")
    cm.prepare(session)
    cm.append(session, token)
    assert works(cm)


@pytest.mark.parametrize(
    "hook",
    [
        lambda messages, session: 1 / 0,
        lambda messages: messages,
        lambda messages, session: [object()],
        lambda messages, session: "x",
        lambda messages, session: messages.append(messages),
        lambda messages, session: session.messages.clear(),
    ],
)
def test_a_before_encode_that_misbehaves_hurts_its_own_call_at_most(cm: ContextManager, hook: Any) -> None:
    other = said("other")
    cm.prepare(other)
    logits = cm.logits(other).copy()
    cm.set_hook("before_encode", hook)
    with suppress(LlamaSessionsError, ZeroDivisionError, TypeError):
        cm.prepare(said("Hello"))
    cm.clear_hook("before_encode")
    np.testing.assert_array_equal(cm.logits(other), logits)
    assert works(cm)


@pytest.mark.parametrize(
    "hook",
    [
        lambda done, total, session: 1 / 0,
        lambda done: True,
        lambda done, total, session: session.messages.clear(),
        lambda done, total, session: session.add_user("more"),
    ],
)
def test_an_on_progress_that_misbehaves_hurts_its_own_call_at_most(cm: ContextManager, hook: Any) -> None:
    session = said("Hello")
    cm.set_hook("on_progress", hook)
    with suppress(ZeroDivisionError, TypeError):
        cm.prepare(session)
    cm.clear_hook("on_progress")
    assert works(cm)
    cm.prepare(session)
    if session.messages:
        oracle_for(model_path("llama-bpe")).assert_exact(cm.logits(session), cm.tokens(session))


@pytest.mark.parametrize("name", ["before_encode", "on_progress", "sink_fn"])
def test_a_hook_that_raises_stop_iteration_ends_no_reply_without_a_word(cm: ContextManager, name: str) -> None:
    session, engine = said("Hello"), Engine(cm)
    session.add_assistant("Hi.")
    cm.set_hook(name, lambda *args: next(iter([])))
    for call in (
        lambda: engine.chat(session, "x"),
        lambda: list(engine.stream(session, "x")),
        lambda: cm.prepare(session),
    ):
        with pytest.raises(RuntimeError, match="raised StopIteration"):
            call()
        assert len(session.messages) == 2
    with Pool(cm) as pool, pytest.raises(RuntimeError, match="raised StopIteration"):
        list(pool.submit(session, "x"))
    cm.clear_hook(name)
    assert len(session.messages) == 2
    assert works(cm)


def test_sampling_at_the_ends_of_what_floats_hold_never_aborts() -> None:
    run_child("""
        from models import model_path
        from llama_sessions import ContextManager, Engine, OptionError

        cm = ContextManager.load(model_path("llama-bpe"), n_ctx=512, max_sessions=2, n_threads=1)
        engine = Engine(cm)
        greedy = engine.complete("Hello", max_tokens=4, temperature=0).tokens
        for temperature in (5e-324, 1e-45, 1e-38, 1e-21, 1e-6):
            assert engine.complete("Hello", max_tokens=4, temperature=temperature).tokens == greedy, temperature
        for options in (
            {"temperature": 1e308}, {"repeat_penalty": 100}, {"repeat_penalty": 0.01}, {"frequency_penalty": -100},
            {"presence_penalty": 100}, {"min_p": 5e-324}, {"top_p": 5e-324}, {"top_k": 2**31 - 1}, {"top_k": 0},
            {"logit_bias": {1: 1e30}}, {"logit_bias": {1: -1e30}}, {"logit_bias": {1: 1e30, 2: 1e30}},
            {"logit_bias": dict.fromkeys(range(640), float("-inf"))}, {"logit_bias": {}}, {"stop": ["x"] * 10_000},
            {"seed": 2**32 - 2}, {"top_p": 0, "min_p": 1, "top_k": 1},
        ):
            try:
                reply = engine.complete("Hello", **{"max_tokens": 4, **options})
            except OptionError as e:
                assert "no token can be sampled" in str(e), e
            else:
                assert reply.n_generated <= 4
            cm.check_integrity()
            assert cm.slots.n_free == 2
    """)
