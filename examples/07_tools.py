"""Tool calls: parsed as they stream, answered by your functions, and the conversation goes on.

The built-in model has never seen a tool, so here a grammar leaves it nothing else to say than a call; what it calls
with is its own. A model that was trained on tools needs none, and `engine.run_tools(chat, functions)` does it all.

python examples/07_tools.py [--model model.gguf]
"""

import argparse
import json

from llama_sessions import ContextManager, Engine, Session, builtin_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=builtin_model())
args = parser.parse_args()

SIGN = {
    "type": "function",
    "function": {
        "name": "print",
        "description": "Prints a sentence on a sign.",
        "parameters": {"type": "object", "properties": {"sentence": {"type": "string"}}, "required": ["sentence"]},
    },
}
CALL = r"""root ::= "<tool_call>\n{\"name\": \"print\", \"arguments\": {\"sentence\": \"" sentence "\"}}\n</tool_call>"
sentence ::= "Your name is " [A-Z] [a-z]{2,9} "."
"""


def print_sign(sentence: str) -> str:
    print(f"\n  *** {sentence} ***")
    return "The sign is printed."


with ContextManager.load(args.model) as cm:
    engine, chat = Engine(cm), Session("You remember what you are told.", tools=[SIGN])
    engine.chat(chat, "My name is Marelo.", temperature=0)

    for chunk in engine.stream(chat, "What is my name?", grammar=CALL, temperature=0):
        if chunk.tool_call is not None:
            print(chunk.tool_call.name or chunk.tool_call.arguments, end="", flush=True)

    (call,) = chat.messages[-1]["tool_calls"]
    result = print_sign(**json.loads(call["function"]["arguments"]))
    chat.add_tool_result(result, call["id"])
    print(f"  {[message['role'] for message in chat.messages]}")
    print(engine.chat(chat, "And what is my name?", temperature=0).text)
