"""A pipeline schedule as plain data: for each rank, the ordered list of the actions it performs.

One description drives everything: the engine (parallel/pipeline.py) runs it, check.py proves it,
simulate.py times it, draw.py draws it. This file says what an action waits for (`needs`) and in
which order tensors travel between ranks (`edge_order`); nothing else restates either. Not here: how
a schedule is made (generators.py). A "rank" in this room is a pipeline rank.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple


class Op(str, Enum):
    """What is done to one microbatch on one stage."""

    F = "F"
    """Forward."""
    B = "B"
    """Backward: input and weight gradients."""
    I = "I"  # noqa: E741
    """The input-gradient half of B."""
    W = "W"
    """The weight-gradient half of B."""
    R = "R"
    """The latest point at which the stage's gradients are reduced."""

    # Enum's own hash is a Python function, and actions are hashed several times each.
    __hash__ = str.__hash__


# Looking a member up on its Enum is slow before Python 3.12, and `needs` does little else.
_F, _B, _I, _W, _R = Op


GRADIENT_OPS = frozenset((Op.B, Op.W))
"""The ops that finish a microbatch on a stage: weight gradients are added and activations freed."""

ALL_MICROBATCHES = -1
"""The microbatch of an R that reduces once, after every microbatch of its stage."""

UNIT_COST = {Op.F: 1.0, Op.B: 2.0, Op.I: 1.0, Op.W: 1.0, Op.R: 0.0}
"""The textbook's costs, in units of one forward."""


class Action(NamedTuple):
    """One op on one microbatch of one stage; printed as `B3@1`, microbatch 3 on stage 1."""

    op: Op
    stage: int
    microbatch: int

    def __str__(self) -> str:
        which = "" if self.microbatch == ALL_MICROBATCHES else str(self.microbatch)
        return f"{self.op.value}{which}@{self.stage}"


class Message(NamedTuple):
    """A tensor that travels between two ranks; `stage` is the stage that receives it."""

    kind: str
    """`act`: a stage's output, or `grad`: the gradient of a stage's output."""
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.kind}{self.microbatch}@{self.stage}"


Edge = tuple[int, int]
"""Sending rank, receiving rank."""


@dataclass(frozen=True)
class Schedule:
    """What each rank does in one step, in order."""

    name: str
    num_microbatches: int
    placement: tuple[int, ...]
    """The rank of each stage."""
    actions: tuple[tuple[Action, ...], ...]
    """The ordered actions of each rank."""

    @property
    def num_stages(self) -> int:
        return len(self.placement)

    @property
    def num_ranks(self) -> int:
        return len(self.actions)

    @cached_property
    def splits_backward(self) -> bool:
        """Whether backward comes as I and W instead of B."""
        return any(a.op is Op.I or a.op is Op.W for rank in self.actions for a in rank)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that live on `rank`, first chunk first."""
        return tuple(s for s, home in enumerate(self.placement) if home == rank)


def needs(action: Action, schedule: Schedule) -> tuple[Action, ...]:
    """The actions that must be done, on whichever rank, before `action` may start."""
    op, stage, microbatch = action
    if op is _F:
        return (Action(_F, stage - 1, microbatch),) if stage else ()
    if op is _W:
        return (Action(_I, stage, microbatch),)
    if op is _R:
        last = _W if schedule.splits_backward else _B
        every = range(schedule.num_microbatches)
        which = every if microbatch == ALL_MICROBATCHES else (microbatch,)
        return tuple(Action(last, stage, m) for m in which)
    own = Action(_F, stage, microbatch)
    return (own, Action(op, stage + 1, microbatch)) if stage + 1 < schedule.num_stages else (own,)


def received(action: Action, schedule: Schedule) -> tuple[int, Message] | None:
    """The sending rank and the message that `action` starts with; None if its input is at hand."""
    op, stage, microbatch = action
    if op is _F:
        source, kind = stage - 1, "act"
    elif op is _B or op is _I:
        source, kind = stage + 1, "grad"
    else:
        return None
    return _crossing(source, stage, Message(kind, stage, microbatch), schedule)


def sent(action: Action, schedule: Schedule) -> tuple[int, Message] | None:
    """The receiving rank and the message that `action` ends with; None if nothing leaves."""
    op, stage, microbatch = action
    if op is _F:
        target, kind = stage + 1, "act"
    elif op is _B or op is _I:
        target, kind = stage - 1, "grad"
    else:
        return None
    return _crossing(target, stage, Message(kind, target, microbatch), schedule)


def _crossing(
    other: int, stage: int, message: Message, schedule: Schedule
) -> tuple[int, Message] | None:
    """`message` with the rank of the stage at its other end, if there is one on another rank."""
    if not 0 <= other < schedule.num_stages:
        return None
    there = schedule.placement[other]
    return (there, message) if there != schedule.placement[stage] else None


def edge_order(schedule: Schedule) -> dict[Edge, tuple[Message, ...]]:
    """For each directed pair of ranks, its messages in the order in which the sender makes them.

    One FIFO carries activations and gradients mixed, so no tags are needed: the receiver posts its
    receives in this order and hands them out by (kind, stage, microbatch). Messages between two
    stages of one rank are not in it.
    """
    order: dict[Edge, list[Message]] = {}
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if (sending := sent(action, schedule)) is not None:
                order.setdefault((rank, sending[0]), []).append(sending[1])
    return {edge: tuple(messages) for edge, messages in sorted(order.items())}


def there_by_then(schedule: Schedule, rank: int) -> dict[Message, int]:
    """For each message to `rank`: how many of its own to that sender are there when it is sent.

    What a rank takes is there, with all that went before it on that edge.
    """
    there: dict[Message, int] = {}
    edges = edge_order(schedule)
    for other in (src for src, dst in edges if dst == rank):
        place = {message: k for k, message in enumerate(edges.get((rank, other), ()), start=1)}
        count = 0
        for action in schedule.actions[other]:
            taken, going = received(action, schedule), sent(action, schedule)
            if taken is not None and taken[0] == rank:
                count = max(count, place[taken[1]])
            if going is not None and going[0] == rank:
                there[going[1]] = count
    return there


def forward_only(schedule: Schedule) -> Schedule:
    """The same schedule without its backward, for evaluation.

    What is left of a legal schedule is legal: every order and every wait in it was there before.
    """
    kept = tuple(tuple(a for a in rank if a.op is Op.F) for rank in schedule.actions)
    return dataclasses.replace(schedule, actions=kept)


def at_first_backward(schedule: Schedule) -> tuple[Schedule, Schedule]:
    """The schedule in two: each rank's forwards before all else that it does, and what follows.

    The first part waits for nothing of the second; it may send what is taken there alone.
    """
    ranks = schedule.actions
    cuts = [next((i for i, a in enumerate(r) if a.op is not _F), len(r)) for r in ranks]
    before: list[int] = []
    while cuts != before:
        before = cuts
        first = {a for rank, cut in zip(ranks, cuts, strict=True) for a in rank[:cut]}
        cuts = [
            next(
                (i for i, a in enumerate(r[:cut]) if not first.issuperset(needs(a, schedule))), cut
            )
            for r, cut in zip(ranks, cuts, strict=True)
        ]
    head = tuple(rank[:cut] for rank, cut in zip(ranks, cuts, strict=True))
    tail = tuple(rank[cut:] for rank, cut in zip(ranks, cuts, strict=True))
    return dataclasses.replace(schedule, actions=head), dataclasses.replace(schedule, actions=tail)


def first_microbatches(schedule: Schedule, num_microbatches: int) -> Schedule:
    """The same schedule with its first microbatches alone.

    Legal if the whole is: no microbatch waits for another.
    """
    kept = tuple(tuple(a for a in r if a.microbatch < num_microbatches) for r in schedule.actions)
    return dataclasses.replace(schedule, num_microbatches=num_microbatches, actions=kept)
