"""An engine on ranks of its own, reached through a socket: what it is asked, and what it answers.

The process that asks is no rank. It takes Remote for a Generation: `submit`, `cancel` and `step`
are the same, except that `step` waits for what the ranks have made. Each message is a line of JSON.
Rank 0 runs the Generation and leads; the others follow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import socket
import tempfile
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch

from megalite.core.config import ModelConfig
from megalite.core.errors import RunError
from megalite.core.precision import dtype_of
from megalite.generate.engine import Event, Generation, Request, check_request
from megalite.generate.load import Place, load_share, open_checkpoint
from megalite.generate.sample import Likely, Sampling
from megalite.generate.share import Leader, follow

START_SECONDS = 600.0
"""Until all ranks have read their shares of a model."""
FOR_EVER = 3e8
"""Seconds that an engine may run: ten years."""

StartRanks = Callable[[str, int, dict[str, Any]], None]
"""(target, world, kwargs): runs ranks until they end; raises RunError if they fail."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serving:
    """How a model is run to generate."""

    tp: int = 1
    pp: int = 1
    device: str = "cpu"
    precision: str = "auto"
    slots: int = 16
    chunk: int = 512

    @property
    def world(self) -> int:
        return self.tp * self.pp


class Remote:
    """The ranks' other side. Made when they are ready; RunError if they cannot start."""

    def __init__(self, path: Path, model: ModelConfig, how: Serving, start: StartRanks):
        self.model, self.slots = model, how.slots
        self._numbers = count()
        self._open: set[int] = set()
        self._failure = ""
        self._folder = tempfile.TemporaryDirectory(prefix="megalite-engine-")
        meet_at = Path(self._folder.name) / "socket"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(meet_at))
        listener.listen(1)
        listener.settimeout(0.2)
        kwargs = {"path": str(path), "how": dataclasses.asdict(how), "meet_at": str(meet_at)}
        self._ranks = threading.Thread(target=self._run, args=(start, how.world, kwargs))
        self._ranks.daemon = True
        self._ranks.start()
        self._socket = self._accept(listener)
        listener.close()
        self._lines = self._socket.makefile("rb")
        self._writing = threading.Lock()
        self._hear()  # that the model is there

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def submit(self, request: Request) -> int:
        """As Generation.submit. RunError when the ranks have ended; so do the others."""
        check_request(request, self.model)
        with self._writing:
            # Rank 0 counts what it gets in the same way.
            number = next(self._numbers)
            self._say({"submit": dataclasses.asdict(request) | {"stop": [*request.stop]}})
            self._open.add(number)
        return number

    def cancel(self, number: int) -> None:
        """As Generation.cancel."""
        with self._writing:
            self._open.discard(number)
            self._say({"cancel": number})

    def step(self) -> list[Event]:
        """What the ranks have made since; waits until there is something."""
        told = [_event(row) for row in self._hear()]
        with self._writing:
            # Of a cancelled one, the last may have been on their way.
            events = [event for event in told if event.request in self._open]
            self._open -= {event.request for event in events if event.ended}
        return events

    def close(self) -> None:
        """End the ranks."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._ranks.join(10)
        self._folder.cleanup()

    def _run(self, start: StartRanks, world: int, kwargs: dict[str, Any]) -> None:
        try:
            start("megalite.generate.remote:serve", world, kwargs)
        except RunError as error:
            self._failure = str(error)

    def _accept(self, listener: socket.socket) -> socket.socket:
        for _ in range(int(START_SECONDS / 0.2)):
            with contextlib.suppress(TimeoutError):
                return listener.accept()[0]
            if not self._ranks.is_alive():
                break
        raise RunError(f"the ranks of the model did not start: {self._why()}")

    def _why(self) -> str:
        self._ranks.join(5)
        return self._failure or "they have ended"

    def _say(self, message: dict[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            raise RunError(f"the ranks of the model failed: {self._why()}") from None

    def _hear(self) -> list[Any]:
        try:
            line = self._lines.readline()
        except (OSError, ValueError):
            line = b""
        if not line:
            raise RunError(f"the ranks of the model failed: {self._why()}")
        return json.loads(line)


def _event(row: dict[str, Any]) -> Event:
    told = {name: tuple(map(_likely, row[name])) for name in ("likely", "echoed")}
    return Event(row["request"], tuple(row["tokens"]), ended=row["ended"], **told)


def _likely(row: dict[str, Any]) -> Likely:
    return Likely(row["token"], row["logprob"], tuple((i, p) for i, p in row["rivals"]))


def serve(rank: int, world: int, *, path: str, how: dict[str, Any], meet_at: str) -> None:
    """Be one rank of an engine, until the process that asks goes away."""
    asked = Serving(**how)
    device = torch.device(asked.device)
    if device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world))
    place = Place(
        slots=asked.slots,
        dtype=dtype_of(asked.precision, device),
        device=device,
        tp=asked.tp,
        pp=asked.pp,
        rank=rank,
    )
    share = load_share(open_checkpoint(Path(path)), place)
    if rank > 0:
        follow(share)
        return
    leader = Leader(share)
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(meet_at)
        _answer(Generation(leader, chunk=asked.chunk), asking)
    leader.dismiss()


def _answer(generation: Generation, asking: socket.socket) -> None:
    """Do what comes over the socket until it ends."""
    unread = b""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        asking.sendall(b"[]\n")
        while True:
            while select.select([asking], [], [], 0 if generation.has_work else None)[0]:
                data = asking.recv(1 << 16)
                if not data:
                    return
                *lines, unread = (unread + data).split(b"\n")
                for message in map(json.loads, lines):
                    if "cancel" in message:
                        generation.cancel(message["cancel"])
                    else:
                        generation.submit(_request(message["submit"]))
            events = [dataclasses.asdict(event) for event in generation.step()]
            if events:
                asking.sendall(json.dumps(events).encode() + b"\n")


def _request(row: dict[str, Any]) -> Request:
    return Request(**row | {"how": Sampling(**row["how"]), "stop": frozenset(row["stop"])})
