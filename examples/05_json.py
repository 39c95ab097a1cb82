"""A reply in the form you ask for: JSON by a schema, or any text by a grammar. It cannot come out otherwise.

python examples/05_json.py [--model model.gguf]
"""

import argparse
import json

from llama_sessions import ContextManager, Engine, Session, builtin_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=builtin_model())
args = parser.parse_args()

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}, "happy": {"type": "boolean"}},
    "required": ["name", "age", "happy"],
}

with ContextManager.load(args.model) as cm:
    engine, chat = Engine(cm), Session("You remember what you are told.")
    engine.chat(chat, "My name is Marelo.", temperature=0)

    reply = engine.chat(chat, "What is my name?", json_schema=PERSON, max_tokens=80, temperature=0)
    person = json.loads(reply.text)
    print(f"by a schema : {person}  ({', '.join(type(v).__name__ for v in person.values())})")

    del chat.messages[-2:]  # the question again, now as one of two words
    reply = engine.chat(chat, "Is my name Marelo?", grammar='root ::= "yes" | "no"', temperature=0)
    print(f"by a grammar: {reply.text} ({reply.stop_reason}, {reply.n_reused} tokens reused)")
