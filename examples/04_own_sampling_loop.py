"""Your own sampling loop: prepare, look at the logits, append the token you want.

python examples/04_own_sampling_loop.py [--model model.gguf]
"""

import argparse

from llama_sessions import ContextManager, Session, builtin_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=builtin_model())
args = parser.parse_args()

with ContextManager.load(args.model) as cm:
    chat = Session("You remember what you are told.")
    for text in ("I left the key in Tamoli.", "Where is the key?"):
        chat.add_user(text)
        cm.prepare(chat)
        said = b""
        for _ in range(40):
            token = int(cm.logits(chat).argmax())  # (n_vocab,) float32, read-only
            if cm.vocab.is_eog(token):
                break
            said += cm.vocab.piece(token)
            cm.append(chat, token)
        # The ids that were appended stand for this message: the next prepare decodes only what is new.
        chat.add_assistant(said.decode("utf-8", "replace"))
        print(f"> {text}\n{chat.messages[-1]['content']}\n  {chat.last_prepare}")
