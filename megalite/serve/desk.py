"""Brings the requests of an event loop to the ranks of a model, and their events back.

One thread waits for the ranks. Whoever asked gets the events of its own requests; when the ranks
fail, everybody gets the failure, and nobody is served any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from megalite.core.errors import RunError
from megalite.generate.engine import Event, Request
from megalite.generate.remote import Remote


class Busy(Exception):
    """As many requests wait as may."""


class Failed(Exception):
    """The ranks of the model have ended."""


class Desk:
    """`room` requests at most are open at once: those that run and those that wait."""

    def __init__(self, remote: Remote, *, room: int):
        self.remote, self.room = remote, room
        self.failure = ""
        self._waiting: dict[int, asyncio.Queue[Event | None]] = {}
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def open(self) -> int:
        """Requests that run or wait."""
        return len(self._waiting)

    async def run(
        self,
        requests: Sequence[Request],
        *,
        seconds: float,
        gone: Callable[[], Awaitable[object]],
    ) -> AsyncIterator[tuple[int, Event]]:
        """Events of `requests`, each with its place among them, until all have ended.

        They are cancelled when `gone()` is done, when `seconds` have passed, and when nobody wants
        the next event. Raises Busy before the first, and Failed.
        """
        self.admit(len(requests))
        events: asyncio.Queue[Event | None] = asyncio.Queue()
        places: dict[int, int] = {}
        leaving = asyncio.ensure_future(gone())
        deadline = self._loop.time() + seconds
        try:
            for place, request in enumerate(requests):
                number = self._submit(request)
                places[number] = place
                self._waiting[number] = events
            while places:
                event = await self._next(events, leaving, deadline)
                if event is None:
                    self._check()
                    return
                if event.request in places:
                    yield places[event.request], event
                    if event.ended:
                        self._forget(event.request)
                        del places[event.request]
        finally:
            leaving.cancel()
            for number in places:
                self._forget(number)
                self._cancel(number)

    async def _next(
        self, events: asyncio.Queue[Event | None], leaving: asyncio.Future[object], deadline: float
    ) -> Event | None:
        """The next event; None when it is time to go."""
        coming = asyncio.ensure_future(events.get())
        left = max(0.0, deadline - self._loop.time())
        both: set[asyncio.Future[Any]] = {coming, leaving}
        await asyncio.wait(both, timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if coming.done():
            return coming.result()
        coming.cancel()
        return None

    def _submit(self, request: Request) -> int:
        try:
            return self.remote.submit(request)
        except RunError as error:
            self._fail(str(error))
            raise Failed from None

    def _cancel(self, number: int) -> None:
        try:
            self.remote.cancel(number)
        except RunError as error:
            self._fail(str(error))

    def _forget(self, number: int) -> None:
        self._waiting.pop(number, None)

    def admit(self, count: int) -> None:
        """Raises Failed or Busy unless `count` more requests can be taken now."""
        self._check()
        if self.open + count > self.room:
            raise Busy

    def _check(self) -> None:
        if self.failure:
            raise Failed

    def _listen(self) -> None:
        """Until the ranks end, in a thread of its own."""
        # RuntimeError: the loop is closed, and nobody waits any more.
        with contextlib.suppress(RuntimeError):
            try:
                while True:
                    events = self.remote.step()
                    self._loop.call_soon_threadsafe(self._hand_out, events)
            except RunError as error:
                self._loop.call_soon_threadsafe(self._fail, str(error))

    def _hand_out(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.request in self._waiting:
                self._waiting[event.request].put_nowait(event)

    def _fail(self, why: str) -> None:
        self.failure = self.failure or why
        for waiting in self._waiting.values():
            waiting.put_nowait(None)
