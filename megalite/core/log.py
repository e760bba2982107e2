"""The collective log (what every rank sent, in order) and the one place that prints.

The log is a ring of plain records that hangs on the mesh: the hang explainer, the volume tests and
the planner's trace read it; nothing here decides anything. Next: comm.py, which writes it.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass


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
    completed: bool = False


class CollectiveLog:
    """The last `keep` collectives of this rank; `total` counts all of them."""

    def __init__(self, keep: int = 65536):
        self.entries: deque[Collective] = deque(maxlen=keep)
        self.total = 0

    def issue(self, op: str, wire: str, axis: str, size: int, nbytes: int) -> Collective:
        """Record a call that is about to start; the caller sets `completed` when it has ended."""
        entry = Collective(self.total, op, wire, axis, size, nbytes, _call_site())
        self.entries.append(entry)
        self.total += 1
        return entry

    def since(self, seq: int) -> Iterator[Collective]:
        """The kept entries with a number of at least `seq`."""
        return (e for e in self.entries if e.seq >= seq)


_PLUMBING = ("/core/comm.py", "/core/log.py", "/parallel/p2p.py", "/autograd/function.py")


def _call_site() -> str:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(_PLUMBING):
        frame = frame.f_back
    path = frame.f_code.co_filename.replace("\\", "/")
    return f"{path[path.rfind('megalite/') :] if 'megalite/' in path else path}:{frame.f_lineno}"


def say(text: str, *, rank: int = 0) -> None:
    """Print a line from rank 0 only; every other rank is silent."""
    if rank == 0:
        print(text, flush=True)
