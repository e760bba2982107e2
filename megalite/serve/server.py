"""`megalite serve RUN`: an OpenAI-compatible server, and the page at /.

This process speaks HTTP and is no rank: the model has ranks of its own (desk.py). What clients may
ask stands in protocol.py, who may ask in guard.py, and what they are answered in answers.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.responses import StreamingResponse

from megalite.core.errors import DataError, UserError
from megalite.data.chat import Message, Template
from megalite.data.strict_json import parse_json
from megalite.serve.answers import ChatShape, Served, Shape, TextShape, pieces, requests_of, usage
from megalite.serve.desk import Busy, Desk, Failed
from megalite.serve.guard import (
    HEADER_BYTES,
    Connection,
    Guard,
    is_loopback,
    own_token,
    read_body,
)
from megalite.serve.model import find, remote
from megalite.serve.protocol import (
    Asked,
    ChatAsked,
    ChatMessage,
    TextAsked,
    TokenizeAsked,
    Wrong,
    check,
)
from megalite.serve.serve_args import ServeArgs

PAGE = Path(__file__).resolve().parent / "page"
LARGEST_DEPTH = 32
"""Of lists and objects in each other, in a body."""


def application(served: Served) -> FastAPI:
    """The routes. Whoever calls it puts a Guard around."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Wrong)
    async def wrong(http: Request, error: Wrong) -> Response:
        return JSONResponse(error.body(), error.status, headers=error.headers)

    @app.exception_handler(HTTPException)
    async def nothing_there(http: Request, error: HTTPException) -> Response:
        what = Wrong(error.status_code, f"{http.method} {http.url.path[:100]}: {error.detail}")
        return JSONResponse(what.body(), error.status_code)

    @app.get("/health")
    async def health() -> Response:
        if served.desk.failure:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics(http: Request) -> Response:
        return PlainTextResponse(prometheus(served, http.app.state.answered))

    @app.get("/v1/models")
    async def models() -> Response:
        model = {"id": served.name, "object": "model", "created": int(served.began)}
        model |= {"owned_by": "megalite", "context": served.context, "chat": served.chats}
        return JSONResponse({"object": "list", "data": [model]})

    @app.post("/v1/chat/completions")
    async def chat(http: Request) -> Response:
        asked: ChatAsked = check(ChatAsked, await json_of(http))
        most = (
            asked.max_tokens
            if asked.max_completion_tokens is None
            else (asked.max_completion_tokens)
        )
        template = template_of(served)
        requests = requests_of(
            served,
            asked,
            [template.prompt(conversation(asked.messages))],
            most,
            stop=frozenset([template.end]),
            rivals=(asked.top_logprobs or 0) if asked.logprobs else None,
        )
        return await respond(served, ChatShape(served, asked), requests, asked, http)

    @app.post("/v1/completions")
    async def complete(http: Request) -> Response:
        asked: TextAsked = check(TextAsked, await json_of(http))
        if asked.echo and asked.stream:
            raise Wrong(400, "echo: not offered with stream", param="echo")
        requests = requests_of(
            served,
            asked,
            asked.prompts(served.tokenizer),
            16 if asked.max_tokens is None else asked.max_tokens,
            stop=frozenset([served.tokenizer.eod]),
            rivals=asked.logprobs,
            echo=bool(asked.echo),
        )
        return await respond(served, TextShape(served, asked), requests, asked, http)

    @app.post("/tokenize")
    async def tokenize(http: Request) -> Response:
        asked: TokenizeAsked = check(TokenizeAsked, await json_of(http))
        if (asked.text is None) == (asked.messages is None):
            raise Wrong(400, "give text or messages, one of the two")
        if asked.messages is None:
            ids = served.tokenizer.encode(asked.text or "")
        else:
            ids = template_of(served).prompt(conversation(asked.messages))
        tokens = [{"id": i, **piece_of(served, i)} for i in ids]
        return JSONResponse({"tokens": tokens, "count": len(ids), "context": served.context})

    @app.get("/")
    async def page() -> Response:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE))
    return app


async def json_of(http: Request) -> Any:
    """The value in the body. Raises Wrong."""
    body = await read_body(http.receive, http.headers.get("content-length"))
    # First of all: Python's parser follows lists in lists until its stack ends.
    if not is_flat(body):
        raise Wrong(400, f"the body is nested deeper than {LARGEST_DEPTH}")
    try:
        return parse_json(body.decode("utf-8"), "body")
    except UnicodeDecodeError as error:
        raise Wrong(400, f"the body is not UTF-8 at byte {error.start}") from None
    except DataError as error:
        raise Wrong(400, str(error)) from None


def is_flat(body: bytes) -> bool:
    """Whether no more than LARGEST_DEPTH lists and objects stand in each other."""
    depth = 0
    for found in re.finditer(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', body, re.DOTALL):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(found[0], 0)
        if depth > LARGEST_DEPTH:
            return False
    return True


def template_of(served: Served) -> Template:
    """Raises Wrong for a model that was not made to chat."""
    try:
        return Template(served.tokenizer)
    except DataError as error:
        raise Wrong(400, f"{error}; /v1/completions goes on from a text") from None


def conversation(messages: list[ChatMessage]) -> list[Message]:
    """As the template takes them."""
    roles = {"developer": "system"}
    return [Message(roles.get(m.role, m.role), m.text) for m in messages]


def piece_of(served: Served, token: int) -> dict[str, Any]:
    """A token's text and bytes."""
    data = served.tokenizer.decode_bytes([token])
    return {"text": data.decode("utf-8", "replace"), "bytes": list(data)}


# -- answers -----------------------------------------------------------------------------------


async def respond(
    served: Served, shape: Shape, requests: list[Any], asked: Asked, http: Request
) -> Response:
    """The answer, whole or as a stream."""
    try:
        served.desk.admit(len(requests))
    except (Failed, Busy) as error:  # while there is a status to say it by
        raise unserved(error) from None
    if asked.stream:
        return StreamingResponse(
            events(served, shape, requests, asked, http), media_type="text/event-stream"
        )
    choices = {}
    try:
        async for piece in pieces(served, requests, asked, http):
            choices[piece.choice.index] = piece.choice
    except (Failed, Busy) as error:
        raise unserved(error) from None
    found = [choices[i] for i in sorted(choices)]
    body = {**shape.head, "object": shape.kind, "choices": [shape.whole(c) for c in found]}
    return JSONResponse({**body, "usage": usage(found, asked.copies)})


def unserved(error: Failed | Busy) -> Wrong:
    """What a client is told."""
    if isinstance(error, Busy):
        return Wrong(429, "too many requests wait; try again", code="busy")
    return Wrong(503, "the model has failed", code="failed")


async def events(
    served: Served, shape: Shape, requests: list[Any], asked: Asked, http: Request
) -> AsyncIterator[bytes]:
    """The answer as server-sent events."""

    def event(choices: list[dict[str, Any]], **more: Any) -> bytes:
        return line({**shape.head, "object": shape.chunk, "choices": choices, **more})

    choices = {}
    try:
        for index in range(len(requests)):
            yield event([shape.opening(index)])
        async for piece in pieces(served, requests, asked, http):
            choices[piece.choice.index] = piece.choice
            if piece.text or piece.told:
                yield event([shape.part(piece)])
            if piece.ended:
                yield event([shape.closing(piece.choice)])
    except (Failed, Busy) as error:
        yield line(unserved(error).body())
        return
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield event([], usage=usage([choices[i] for i in sorted(choices)], asked.copies))
    yield b"data: [DONE]\n\n"


def line(value: dict[str, Any]) -> bytes:
    """One event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def prometheus(served: Served, answered: dict[int, int]) -> str:
    """The metrics, in Prometheus's text form."""
    rows = [
        "# HELP megalite_requests_total Answered HTTP requests.",
        "# TYPE megalite_requests_total counter",
        *(f'megalite_requests_total{{status="{s}"}} {n}' for s, n in sorted(answered.items())),
        "# HELP megalite_tokens_total Tokens of prompts read, and tokens made.",
        "# TYPE megalite_tokens_total counter",
        *(f'megalite_tokens_total{{kind="{k}"}} {n}' for k, n in sorted(served.tokens.items())),
        "# HELP megalite_open_requests Texts that are being made, or wait for a slot.",
        "# TYPE megalite_open_requests gauge",
        f"megalite_open_requests {served.desk.open}",
        "# HELP megalite_up Whether the model runs.",
        "# TYPE megalite_up gauge",
        f"megalite_up {int(not served.desk.failure)}",
    ]
    return "\n".join(rows) + "\n"


# -- the command -------------------------------------------------------------------------------


def serve(args: ServeArgs) -> None:
    """Serve until Ctrl-C or SIGTERM."""
    token = own_token(args.token_file) if args.token_file else ""
    if not token and not is_loopback(args.host):
        raise UserError(
            f"--host {args.host}: anybody who reaches this address could use the model "
            "(name a --token-file, or leave --host at 127.0.0.1)"
        )
    if bool(args.tls_cert) != bool(args.tls_key):
        raise UserError("--tls-cert and --tls-key: one is nothing without the other")
    saved, how = find(Path(args.checkpoint), args, slots=args.slots)
    tokenizer, listening = saved.tokenizer(), listen(args.host, args.port)
    with listening, remote(saved, how) as ranks:

        def make() -> Served:
            desk = Desk(ranks, room=args.slots + args.max_queue)
            return Served(saved, tokenizer, desk, args.max_seconds)

        names = {"localhost", args.host, *filter(None, args.allow_host.split(","))}
        with contextlib.suppress(KeyboardInterrupt):
            asyncio.run(run(make, args, listening, token, names))


async def run(
    make: Callable[[], Served], args: ServeArgs, listening: socket.socket, token: str, names: set
) -> None:
    """Speak HTTP on the socket until it is enough."""
    served = make()
    app = application(served)
    guard = Guard(app, token=token, names={name.lower() for name in names})
    app.state.answered = guard.answered
    server = uvicorn.Server(
        uvicorn.Config(
            guard,
            http=Connection,
            ws="none",
            lifespan="off",
            log_level="critical",
            access_log=False,
            server_header=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_graceful_shutdown=2,
            ssl_certfile=args.tls_cert or None,
            ssl_keyfile=args.tls_key or None,
        )
    )
    host, port = listening.getsockname()[:2]
    scheme = "https" if args.tls_cert else "http"
    shown = f"[{host}]" if ":" in host else host
    kind = "chat" if served.chats else "base model"
    print(
        f"serving {served.name} ({kind}, context {served.context}) on {scheme}://{shown}:{port} "
        "(Ctrl-C ends it)",
        flush=True,
    )
    await server.serve(sockets=[listening])


def listen(host: str, port: int) -> socket.socket:
    """A socket at that address. Raises UserError where there can be none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, proto, _, address = found[0]
        listening = socket.socket(family, kind, proto)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(1024)
    except (OSError, OverflowError) as error:
        raise UserError(f"--host {host} --port {port}: {error}") from None
    return listening
