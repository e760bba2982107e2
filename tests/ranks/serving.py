"""A server of a tiny model, in a thread of the test's process, its ranks beside it."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megalite.generate.load import open_checkpoint
from megalite.generate.remote import FOR_EVER, Remote, Serving
from megalite.serve import server
from megalite.serve.answers import Served
from megalite.serve.desk import Desk
from megalite.serve.serve_args import ServeArgs
from tests.ranks.client import Ranks
from tests.unit.data.samples import make_tokenizer

MODEL = {
    "num_layers": 2, "hidden_size": 32, "num_heads": 4, "vocab_size": 600, "seq_len": 96,
    "init_std": 0.3, "position": "rope",
}  # fmt: skip


def make_run(run: Path, run_ranks: Any) -> Path:
    """A run directory of an untrained model, with a tokenizer that knows conversations."""
    run_ranks("tests.ranks.generate_jobs:save_untrained", 1, run=str(run), model=MODEL)
    make_tokenizer(600).save(run / "tokenizer.json")
    return run


class Client:
    """Speaks HTTP with one server, as far as a test needs."""

    def __init__(self, port: int):
        self.port = port

    def send(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Any, http.client.HTTPMessage]:
        """Status, JSON (or text) and headers of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, path, data, named)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        is_json = answer.headers.get_content_type() == "application/json"
        return answer.status, json.loads(text) if is_json else text, answer.headers

    def post(self, path: str, **body: Any) -> Any:
        """What a request that succeeds is answered."""
        status, answer, _ = self.send("POST", path, body)
        assert status == 200, answer
        return answer

    def events(self, path: str, **body: Any) -> list[Any]:
        """The events of a stream; the last one must be [DONE]."""
        status, text, _ = self.send("POST", path, {**body, "stream": True})
        assert status == 200, text
        events = [e.removeprefix("data: ") for e in text.split("\n\n") if e]
        assert events.pop() == "[DONE]"
        return [json.loads(event) for event in events]

    def open(self) -> int:
        """Texts that are being made or wait."""
        _, text, _ = self.send("GET", "/metrics")
        row = next(r for r in text.splitlines() if r.startswith("megalite_open_requests "))
        return int(row.split()[1])


@contextmanager
def serving(
    run: Path, ranks: Ranks, *, token: str = "", pace: float = 0.0, **args: Any
) -> Iterator[Client]:
    """A server with these arguments, each of whose steps takes `pace` seconds more."""
    asked = ServeArgs(**{"checkpoint": str(run), "port": 0, **args})
    saved = open_checkpoint(run)

    def start(target: str, world: int, kwargs: dict[str, Any]) -> None:
        ranks.run(target, world, kwargs=kwargs, timeout=FOR_EVER, grace=0.5)

    how = Serving(tp=asked.tp, pp=asked.pp, slots=asked.slots)
    remote = Remote(saved.directory, saved.model, how, start)
    step = remote.step
    remote.step = lambda: (time.sleep(pace), step())[1]  # type: ignore[method-assign]
    listening = server.listen("127.0.0.1", 0)

    def make() -> Served:
        desk = Desk(remote, room=asked.slots + asked.max_queue)
        return Served(saved, saved.tokenizer(), desk, asked.max_seconds)

    enough: list[Callable[[], object]] = []

    async def run() -> None:
        running = asyncio.ensure_future(server.run(make, asked, listening, token, {"localhost"}))
        loop = asyncio.get_running_loop()
        enough.append(lambda: loop.call_soon_threadsafe(running.cancel))
        await asyncio.wait({running})

    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    try:
        yield Client(listening.getsockname()[1])
    finally:
        enough[0]()
        thread.join(30)
        listening.close()
        remote.close()
