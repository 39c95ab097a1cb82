"""A reply in the form you ask for: JSON by a schema, or any text by a grammar. It cannot come out otherwise.

python examples/05_json.py [--model model.gguf]
"""

import argparse
import json

from llama_sessions import ContextManager, Engine, Session, builtin_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=builtin_model())
args = parser.parse_args()

ANSWER = {
    "type": "object",
    "properties": {
        "answer": {"type": "string", "pattern": "^Your name is [A-Z][a-z]{2,9}\\.$"},
        "sure": {"type": "boolean"},
    },
    "required": ["answer", "sure"],
}

with ContextManager.load(args.model) as cm:
    engine, chat = Engine(cm), Session("You remember what you are told.")
    engine.chat(chat, "My name is Marelo.", temperature=0)

    reply = engine.chat(chat, "What is my name?", json_schema=ANSWER, temperature=0)
    answer = json.loads(reply.text)
    print(f"by a schema : {answer['answer']} sure: {answer['sure']}")

    reply = engine.chat(chat, "What is my name?", grammar='root ::= "yes" | "no"', temperature=0)
    print(f"by a grammar: {reply.text} ({reply.n_reused} tokens of the prompt reused)")
