"""Many at once: a pool answers all sessions together, one llama_decode a step for all of them.

python examples/13_pool.py [--model model.gguf]
"""

import argparse
import time

from llama_sessions import ContextManager, Engine, Pool, Session, builtin_model

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a GGUF; default: the model in the box")
args = parser.parse_args()

NAMES = ["Anelda", "Borvin", "Cemiro", "Dolfan", "Emvira", "Fenro", "Gaslo", "Ilmera"]
QUESTION = {"text": "What is my name?", "max_tokens": 64, "temperature": 0}

# Two threads would only wait for each other over the model in the box, as small as it is.
model, n_threads = (args.model, None) if args.model else (builtin_model(), 1)
with ContextManager.load(model, max_sessions=len(NAMES), n_ctx=4096, n_threads=n_threads) as cm:
    cm.set_system("You remember what you are told.")
    engine, pool = Engine(cm), Pool(cm)
    people = [Session() for _ in NAMES]
    for person, name in zip(people, NAMES, strict=True):
        pool.submit(person, f"My name is {name}.", max_tokens=64, temperature=0)
    pool.run()

    started = time.perf_counter()
    alone = [engine.chat(person, **QUESTION) for person in people]
    n_tokens = sum(reply.n_generated for reply in alone)
    print(f"one after another: {n_tokens / (time.perf_counter() - started):5.0f} tokens/s")

    for person in people:
        person.undo()  # take the question and its answer back, to ask once more
    started = time.perf_counter()
    tickets = [pool.submit(person, **QUESTION) for person in people]
    pool.run()
    print(f"all together:      {n_tokens / (time.perf_counter() - started):5.0f} tokens/s")
    for name, ticket, before in zip(NAMES, tickets, alone, strict=True):
        print(f"{name:6}> {ticket.result().text}  the same words: {ticket.result().text == before.text}")

    # Or a worker drives it: submit from any thread at any moment, iterate over a ticket, cancel another.
    unwanted = pool.submit(people[1], **QUESTION)
    unwanted.cancel()
    with pool:
        print("as it comes: " + "|".join(chunk.text for chunk in pool.submit(people[0], **QUESTION)))
        print(f"cancelled: {unwanted.result().stop_reason}")
    done = pool.stats()
    print(f"{done.n_generated_tokens} tokens in {done.n_steps} steps; {done.n_done} done, {done.n_cancelled} cancelled")
