"""Who gets which events, and what ends a request early."""

from __future__ import annotations

import asyncio
import queue

import pytest

from megalite.core.errors import RunError
from megalite.generate.engine import LENGTH, Event, Request
from megalite.serve.desk import Busy, Desk, Failed

ASK = Request(tokens=[1], max_tokens=2)


class Ranks:
    """Ranks that make what the test says."""

    def __init__(self):
        self.made: queue.Queue = queue.Queue()
        self.submitted, self.cancelled = 0, []

    def submit(self, request):
        self.submitted += 1
        return self.submitted - 1

    def cancel(self, number):
        self.cancelled.append(number)

    def step(self):
        made = self.made.get(timeout=30)
        if isinstance(made, Exception):
            raise made
        return made


@pytest.fixture
def ranks():
    made = Ranks()
    yield made
    made.made.put(RunError("the test is over"))


async def never():
    await asyncio.Event().wait()


async def gather(desk, count, *, seconds=30.0, gone=never):
    return [e async for e in desk.run([ASK] * count, seconds=seconds, gone=gone)]


def test_everybody_gets_the_events_of_their_own_requests(ranks):
    async def main():
        desk = Desk(ranks, room=4)
        first = asyncio.create_task(gather(desk, 2))
        second = asyncio.create_task(gather(desk, 1))
        while ranks.submitted < 3:
            await asyncio.sleep(0.001)
        assert desk.open == 3
        ranks.made.put([Event(2, (7,)), Event(0, (5,)), Event(9, (1,))])
        ranks.made.put([Event(1, (6,), ended=LENGTH), Event(0, ended=LENGTH)])
        ranks.made.put([Event(2, ended=LENGTH)])
        assert [(i, e.tokens) for i, e in await first] == [(0, (5,)), (1, (6,)), (0, ())]
        assert [(i, e.tokens) for i, e in await second] == [(0, (7,)), (0, ())]
        assert desk.open == 0 and ranks.cancelled == []

    asyncio.run(main())


def test_no_more_requests_are_open_than_there_is_room_for(ranks):
    async def main():
        desk = Desk(ranks, room=2)
        waiting = asyncio.create_task(gather(desk, 2))
        await asyncio.sleep(0.01)
        with pytest.raises(Busy):
            await gather(desk, 1)
        assert ranks.submitted == 2
        waiting.cancel()
        await asyncio.wait({waiting})
        assert ranks.cancelled == [0, 1] and desk.open == 0

    asyncio.run(main())


def test_time_that_is_up_and_a_client_that_has_gone_end_a_request(ranks):
    async def main():
        desk = Desk(ranks, room=9)
        ranks.made.put([Event(0, (5,))])
        assert [e.tokens for _, e in await gather(desk, 2, seconds=0.2)] in ([(5,)], [])
        assert await gather(desk, 1, gone=lambda: asyncio.sleep(0.05)) == []
        assert ranks.cancelled == [0, 1, 2] and desk.open == 0

    asyncio.run(main())


def test_failure_reaches_all_who_wait_and_all_who_come(ranks):
    async def main():
        desk = Desk(ranks, room=9)
        waiting = [asyncio.create_task(gather(desk, 2)) for _ in range(2)]
        await asyncio.sleep(0.01)
        ranks.made.put(RunError("rank 1 ended by SIGKILL"))
        for task in waiting:
            with pytest.raises(Failed):
                await task
        with pytest.raises(Failed):
            await gather(desk, 1)
        assert desk.failure == "rank 1 ended by SIGKILL"

    asyncio.run(main())
