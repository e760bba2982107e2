"""Transfers between pipeline stages: for each directed pair of ranks a FIFO and a group of its own.

A receiver knows the whole schedule, so it posts its receives in the sender's order and hands them
out by message; there are no tags to match, on gloo or NCCL. Shapes are never sent: both sides know
the microbatch. It knows as well what the sender had taken by then, and so which of its own messages
have arrived: gloo says of no send that it has ended before somebody waits for it. This is the only
file beside core/ that talks to torch.distributed. Next: pipeline.py, which uses it.
"""

from __future__ import annotations

import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.core.comm import Work, wait_for
from megalite.core.log import Collective, sleep_until
from megalite.core.mesh import Mesh
from megalite.schedule.action import Message, Schedule, edge_order, there_by_then

AHEAD = 2
"""Receives posted beyond the one that is waited for, so that data lands while a stage computes."""

_Posted = tuple[Message, Tensor, Work | None, Collective]
_Sending = tuple[Work | None, Callable[[], None], Collective]


class Late:
    """A send that is held: it leaves at its time, by a thread that sleeps till then."""

    def __init__(self, send: Callable[[], Work | None], entry: Collective, after: Late | None):
        self._send, self._entry, self._after = send, entry, after
        self._work: Work | None = None
        self._thread = threading.Thread(target=self._leave, daemon=True)
        self._thread.start()

    def _leave(self) -> None:
        sleep_until(self._entry.held_until)
        if self._after is not None:  # one after the other, as on any edge
            self._after._thread.join()
            self._after = None
        self._work = self._send()

    def wait(self) -> None:
        self._thread.join()
        assert self._work is not None, "the thread of a held send has failed"
        self._work.wait()

    def is_completed(self) -> bool:
        return self._work is not None and self._work.is_completed()


class Pipes:
    """The FIFOs of one pipeline rank. All ranks of the world make it together, of one schedule."""

    def __init__(self, mesh: Mesh, schedule: Schedule):
        self.mesh, self.me = mesh, mesh.coords["pp"]
        self._groups: dict[tuple[int, int], dist.ProcessGroup | None] = {}
        edges = list(edge_order(schedule))
        lines = mesh.lines("pp") if mesh.kind == "real" else []
        for line in lines:
            for src, dst in edges:
                group = mesh.new_group((line[src], line[dst]))
                if mesh.rank in (line[src], line[dst]):
                    self._groups[src, dst] = group

    def begin(self, schedule: Schedule, empty: Callable[[Message], Tensor]) -> None:
        """Start a step: `empty` makes the buffer that a message is received into.

        Nothing comes before it is expected.
        """
        self._empty = empty
        self._sending: defaultdict[int, deque[_Sending]] = defaultdict(deque)
        self._gone: Counter[int] = Counter()
        """Of the messages to each rank, how many have left for good."""
        self._there = there_by_then(schedule, self.me)
        self._late: dict[int, Late] = {}
        self._coming: dict[int, deque[Message]] = {}
        self._posted: dict[int, deque[_Posted]] = {}
        self._landed: dict[Message, Tensor] = {}

    def expect(self, schedule: Schedule) -> None:
        """Receive what is sent in this part of the step's schedule, its first or the next."""
        for (src, dst), messages in edge_order(schedule).items():
            if dst == self.me:
                self._coming.setdefault(src, deque()).extend(messages)
                self._posted.setdefault(src, deque())
                self._post(src)

    def take(self, src: int, message: Message) -> Tensor:
        """The tensor of `message` from that pipeline rank; blocks until it is here."""
        while message not in self._landed:
            self._land(src)
        return self._landed.pop(message)

    def drop(self) -> None:
        """Receive what is expected and forget it, and wait until everything sent has left."""
        for src, posted in self._posted.items():
            while posted:
                self._land(src)
        self._landed.clear()
        self.end()

    def _land(self, src: int) -> None:
        arrived, buffer, work, entry = self._posted[src].popleft()
        if work is not None:
            wait_for(work)
        entry.end()
        self._landed[arrived] = buffer
        self._let_go(src, self._there[arrived])
        self._post(src)

    def send(self, dst: int, tensor: Tensor, sent: Callable[[], None] = lambda: None) -> None:
        """Start to send `tensor`; `sent` is called once its storage is no longer needed."""
        tensor = tensor.contiguous()
        entry = self._log("send", dst, tensor)
        work: Work | None = None
        if self.mesh.kind == "real":
            work = self._start(dst, tensor, entry)
        self._sending[dst].append((work, sent, entry))
        self._let_go(dst)

    def _start(self, dst: int, tensor: Tensor, entry: Collective) -> Work | None:
        to, group = self.mesh.pipeline_rank(dst), self._groups[self.me, dst]
        if entry.held_until and not entry.at_once:
            send = partial(dist.isend, tensor, to, group=group)
            self._late[dst] = Late(send, entry, self._late.get(dst))
            return self._late[dst]
        # Not until it has arrived: two ranks that both sent first would wait for ever.
        sleep_until(entry.held_until)
        return dist.isend(tensor, to, group=group)

    def end(self) -> None:
        """Wait until everything that was sent has left."""
        for dst, sending in self._sending.items():
            self._let_go(dst, self._gone[dst] + len(sending))
        assert not any((*self._coming.values(), *self._posted.values())) and not self._landed

    def _post(self, src: int) -> None:
        while self._coming[src] and len(self._posted[src]) <= AHEAD:
            message = self._coming[src].popleft()
            buffer = self._empty(message)
            entry = self._log("recv", src, buffer)
            work = None
            if self.mesh.kind == "real":
                whence = self.mesh.pipeline_rank(src)
                work = dist.irecv(buffer, whence, group=self._groups[src, self.me])
            self._posted[src].append((message, buffer, work, entry))

    def _let_go(self, dst: int, there: int = 0) -> None:
        """Forget what has been sent: the first `there` messages, which no wait is long for, and
        others that say themselves that they have ended.
        """
        sending = self._sending[dst]
        while sending:
            work, sent, entry = sending[0]
            if work is not None and self._gone[dst] < there:
                wait_for(work)
            elif work is not None and not work.is_completed():
                return
            entry.end()
            sent()
            sending.popleft()
            self._gone[dst] += 1

    def _log(self, op: str, other: int, tensor: Tensor) -> Collective:
        nbytes = tensor.numel() * tensor.element_size()
        return self.mesh.log.issue(op, op, f"pp:{self.me}-{other}", 2, nbytes)


def free_storage(tensor: Tensor) -> None:
    """Give back the memory of a stage's output that has been sent; its graph stays.

    Only where the node that made it does not look at its output in backward: every stage of ours
    ends in a residual's addition, in dropout's pass or in torch's own, or in a layer that is run
    again, behind ZeRO-3's gate or not. A fork's own ending keeps its output.
    """
    made_by = tensor.grad_fn
    while type(made_by).__name__ == "_GateBackward":
        made_by = made_by.next_functions[0][0]  # type: ignore[union-attr]
    if type(made_by).__name__ in ("AddBackward0", "_AgainBackward", "_DropoutBackward"):
        with torch.no_grad():
            tensor.untyped_storage().resize_(0)
