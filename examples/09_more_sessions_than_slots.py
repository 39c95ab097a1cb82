"""Twenty people, three slots: whoever is idle is parked, and comes back without its past being computed again.

python examples/09_more_sessions_than_slots.py [--model model.gguf]
"""

import argparse

from llama_sessions import ContextManager, Engine, Session, builtin_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=builtin_model())
args = parser.parse_args()

NAMES = ["Anelda", "Borvin", "Cemiro", "Dolfan", "Emvira", "Fenro", "Gaslo", "Ilmera", "Imron", "Jalvi"]

with ContextManager.load(args.model, max_sessions=3) as cm:
    cm.set_system("You remember what you are told.")
    engine = Engine(cm)
    people = [Session() for _ in range(20)]

    for i, person in enumerate(people):
        engine.chat(person, f"My name is {NAMES[i % len(NAMES)]}.", temperature=0)
    stats = cm.stats()
    print(f"{len(people)} people, {stats.slots_total} slots, {stats.n_parked} parked")

    n_decoded = 0
    for i, person in enumerate(people):
        reply = engine.chat(person, "What is my name?", temperature=0)
        n_decoded += reply.n_decoded
        if i % 7 == 0:
            print(f"{NAMES[i % len(NAMES)]:7}> {reply.text}  ({person.last_prepare})")
    print(f"second round: {n_decoded / len(people):.1f} tokens decoded a person")
    saved = cm.stats().radix
    print(f"saved KV: {saved.n_tokens} tokens, {saved.n_bytes / 2**20:.2f} MiB; {saved.n_hit_tokens} tokens restored")
