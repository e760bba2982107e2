"""List scheduling: a schedule from a preference order and two caps; and where R goes in any order.

Each rank does what it prefers of what is ready. Most schedules of generators.py are one call of
`list_schedule`; one that writes its own order ends with `with_reductions`.
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
    return Schedule(name, num_microbatches, placement, with_reductions(order, placement))


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


def with_reductions(
    order: Sequence[Sequence[Action]], placement: tuple[int, ...]
) -> tuple[tuple[Action, ...], ...]:
    """Each rank's `order` with one R a stage, right after the stage's last gradient.

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
