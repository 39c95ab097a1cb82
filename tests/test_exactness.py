"""Invariant 2, path by path: by whatever way the KV came, the logits are those of a fresh context's prefill.

Every test runs over each kind of memory and asserts two things: which way was taken, and that the logits are right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from models import model_path
from oracle import Oracle, oracle_for
from templates import CONTROLS, REFUSING, TEMPLATES, PlainVocab

from llama_sessions import ContextManager, Engine, MemoryKind, NextToken, PromptChunk, Session
from llama_sessions.kv.row import common_prefix

SYSTEM = "You answer in one short sentence. Never lie."
LONG = "It was a bright cold day in April, and the clocks were striking thirteen. "


@dataclass
class World:
    """A manager and the oracle of its model."""

    cm: ContextManager
    oracle: Oracle
    neighbour: Session | None = None

    @property
    def trims(self) -> bool:
        """Whether a row of this memory can be cut back at all."""
        return not self.cm.capabilities.keeps_state

    def exact(self, session: Session) -> None:
        """The session's logits are those of a fresh prefill of its tokens."""
        self.oracle.assert_exact(self.cm.logits(session), self.cm.tokens(session))

    def prepare(self, session: Session) -> list[str]:
        """Prepare, prove it, and say where the tokens came from."""
        n = self.cm.prepare(session)
        assert n == session.n_past == len(self.cm.tokens(session))
        report = session.last_prepare
        assert report is not None
        assert [s.p0 for s in report.stretches] == [0, *(s.p1 for s in report.stretches)][:-1]
        assert report.n_tokens == report.n_reused + report.n_decoded == n
        assert report.exact
        self.exact(session)
        return [s.source for s in report.stretches]


@dataclass(frozen=True)
class Variant:
    model: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.model, *(f"{k}={v}" for k, v in self.options.items())])


STREAMS = {"kv_unified": False, "n_ctx": 6 * 512}
VARIANTS = [
    Variant("llama-bpe"),
    Variant("llama-bpe", STREAMS),
    Variant("llama-spm"),
    Variant("llama-yarn"),
    Variant("gemma3"),
    Variant("gemma3", {"swa_full": False}),
    Variant("gemma3", STREAMS),
    Variant("gemma3", {**STREAMS, "swa_full": False}),
    Variant("mamba"),
    Variant("mamba", STREAMS),
    Variant("hybrid"),
    Variant("hybrid", STREAMS),
]


@pytest.fixture(params=VARIANTS, ids=str)
def world(request: pytest.FixtureRequest, load: Callable[..., ContextManager]) -> World:
    variant = request.param
    return World(load(variant.model, headroom=0, **variant.options), oracle_for(model_path(variant.model)))


def kept_its_row(session: Session, n_before: int) -> bool:
    """Whether the last prepare kept all `n_before` tokens of the session's own row."""
    report = session.last_prepare
    return report is not None and report.stretches[0].source == "row" and report.stretches[0].p1 == n_before


def talk(session: Session, *texts: str) -> Session:
    """Add messages, user and assistant in turn, going on where the session stands."""
    for text in texts:
        last = session.messages[-1]["role"] if session.messages else "assistant"
        session.add("user" if last == "assistant" else "assistant", text)
    return session


def test_the_first_turn_shares_the_prefix_and_is_exact(world: World) -> None:
    n_prefix = world.cm.set_system(SYSTEM)
    session = talk(Session(), "Who are you?")
    assert world.prepare(session) == ["prefix", "decode"]
    assert session.last_prepare.n_reused == n_prefix > 0


def test_the_first_turn_without_a_system_text_decodes_everything(world: World) -> None:
    session = talk(Session(), "Who are you?")
    assert world.prepare(session) == ["decode"]
    assert world.cm.stats().n_native_operations == 0


def test_the_tenth_turn_adds_to_the_row_and_is_exact(world: World) -> None:
    world.cm.set_system(SYSTEM)
    session = talk(Session(), "Who are you?")
    world.cm.prepare(session)
    for turn in range(8):
        talk(session, f"Answer number {turn}.", f"And what is {turn} plus {turn}?")
        world.cm.prepare(session)
    n_before = session.n_past
    talk(session, "Nobody.", "Then who?")
    assert world.prepare(session) == ["row", "decode"]
    assert session.last_prepare.n_reused == n_before


def test_a_turn_after_appended_tokens_decodes_nothing_of_the_reply_again(world: World) -> None:
    session = talk(Session(), "Who are you?")
    world.cm.prepare(session)
    reply = [int(world.cm.vocab.tokenize(char)[-1]) for char in "the time"]  # not how the tokenizer would cut it
    assert len(world.cm.vocab.tokenize("the time")) < len(reply)
    n_prompt = session.n_past
    for token in reply:
        world.cm.append(session, token)
    world.exact(session)
    n_before = session.n_past
    session.add_assistant("the time")
    session.add_user("Then who?")
    assert world.prepare(session) == ["row", "decode"]
    # Mistral's template writes a space between the prompt and a reply, which nobody had appended.
    spaced = world.cm.vocab.adds_space_prefix
    assert session.last_prepare.n_reused == (n_prompt if spaced else n_before)


def replace_first(session: Session) -> None:
    session.messages[0] = {"role": "user", "content": "Quite another beginning"}


def edit_in_place(session: Session) -> None:
    session.messages[2]["content"] += " Tell me now!"


def drop_last_exchange(session: Session) -> None:
    del session.messages[1:3]


def insert_exchange(session: Session) -> None:
    session.messages[2:2] = [{"role": "user", "content": "Wait."}, {"role": "assistant", "content": "I wait."}]


@pytest.mark.parametrize("edit", [replace_first, edit_in_place, drop_last_exchange, insert_exchange])
def test_an_edited_history_keeps_what_still_holds_and_is_exact(world: World, edit: Callable[[Session], None]) -> None:
    n_prefix = world.cm.set_system(SYSTEM)
    session = talk(Session(), "Who are you?", "I am a clock.", "What time is it?", "Thirteen.", "Never!")
    world.cm.prepare(session)
    before = world.cm.tokens(session)
    edit(session)
    sources = world.prepare(session)
    n_common = common_prefix(before, world.cm.tokens(session))
    assert n_prefix <= n_common < session.n_past
    report = session.last_prepare
    if world.trims and world.cm.stats().n_cells_unique:  # a row this short lies within every window
        assert sources == ["row", "decode"]
        assert report.n_reused == n_common
    else:  # a state cannot go back, but the prefix has one of its own
        assert sources == ["prefix", "decode"]
        assert report.n_reused == n_prefix


def test_dropping_the_end_of_the_history_decodes_one_token_and_is_exact(world: World) -> None:
    session = talk(Session(), "Who are you?")
    world.cm.prepare(session)
    n_first = session.n_past
    talk(session, "I am a clock.", "What time is it?")
    world.cm.prepare(session)
    del session.messages[1:]
    sources = world.prepare(session)
    assert session.n_past == n_first
    if world.trims:
        assert sources == ["row", "decode"]
        assert session.last_prepare.n_decoded == 1
    else:
        assert sources == ["decode"]


def test_preparing_an_unchanged_session_again_gives_the_same_logits(world: World) -> None:
    session = talk(Session(), "Who are you?")
    world.cm.prepare(session)
    first = world.cm.logits(session).copy()
    n_decodes = world.cm.stats().n_decodes
    assert world.prepare(session) == ["row"]
    assert world.cm.stats().n_decodes == n_decodes
    np.testing.assert_array_equal(world.cm.logits(session), first)


@pytest.mark.parametrize("change", ["set_system", "session.system", "none", "cleared"])
def test_a_changed_system_text_is_exact(world: World, change: str) -> None:
    world.cm.set_system(SYSTEM)
    session = talk(Session(), "Who are you?", "I am a clock.", "What time is it?")
    world.cm.prepare(session)
    plain = world.cm.tokens(talk(Session(""), "x"))
    assert len(plain) == 0
    if change == "set_system":
        n_prefix = world.cm.set_system("You answer in rhymes. Never lie.")
        assert world.prepare(session)[-1] == "decode"
        assert session.last_prepare.n_reused >= (n_prefix if not world.trims else 1)
        assert "rhymes" in world.oracle.detokenize(world.cm.tokens(session)).decode()
    elif change == "session.system":
        session.system = "You are a poet."
        assert world.prepare(session)[-1] == "decode"
        text = world.oracle.detokenize(world.cm.tokens(session)).decode()
        assert "poet" in text
        assert "Never lie" not in text
    else:
        if change == "none":
            session.system = ""
        else:
            assert world.cm.set_system("") == 0
        assert world.prepare(session)[-1] == "decode"
        assert "Never lie" not in world.oracle.detokenize(world.cm.tokens(session)).decode()


def test_a_regenerated_reply_starts_from_exact_logits(world: World) -> None:
    engine = Engine(world.cm)
    session = Session()
    first = engine.chat(session, "Who are you?", max_tokens=12, temperature=0.0)
    n_prompt = first.n_prompt
    second = engine.regenerate(session, max_tokens=12, temperature=0.0)
    assert second.n_prompt == n_prompt
    assert second.n_decoded == (1 if world.trims else n_prompt)
    assert second.tokens == first.tokens
    world.exact(session)
    assert len(session.messages) == 2


def test_a_fork_and_its_parent_go_on_in_turn(world: World) -> None:
    world.cm.set_system(SYSTEM)
    parent = talk(Session(), "Who are you?")
    world.cm.prepare(parent)
    before = world.cm.stats()
    child = world.cm.fork(parent)
    after = world.cm.stats()
    assert after.n_decodes == before.n_decodes
    assert after.n_native_operations == before.n_native_operations + 1
    assert child.n_past == parent.n_past
    np.testing.assert_array_equal(world.cm.logits(child), world.cm.logits(parent))
    world.exact(child)
    for turn in range(3):
        for session, other, reply in ((child, parent, "Child"), (parent, child, "My name is parent")):
            n_before = session.n_past
            world.prepare(talk(session, f"{reply} {turn}.", "Really?"))
            assert kept_its_row(session, n_before)
            world.exact(other)


def test_forks_of_forks_without_a_decode_in_between_are_exact(world: World) -> None:
    first = talk(Session(), "Who are you?")
    world.cm.prepare(first)
    second = world.cm.fork(first)
    third = world.cm.fork(second)
    world.cm.release(first)
    for reply, session in (("Yes.", third), ("No.", second)):
        n_before = session.n_past
        world.prepare(talk(session, reply, "Really?"))
        assert kept_its_row(session, n_before)


def test_three_interleaved_sessions_are_exact(world: World) -> None:
    world.cm.set_system(SYSTEM)
    sessions = [talk(Session(), f"{i} is my number.") for i in range(3)]
    for turn in range(3):
        for i, session in enumerate(sessions):
            n_before = session.n_past
            sources = world.prepare(session)
            assert kept_its_row(session, n_before) if turn else sources[0] == "prefix"
            talk(session, f"{i}, yes.", f"Say {turn * i} once more.")
    for session in sessions:
        world.exact(session)


def test_a_session_shares_a_live_row_of_its_namespace(world: World) -> None:
    world.cm.set_system(SYSTEM)
    first = talk(Session(namespace="a"), "Tell me a story about a clock.")
    world.cm.prepare(first)
    second = talk(Session(namespace="a"), "Tell me a story about a clock.", "Once upon a time", "Go on.")
    cells = world.cm.stats().n_cells_unique
    assert world.prepare(second) == ["live", "decode"]
    assert second.last_prepare.n_reused == first.n_past
    if world.cm.stats().n_cells_total is not None:
        assert world.cm.stats().n_cells_unique == cells + second.last_prepare.n_decoded
    n_before = first.n_past
    world.prepare(talk(first, "There was", "Louder."))
    assert kept_its_row(first, n_before)
    world.exact(second)


def test_a_part_of_a_live_row_is_shared_where_memory_can_be_cut(world: World) -> None:
    first = talk(Session(), "Tell me a story about a clock.", "Once upon a time", "Go on.")
    world.cm.prepare(first)
    n_before = len(world.cm.tokens(first))
    second = talk(Session(), "Tell me a story about a clock.", "Once it was noon", "And then?")
    sources = world.prepare(second)
    if world.trims:
        assert sources == ["live", "decode"]
        assert 0 < second.last_prepare.n_reused < n_before
    else:
        assert sources == ["decode"]
    world.exact(first)


def test_a_better_live_row_replaces_the_end_of_the_own_row(world: World) -> None:
    own = talk(Session(), "Tell me a story about a clock.", "No, I do not like clocks at all.", "Why?")
    world.cm.prepare(own)
    other = talk(Session(), "Tell me a story about a clock.", "Once upon a time there was one.", "Go on.")
    world.cm.prepare(other)
    own.messages[:] = [dict(m) for m in other.messages]
    talk(own, "It struck.", "When?")
    sources = world.prepare(own)
    assert own.last_prepare.n_reused == other.n_past
    assert sources in (["row", "live", "decode"], ["live", "decode"])
    n_before = other.n_past
    world.prepare(talk(other, "Ringing.", "Where?"))
    assert kept_its_row(other, n_before)
    world.exact(own)


def test_a_prompt_of_many_chunks_is_exact(load: Callable[..., ContextManager], world: World) -> None:
    variant = world.cm.capabilities
    name = {"window": "gemma3", "recurrent": "mamba", "hybrid": "hybrid"}.get(variant.kind.value, "llama-bpe")
    cm = load(name, n_batch=32, n_ctx=variant.n_ctx, kv_unified=variant.unified, swa_full=variant.swa_full)
    chunked = World(cm, oracle_for(model_path(name)))
    session = talk(Session(), LONG * 4)
    assert chunked.prepare(session) == ["decode"]
    assert session.n_past > 3 * 32
    assert cm.stats().n_decodes == -(-session.n_past // 32)


def test_a_step_of_several_sessions_is_exact_for_each(world: World) -> None:
    sessions = [talk(Session(), f"My number is {i}." * (i + 1)) for i in range(3)]
    work: list[Any] = [PromptChunk(world.cm.begin(s), 1000) for s in sessions[:2]]
    world.cm.prepare(sessions[2])
    token = int(world.cm.logits(sessions[2]).argmax())
    n_decodes = world.cm.stats().n_decodes
    report = world.cm.step([*work, NextToken(sessions[2], token)])
    assert world.cm.stats().n_decodes == n_decodes + 1
    assert all(r.done and r.error is None for r in report.results.values())
    for session in sessions:
        world.exact(session)


def test_two_streams_advanced_in_turn_do_not_mix_their_logits(world: World) -> None:
    """Each stream's greedy tokens are those it gives alone: a fresh prefill's argmax, step by step."""
    engine = Engine(world.cm)
    texts = ["Who are you?", "What is the time in the city by the sea?"]
    streams = [engine.stream(Session(), text, max_tokens=8, temperature=0.0) for text in texts]
    tokens: list[list[int]] = [[], []]
    for _ in range(8):
        for i, stream in enumerate(streams):
            chunk = next(stream, None)
            if chunk is not None and chunk.token is not None:
                tokens[i].append(chunk.token)
    assert all(stream.reply is not None for stream in streams)
    for text, together in zip(texts, tokens, strict=True):
        session = Session()
        alone = [c.token for c in engine.stream(session, text, max_tokens=8, temperature=0.0)]
        assert together == alone
    assert tokens[0] != tokens[1]


def test_logits_not_yet_read_survive_the_steps_of_other_sessions(world: World) -> None:
    first, second = talk(Session(), "Who are you?"), talk(Session(), "What time is it?")
    world.cm.prepare(first)
    world.cm.prepare(second)
    world.cm.append(second, 65)
    world.exact(first)
    world.exact(second)


# -- sliding windows: rows longer than the window, and neighbours that eat what lies outside it


@pytest.fixture(params=[{}, {"swa_full": False}, STREAMS], ids=["full", "small", "streams"])
def windowed(request: pytest.FixtureRequest, load: Callable[..., ContextManager]) -> World:
    """A model with a window of 64 in most layers. The first half of the cache belongs to a neighbour for now."""
    world = World(load("gemma3", **request.param), oracle_for(model_path("gemma3")))
    world.neighbour = talk(Session("neighbour"), LONG * (world.cm.n_ctx_seq // 90))
    world.cm.prepare(world.neighbour)
    return world


def neighbours_decode_a_lot(world: World) -> None:
    """Free the first half of the cache and fill it anew, and more: llama.cpp takes the cells of other rows that lie
    outside their window before it looks further."""
    world.cm.release(world.neighbour)
    session = talk(Session("another neighbour"), LONG * (world.cm.n_ctx_seq // 60))
    world.cm.prepare(session)
    world.cm.release(session)


def first_position(world: World, session: Session) -> int | None:
    """llama.cpp's own word: the first position that the window layers still hold."""
    tokens = world.cm.tokens(session)
    (row,) = [row for row in world.cm._store.rows.values() if np.array_equal(row.tokens, tokens)]
    return world.cm._store.context.memory.pos_min(row.seq_id)


def is_eaten(world: World, session: Session) -> bool:
    return first_position(world, session) != 0


def test_neighbours_do_eat_the_cells_outside_the_window(load: Callable[..., ContextManager], windowed: World) -> None:
    """The trap itself: without it the tests below would prove nothing."""
    session = talk(Session(), LONG * 5)
    windowed.cm.prepare(session)
    assert not is_eaten(windowed, session)
    neighbours_decode_a_lot(windowed)
    assert is_eaten(windowed, session) == windowed.cm.capabilities.unified
    windowed.exact(session)


def test_a_row_past_the_window_goes_on_exactly_after_neighbours_decoded(windowed: World) -> None:
    session = talk(Session(), LONG * 5)
    windowed.prepare(session)
    assert session.n_past > 3 * 64
    n_before = session.n_past
    neighbours_decode_a_lot(windowed)
    windowed.prepare(talk(session, "Yes.", "Go on."))
    assert kept_its_row(session, n_before)


def test_a_row_past_the_window_is_trimmed_only_as_far_as_its_window_is_there(windowed: World) -> None:
    session = talk(Session(), LONG * 5)
    windowed.cm.prepare(session)
    n_first = session.n_past
    windowed.cm.prepare(talk(session, "Yes.", "Why? Tell me!"))
    assert session.n_past - n_first < 63  # so that some of the window of the shorter row is left, but not all
    neighbours_decode_a_lot(windowed)
    eaten = is_eaten(windowed, session)
    del session.messages[1:]
    assert windowed.prepare(session) == (["decode"] if eaten else ["row", "decode"])
    assert session.n_past == n_first


def test_a_row_with_a_lost_beginning_is_shared_as_a_whole(windowed: World) -> None:
    first = talk(Session(), LONG * 5)
    windowed.cm.prepare(first)
    neighbours_decode_a_lot(windowed)
    longer = talk(Session(), LONG * 5, "Yes.", "Why?")
    assert windowed.prepare(longer) == ["live", "decode"]
    assert longer.last_prepare.n_reused == first.n_past
    windowed.exact(first)


def test_a_part_of_a_row_is_shared_only_where_its_window_is_there(windowed: World) -> None:
    first = talk(Session(), LONG * 5, "Yes.", "Why? Tell me!")
    windowed.cm.prepare(first)
    neighbours_decode_a_lot(windowed)
    eaten = is_eaten(windowed, first)
    shorter = talk(Session(), LONG * 5, "No.", "Why?")
    assert windowed.prepare(shorter) == (["decode"] if eaten else ["live", "decode"])
    windowed.exact(first)


def test_the_border_of_the_window_is_known_to_the_token(load: Callable[..., ContextManager]) -> None:
    """The next token, at position m, looks at [m - 63, m]: a row cut to m is whole from first position m - 63 on."""
    world = World(load("gemma3"), oracle_for(model_path("gemma3")))
    world.neighbour = talk(Session("neighbour"), LONG * 10)
    world.cm.prepare(world.neighbour)
    ids = [int(t) for t in world.cm.vocab.tokenize("abcdefghijklmnop")]
    other = int(world.cm.vocab.tokenize("~")[-1])
    first = talk(Session(), LONG * 5)
    world.cm.prepare(first)
    for token in ids[:5]:
        world.cm.append(first, token)
    neighbours_decode_a_lot(world)
    for token in ids[5:]:
        world.cm.append(first, token)
    lost = first_position(world, first)
    assert lost is not None
    assert lost > 0
    distances = set()
    for k in range(2, 9):
        reply = [*ids[:k], other]
        second = talk(Session(), LONG * 5)
        second.add_reply(b"".join(map(world.cm.vocab.piece, reply)).decode(), reply)
        sources = world.prepare(talk(second, "Why?"))
        m = common_prefix(world.cm.tokens(first), world.cm.tokens(second))
        assert (sources[0] == "live") == (m - 63 >= lost), (m, lost)
        distances.add(m - 63 - lost)
        world.cm.release(second)
    assert {-1, 0} <= distances


def test_a_system_text_past_the_window_is_shared_after_neighbours_decoded(windowed: World) -> None:
    n_prefix = windowed.cm.set_system(LONG * 5)
    assert n_prefix > 3 * 64
    neighbours_decode_a_lot(windowed)
    session = talk(Session(), "Who are you?")
    assert windowed.prepare(session) == ["prefix", "decode"]
    assert session.last_prepare.n_reused == n_prefix
    windowed.prepare(talk(Session(), "Who is next?"))
    windowed.exact(session)


def test_a_system_text_cut_short_after_neighbours_decoded_is_exact(windowed: World) -> None:
    windowed.cm.set_system(LONG * 5)
    neighbours_decode_a_lot(windowed)
    n_prefix = windowed.cm.set_system(LONG * 4 + LONG[:-8])  # a few tokens shorter: some of its window is left
    session = talk(Session(), "Who are you?")
    assert windowed.prepare(session) == ["prefix", "decode"]
    assert session.last_prepare.n_reused == n_prefix


# -- templates with habits

HABITS = ("two-bos", "default-system", "folds-system", "refuses-system", "reasoning", "macro")
HABITUAL = {"controls": ("<|begin_of_text|>", *CONTROLS), "add_bos": True, "n_vocab": 900}


@pytest.mark.parametrize("template", HABITS)
def test_whatever_a_template_does_with_a_conversation_its_rows_are_what_it_writes_and_exact(
    load: Callable[..., ContextManager], template: str
) -> None:
    cm = load(model=HABITUAL, chat_template=TEMPLATES[template], system_fallback="user", headroom=0)
    world = World(cm, oracle_for(model_path("llama-bpe", **HABITUAL)))
    plain = PlainVocab(world.oracle.vocab)
    write = Jinja2ChatFormatter(TEMPLATES[template], eos_token="<|im_end|>", bos_token="<|begin_of_text|>")

    def written(session: Session, system: str) -> str:
        messages = [dict(m) for m in session.messages]
        if system and template in REFUSING:
            messages[0]["content"] = f"{system}\n\n{messages[0]['content']}"
        elif system:
            messages.insert(0, {"role": "system", "content": system})
        return str(write(messages=messages).prompt)

    def check(session: Session, system: str) -> None:
        before = cm.tokens(session)
        world.prepare(session)
        assert cm.tokens(session).tolist() == plain.prompt(written(session, system))
        if session.n_past and len(before):  # as much of it as can be was there already
            assert session.last_prepare.n_reused >= common_prefix(before[:-1], cm.tokens(session))

    n_prefix = cm.set_system(SYSTEM)
    session = talk(Session(), "Who are you?")
    check(session, SYSTEM)
    assert session.last_prepare.n_reused == n_prefix > len(plain.tokenize(SYSTEM))
    for turn in range(9):
        talk(session, f"<think>\nNumber {turn}?\n</think>\n\nI am {turn}.", f" And who is {turn} plus {turn}?\n")
        check(session, SYSTEM)
    session.messages[4]["content"] = "Never mind."
    check(session, SYSTEM)
    child = cm.fork(session)
    del session.messages[6:]
    check(talk(child, "A child.", "Really?"), SYSTEM)
    check(session, SYSTEM)
    cm.set_system("You answer in rhymes.")
    check(child, "You answer in rhymes.")
    child.system = ""
    check(child, "")
    check(session, "You answer in rhymes.")
    # Replies keep the ids they were sampled as: what they spell is what the template writes.
    engine = Engine(cm)
    for question in ("Say something.", "And then?"):
        engine.chat(session, question, max_tokens=8, seed=1, temperature=1.5)
        world.exact(session)
    world.prepare(talk(session, "Well?"))
    spelled = world.oracle.detokenize(cm.tokens(session)).decode().removeprefix("<|begin_of_text|>")
    assert spelled == written(session, "You answer in rhymes.").replace("<|begin_of_text|>", "")


# -- the user's own context


@contextmanager
def bare_context(path: Path, n_seq_max: int, *, unified: bool = True, n_ctx: int = 512) -> Iterator[tuple[Any, Any]]:
    """A context made with llama_cpp alone, with some leftovers in it."""
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    p = llama_cpp.llama_context_default_params()
    p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = n_ctx, 128, 128, n_seq_max
    p.n_threads = p.n_threads_batch = 1
    p.swa_full, p.kv_unified = True, unified
    ctx = llama_cpp.llama_init_from_model(model, p)
    for seq_id in range(n_seq_max):
        assert decode_bare(ctx, [1, 2, 3], seq_id) == 0
    try:
        yield ctx, llama_cpp.llama_model_get_vocab(model)
    finally:
        llama_cpp.llama_free(ctx)
        llama_cpp.llama_model_free(model)


def decode_bare(ctx: Any, tokens: list[int], seq_id: int) -> int:
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, seq_id
        batch.logits[i] = False
    batch.n_tokens = len(tokens)
    code = llama_cpp.llama_decode(ctx, batch)
    llama_cpp.llama_batch_free(batch)
    return code


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("n_seq_max", [1, 2, 3])
@pytest.mark.parametrize("model", ["llama-bpe", "gemma3", "mamba", "hybrid"])
def test_a_context_of_the_users_own_is_cleared_and_exact(model: str, n_seq_max: int, unified: bool) -> None:
    path = model_path(model)
    with bare_context(path, n_seq_max, unified=unified) as (ctx, vocab), ContextManager(ctx, vocab) as cm:
        world = World(cm, oracle_for(path))
        cm.check_integrity()
        assert cm.slots.capacity == cm.stats().slots_total == (n_seq_max if n_seq_max == 1 else max(1, n_seq_max - 2))
        n_prefix = cm.set_system(SYSTEM)
        assert cm.prefix.has_slot == (n_seq_max > 1) == bool(n_prefix)
        session = talk(Session(), "Who are you?")
        assert world.prepare(session) == (["prefix", "decode"] if n_prefix else ["decode"])
        assert "Never lie" in world.oracle.detokenize(cm.tokens(session)).decode()
        talk(session, "A clock.", "What time is it?")
        assert world.prepare(session) == ["row", "decode"]
        cm.check_integrity()


def test_close_does_not_free_a_context_of_the_users_own() -> None:
    with bare_context(model_path("llama-bpe"), 2) as (ctx, vocab):
        cm = ContextManager(ctx, vocab)
        cm.prepare(talk(Session(), "Who are you?"))
        cm.close()
        memory = llama_cpp.llama_get_memory(ctx)
        llama_cpp.llama_memory_clear(memory, True)
        assert decode_bare(ctx, [5, 6, 7], 1) == 0
        assert llama_cpp.llama_memory_seq_pos_max(memory, 1) == 2


def test_the_kinds_of_memory_are_those_the_variants_are_meant_for(world: World, request: Any) -> None:
    name = request.node.callspec.params["world"].model
    kinds = {"gemma3": MemoryKind.WINDOW, "mamba": MemoryKind.RECURRENT, "hybrid": MemoryKind.HYBRID}
    caps = world.cm.capabilities
    assert caps.kind is kinds.get(name, MemoryKind.FULL)
    assert caps.n_swa == (64 if name == "gemma3" else 0)
    assert caps.unified == request.node.callspec.params["world"].options.get("kv_unified", True)
