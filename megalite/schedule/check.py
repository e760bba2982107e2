"""Proof that a schedule can run, before any process starts: complete, in order, no cycle of waits.

`check` refuses a bad schedule with a one-line ValueError that names the actions at fault. `walk` is
the one traversal of a schedule: check.py asks it for deadlocks, simulate.py for times. `buffers`
says how many receives each edge must have posted at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from megalite.schedule.action import (
    ALL_MICROBATCHES,
    Action,
    Edge,
    Op,
    Schedule,
    edge_order,
    needs,
    received,
)

DEFAULT_CAP = 4
"""Most receives an edge may need posted at once.

Every schedule of generators.py sends in the order of use and needs one. Each one more is a stage
input that lies unused in memory beside those the stage itself keeps; four covers a deliberate swap
of neighbours, while a schedule that needs as many as it has microbatches is one with its sends in
the wrong order.
"""

Tie = tuple[int, int]
"""The two stages that hold one tied table."""

Meeting = dict[Action, tuple[Action, tuple[Action, ...]]]
"""For an R that is half of a collective: the other half, and what is done when a rank is there."""


def check(schedule: Schedule, *, cap: int | None = None, tied: Tie | None = None) -> None:
    """Raise ValueError unless every rank can run its list to the end.

    Every microbatch passes every stage once, on the stage's own rank; what an action needs comes
    before it; each stage has one R after its last gradient; no ranks wait for each other in a
    circle; and no edge needs more than `cap` receives posted at once (None: DEFAULT_CAP). The two R
    of `tied` stages on different ranks are one collective: neither rank passes it before both have
    reached it; on one rank the stages share the table, and the first one's R comes after the
    gradients of both. A schedule without any backward (`forward_only`) has no R.
    """
    _check_complete(schedule)
    _check_order_on_ranks(schedule, tied)
    for _ in walk(schedule, tied=tied):
        pass
    limit = DEFAULT_CAP if cap is None else cap
    for (src, dst), held in buffers(schedule).items():
        if held > limit:
            raise ValueError(
                f"{schedule.name}: rank {dst} uses what rank {src} sends so far out of order that "
                f"{held} receives must be posted at once, over the cap of {limit} "
                "(do the actions in one order on both ranks)"
            )


def walk(
    schedule: Schedule, *, tied: Tie | None = None
) -> Iterator[tuple[int, Action, tuple[Action, ...]]]:
    """Every (rank, action, what it needed), each after what it needed; linear in the actions.

    Sends never block: what is sent stays with its sender until the receive is posted. Raises
    ValueError when no rank can go on, naming for every stuck rank where it waits and for what.
    """
    meeting = _meeting(schedule, tied)
    at = [0] * schedule.num_ranks
    done: set[Action] = set()
    waiting: dict[Action, list[int]] = {}
    runnable = list(range(schedule.num_ranks))
    while runnable:
        rank = runnable.pop()
        actions = schedule.actions[rank]
        while at[rank] < len(actions):
            action = actions[at[rank]]
            before = needs(action, schedule)
            reached = meeting[action][1] if action in meeting else ()
            missing = next((a for a in before + reached if a not in done), None)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            yield rank, action, before
            done.add(action)
            at[rank] += 1
            runnable += waiting.pop(action, ())
    if waiting:
        stuck = sorted((rank, missing) for missing, ranks in waiting.items() for rank in ranks)
        texts = [_waits(schedule, rank, at[rank], missing, meeting) for rank, missing in stuck]
        raise ValueError(f"{schedule.name}: deadlock: {'; '.join(texts)}")


def buffers(schedule: Schedule) -> dict[Edge, int]:
    """For each edge, the most messages that lie received and unused while its rank waits for one.

    Messages arrive in the sender's order, so to use the i-th, all earlier ones must have been taken
    in. This many receives posted ahead are enough, however fast either rank is.
    """
    order = edge_order(schedule)
    place = {edge: {m: i for i, m in enumerate(messages)} for edge, messages in order.items()}
    furthest = dict.fromkeys(order, 0)
    used = dict.fromkeys(order, 0)
    held = dict.fromkeys(order, 0)
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            receiving = received(action, schedule)
            if receiving is None:
                continue
            edge = (receiving[0], rank)
            furthest[edge] = max(furthest[edge], place[edge][receiving[1]] + 1)
            held[edge] = max(held[edge], furthest[edge] - used[edge])
            used[edge] += 1
    return held


def _check_complete(schedule: Schedule) -> None:
    """Raise ValueError unless each action of the whole is there once, where its stage lives."""
    name, ranks, stages = schedule.name, range(schedule.num_ranks), range(schedule.num_stages)
    if set(schedule.placement) != set(ranks):
        raise ValueError(
            f"{name}: stages live on ranks {sorted(set(schedule.placement))}, but actions are "
            f"given for {schedule.num_ranks} ranks (each rank holds a stage or more)"
        )
    expected = _expected(schedule)
    count = Counter(a for actions in schedule.actions for a in actions)
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if action not in expected:
                ops = ", ".join(sorted({a.op.value for a in expected}))
                raise ValueError(
                    f"{name}: rank {rank} has {action}, which is none of the actions {ops} of "
                    f"{schedule.num_microbatches} microbatches on {len(stages)} stages"
                )
            home = schedule.placement[action.stage]
            if home != rank:
                raise ValueError(
                    f"{name}: {action} is on rank {rank}, but its stage lives on rank {home}"
                )
            if count[action] > 1:
                raise ValueError(f"{name}: rank {rank} does {action} {count[action]} times")
    if absent := sorted(expected.difference(count), key=lambda a: (a.microbatch, a.stage, a.op)):
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise ValueError(f"{name}: {', '.join(map(str, absent[:3]))}{more} missing")


def _expected(schedule: Schedule) -> set[Action]:
    """The actions of a whole schedule of this one's sizes and kind of backward."""
    if schedule.splits_backward:
        ops: tuple[Op, ...] = (Op.F, Op.I, Op.W)
    elif any(a.op is not Op.F for actions in schedule.actions for a in actions):
        ops = (Op.F, Op.B)
    else:
        ops = (Op.F,)
    stages, microbatches = range(schedule.num_stages), range(schedule.num_microbatches)
    whole = {Action(op, s, m) for op in ops for s in stages for m in microbatches}
    if len(ops) > 1:
        whole |= {Action(Op.R, s, ALL_MICROBATCHES) for s in stages}
    return whole


def _check_order_on_ranks(schedule: Schedule, tied: Tie | None) -> None:
    """Raise ValueError if a rank's own list puts an action before one it needs."""
    shared = {}
    if tied is not None and schedule.placement[tied[0]] == schedule.placement[tied[1]]:
        first, second = (Action(Op.R, stage, ALL_MICROBATCHES) for stage in tied)
        shared[first] = needs(second, schedule)
    for rank, actions in enumerate(schedule.actions):
        done: set[Action] = set()
        for action in actions:
            for earlier in needs(action, schedule) + shared.get(action, ()):
                if schedule.placement[earlier.stage] == rank and earlier not in done:
                    raise ValueError(f"{schedule.name}: rank {rank} does {action} before {earlier}")
            done.add(action)


def _meeting(schedule: Schedule, tied: Tie | None) -> Meeting:
    """The two R of `tied` stages on different ranks, each with its other half."""
    if tied is None or schedule.placement[tied[0]] == schedule.placement[tied[1]]:
        return {}
    halves = [Action(Op.R, stage, ALL_MICROBATCHES) for stage in tied]
    result: Meeting = {}
    for half, other in (halves, halves[::-1]):
        actions = schedule.actions[schedule.placement[other.stage]]
        if other in actions:
            # Being at an action is having done the one before it.
            i = actions.index(other)
            result[half] = (other, actions[max(i - 1, 0) : i])
    return result


def _waits(schedule: Schedule, rank: int, at: int, missing: Action, meeting: Meeting) -> str:
    """Where a stuck rank waits, and for what."""
    action = schedule.actions[rank][at]
    if action in meeting and missing in meeting[action][1]:
        missing = meeting[action][0]
    return (
        f"rank {rank} waits at {action} for {missing} of rank {schedule.placement[missing.stage]}"
    )
