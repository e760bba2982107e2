"""When each action of a schedule starts and ends, and what follows: bubbles, memory, a chart.

Each rank does its list in order, each action as soon as its rank is free and its input has arrived.
Sends never block and edges never queue. What a real action costs: plan/cost.py. As a picture:
draw.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from megalite.schedule.action import (
    GRADIENT_OPS,
    UNIT_COST,
    Action,
    Message,
    Op,
    Schedule,
    received,
)
from megalite.schedule.check import walk

Cost = Mapping[Op, float] | Callable[[Action], float]
Comm = float | Callable[[int, int, Message], float]


@dataclass(frozen=True)
class Timeline:
    """A schedule with its times, in seconds from the start of the step."""

    schedule: Schedule
    spans: dict[Action, tuple[float, float]]
    """Start and end of each action."""

    @property
    def makespan(self) -> float:
        """From the start of the step to the end of its last action."""
        return max((end for _, end in self.spans.values()), default=0.0)

    def of_rank(self, rank: int) -> list[tuple[Action, float, float]]:
        """What `rank` does, in order, with start and end."""
        return [(action, *self.spans[action]) for action in self.schedule.actions[rank]]

    def busy(self, rank: int) -> float:
        """Seconds in which `rank` works."""
        return sum(end - start for _, start, end in self.of_rank(rank))


def simulate(schedule: Schedule, cost: Cost = UNIT_COST, comm: Comm = 0.0) -> Timeline:
    """The Timeline of `schedule`; linear in its actions.

    `cost` gives seconds by op (R is 0 if it is not named) or by action, for uneven stages. `comm`
    is the seconds from the end of an action until its message can be used on the other rank, alike
    for all or by (sending rank, receiving rank, message). Raises ValueError if the schedule
    deadlocks.
    """
    price = _price(schedule, cost)
    free = [0.0] * schedule.num_ranks
    spans: dict[Action, tuple[float, float]] = {}
    for rank, action, before in walk(schedule):
        start = free[rank]
        for earlier in before:
            ready = spans[earlier][1]
            if schedule.placement[earlier.stage] != rank:
                ready += _delay(schedule, rank, action, comm)
            start = max(start, ready)
        free[rank] = start + price(action)
        spans[action] = (start, free[rank])
    return Timeline(schedule, spans)


def _delay(schedule: Schedule, rank: int, action: Action, comm: Comm) -> float:
    """Seconds that the message which `action` starts with travels."""
    if not callable(comm):
        return comm
    receiving = received(action, schedule)
    assert receiving is not None, f"{action} needs another rank, but receives nothing"
    source, message = receiving
    return comm(source, rank, message)


def _price(schedule: Schedule, cost: Cost) -> Callable[[Action], float]:
    """`cost` as a function of the action."""
    if callable(cost):
        return cost
    by_op = {Op.R: 0.0, **cost}
    if lacking := sorted({a.op.value for rank in schedule.actions for a in rank} - set(by_op)):
        raise ValueError(f"{schedule.name}: no cost is given for {lacking[0]}")
    return lambda action: by_op[action.op]


def bubble(timeline: Timeline) -> float:
    """Share of the makespan in which ranks wait, in [0, 1), over all ranks.

    Narayanan et al. 2021 (arXiv 2104.04473), section 2.2, but as a share of the whole time where
    the paper divides by the ideal time.
    """
    whole = timeline.makespan * timeline.schedule.num_ranks
    busy = sum(timeline.busy(rank) for rank in range(timeline.schedule.num_ranks))
    return 1.0 - busy / whole if whole else 0.0


def own_span_bubble(timeline: Timeline) -> float:
    """The largest share that any rank waits between its own first and last action, in [0, 1).

    Zero-bubble schedules (Qi et al. 2023, arXiv 2401.10241) are judged by it: ranks that start and
    end at different times still lose nothing from step to step.
    """
    worst = 0.0
    for rank in range(timeline.schedule.num_ranks):
        mine = timeline.of_rank(rank)
        span = mine[-1][2] - mine[0][1] if mine else 0.0
        worst = max(worst, 1.0 - timeline.busy(rank) / span if span else 0.0)
    return worst


def peak_live(schedule: Schedule) -> tuple[int, ...]:
    """Per rank, the most microbatches whose activations it holds at once, each chunk counted.

    They are held from F to B, or to W where backward is split.
    """
    peaks = []
    for actions in schedule.actions:
        live = peak = 0
        for action in actions:
            live += (action.op is Op.F) - (action.op in GRADIENT_OPS)
            peak = max(peak, live)
        peaks.append(peak)
    return tuple(peaks)


def text_chart(timeline: Timeline) -> str:
    """The timeline as ASCII, one row a rank; the shortest action is just wide enough for its label.

    A label is op and microbatch, with the chunk after a dot where a rank has more than one.
    """
    schedule = timeline.schedule
    shown = {a: s for a, s in timeline.spans.items() if s[1] > s[0]}
    if not shown:
        return "\n".join(f"rank {rank} |" for rank in range(schedule.num_ranks))
    chunk = {s: i for r in range(schedule.num_ranks) for i, s in enumerate(schedule.stages_of(r))}
    many = max(chunk.values()) > 0
    labels = {
        a: f"{a.op.value}{a.microbatch}" + (f".{chunk[a.stage]}" if many else "") for a in shown
    }
    column = (max(map(len, labels.values())) + 1) / min(
        end - start for start, end in shown.values()
    )
    width = round(timeline.makespan * column)
    margin = len(str(schedule.num_ranks - 1))
    rows = []
    for rank in range(schedule.num_ranks):
        row = ["."] * width
        for action, start, end in timeline.of_rank(rank):
            if action in shown:
                left, right = round(start * column), round(end * column)
                row[left:right] = f"{labels[action]:-<{right - left - 1}}|"
        rows.append(f"rank {rank:>{margin}} |{''.join(row)}")
    return "\n".join(rows)
