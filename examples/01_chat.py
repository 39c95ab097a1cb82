"""A chat: the reply appears as it is made, and the next turn costs only its own tokens.

python examples/01_chat.py [--model model.gguf]
"""

import argparse

from llama_sessions import ContextManager, Engine, Session, builtin_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=builtin_model())
args = parser.parse_args()

with ContextManager.load(args.model) as cm:
    cm.set_system("You remember what you are told.")
    engine, chat = Engine(cm), Session()
    for text in ("My name is Marelo.", "My favourite drink is tea.", "What is my name?", "What is my favourite drink?"):
        print(f"> {text}")
        for chunk in engine.stream(chat, text, temperature=0):
            print(chunk.text, end="", flush=True)
        print(f"\n  {chat.last_prepare}")
