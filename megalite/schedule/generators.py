"""The schedules by name. Each is a function of pipeline ranks, microbatches and stages a rank.

Four of them are a preference order and two caps (listing.py); `interleaved` and `zb_v` write their
order down. A new schedule is a function that returns a Schedule, and one line in SCHEDULES to name
it; a user's own needs no line (custom.py). What makes one legal: check.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from megalite.schedule.action import Action, Op, Schedule
from megalite.schedule.listing import list_schedule, with_reductions


def gpipe(pp: int, num_microbatches: int, vpp: int = 1) -> Schedule:
    """All forwards, then all backwards. Huang et al. 2019 (arXiv 1811.06965)."""
    _check_sizes("gpipe", pp, num_microbatches, vpp)
    return list_schedule(
        "gpipe",
        num_microbatches,
        placement=tuple(range(pp)),
        prefer=(Op.F, Op.B),
        cap=lambda rank: num_microbatches,
    )


def one_f_one_b(pp: int, num_microbatches: int, vpp: int = 1) -> Schedule:
    """Backward as soon as it can, so that rank r holds pp - r microbatches at most.

    PipeDream-flush: Narayanan et al. 2021 (arXiv 2006.09503).
    """
    _check_sizes("1f1b", pp, num_microbatches, vpp)
    return list_schedule(
        "1f1b",
        num_microbatches,
        placement=tuple(range(pp)),
        prefer=(Op.B, Op.F),
        cap=lambda rank: pp - rank,
    )


def interleaved(pp: int, num_microbatches: int, vpp: int) -> Schedule:
    """Megatron's interleaved 1F1B: vpp chunks a rank, run through by groups of pp microbatches.

    Narayanan et al. 2021 (arXiv 2104.04473), section 2.2. Where pp does not divide the
    microbatches, this is the schedule of the next multiple with the surplus struck out: legal
    because no microbatch waits for another.
    """
    if vpp < 2:
        raise ValueError(
            f"interleaved has two stages a rank or more, got --vpp {vpp} "
            "(use --vpp 2, or --schedule 1f1b)"
        )
    _check_sizes("interleaved", pp, num_microbatches)
    units = -(-num_microbatches // pp) * pp * vpp

    def unit(k: int, op: Op, rank: int) -> Action:
        group, within = divmod(k, pp * vpp)
        chunk, microbatch = divmod(within, pp)
        if op is Op.B:
            chunk = vpp - 1 - chunk
        return Action(op, chunk * pp + rank, group * pp + microbatch)

    order = []
    for rank in range(pp):
        warmup = min(units, 2 * (pp - rank - 1) + (vpp - 1) * pp)
        actions = [unit(k, Op.F, rank) for k in range(warmup)]
        for k in range(warmup, units):
            actions += (unit(k, Op.F, rank), unit(k - warmup, Op.B, rank))
        actions += [unit(k, Op.B, rank) for k in range(units - warmup, units)]
        order.append([a for a in actions if a.microbatch < num_microbatches])
    placement = tuple(stage % pp for stage in range(pp * vpp))
    return Schedule(
        f"interleaved-{vpp}", num_microbatches, placement, with_reductions(order, placement)
    )


def zb_h1(pp: int, num_microbatches: int, vpp: int = 1) -> Schedule:
    """1F1B's memory with a third of its bubble: W fills what I leaves. No rank holds more than pp.

    Qi et al. 2023 (arXiv 2401.10241), section 2: with F = I = W = 1 and pp microbatches or more
    it takes 3 n + pp - 1.
    """
    _check_sizes("zb-h1", pp, num_microbatches, vpp)
    return list_schedule(
        "zb-h1",
        num_microbatches,
        placement=tuple(range(pp)),
        prefer=(Op.F, Op.I, Op.W),
        cap=lambda rank: pp - rank,
        hold=lambda rank: pp,
    )


def zb_h2(pp: int, num_microbatches: int, vpp: int = 1) -> Schedule:
    """No bubble between a rank's first and last action, for twice the memory of 1F1B.

    Qi et al. 2023 (arXiv 2401.10241), section 2: with F = I = W, and 2 pp - 1 microbatches or
    more. Ranks start and end at different times, so a barrier between steps brings pp - 1 back.
    """
    _check_sizes("zb-h2", pp, num_microbatches, vpp)
    return list_schedule(
        "zb-h2",
        num_microbatches,
        placement=tuple(range(pp)),
        prefer=(Op.I, Op.F, Op.W),
        cap=lambda rank: 2 * (pp - rank) - 1,
        hold=lambda rank: 2 * pp - 1,
    )


def zb_v(pp: int, num_microbatches: int, vpp: int = 2) -> Schedule:
    """Two stages a rank in a V, down the ranks and up again: zb-h2's bubble in 1F1B's memory.

    Rank r holds stages r and 2 pp - 1 - r, so the first rank has both ends of the model, and a rank
    starts backward on its second stage soon after its forward. With F = I = W and 2 pp - 1
    microbatches or more no rank waits in its own span; none holds more than 2 pp half-size stages.
    Qi et al. 2024 (arXiv 2405.15362), where it is V-ZB.
    """
    if vpp != 2:
        raise ValueError(f"zb-v has two stages a rank, got --vpp {vpp} (use --vpp 2)")
    _check_sizes("zb-v", pp, num_microbatches)
    order = [
        [a for a in _v_order(rank, pp, num_microbatches) if a.microbatch < num_microbatches]
        for rank in range(pp)
    ]
    placement = (*range(pp), *reversed(range(pp)))
    return Schedule("zb-v", num_microbatches, placement, with_reductions(order, placement))


def _v_order(rank: int, pp: int, num_microbatches: int) -> list[Action]:
    """What one rank of zb-v does, turn by turn; it runs on past the last microbatch.

    Forwards go down until the first comes up again; then the two take turns, then the second stage
    runs F I W until the first backward has come down to it. The steady turn has all six. At the end
    input gradients hurry, since other ranks wait for them, and weight gradients fill what is left.
    """
    down, up = rank, 2 * pp - 1 - rank
    steady = max(num_microbatches - pp, 0)
    turns = (
        (2 * (pp - rank) - 1, ((Op.F, down),)),
        (rank, ((Op.F, up), (Op.F, down))),
        (pp - rank, ((Op.F, up), (Op.I, up), (Op.W, up))),
        (steady, tuple((op, stage) for stage in (down, up) for op in (Op.F, Op.I, Op.W))),
        (rank, ((Op.I, down), (Op.I, up))),
        (pp - rank, ((Op.I, down), (Op.W, down))),
        (rank, ((Op.W, up),)),
        (rank, ((Op.W, down),)),
    )
    actions: list[Action] = []
    next_of: Counter[tuple[Op, int]] = Counter()
    for count, turn in turns:
        for _ in range(count):
            for op, stage in turn:
                actions.append(Action(op, stage, next_of[op, stage]))
                next_of[op, stage] += 1
    return actions


def _check_sizes(name: str, pp: int, num_microbatches: int, vpp: int = 1) -> None:
    """Raise ValueError unless a schedule of one stage a rank can have these sizes."""
    if pp < 1:
        raise ValueError(f"{name} needs a rank or more, got --pp {pp} (use --pp 1)")
    if num_microbatches < 1:
        raise ValueError(
            f"{name} needs a microbatch or more, got {num_microbatches} "
            "(raise --global-batch-size, or lower --micro-batch-size)"
        )
    if vpp != 1:
        raise ValueError(
            f"{name} has one stage a rank, got --vpp {vpp} "
            "(use --schedule interleaved or zb-v, or --vpp 1)"
        )


CHUNKED = ("interleaved", "zb-v")
"""Those of SCHEDULES whose ranks hold more than one stage."""

SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zb-h1": zb_h1,
    "zb-h2": zb_h2,
    "zb-v": zb_v,
}
"""Schedule by name, called as `SCHEDULES[name](pp, num_microbatches, vpp)`."""
