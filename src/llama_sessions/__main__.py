"""`python -m llama_sessions demo`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import builtin_model
from .demo import run
from .errors import LlamaSessionsError


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="llama_sessions", description="Many chat sessions over one context.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a short story on the built-in model")
    demo.add_argument("--model", default=builtin_model(), help="another GGUF (the story is the built-in one's)")
    args = parser.parse_args(argv)
    try:
        run(args.model)
    except LlamaSessionsError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
