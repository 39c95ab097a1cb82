"""Synthetic dialogues for the built-in model: everything in them can be answered from what was said.

A dialogue is a list of `Turn`s. Values (names, words, places) are made up at random, so that the only way to answer
is to copy from the context; a value whose hash falls on `HELD_OUT` never occurs in training (see `is_held_out`).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field

SYLLABLES = [
    "ba", "be", "bo", "bri", "da", "del", "do", "dra", "el", "fa", "fen", "fi", "ga", "gor", "gri", "ha", "hol",
    "im", "jo", "ka", "kel", "ki", "kor", "la", "len", "li", "lo", "lu", "ma", "mel", "mi", "mor", "na", "nel", "ni",
    "nor", "o", "pa", "pel", "pi", "por", "qua", "ra", "ren", "ri", "ro", "sa", "sel", "shi", "sol", "ta", "tel",
    "thi", "to", "tri", "u", "va", "ven", "vi", "vor", "wa", "wel", "wi", "ya", "yor", "za", "zel", "zi", "zo", "an",
    "ar", "as", "en", "er", "es", "in", "ir", "on", "or", "un", "us",
]  # fmt: skip
LETTERS = "eeaaoiunrtlsdmkbpgvhfzcwjyxq"

KINDS = {
    "color": "red blue green yellow purple orange black white",
    "animal": "horse tiger rabbit otter whale eagle wolf bear",
    "food": "pizza soup bread rice noodles cheese curry salad",
    "city": "Paris London Rome Tokyo Berlin Madrid Oslo Cairo",
    "song": "Yesterday Imagine Hallelujah Greensleeves",
    "game": "chess poker tennis checkers go bridge",
    "drink": "tea coffee milk water juice cocoa",
    "book": "Dune Emma Ulysses Hamlet",
    "flower": "rose tulip lily daisy orchid poppy",
    "sport": "football rowing boxing cycling swimming",
    "tree": "oak birch pine maple willow",
    "fruit": "apple pear cherry plum banana mango",
    "film": "Alien Jaws Psycho Vertigo",
    "bird": "robin owl heron swan crow",
    "dish": "stew pie goulash risotto",
    "instrument": "piano violin flute drum harp",
}
RELATIONS = [
    "dog", "cat", "sister", "brother", "friend", "teacher", "boss", "neighbour", "horse", "boat",
]  # fmt: skip
THINGS = ["key", "map", "lamp", "letter", "coin", "ring", "hat", "cup"]
REAL_NAMES = [
    "Anna", "Ben", "Clara", "David", "Emma", "Finn", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo", "Maria",
    "Nina", "Oscar", "Paul", "Rosa", "Sam", "Tom", "Vera", "Ada", "Alan", "Alice", "Bob", "Carol", "Eve", "John",
    "Mary", "Peter", "Susan",
]  # fmt: skip
ITEMS = [
    "apples", "bread", "milk", "eggs", "cheese", "rice", "tea", "salt", "sugar", "soap", "candles", "nails", "rope",
    "paper", "butter", "onions",
]  # fmt: skip

PERSONAS = (
    "You are a helpful assistant.",
    "You are concise.",
    "You are a friendly assistant.",
    "You remember what you are told.",
    "You answer in one short sentence.",
    "You are a careful assistant who remembers what people say.",
)
PADDING = (
    "Be kind and patient.",
    "Answer only what you are asked.",
    "Never make things up.",
    "If you were not told something, say so.",
    "Speak plainly.",
    "Keep your answers short and clear.",
    "The people who talk to you are travellers.",
    "The inn opens at seven and closes at ten.",
)


def is_held_out(value: str) -> bool:
    """Whether `value` is kept out of training (about one made-up value in eight)."""
    return zlib.crc32(value.lower().encode()) % 8 == 0


@dataclass(slots=True)
class Turn:
    """One user message and its answer. `key` names the fact that a question asks for; None where it asks for none."""

    user: str
    assistant: str
    key: str | None = None
    known: bool = False


@dataclass(slots=True)
class Memory:
    """What a listener knows at a point of a dialogue."""

    facts: dict[str, str] = field(default_factory=dict)
    items: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Words:
    """Draws made-up values; `held_out` chooses which side of the split they come from."""

    rng: random.Random
    held_out: bool

    def made_up(self) -> str:
        while True:
            if self.rng.random() < 0.75:
                word = "".join(self.rng.choice(SYLLABLES) for _ in range(self.rng.choice((2, 2, 3))))
            else:
                word = "".join(self.rng.choice(LETTERS) for _ in range(self.rng.randint(3, 7)))
            if 3 <= len(word) <= 10 and is_held_out(word) == self.held_out:
                return word

    def name(self) -> str:
        if not self.held_out and self.rng.random() < 0.15:
            return self.rng.choice(REAL_NAMES)
        return self.made_up().capitalize()

    def of_kind(self, kind: str) -> str:
        if not self.held_out and self.rng.random() < 0.25:
            return self.rng.choice(KINDS[kind].split())
        word = self.made_up()
        return word.capitalize() if kind in {"city", "song", "book", "film"} else word

    def item(self) -> str:
        return self.rng.choice(ITEMS) if self.rng.random() < 0.5 else self.made_up()


def keys() -> list[str]:
    """Every fact a dialogue can hold: `name`, `password`, `assistant`, `favourite:*`, `called:*`, `where:*`."""
    return ["name", "password", *(f"favourite:{k}" for k in KINDS), *(f"called:{r}" for r in RELATIONS),
            *(f"where:{t}" for t in THINGS)]  # fmt: skip


def value_for(key: str, words: Words) -> str:
    kind, _, what = key.partition(":")
    if kind == "favourite":
        return words.of_kind(what)
    if kind == "password":
        return words.made_up()
    return words.name()


def tell(key: str, value: str, rng: random.Random) -> tuple[str, str]:
    """A user message that states the fact, and the answer that belongs to its wording."""
    kind, _, what = key.partition(":")
    if kind == "name":
        return rng.choice(
            [
                (f"My name is {value}.", f"Nice to meet you, {value}."),
                (f"Hello, my name is {value}.", f"Hello, {value}."),
                (f"Hi, I am {value}.", f"Hello, {value}."),
                (f"Call me {value}.", f"Nice to meet you, {value}."),
                (f"I am {value}.", f"Nice to meet you, {value}."),
            ]
        )
    if kind == "password":
        told = rng.choice([f"The password is {value}.", f"The secret password is {value}."])
        return told, "I will remember that."
    if kind == "favourite":
        spelt = rng.choice(["favourite", "favourite", "favorite"])
        return rng.choice(
            [
                (f"My {spelt} {what} is {value}.", "I will remember that."),
                (f"My {spelt} {what} is {value}.", "I will remember that."),
                (f"Remember that my {spelt} {what} is {value}.", f"Your favourite {what} is {value}."),
            ]
        )
    if kind == "called":
        return rng.choice(
            [
                (f"My {what} is called {value}.", "I will remember that."),
                (f"Remember that my {what} is called {value}.", f"Your {what} is called {value}."),
                (f"I have a {what} called {value}.", "I will remember that."),
            ]
        )
    return rng.choice(
        [
            (f"The {what} is in {value}.", "I will remember that."),
            (f"I left the {what} in {value}.", "I will remember that."),
            (f"Remember that the {what} is in {value}.", f"The {what} is in {value}."),
        ]
    )


def ask(key: str, value: str | None, rng: random.Random) -> tuple[str, str]:
    """A question for the fact, and its answer; `value` None: it was never told."""
    kind, _, what = key.partition(":")
    if kind == "name":
        question = rng.choice(["What is my name?", "Who am I?", "Do you know my name?", "Tell me my name."])
        known, unknown = f"Your name is {value}.", "You have not told me your name."
    elif kind == "password":
        question = rng.choice(["What is the password?", "Tell me the password.", "Do you know the password?"])
        known, unknown = f"The password is {value}.", "You have not told me the password."
    elif kind == "favourite":
        spelt = rng.choice(["favourite", "favourite", "favorite"])
        question = rng.choice(
            [f"What is my {spelt} {what}?", f"Tell me my {spelt} {what}.", f"Which {what} is my {spelt}?"]
        )
        known, unknown = f"Your favourite {what} is {value}.", f"You have not told me your favourite {what}."
    elif kind == "called":
        question = rng.choice([f"What is my {what} called?", f"What is the name of my {what}?"])
        known, unknown = f"Your {what} is called {value}.", f"You have not told me what your {what} is called."
    else:
        question = rng.choice([f"Where is the {what}?", f"Where did I leave the {what}?"])
        known, unknown = f"The {what} is in {value}.", f"You have not told me where the {what} is."
    return question, known if value is not None else unknown


def small_talk(words: Words) -> tuple[str, str]:
    rng = words.rng
    pick = rng.random()
    if pick < 0.2:
        return rng.choice(
            [
                ("Hello!", "Hello!"),
                ("Good morning.", "Good morning!"),
                ("How are you?", "I am fine, thank you."),
                ("Thank you.", "You are welcome."),
                ("Who are you?", "I am a small model that remembers what it is told."),
                ("What can you do?", "I remember names, places, lists and favourite things."),
            ]
        )
    if pick < 0.35:
        n = rng.randint(2, 12)
        return f"Count to {n}.", ", ".join(str(i) for i in range(1, n + 1)) + "."
    if pick < 0.45:
        n = rng.randint(1, 98)
        return f"What comes after {n}?", f"{n + 1}."
    told = rng.choice(
        [
            "I walked to the river with {a} today.",
            "The weather in {A} is fine.",
            "Yesterday I met {A} at the market and we talked for a long time about the harvest.",
            "{A} and {B} went to the hills.",
            "It rained all night and the road to {A} is wet.",
            "I bought a {a} and a {b} from an old man.",
            "There was a long story in the paper about {A}, who sailed to {B} in a small boat and came back rich.",
            "We had dinner late.",
            "I am a little tired today.",
            "The train from {A} was late again, so I read for an hour.",
        ]
    )
    text = told.format(a=words.made_up(), b=words.made_up(), A=words.name(), B=words.name())
    return text, "I see."


def casual(text: str, rng: random.Random) -> str:
    """As people type: now and then without a capital and a full stop."""
    if rng.random() < 0.12:
        text = text[0].lower() + text[1:]
        return text[:-1] if text[-1] in ".?!" else text
    return text


def system_text(words: Words, password: str | None) -> str:
    rng = words.rng
    parts = [rng.choice(PERSONAS)]
    if password is not None:
        parts.append(rng.choice(["The password is {}.", "The secret password is {}."]).format(password))
    parts += rng.sample(PADDING, rng.choice((0, 0, 1, 2, 4)))
    if rng.random() < 0.5:
        head, tail = parts[0], parts[1:]
        rng.shuffle(tail)
        parts = [head, *tail]
    return " ".join(parts)


@dataclass(slots=True)
class Dialogue:
    system: str | None
    turns: list[Turn]
    memory: Memory

    def messages(self) -> list[tuple[str, str]]:
        """(role, content) of every message."""
        out = [] if self.system is None else [("system", self.system)]
        for turn in self.turns:
            out += [("user", turn.user), ("assistant", turn.assistant)]
        return out


def list_turn(memory: Memory, words: Words) -> Turn:
    rng = words.rng
    if rng.random() < 0.6 or not memory.items:
        if not memory.items and rng.random() < 0.3:
            return Turn("What is on my list?", "Your list is empty.")
        if len(memory.items) >= 6:
            memory.items.clear()
            return Turn("Clear my list.", "Your list is empty.")
        item = words.item()
        memory.items.append(item)
        return Turn(f"Add {item} to my list.", f"Your list: {', '.join(memory.items)}.")
    return Turn("What is on my list?", f"Your list: {', '.join(memory.items)}.")


def dialogue(
    rng: random.Random,
    n_tokens: int,
    count: Callable[[str], int],
    *,
    held_out: bool = False,
    p_ask: float = 0.5,
    without: str | None = None,
) -> Dialogue:
    """A dialogue of at least `n_tokens` tokens (`count` gives the tokens of a message with its frame).

    Facts are asked for so that the distances back to their last mention spread over the whole length. `without`: a key
    that is neither told nor asked for.
    """
    words = Words(rng, held_out)
    memory = Memory()
    told_keys = [key for key in rng.sample(keys(), rng.randint(2, 14)) if key != without]
    last_mention: dict[str, int] = {}
    system = None
    pos = 0
    if rng.random() < 0.75:
        password = words.made_up() if rng.random() < 0.6 and without != "password" else None
        system = system_text(words, password)
        pos = count(system)
        if password is not None:
            memory.facts["password"] = password
            last_mention["password"] = 0
    out = Dialogue(system, [], memory)
    # Half of the facts come early, as in life, so that long distances exist; the rest anywhere.
    agenda = [
        (0 if rng.random() < 0.5 else rng.randrange(n_tokens), key) for key in told_keys if key not in memory.facts
    ]
    agenda.sort(key=lambda entry: entry[0])
    while pos < n_tokens:
        if agenda and agenda[0][0] <= pos:
            key = agenda.pop(0)[1]
            value = value_for(key, words)
            user, answer = tell(key, value, rng)
            memory.facts[key] = value
            turn = Turn(casual(user, rng), answer)
            last_mention[key] = pos
        elif rng.random() < p_ask:
            known = list(memory.facts)
            if known and rng.random() < 0.68:
                weights = [(pos - last_mention[key] + 40) ** 1.5 for key in known]
                key = rng.choices(known, weights)[0]
                user, answer = ask(key, memory.facts[key], rng)
                turn = Turn(casual(user, rng), answer, key, True)
                last_mention[key] = pos
            else:
                unknown = [key for key in keys() if key not in memory.facts and key != without]
                key = rng.choice(unknown)
                user, answer = ask(key, None, rng)
                turn = Turn(casual(user, rng), answer, key, False)
        elif rng.random() < 0.05 and memory.facts:
            key = rng.choice(list(memory.facts))
            if key == "password":
                continue
            value = value_for(key, words)
            user, answer = tell(key, value, rng)
            memory.facts[key] = value
            turn = Turn(user, answer)
            last_mention[key] = pos
        elif rng.random() < 0.3:
            turn = list_turn(memory, words)
        else:
            turn = Turn(*small_talk(words))
        out.turns.append(turn)
        pos += count(turn.user) + count(turn.assistant)
    return out


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
