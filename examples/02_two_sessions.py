"""Two people at once: one system prompt, its KV shared; what one says the other never hears.

python examples/02_two_sessions.py [--model model.gguf]
"""

import argparse

from llama_sessions import ContextManager, Engine, Session, builtin_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=builtin_model())
args = parser.parse_args()

with ContextManager.load(args.model, max_sessions=2) as cm:
    n_prefix = cm.set_system("You are a careful assistant who remembers what people say. The password is velora.")
    print(f"system prompt: {n_prefix} tokens, decoded once")
    engine = Engine(cm)
    anna, ben = Session(), Session()
    turns = [
        (anna, "Anna", "My dog is called Telmi."),
        (ben, "Ben", "My dog is called Orwas."),
        (anna, "Anna", "What is my dog called?"),
        (ben, "Ben", "What is my dog called?"),
        (ben, "Ben", "What is the password?"),
    ]
    for session, name, text in turns:
        reply = engine.chat(session, text, temperature=0)
        print(f"{name}> {text}\n  {reply.text}   [{reply.n_reused} tokens reused, {reply.n_decoded} decoded]")

    # Or both at the same time: two streams, advanced in turn.
    streams = [engine.stream(s, "What is the password?", temperature=0) for s in (anna, ben)]
    for chunks in zip(*streams, strict=False):
        print("  |".join(f"{chunk.text!r:14}" for chunk in chunks))
    print(cm.describe())
