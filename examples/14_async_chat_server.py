"""A small web chat: each tab of the browser is a session, and a pool answers all of them together.

pip install 'llama-sessions[server]'
python examples/14_async_chat_server.py [--model model.gguf] [--port 8000]
"""

import argparse
import asyncio
import json
import re
import secrets
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.requests import Request
    from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
    from starlette.routing import Route
except ModuleNotFoundError as e:
    sys.exit(f"{e}; pip install 'llama-sessions[server]' (here: pip install -e '.[server]')")

from llama_sessions import (
    PRESETS,
    AsyncPool,
    CapacityError,
    ContextManager,
    LlamaSessionsError,
    OptionError,
    QueueFull,
    Session,
    StateError,
    Ticket,
    builtin_model,
)

PAGE = Path(__file__).with_suffix(".html")
NOTHING_FROM_ELSEWHERE = (
    "default-src 'none'; connect-src 'self'; img-src data:; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
)
MOST_TABS, MOST_BYTES = 64, 100_000
STATUS = {OptionError: 400, StateError: 409, QueueFull: 429, CapacityError: 507}
EDGE = re.compile(r"^  ( *)\[(\d+), (\d+)\) (\d+) bytes, used (\d+) times", re.M)  # in what `describe` prints


@dataclass
class Tab:
    """A conversation in the browser. `ticket`: its latest reply, while that is under way."""

    session: Session
    name: str
    number: int
    ticket: Ticket | None = None
    id: str = field(default_factory=lambda: secrets.token_urlsafe(9))

    def as_json(self) -> dict[str, Any]:
        return {"tab": self.id, "name": self.name, "messages": self.session.messages}


class Chat:
    """The tabs, and what a browser may do with them."""

    def __init__(self, cm: ContextManager, **options: Any) -> None:
        self.cm, self.options = cm, options
        self.tabs: dict[str, Tab] = {}  # whose turn is the longest ago first
        self.n_tabs = 0
        self.app = Starlette(
            routes=[
                Route("/", self.page),
                Route("/map", self.map),
                Route("/metrics", self.metrics),
                Route("/tabs", self.open, methods=["POST"]),
                Route("/tabs/{tab}", self.look),
                *(
                    Route(f"/tabs/{{tab}}/{action.__name__}", action, methods=["POST"])
                    for action in (self.chat, self.stop, self.undo, self.fork)
                ),
            ],
            # Whoever resolves a name of their own to 127.0.0.1 is not let in.
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])],
            exception_handlers={LlamaSessionsError: refuse, HTTPException: refuse},
            lifespan=self.lifespan,
        )
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="warning", timeout_graceful_shutdown=5))

    @asynccontextmanager
    async def lifespan(self, _: Starlette) -> AsyncIterator[None]:
        async with AsyncPool(self.cm) as self.pool:
            yield

    # -- the page, and its tabs

    async def page(self, _: Request) -> Response:
        return FileResponse(PAGE, headers={"Content-Security-Policy": NOTHING_FROM_ELSEWHERE})

    async def open(self, request: Request) -> Response:
        await body_of(request)
        return self.add(Session())

    async def look(self, request: Request) -> Response:
        return JSONResponse(self.tab(request).as_json())

    def add(self, session: Session, origin: str = "") -> Response:
        for tab in list(self.tabs.values())[: max(0, len(self.tabs) - MOST_TABS + 1)]:
            del self.tabs[tab.id]  # nobody else holds its session: the slot is free with the next call
        self.n_tabs += 1
        tab = Tab(session, f"tab {self.n_tabs}{origin}", self.n_tabs)
        self.tabs[tab.id] = tab
        return JSONResponse(tab.as_json(), 201)

    def tab(self, request: Request, *, idle: bool = False) -> Tab:
        tab = self.tabs.get(request.path_params["tab"])
        if tab is None:
            raise HTTPException(404, "this tab is not known here any more; open a new one")
        if idle and self.cm.is_held(tab.session):
            raise StateError("a reply is under way in this tab; stop it first")
        return tab

    # -- a conversation

    async def chat(self, request: Request) -> Response:
        """The reply as server-sent events: `chunk` many times, then `end` or `error`."""
        tab, text = self.tab(request), (await body_of(request)).get("text")
        if not isinstance(text, str) or not text.strip():
            raise HTTPException(400, f"text must say something, not {text!r:.40}")
        tab.ticket = await self.pool.submit(tab.session, text, wait_s=10, **self.options)
        self.tabs[tab.id] = self.tabs.pop(tab.id, tab)  # now the one used last
        return StreamingResponse(self.events(tab, tab.ticket), media_type="text/event-stream")

    async def events(self, tab: Tab, ticket: Ticket) -> AsyncIterator[str]:
        try:
            async with aclosing(self.pool.chunks(ticket)) as chunks:
                async for chunk in chunks:
                    if chunk.text:
                        yield event("chunk", kind=chunk.kind, text=chunk.text)
                    if self.server.should_exit:
                        ticket.cancel()
        except LlamaSessionsError as e:
            yield event("error", error=str(e), **tab.as_json())
            return
        reply = ticket.result()
        yield event(
            "end",
            stopped=reply.is_cut_short,
            cost=f"{reply.n_reused} reused, {reply.n_decoded} decoded, {reply.n_generated} said",
            first_token_ms=round(reply.first_token_s * 1e3),
            **tab.as_json(),
        )

    async def stop(self, request: Request) -> Response:
        await body_of(request)
        if (ticket := self.tab(request).ticket) is not None:
            ticket.cancel()
        return Response(status_code=204)

    async def undo(self, request: Request) -> Response:
        await body_of(request)
        tab = self.tab(request, idle=True)
        tab.session.undo()
        return JSONResponse(tab.as_json())

    async def fork(self, request: Request) -> Response:
        await body_of(request)
        tab = self.tab(request, idle=True)
        branch = await asyncio.to_thread(self.cm.fork, tab.session)  # it waits for the step that is under way
        return self.add(branch, f" ← {tab.number}")

    # -- who holds what

    async def map(self, _: Request) -> Response:
        """Never waits for a decode. Polled: a stream a tab would use up the six connections that a browser makes."""
        stats, edges = self.cm.stats(), EDGE.findall(self.cm.describe())
        return JSONResponse(
            {
                "model": self.cm.capabilities.model,
                "n_ctx_seq": self.cm.n_ctx_seq,
                "stats": asdict(stats),
                "pool": asdict(self.pool.stats()),
                "rows": [self.row(tab) for tab in sorted(self.tabs.values(), key=lambda tab: tab.number)],
                "tree": [
                    {"depth": len(indent) // 2, "p0": int(p0), "p1": int(p1), "n_bytes": int(n), "n_uses": int(uses)}
                    for indent, p0, p1, n, uses in edges
                ],
            }
        )

    def row(self, tab: Tab) -> dict[str, Any]:
        session, prepared = tab.session, tab.session.last_prepare
        is_busy = self.cm.is_held(session)
        state = tab.ticket.state if is_busy and tab.ticket else "parked" if self.cm.is_parked(session) else "idle"
        parts = [[part.source, part.p1 - part.p0] for part in prepared.stretches] if prepared else []
        said = session.n_past - sum(n for _, n in parts)
        return {"name": tab.name, "state": state, "n": session.n_past, "parts": [*parts, ["said", max(0, said)]]}

    async def metrics(self, _: Request) -> Response:
        return PlainTextResponse(self.pool.metrics())


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON object that came. Pages of other sites cannot send that type without being asked about it first."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
        raise HTTPException(415, "send application/json")
    n_bytes = request.headers.get("content-length", "")
    if not n_bytes.isdecimal() or int(n_bytes) > MOST_BYTES:
        raise HTTPException(413, f"send at most {MOST_BYTES} bytes, and say how many")
    try:
        body = await request.json()
    except (ValueError, RecursionError) as e:
        raise HTTPException(400, f"this is no JSON: {e}") from None
    if not isinstance(body, dict):
        raise HTTPException(400, f"send an object, not {type(body).__name__}")
    return body


async def refuse(_: Request, e: Exception) -> Response:
    """What went wrong, for the page to show."""
    if isinstance(e, HTTPException):
        return JSONResponse({"error": e.detail}, e.status_code)
    return JSONResponse({"error": str(e)}, next((n for kind, n in STATUS.items() if isinstance(e, kind)), 500))


def event(name: str, /, **data: Any) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=builtin_model(), help="a GGUF; default: the model in the box")
    parser.add_argument("--port", type=int, default=8000, help="on 127.0.0.1; 0: any that is free")
    parser.add_argument("--preset", choices=PRESETS, default="precise", help="how to sample (default: %(default)s)")
    most = "tokens for all tabs together, and at most for one; default: what the model was trained for, up to 8192"
    parser.add_argument("--n-ctx", type=int, help=most)
    parser.add_argument("--n-threads", type=int, help="to decode with; default: as many as there are cores")
    parser.add_argument("--system", default="You remember what you are told.", help="the system text")
    args = parser.parse_args()
    try:
        listener = socket.create_server(("127.0.0.1", args.port))
    except (OSError, OverflowError) as e:
        sys.exit(f"port {args.port} of 127.0.0.1: {e}; try --port 0")
    with ContextManager.load(args.model, n_ctx=args.n_ctx, n_threads=args.n_threads) as cm:
        cm.set_system(args.system)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}   Ctrl-C ends it", flush=True)
        with suppress(KeyboardInterrupt):
            Chat(cm, preset=args.preset).server.run(sockets=[listener])


if __name__ == "__main__":
    main()
