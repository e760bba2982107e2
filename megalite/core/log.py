"""The collective log: what every rank sent, in order.

The log is a ring of plain records that hangs on the mesh: the hang explainer, the volume tests, the
planner and the trace of a step (train/trace.py) read it; nothing here decides anything. Times are
seconds of the host's monotonic clock, which all ranks of a host share. Next: comm.py, which writes
it.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megalite.schedule.action import Action


@dataclass(slots=True)
class Collective:
    """One call through core/comm.py or parallel/p2p.py, as this rank saw it."""

    seq: int
    """Number of the call on this rank, from 0."""
    op: str
    """What was asked for: all_reduce, all_gather, reduce_scatter, all_to_all, shift, broadcast,
    send or recv.
    """
    wire: str
    """What went over the wire: gloo may run a reduce_scatter as an all_to_all."""
    axis: str
    size: int
    """Ranks of the axis."""
    nbytes: int
    """Bytes of the whole tensor: what all_reduce, reduce_scatter, all_to_all and shift take, what
    all_gather gives.
    """
    site: str
    """file:line that asked."""
    issued: float
    ended: float | None = None
    """When this rank saw that it had ended."""
    held_until: float = 0.0
    """What a Hold lays on it: it does not end before."""
    at_once: bool = False
    """What a Hold without overlap asks: whoever starts it waits for it there and then."""

    @property
    def completed(self) -> bool:
        return self.ended is not None

    def end(self) -> None:
        """Say that it has ended, after whatever time it is still held."""
        if self.held_until:
            sleep_until(self.held_until)
        self.ended = time.perf_counter()


@dataclass(frozen=True)
class Hold:
    """A delay of communication, to measure what of it hides behind computation."""

    seconds: Callable[[Collective], float]
    """From the start of a call, how long it does not end: it waits asleep, and takes no CPU."""
    overlap: bool = True
    """False: what is delayed is waited for where it is started."""


class Stretch(NamedTuple):
    """What this rank began to do at a time; it ends where the next one starts."""

    start: float
    what: str
    action: Action | None


class CollectiveLog:
    """The last `keep` collectives of this rank; `total` counts all of them."""

    def __init__(self, keep: int = 65536):
        self.entries: deque[Collective] = deque(maxlen=keep)
        self.total = 0
        self.hold: Hold | None = None
        self.stretches: list[Stretch] | None = None
        """What the rank does, one thing after the other; None while nobody wants to know."""

    def issue(self, op: str, wire: str, axis: str, size: int, nbytes: int) -> Collective:
        """Record a call that is about to start; the caller calls `end` when it has ended."""
        now = time.perf_counter()
        entry = Collective(self.total, op, wire, axis, size, nbytes, _call_site(), now)
        self.entries.append(entry)
        self.total += 1
        if self.hold is not None and (seconds := self.hold.seconds(entry)) > 0:
            entry.held_until, entry.at_once = now + seconds, not self.hold.overlap
        return entry

    def doing(self, what: str, action: Action | None = None) -> None:
        """Say what this rank does from now on, with the action that it is part of."""
        if self.stretches is not None:
            self.stretches.append(Stretch(time.perf_counter(), what, action))

    def since(self, seq: int) -> Iterator[Collective]:
        """The kept entries with a number of at least `seq`."""
        return (e for e in self.entries if e.seq >= seq)


_PLUMBING = ("/core/comm.py", "/core/log.py", "/parallel/p2p.py", "/autograd/function.py")


def sleep_until(moment: float) -> None:
    """Sleep until that time of the clock that entries have."""
    while (left := moment - time.perf_counter()) > 0:
        time.sleep(left)


def _call_site() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(_PLUMBING):
        frame = frame.f_back
    path = frame.f_code.co_filename.replace("\\", "/")
    return f"{path[path.rfind('megalite/') :] if 'megalite/' in path else path}:{frame.f_lineno}"
