"""What stands between the server and the world: who may ask, how much, and how slowly.

An ASGI application around ours, and a connection that does not wait for ever. A page of another
site must not reach a server on this machine: hence the checks of Host (its name could be made to
point here) and Origin.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from megalite.core.errors import UserError
from megalite.serve.client import read_token
from megalite.serve.protocol import Wrong

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

HEADER_SECONDS = 5.0
"""For the line and headers of a request."""
BODY_SECONDS = 10.0
STALL_SECONDS = 30.0
"""That a client may take nothing of what is written to it."""
HEADER_BYTES = 16 << 10
BODY_BYTES = 1 << 20
TOKEN_LENGTH = 32
OPEN_PATHS = ("/health", "/", "/page")
"""What needs no token: the page asks for it."""
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def own_token(path: str) -> str:
    """The token in a file. Raises UserError if there is none, or one that could be guessed."""
    token = read_token(path)
    if len(token) < TOKEN_LENGTH:
        raise UserError(
            f"--token-file {path}: the token must be {TOKEN_LENGTH} characters or more (make one "
            "with: openssl rand -hex 32)"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """Lets through to `app` what may pass, and answers the rest itself."""

    def __init__(self, app: Any, *, token: str, names: set[str]):
        self.app, self.token, self.names = app, token.encode(), names
        self.answered: Counter[int] = Counter()
        """Answers by status."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI application."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def guarded(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.answered[message["status"]] += 1
                own = {name for name, _ in message["headers"]}
                more = [(k.encode(), v.encode()) for k, v in HEADERS.items()]
                message["headers"] = [*message["headers"], *(h for h in more if h[0] not in own)]
            await send(message)

        try:
            self._check(scope)
        except Wrong as wrong:
            return await answer(wrong, guarded)
        await self.app(scope, receive, guarded)

    def _check(self, scope: Scope) -> None:
        headers: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            headers.setdefault(name, []).append(value)
        hosts = headers.get(b"host", [])
        if len(hosts) != 1 or not self._knows(hosts[0].decode("latin-1")):
            raise Wrong(403, "this server is not called that (see --allow-host)", code="host")
        origins = headers.get(b"origin", [])
        if origins and [o.partition(b"://")[2] for o in origins] != hosts:
            raise Wrong(403, "pages of other sites may not call this server", code="origin")
        path = scope["path"]
        if self.token and not (path in OPEN_PATHS or path.startswith("/page/")):
            given = headers.get(b"authorization", [b""])
            if len(given) != 1 or not hmac.compare_digest(given[0], b"Bearer " + self.token):
                raise Wrong(401, "missing or wrong bearer token", code="token")

    def _knows(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").lower()
        if name in self.names:
            return True
        try:
            # An address is no name that somebody else could make point here.
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


async def answer(wrong: Wrong, send: Send) -> None:
    """Send an error."""
    body = json.dumps(wrong.body()).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name.encode(), value.encode()) for name, value in wrong.headers.items()]
    # What is left of its body is not read.
    headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": wrong.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def read_body(receive: Receive, length: str | None) -> bytes:
    """The whole body. Raises Wrong if it is long, slow or cut off."""
    too_long = Wrong(413, f"the body is longer than {BODY_BYTES} bytes", code="body")
    if length is not None and length.isdigit() and int(length) > BODY_BYTES:
        raise too_long
    try:
        return await asyncio.wait_for(_whole(receive, too_long), BODY_SECONDS)
    except asyncio.TimeoutError:
        raise Wrong(408, f"the body took more than {BODY_SECONDS:g} s", code="body") from None


async def _whole(receive: Receive, too_long: Wrong) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Wrong(400, "the body was cut off", code="body")
        body += message.get("body", b"")
        if len(body) > BODY_BYTES:
            raise too_long
        if not message.get("more_body"):
            return body


class Connection(H11Protocol):
    """Closes on clients that do not end their headers, or take nothing of what they asked for."""

    _late: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The time for headers begins."""
        super().connection_made(transport)
        self._late = self.loop.call_later(HEADER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """It ends when they are there, and begins again with the next request."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget_headers()
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def pause_writing(self) -> None:
        """More is written than the client takes."""
        super().pause_writing()
        self._stalled = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It has taken it."""
        super().resume_writing()
        self._forget_stall()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is waited for any more."""
        super().connection_lost(exc)
        self._forget_headers()
        self._forget_stall()

    def _forget_headers(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = None

    def _forget_stall(self) -> None:
        if self._stalled is not None:
            self._stalled.cancel()
        self._stalled = None
