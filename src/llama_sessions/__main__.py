"""`python -m llama_sessions demo | chat | info MODEL`."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence

from . import builtin_model
from .demo import run
from .errors import LlamaSessionsError
from .generation_options import PRESETS
from .info import describe
from .manager import ContextManager
from .terminal import chat


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llama_sessions", description="Many chat sessions over one context.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a short story on the built-in model")
    demo.add_argument("--model", default=builtin_model(), help="another GGUF (the story is the built-in one's)")
    talk = commands.add_parser("chat", help="a conversation in the terminal")
    talk.add_argument("--model", default=builtin_model(), help="a GGUF; default: the built-in model")
    talk.add_argument("--system", help="the system text")
    talk.add_argument("--preset", choices=PRESETS, default="balanced", help="how to sample (default: %(default)s)")
    talk.add_argument("--n-ctx", type=int, help="tokens of context for all sessions together")
    info = commands.add_parser("info", help="what a model's memory and template can do")
    info.add_argument("model", nargs="?", default=builtin_model(), help="a GGUF; default: the built-in model")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(argv)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # what the terminal cannot spell must not end the program
            stream.reconfigure(errors="replace")
    try:
        if args.command == "demo":
            run(args.model)
        elif args.command == "chat":
            chat(args.model, args.system, n_ctx=args.n_ctx, preset=args.preset)
        else:
            with ContextManager.load(args.model, n_ctx=None, max_sessions=1) as cm:
                print("\n".join(describe(cm)))
    except LlamaSessionsError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
