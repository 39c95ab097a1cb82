"""A chat far past its context: the oldest turns go, what is pinned stays, and nothing is taken out of `messages`.

python examples/11_endless_chat.py [--model model.gguf]
"""

import argparse

from llama_sessions import ContextManager, Engine, Session, builtin_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=builtin_model())
args = parser.parse_args()

STORY = "There was a long story in the paper about {}, who sailed to {} in a small boat and came back rich."
SAILORS, PLACES = ("Orwas", "Bemor", "Sulan", "Mirto"), ("Tamoli", "Ilmera", "Velan")

with ContextManager.load(args.model, n_ctx=256, max_sessions=1) as cm:
    cm.set_system("You are a careful assistant who remembers what people say. The password is velora.")
    engine, chat = Engine(cm), Session()

    def say(text: str) -> None:
        reply = engine.chat(chat, text, temperature=0, max_tokens=48)
        cost = f"{reply.n_reused} reused, {reply.n_decoded} decoded, {chat.last_prepare.n_evicted} evicted"
        print(f"> {text}\n{reply.text}   [{cost}; {len(chat.window)} of {len(chat.messages)} messages in the window]")

    say("My name is Anelda.")
    chat.pin_message(0)  # by its index; the pin stays with the message
    chat.pin_message(1)
    say("My favourite drink is tea.")
    for sailor in SAILORS:
        for place in PLACES:
            say(STORY.format(sailor, place))
    for question in ("What is the password?", "What is my name?", "What is my favourite drink?"):
        say(question)

    # What stood behind the turns that went was moved up, not computed again: each turn decodes only what is new, but
    # the KV is no longer what a fresh prefill of the window would give. `rebuild` makes it so.
    print(f"\nexact: {chat.last_prepare.exact}")
    cm.rebuild(chat)
    print(f"exact once rebuilt: {chat.last_prepare.exact}, for {chat.last_prepare.n_decoded} tokens decoded")
    print(f"{cm.stats().n_tokens_evicted} tokens went, in {cm.stats().n_evictions} evictions")
