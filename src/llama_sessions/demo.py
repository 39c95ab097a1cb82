"""A short story on the model in the box: what sharing KV saves, and that nothing gets mixed up."""

from __future__ import annotations

from itertools import cycle, islice

from .engine import Engine
from .manager import ContextManager
from .reply import Reply
from .session import Session

SYSTEM = (
    "You are a careful assistant who remembers what people say. The password is velora. "
    "If you were not told something, say so."
)

STORY = (
    "There was a long story in the paper about {}, who sailed to {} in a small boat and came back rich. "
    "Yesterday I met {} at the market and we talked for a long time about the harvest. "
    "It rained all night and the road to {} is wet."
)
PLACES = ("Orwas", "Bemor", "Sulan", "Mirto", "Tamoli", "Ilmera", "Velan")


class Demo:
    """Runs the acts and prints what each turn cost."""

    def __init__(self, cm: ContextManager) -> None:
        self.cm = cm
        self.engine = Engine(cm)
        self.n_reused = self.n_decoded = 0

    def say(self, who: str, session: Session, text: str) -> Reply:
        reply = self.engine.chat(session, text, temperature=0, max_tokens=48)
        self.n_reused += reply.n_reused
        self.n_decoded += reply.n_decoded
        cost = f"{reply.n_reused:4d} reused {reply.n_decoded:3d} decoded {reply.first_token_s * 1e3:6.1f} ms"
        print(f"  {who:>6}: {text:<36} {reply.text:<44} {cost}")
        return reply

    def act(self, title: str) -> None:
        print(f"\n{title}")

    def run(self) -> None:
        cm = self.cm
        self.act("1. A system prompt with a secret")
        n = cm.set_system(SYSTEM)
        print(f"  {SYSTEM}\n  {n} tokens, decoded once for everybody")

        self.act("2. Two people in turns; each costs only the new words (tokens reused, decoded, time to first token)")
        anna, ben = Session(), Session()
        self.say("Anna", anna, "My name is Anelda.")
        self.say("Ben", ben, "My name is Borvin.")
        self.say("Anna", anna, "My favourite drink is tea.")
        self.say("Ben", ben, "Add candles to my list.")
        self.say("Ben", ben, "Add milk to my list.")
        self.say("Anna", anna, "What is my name?")
        self.say("Ben", ben, "What is my name?")
        self.say("Ben", ben, "What is my favourite drink?")
        self.say("Anna", anna, "What is the password?")

        self.act("3. Anna takes something back: the past is edited, what still holds is kept")
        anna.messages[2]["content"] = "My favourite drink is cocoa."
        self.say("Anna", anna, "What is my favourite drink?")

        self.act("4. A fork: Ben goes two ways, from the same cells")
        cells = cm.stats().n_cells_unique
        twin = cm.fork(ben)
        print(f"  {twin.n_past} tokens forked, {cm.stats().n_cells_unique - cells} cells more in use")
        self.say("Ben", ben, "Add rope to my list.")
        self.say("Ben'", twin, "Add soap to my list.")
        self.say("Ben", ben, "What is on my list?")
        self.say("Ben'", twin, "What is on my list?")

        self.act("5. Anna leaves, and comes back: her row is parked, its cells are free, nothing is computed again")
        cells = cm.stats().n_cells_unique
        cm.park(anna)
        print(f"  Anna is parked: {cells - cm.stats().n_cells_unique} cells freed, {anna.n_past} tokens saved")
        self.say("Ben", ben, "Add bread to my list.")
        self.say("Anna", anna, "What is my name?")

        self.act("6. Ben talks on, far past the context: the oldest turns go, the password and what he pins stay")
        ben.pin_message(0)
        ben.pin_message(1)
        places = cycle(PLACES)
        for n in range(1, 33):
            self.engine.chat(ben, STORY.format(*islice(places, 4)), temperature=0, max_tokens=48)
            if n % 8 == 0:
                window = f"{len(ben.window)} of {len(ben.messages)} messages in the window"
                n_gone = cm.stats().n_tokens_evicted
                print(f"  {n:2d} stories later: {window}, {ben.n_past} tokens in {cm.n_ctx_seq}, {n_gone} gone")
        self.say("Ben", ben, "What is the password?")
        self.say("Ben", ben, "What is my name?")
        self.say("Ben", ben, "What is on my list?")
        self.say("Anna", anna, "What is my favourite drink?")
        self.say("Ben'", twin, "What is on my list?")
        if ben.last_prepare is not None and not ben.last_prepare.exact:
            print("  What Ben has left was moved up, not computed again; cm.rebuild(ben) makes it exact once more.")

        self.act("Where everything is")
        print("  " + cm.describe().replace("\n", "\n  "))
        share = self.n_reused / (self.n_reused + self.n_decoded)
        print(f"\n{self.n_reused} prompt tokens reused, {self.n_decoded} decoded: {share:.0%} were there already.")
        print("Next: README.md, and examples/01_chat.py.")


def run(path: str) -> None:
    """The demo on a model; it is written for the built-in one."""
    # One thread: the built-in model is too small to gain from a second.
    with ContextManager.load(path, max_sessions=4, n_threads=1) as cm:
        print(f"llama-sessions demo, on {cm.capabilities.model} ({cm.n_ctx_seq} tokens of context)")
        Demo(cm).run()
        cm.check_integrity()
