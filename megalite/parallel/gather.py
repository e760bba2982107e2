"""Parameters that other ranks have updated or hold: gathered by when the unit that reads them runs.

ZeRO 1 and 2: every bucket's gather starts after the update and runs beside the next forward, in
which each unit waits for its own. ZeRO-3: a unit's parameters are whole only while it runs; else
each rank keeps its range. Around each unit of a stage: gather before its forward, drop after it; in
backward the same, by two gates on the tensors that leave and enter it. The unit that comes next is
gathered meanwhile. A parameter is a view of its bucket's one storage, which is emptied and refilled
in place, so whatever autograd saved of it is right again when its backward comes. W needs no
parameters. Rajbhandari et al. 2020 (arXiv 1910.02054). Next: zero.py, which decides what is cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from megalite.core import comm
from megalite.core.call import Call
from megalite.core.mesh import Axis
from megalite.core.unit import HasUnits, Unit
from megalite.parallel.buckets import Bucket


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, action):
        ctx.action = action
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.action()
        return grad, None


class Gatherer:
    """Has the parameters of one stage whole while its units need them; `drops` them afterwards."""

    def __init__(
        self, stage: HasUnits, buckets_of: Mapping[int, Bucket], axis: Axis, *, drops: bool
    ):
        self.axis, self.drops = axis, drops
        self.buckets = {
            unit.name: list({id(b): b for b in (buckets_of[id(p)] for p in unit.params)}.values())
            for unit in stage.units()
        }
        self.order = list(self.buckets)
        self.entry = 0
        """The first unit whose backward needs parameters: one that takes tokens looks at none."""
        self.inner = stage.run_unit
        stage.run_unit = self.run

    def run(self, unit: Unit, x: Tensor | None, call: Call) -> Tensor:
        """`unit.run(x, call)` with its parameters there, now and in its backward."""
        at = self.order.index(unit.name)
        if x is None:
            self.entry = 1
        self._need(at, ahead=at + 1)
        if not self.drops:
            return self.inner(unit, x, call)
        if x is not None and torch.is_grad_enabled():
            x = _Gate.apply(x, lambda: self._drop(at))
        y = self.inner(unit, x, call)
        if x is not None and torch.is_grad_enabled():
            y = _Gate.apply(y, lambda: self._need(at, ahead=at - 1 if at > self.entry else -1))
        self._drop(at)
        return y

    def _need(self, at: int, *, ahead: int) -> None:
        wanted = self.buckets[self.order[at]]
        coming = self.buckets[self.order[ahead]] if 0 <= ahead < len(self.order) else []
        for bucket in (*wanted, *coming):
            start(bucket, self.axis)
        for bucket in wanted:
            settle(bucket)

    def _drop(self, at: int) -> None:
        for bucket in self.buckets[self.order[at]]:
            settle(bucket)
            empty(bucket)


def start(bucket: Bucket, axis: Axis) -> None:
    """Begin to gather a bucket's parameters, unless they are whole or on their way."""
    if bucket.is_whole:
        return
    nbytes = bucket.params.numel() * bucket.params.element_size()
    storage = bucket.params.untyped_storage()
    if storage.nbytes() != nbytes:
        storage.resize_(nbytes)
    bucket.is_whole = True
    # Through an alias: writing does not count as a change of what autograd has saved.
    bucket.gathering = comm.all_gather_start(bucket.weights, axis, out=bucket.params.data)


def settle(bucket: Bucket) -> None:
    """Wait for the gather under way, if there is one."""
    if bucket.gathering is not None:
        bucket.gathering.wait()
        bucket.gathering = None


def empty(bucket: Bucket) -> None:
    """Free the memory of `bucket.params`; its tensors stay, with nothing to read."""
    bucket.params.untyped_storage().resize_(0)
    bucket.is_whole = False


@contextmanager
def whole(buckets: list[Bucket], axis: Axis) -> Iterator[None]:
    """All parameters there for the body, which may overwrite them; then cut again as they were."""
    cut = [b for b in buckets if not b.is_whole]
    for bucket in cut:
        start(bucket, axis)
    for bucket in buckets:
        settle(bucket)
    yield
    for bucket in cut:
        keep_range(bucket)


def keep_range(bucket: Bucket) -> None:
    """Copy the updated range out of the whole parameters, and drop those."""
    lo, hi = bucket.updated
    bucket.weights.copy_(bucket.params[lo:hi].detach())
    empty(bucket)
