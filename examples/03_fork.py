"""A branch: same past, different future. It costs nothing until it says something of its own.

python examples/03_fork.py [--model model.gguf]
"""

import argparse

from llama_sessions import ContextManager, Engine, Session, builtin_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=builtin_model())
args = parser.parse_args()

with ContextManager.load(args.model) as cm:
    engine, chat = Engine(cm), Session("You remember what you are told.")
    engine.chat(chat, "My cat is called Sulan.", temperature=0)

    cells = cm.stats().n_cells_unique
    branch = cm.fork(chat)
    print(f"forked {branch.n_past} tokens; cells in use before {cells}, after {cm.stats().n_cells_unique}")

    engine.chat(branch, "My horse is called Bemor.", temperature=0)
    for name, session in (("chat", chat), ("branch", branch)):
        for text in ("What is my cat called?", "What is my horse called?"):
            print(f"{name:7}> {text}  {engine.chat(session, text, temperature=0).text}")

    # History is a plain list: edit it, and the next turn keeps what still holds.
    chat.messages[0]["content"] = "My cat is called Mirto."
    del chat.messages[2:]
    print(f"edited > What is my cat called?  {engine.chat(chat, 'What is my cat called?', temperature=0).text}")
    print(f"  {chat.last_prepare}")
