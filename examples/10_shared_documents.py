"""Many questions on the same long text, which is no system prompt: it is computed once, whoever asks.

python examples/10_shared_documents.py [--model model.gguf]
"""

import argparse

from llama_sessions import ContextManager, Engine, Session, builtin_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=builtin_model())
args = parser.parse_args()

FACTS = {"dog": "Telmi", "cat": "Sulan", "horse": "Bemor", "boat": "Orwas"}

with ContextManager.load(args.model, max_sessions=2) as cm:
    engine = Engine(cm)
    for thing in [*FACTS, *FACTS]:
        session = Session("You remember what you are told.")
        for other, name in FACTS.items():
            session.add_user(f"My {other} is called {name}.")
            session.add_assistant("I will remember that.")
        reply = engine.chat(session, f"What is my {thing} called?", temperature=0)
        print(f"{reply.text:32} {session.last_prepare}")
        cm.release(session)  # what was computed for it stays in the cache

    stats = cm.stats()
    print(f"{stats.n_tokens_decoded} tokens decoded, {stats.radix.n_hit_tokens} restored, {stats.radix.n_nodes} edges:")
    print(cm.describe())
