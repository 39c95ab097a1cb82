"""Ctrl-C at any moment is safe: the accounting adds up, the next prepare is exact, nobody else is hurt."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from child import run_child

from llama_sessions.kv.row import Row

SEED = 20260101

# Deeds that take a few milliseconds each; a timer sends SIGINT at a random moment of one. Whatever was interrupted,
# a bystander's logits must not change, and the session must be exact again after one prepare.
INTERRUPTED = """
    import gc, os, random, signal, sys, time
    import numpy as np
    from models import model_path
    from oracle import oracle_for
    from llama_sessions import ContextManager, Engine, Session

    name, seed, n_wanted, names = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split()
    rng = random.Random(seed)
    print(f"seed {seed}", flush=True)
    oracle = oracle_for(model_path(name))
    streams = {"kv_unified": False, "n_ctx": 6144} if "streams" in sys.argv[5:] else {"n_ctx": 1024}
    cm = ContextManager.load(model_path(name), max_sessions=4, n_threads=1, n_batch=32, **streams)
    engine = Engine(cm)
    words = ["who", "are", "you", "what", "time", "is", "it", "tell", "me", "a", "story", "about", "the", "clock"]

    def text(n):
        return " ".join(rng.choices(words, k=n))

    def talk(session):
        session.add_user(text(12))
        cm.prepare(session)

    def next_turn(session):
        if session.messages and session.messages[-1]["role"] == "user":
            session.add_assistant(text(3))
        session.add_user(text(40))
        cm.prepare(session)

    def edit(session):
        if session.messages:
            session.messages[0]["content"] = text(30)
        cm.prepare(session)

    def stream(session):
        for chunk in engine.stream(session, text(20), max_tokens=12, temperature=1.5):
            pass

    def regenerate(session):
        if session.messages and session.messages[-1]["role"] == "assistant":
            engine.regenerate(session, max_tokens=6)

    def branch(session):
        child = cm.fork(session)
        for token in (65, 66):
            # A stream that was hit takes its question back, and leaves half a prompt.
            if child.n_past and session.messages:
                cm.append(child, token)

    def renew(session):
        cm.release(session)
        cm.prepare(session)

    def come_back(session):
        cm.park(session)
        if session.n_past:
            cm.logits(session)

    def come_back_decoded(session):
        cm.park(session)
        cm.clear_radix()
        if session.n_past:
            cm.logits(session)

    def crowd(session):
        others = [Session() for _ in range(4)]
        for other in others:
            other.add_user(text(8))
            cm.prepare(other)

    def branch_and_park(session):
        child = cm.fork(session)
        cm.park(session)
        cm.release(child)
        if session.n_past:
            cm.logits(session)

    def system(session):
        cm.set_system(rng.choice(["", text(10), text(40)]))
        cm.prepare(session)

    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(os.getpid(), signal.SIGINT))
    deeds = [globals()[each] for each in names]
    bystander = Session("")
    bystander.add_user("I only stand here.")
    cm.prepare(bystander)
    cm.pin(bystander)
    standing = cm.logits(bystander).copy()
    session = Session()
    usual = {}
    n_hit = n_deeds = 0
    deadline = time.process_time() + 60  # of its own work: others may have the machine meanwhile
    while n_hit < n_wanted:
        assert time.process_time() < deadline, (n_hit, n_deeds)
        if sum(len(m["content"]) for m in session.messages) > 900:
            session.messages.clear()
        deed = rng.choice(deeds)
        said = [(m["role"], m["content"]) for m in session.messages]
        n_deeds += 1
        before = cm.tokens(session)
        started = time.perf_counter()
        hit = False
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-5, 1.2 * usual.get(deed, 0.004)))
            deed(session)
            signal.setitimer(signal.ITIMER_REAL, 0)
            time.sleep(0)
        except KeyboardInterrupt:
            hit = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        if not hit:
            usual[deed] = 0.5 * usual.get(deed, 0.004) + 0.5 * (time.perf_counter() - started)
            continue
        n_hit += 1
        where = f"after hit {n_hit} in {deed.__name__}, seed {seed}"
        now = [(m["role"], m["content"]) for m in session.messages]
        if deed is stream:  # the question goes back, or it has a reply
            assert now[: len(said)] == said, (where, said, now)
            assert [role for role, _ in now[len(said) :]] in ([], ["user", "assistant"]), (where, said, now)
        elif deed is regenerate and said and said[-1][0] == "assistant":  # the old reply, or a new one
            assert len(now) == len(said) and now[:-1] == said[:-1] and now[-1][0] == "assistant", (where, said, now)
        elif deed in (come_back, come_back_decoded, crowd, branch_and_park):
            assert np.array_equal(cm.tokens(session), before), where
        cm.check_integrity()
        assert np.array_equal(cm.logits(bystander), standing), where
        if not session.messages:
            continue
        try:
            cm.prepare(session)
            oracle.assert_exact(cm.logits(session), cm.tokens(session))
        except Exception as e:
            raise AssertionError(where) from e
    cm.append(bystander, 65)
    oracle.assert_exact(cm.logits(bystander), cm.tokens(bystander))
    cm.release(bystander)
    cm.release(session)
    gc.collect()  # sessions in the frames of what was interrupted
    cm.check_integrity()
    assert cm.slots.n_free == 4, cm.describe()
    assert cm.stats().n_cells_unique == cm.prefix.n_tokens
    cm.close()
    print(f"{n_hit} interrupts in {n_deeds} deeds")
"""


TALK = "talk next_turn edit stream regenerate branch renew system"
PARK = "next_turn come_back come_back_decoded crowd branch_and_park"


@pytest.mark.parametrize(("name", "n"), [("llama-bpe", 200), ("gemma3", 12), ("hybrid", 12)])
def test_ctrl_c_at_random_moments_leaves_everything_exact(name: str, n: int) -> None:
    out = run_child(INTERRUPTED, name, str(SEED), str(n), TALK)
    assert f"\n{n} interrupts in " in out


@pytest.mark.parametrize(
    ("name", "n", "options"),
    [("llama-bpe", 60, ()), ("llama-bpe", 20, ("streams",)), ("gemma3", 8, ()), ("hybrid", 8, ())],
)
def test_ctrl_c_while_sessions_are_parked_and_come_back_loses_no_token(
    name: str, n: int, options: tuple[str, ...]
) -> None:
    out = run_child(INTERRUPTED, name, str(SEED), str(n), PARK, *options)
    assert f"\n{n} interrupts in " in out


# A timer seldom hits the one line that matters, so here the interrupt comes at chosen lines: at the n-th one that runs
# in a file, for as many n, spread evenly over a whole life of a session, as there is time for.
SWEEP = """
    import gc, linecache, os, sys
    import numpy as np
    from models import model_path
    from oracle import oracle_for
    from llama_sessions import ContextManager, Engine, Session
    import llama_sessions

    root = os.path.dirname(llama_sessions.__file__) + os.sep
    path = model_path("llama-bpe")
    oracle = oracle_for(path)

    class At:
        def __init__(self, file, n):
            self.file, self.n, self.n_lines, self.hit = root + file, n, 0, None

        def __call__(self, frame, event, arg):
            return self.line if frame.f_code.co_filename == self.file else None

        def line(self, frame, event, arg):
            # CPython looks for signals neither at a try nor while it enters or leaves a with.
            text = linecache.getline(self.file, frame.f_lineno).strip()
            if event == "line" and text != "try:" and not text.startswith("with "):
                if self.n_lines == self.n:
                    self.hit = f"{frame.f_code.co_name}, line {frame.f_lineno}"
                    sys.settrace(None)
                    raise KeyboardInterrupt
                self.n_lines += 1
            return self.line

    def said(*texts):
        session = Session()
        for i, text in enumerate(texts):
            session.add("assistant" if i % 2 else "user", text)
        return session

    def park(cm, session):
        cm.prepare(session)
        cm.park(session)
        cm.logits(session)
        others = [said("I am one."), said("I am two.")]
        for other in others:
            cm.prepare(other)  # the session is parked for the second
        session.messages[0]["content"] = "Who else are you?"
        cm.prepare(session)
        cm.fork(session)
        cm.set_system("Be long. " * 4, keep_cache=True)
        cm.append(session, 65)

    def talk(cm, session):
        cm.prepare(session)
        session.messages[0]["content"] = "Who else are you?"
        cm.prepare(session)
        child = cm.fork(session)
        cm.append(child, 65)
        cm.release(child)
        cm.prepare(said("Tell me about the clock.", "No.", "Please?"))  # and gone again
        cm.set_system("Be long. " * 4)
        for chunk in Engine(cm).stream(session, "Who?", max_tokens=3, seed=1):
            pass
        Engine(cm).regenerate(session, max_tokens=2, seed=2)

    def run(file, n):
        with ContextManager.load(path, n_ctx=512, max_sessions=4, n_threads=1, n_batch=32) as cm:
            cm.set_system("Be brief.")
            bystander, neighbour = said("I only stand here."), said("Tell me about the clock.", "Yes.", "Do!")
            for each in (bystander, neighbour):
                cm.prepare(each)
                cm.pin(each)
            standing = cm.logits(bystander).copy()
            session, at = said("Who are you?"), At(file, n)
            sys.settrace(at)
            try:
                life(cm, session)
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
            gc.collect()
            try:
                cm.check_integrity()
                assert np.array_equal(cm.logits(bystander), standing), "the bystander was hurt"
                roles = [m["role"] for m in session.messages]
                assert roles in (["user"], ["user", "user", "assistant"]), roles
                cm.prepare(session)
                oracle.assert_exact(cm.logits(session), cm.tokens(session))
                for each in (session, bystander, neighbour):
                    cm.release(each)
                assert cm.slots.n_free == 4, "a slot is lost"
                cm.check_integrity()
            except Exception as e:
                raise AssertionError(f"after an interrupt in {file}, {at.hit}") from e
            return at

    n_most, life = int(sys.argv[1]), globals()[sys.argv[2]]
    for file in sys.argv[3:]:
        n_lines = run(file, -1).n_lines
        assert n_lines > 20, (file, n_lines)
        points = sorted({int(n) for n in np.linspace(0, n_lines - 1, n_most)})
        assert all(run(file, n).hit for n in points)
        print(file, n_lines, "lines", len(points), "interrupts", flush=True)
"""
ACCOUNTING = ("kv/store.py", "kv/prefix.py", "kv/row.py", "seats.py", "stepper.py", "manager.py", "entry.py",
              "generation.py", "stream.py", "llama/context.py")  # fmt: skip


def test_an_interrupt_at_any_line_of_the_accounting_leaves_everything_exact() -> None:
    out = run_child(SWEEP, "8", "talk", *ACCOUNTING)
    assert [line.split()[0] for line in out.splitlines()] == list(ACCOUNTING)


PARKING = ("parking.py", "preparing.py", "kv/snapshot.py", "kv/cache.py", "kv/blob_store.py", "kv/sequences.py")


def test_an_interrupt_at_any_line_of_parking_leaves_everything_exact() -> None:
    out = run_child(SWEEP, "6", "park", *PARKING)
    assert [line.split()[0] for line in out.splitlines()] == list(PARKING)


def test_an_interrupt_at_any_line_of_the_slots_leaves_everything_exact() -> None:
    run_child(SWEEP, "1000", "talk", "kv/slots.py")


def test_an_interrupt_while_a_row_grows_leaves_it_as_it_was() -> None:
    n_hits = 0
    for function, at in itertools.product((Row.write, Row._grow, Row._use), range(12)):
        row = Row(0)
        row.write(0, np.arange(200, dtype=np.int32), np.arange(200))
        row.n = 200
        more = np.arange(100, dtype=np.int32)
        try:
            with interrupt_at(function, at):
                row.write(200, more, more.astype(np.int64))
        except KeyboardInterrupt:
            n_hits += 1
        np.testing.assert_array_equal(row.tokens, np.arange(200))
        row.write(200, more, more.astype(np.int64))
        row.n = 300
        np.testing.assert_array_equal(row.tokens, [*range(200), *range(100)])
        np.testing.assert_array_equal(row.cells, [*range(200), *range(100)])
    assert 8 < n_hits < 36


@contextmanager
def interrupt_at(function: Any, at: int) -> Iterator[None]:
    """KeyboardInterrupt at the `at`-th line that runs in a function."""
    lines = iter(range(10**6))

    def local(frame: Any, event: str, arg: Any) -> Any:
        if event == "line" and next(lines) == at:
            raise KeyboardInterrupt
        return local

    sys.settrace(lambda frame, event, arg: local if frame.f_code is function.__code__ else None)
    try:
        yield
    finally:
        sys.settrace(None)
