"""Thinking comes apart from the text, and can be given a budget in tokens.

The built-in model does not think, so here a template opens the thinking for it, as those of thinking models do. They
need nothing of this: their own template tells.

python examples/08_thinking.py [--model model.gguf]
"""

import argparse

from llama_sessions import ContextManager, Engine, Session, builtin_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=builtin_model())
args = parser.parse_args()

OPENS_THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content.split('</think>')[-1] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
template = OPENS_THINKING if args.model == builtin_model() else None

with ContextManager.load(args.model, chat_template=template) as cm:
    engine, chat = Engine(cm), Session("You remember what you are told.")
    chat.add_user("My name is Marelo.")
    chat.add_assistant("Nice to meet you, Marelo.")

    # A form is asked of what follows the thinking, not of the thinking itself.
    answer = 'root ::= "Your name is " [A-Z] [a-z]+ "."'
    for chunk in engine.stream(chat, "What is my name?", think_budget=6, grammar=answer, temperature=0):
        if chunk.text:
            print(f"{chunk.kind:8} {chunk.text!r}")

    print({key: value for key, value in chat.messages[-1].items() if key != "role"})
    print(chat.last_prepare)
