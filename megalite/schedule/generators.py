"""The schedules by name. Each is a function of pipeline ranks, microbatches and stages a rank.

`list_schedule` makes every schedule that a preference order and two caps describe (gpipe and 1f1b
are one call each); `interleaved` follows Megatron's order instead. A new schedule is a function
that returns a Schedule, and one line in SCHEDULES to name it. What makes one legal: check.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import heappop, heappush

from megalite.schedule.action import (
    ALL_MICROBATCHES,
    GRADIENT_OPS,
    UNIT_COST,
    Action,
    Op,
    Schedule,
    needs,
)

PerRank = Callable[[int], int]


def list_schedule(
    name: str,
    num_microbatches: int,
    *,
    placement: tuple[int, ...],
    prefer: Sequence[Op],
    cap: PerRank,
    hold: PerRank | None = None,
) -> Schedule:
    """Let each rank, whenever free, take the first action that is ready, in order of `prefer`.

    `cap(rank)` bounds the microbatches between F and the op that sends their gradient on (B or I),
    which is how far forwards run ahead; `hold(rank)` those between F and the op that frees their
    activations (B or W), which is memory. UNIT_COST decides what is ready when; the order that
    comes out serves whatever the real costs are. Raises ValueError if the caps stop all progress.
    """
    ready = _Ready(name, num_microbatches, placement, tuple(prefer))
    num_ranks = max(placement) + 1
    ahead, held = [0] * num_ranks, [0] * num_ranks
    order: list[list[Action]] = [[] for _ in range(num_ranks)]
    busy = [False] * num_ranks
    running: list[tuple[float, int, Action]] = []
    now, woken = 0.0, set(range(num_ranks))
    while True:
        for rank in woken:
            may_forward = ahead[rank] < cap(rank) and (hold is None or held[rank] < hold(rank))
            if not busy[rank] and (action := ready.take(rank, may_forward)) is not None:
                order[rank].append(action)
                ahead[rank] += (action.op is Op.F) - (action.op in (Op.B, Op.I))
                held[rank] += (action.op is Op.F) - (action.op in GRADIENT_OPS)
                busy[rank] = True
                heappush(running, (now + UNIT_COST[action.op], rank, action))
        if not running:
            break
        # All that ends at one moment is seen before anyone chooses: ties do not depend on rank.
        now, woken = running[0][0], set()
        while running and running[0][0] == now:
            _, rank, action = heappop(running)
            busy[rank] = False
            woken.add(rank)
            woken |= ready.finish(action)
    if ready.unfinished:
        raise ValueError(
            f"{name}: no rank may go on with {ready.unfinished} actions left (raise cap or hold)"
        )
    return Schedule(name, num_microbatches, placement, _with_reductions(order, placement))


class _Ready:
    """The actions that may start, by rank and op, kept up to date as actions finish."""

    def __init__(
        self, name: str, num_microbatches: int, placement: tuple[int, ...], prefer: tuple[Op, ...]
    ) -> None:
        self.placement = placement
        self.forward = prefer.index(Op.F)
        self.rank_of_op = {op: i for i, op in enumerate(prefer)}
        everything = tuple(
            Action(op, stage, m)
            for op in prefer
            for stage in range(len(placement))
            for m in range(num_microbatches)
        )
        # Not an order yet: only what `needs` has to know, the sizes and whether backward is split.
        whole = Schedule(name, num_microbatches, placement, (everything,))
        self.unfinished = len(everything)
        self.missing: dict[Action, int] = {}
        self.followers: dict[Action, list[Action]] = {}
        self.heaps: list[list[list[tuple[int, Action]]]] = [
            [[] for _ in prefer] for _ in range(max(placement) + 1)
        ]
        for action in everything:
            before = needs(action, whole)
            self.missing[action] = len(before)
            for earlier in before:
                self.followers.setdefault(earlier, []).append(action)
            if not before:
                self._add(action)

    def take(self, rank: int, may_forward: bool) -> Action | None:
        """Take out the action that `rank` prefers, of one op the earliest microbatch."""
        for i, heap in enumerate(self.heaps[rank]):
            if heap and (may_forward or i != self.forward):
                return heappop(heap)[1]
        return None

    def finish(self, action: Action) -> set[int]:
        """Count `action` as done. Returns the ranks that have something more to do."""
        self.unfinished -= 1
        woken = set()
        for follower in self.followers.pop(action, ()):
            self.missing[follower] -= 1
            if not self.missing[follower]:
                self._add(follower)
                woken.add(self.placement[follower.stage])
        return woken

    def _add(self, action: Action) -> None:
        heap = self.heaps[self.placement[action.stage]][self.rank_of_op[action.op]]
        heappush(heap, (action.microbatch, action))


def _with_reductions(
    order: Sequence[Sequence[Action]], placement: tuple[int, ...]
) -> tuple[tuple[Action, ...], ...]:
    """`order` with one R a stage, right after the last action that adds to the stage's gradients.

    The last stage's R comes at the end of its rank's list if stage 0 lives elsewhere. With a tied
    table it meets the R of stage 0, which is the last action of the whole step: standing earlier,
    it would hold up the backward that stage 0 waits for.
    """
    last = len(placement) - 1
    meets = placement[0] != placement[last]
    result = []
    for actions in order:
        final = {a.stage: i for i, a in enumerate(actions) if a.op in GRADIENT_OPS}
        after = {i: stage for stage, i in final.items()}
        if meets and last in final:
            del after[final[last]]
        merged = []
        for i, action in enumerate(actions):
            merged.append(action)
            if i in after:
                merged.append(Action(Op.R, after[i], ALL_MICROBATCHES))
        if meets and last in final:
            merged.append(Action(Op.R, last, ALL_MICROBATCHES))
        result.append(tuple(merged))
    return tuple(result)


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
        f"interleaved-{vpp}", num_microbatches, placement, _with_reductions(order, placement)
    )


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
            f"{name} has one stage a rank, got --vpp {vpp} (use --schedule interleaved, or --vpp 1)"
        )


SCHEDULES: dict[str, Callable[[int, int, int], Schedule]] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
}
"""Schedule by name, called as `SCHEDULES[name](pp, num_microbatches, vpp)`."""
