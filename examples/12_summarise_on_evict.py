"""What leaves the window is summarised: the same model reads it in a second session, and its notes take its place.

python examples/12_summarise_on_evict.py [--model model.gguf]
"""

import argparse
from dataclasses import replace

from llama_sessions import STRATEGIES, ContextManager, Engine, Eviction, Session, builtin_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=builtin_model())
args = parser.parse_args()

# Ask a larger model for a summary in its own words; the one in the box can say what it was told, one thing at a time.
STORY = "There was a long story in the paper about {} people, who sailed to sea in a small boat and came back rich."
QUESTIONS = ("What is my name?", "What is my favourite drink?", "Where is the key?")


def half_at_once(request: Eviction) -> list[tuple[int, int]]:
    """Whole turns, oldest first, but half of the window: so that a summary is written now and then, not every turn."""
    return STRATEGIES["message"](replace(request, n_needed=max(request.n_needed, request.n_tokens // 2)))


with ContextManager.load(args.model, n_ctx=512, max_sessions=2, eviction=half_at_once) as cm:
    engine, chat = Engine(cm), Session("You remember what you are told.")

    def summarise(dropped: list[dict], session: Session) -> list[dict]:
        """`on_evict`: gets the messages that go, the last summary first; returns what is to stand in their place."""
        reader = Session(session.system)
        reader.messages = list(dropped)
        answers = [engine.chat(reader, question, temperature=0).text for question in QUESTIONS]
        cm.release(reader)
        notes = " ".join(a for a in answers if "You have not told me" not in a).replace("Your", "My")
        print(f"  {len(dropped)} messages go. {notes}")
        return [{"role": "user", "content": notes}, {"role": "assistant", "content": "I will remember that."}]

    cm.set_hook("on_evict", summarise)
    for text in ("My name is Marelo.", "My favourite drink is tea.", "I left the key in Tamoli."):
        print(f"> {text} {engine.chat(chat, text, temperature=0).text}")
    for n in range(12):
        engine.chat(chat, STORY.format(n + 2), temperature=0)
    for text in (*QUESTIONS, "Where is the map?"):
        print(f"> {text} {engine.chat(chat, text, temperature=0).text}")
    first = chat.window[0]["content"]
    print(f"{len(chat.messages)} messages; the {len(chat.window)} in the window begin with: {first}")
