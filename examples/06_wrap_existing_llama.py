"""A program that has a `llama_cpp.Llama` already gains sessions in three lines; the weights are loaded once.

python examples/06_wrap_existing_llama.py [--model model.gguf]
"""

import argparse

import llama_cpp

from llama_sessions import ContextManager, Engine, Session, builtin_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=builtin_model())
args = parser.parse_args()

llm = llama_cpp.Llama(args.model, n_ctx=512, verbose=False)  # what the program had before

with ContextManager.from_llama(llm, max_sessions=4) as cm:
    engine = Engine(cm)
    chats = {name: Session("You remember what you are told.") for name in ("Anelda", "Borvin")}

    for name, chat in chats.items():
        engine.chat(chat, f"My name is {name}.", temperature=0)
    for chat in chats.values():
        print(engine.chat(chat, "What is my name?", temperature=0).text)

    # Or as servers call it, with the whole conversation each time: only what is new is decoded.
    messages = [{"role": "user", "content": "My cat is called Sulan."}]
    reply = engine.chat(messages=messages, temperature=0)
    messages += [{"role": "assistant", "content": reply.text}, {"role": "user", "content": "What is my cat called?"}]
    reply = engine.chat(messages=messages, temperature=0)
    print(f"{reply.text}  {reply.usage}")

# The Llama itself goes on as before.
print(llm.create_chat_completion([{"role": "user", "content": "My dog is called Telmi."}], temperature=0)["choices"][0])
