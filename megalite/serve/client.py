"""Asks an OpenAI-compatible server, over HTTP or HTTPS, for answers as they come."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from megalite.core.errors import RunError, UserError
from megalite.data.chat import Message
from megalite.serve.talk_args import Drawing

TIMEOUT = 120.0
"""Seconds that a server may say nothing."""


class Server:
    """A server at a URL such as http://127.0.0.1:8000; /v1 at its end is taken for granted."""

    def __init__(self, url: str, *, token_file: str = "", ca_file: str = ""):
        try:
            parts = urlsplit(url)
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError as error:
            raise UserError(f"--url {url}: {error}") from None
        if parts.scheme not in ("http", "https") or not self._host:
            raise UserError(f"--url {url}: expected http://HOST:PORT or https://HOST")
        self.url = url
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if token_file:
            self._headers["Authorization"] = f"Bearer {read_token(token_file)}"
        self._trust = None
        if parts.scheme == "https":
            try:
                self._trust = ssl.create_default_context(cafile=ca_file or None)
            except OSError as error:
                raise UserError(f"--ca-file {ca_file}: {error.strerror or error}") from None

    def model(self) -> str:
        """The name of the first model that the server has."""
        connection, answer = self._ask("GET", "/v1/models")
        with closing(connection):
            return str(json.loads(answer.read())["data"][0]["id"])

    def answer(self, messages: list[Message], how: Drawing) -> Generator[str]:
        """What the assistant says, in pieces. Raises UserError with the server's words."""
        body: dict[str, Any] = {
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "stream": True,
            "max_tokens": how.max_tokens,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "seed": how.seed,
        }
        # Not all servers know these; what changes nothing need not be said.
        plain = Drawing()
        for name in ("top_k", "min_p", "repetition_penalty", "stop"):
            if getattr(how, name) != getattr(plain, name):
                body[name] = getattr(how, name)
        connection, answer = self._ask("POST", "/v1/chat/completions", body)
        with closing(connection):
            for line in answer:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = json.loads(data)
                if "error" in event:
                    raise UserError(f"{self.url}: {event['error'].get('message')}")
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        at = (self._host, self._port)
        if self._trust is not None:
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                *at, timeout=TIMEOUT, context=self._trust
            )
        else:
            connection = http.client.HTTPConnection(*at, timeout=TIMEOUT)
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, self._path + path, data, self._headers)
            answer = connection.getresponse()
            if answer.status != 200:
                raise UserError(f"{self.url}: {answer.status}: {_words(answer.read())}")
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise RunError(f"{self.url}: {error}") from None
        except UserError:
            connection.close()
            raise
        return connection, answer


def read_token(path: str) -> str:
    """The token in a file, one word. Raises UserError if there is none."""
    try:
        token = Path(path).read_text(encoding="ascii").strip()
    except OSError as error:
        raise UserError(f"--token-file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--token-file {path}: the token must be ASCII") from None
    if not token or any(c.isspace() for c in token):
        raise UserError(f"--token-file {path}: expected one token, in one line")
    return token


def _words(body: bytes) -> str:
    """What an error says, of the server's own form or any."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace").strip() or "no reason given"
