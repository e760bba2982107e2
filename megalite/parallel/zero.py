"""ZeRO as one policy over flat buckets: which of optimizer state, gradients, parameters is cut.

Stage 0 shards nothing, 1 the optimizer state, 2 the gradients as well, 3 the parameters too;
gather.py brings parameters together. Rajbhandari et al. 2020 (arXiv 1910.02054). A bucket's
reduction starts when the last contribution to it has landed: once a step, or from stage 2 on once a
microbatch, so that a whole gradient exists only while it is being made and reduced. It runs beside
what is left of the backward; `reduce` (the schedule's R) starts the rest, `finish` waits.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn

from megalite.core import comm
from megalite.core.mesh import Mesh
from megalite.core.params import listen
from megalite.core.unit import HasUnits
from megalite.parallel.buckets import Bucket, RuleOf, Span, one_rule, plan
from megalite.parallel.gather import Gatherer, keep_range, settle, start, whole

STEP = -1
"""The group of contributions that are reduced once a step; others are numbers of microbatches."""

LANES = 2
"""Whole gradients of one size that stage 2 holds: one is being made while one is reduced. On gloo
also how many reductions are under way at once."""

Part = tuple[int, int]
"""A bucket's number and a group: what one reduction reduces."""


class Zero:
    """The buckets of this rank's stages and how they are kept over the data and context ranks.

    Gradients are sent to those in the dtype `sent_as` (None: in which they were added up).
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        mesh: Mesh,
        *,
        stage: int,
        bucket_bytes: float,
        device: torch.device,
        rule_of: RuleOf = one_rule,
        sent_as: torch.dtype | None = None,
    ):
        self.mesh, self.stage, self.sent_as = mesh, stage, sent_as
        self.axis = mesh.axis("dp", "cp")
        self.buckets: list[Bucket] = []
        self._of: dict[int, tuple[int, int]] = {}
        unit_of = units_of(stages) if stage >= 3 else lambda param: ""
        ways = self.axis.size
        planned = plan(
            stages, ways=ways, bucket_bytes=bucket_bytes, unit_of=unit_of, rule_of=rule_of
        )
        for layout, params in planned:
            for slot_idx, param in enumerate(params):
                self._of[id(param)] = (len(self.buckets), slot_idx)
                if not layout.key.frozen:
                    listen(param, self._on_landed, self._home if stage >= 2 else None)
            updated = layout.range_of(self.axis.idx) if stage >= 1 else (0, layout.size)
            bucket = Bucket(
                layout,
                params,
                device,
                whole_grads=stage < 2,
                whole_params=stage < 3,
                updated=updated,
            )
            self.buckets.append(bucket)
        if stage >= 1:
            bucket_of = {param: self.buckets[number] for param, (number, _) in self._of.items()}
            for module in stages.values():
                Gatherer(cast(HasUnits, module), bucket_of, self.axis, drops=stage >= 3)
        self._partials = [b.layout.partial_spans(mesh.axes) for b in self.buckets]
        self._spare: dict[int, list[Tensor]] = {}
        self._lanes: Counter[int] = Counter()
        self.begin(0)

    def begin(self, num_microbatches: int) -> None:
        """Start a step of that many microbatches: clear the gradients."""
        times = num_microbatches if self.stage < 2 else 1
        self.expected = [b.uses * times for b in self.buckets]
        self.landed: Counter[Part] = Counter()
        self._pending: dict[Part, comm.Pending] = {}
        self._open: dict[Part, Tensor] = {}
        self._group = STEP
        for number, bucket in enumerate(self.buckets):
            if bucket.whole_grads is None:
                bucket.grads.zero_()
            else:
                self._open[number, STEP] = bucket.whole_grads.zero_()

    def enter(self, microbatch: int) -> None:
        """What lands from now on belongs to that microbatch."""
        if self.stage >= 2:
            self._group = microbatch

    def reduce(self, stage: int) -> None:
        """Start those reductions of a stage, its gradients complete, that have not started yet."""
        for part in list(self._open):
            if self.buckets[part[0]].layout.key.stage == stage and part not in self._pending:
                self._start(part)

    def finish(self) -> None:
        """Wait for all reductions: `Bucket.grads` then is summed over microbatches and data."""
        assert set(self._open) <= set(self._pending), "R was not run for every stage"
        keys = enumerate(bucket.layout.key for bucket in self.buckets)
        tied = {n for n, key in keys if key.tied and not key.frozen}
        for part in [p for p in self._pending if p[0] in tied]:
            self._collect(part)
        tying = []
        for number in sorted(tied):
            assert self.mesh.tie is not None
            tying.append(comm.all_reduce_start(self.buckets[number].grads, self.mesh.tie))
        for part in list(self._pending):
            self._collect(part)
        for pending in tying:
            pending.wait()

    def my_range(self, bucket: Bucket) -> Span:
        """The range this rank looks after: counts in the norm and saves."""
        return bucket.layout.range_of(self.axis.idx)

    def all_landed(self, num_microbatches: int) -> bool:
        """Whether every use of every parameter has landed once a microbatch, and nothing else."""
        groups = range(num_microbatches) if self.stage >= 2 else (STEP,)
        wanted = {(n, g): uses for n, uses in enumerate(self.expected) for g in groups if uses}
        return dict(self.landed) == wanted

    def keep_params(self) -> None:
        """Take the parameters, all of them there, as this rank's: after initialisation."""
        if self.stage >= 3:
            for bucket in self.buckets:
                keep_range(bucket)

    def whole_params(self) -> AbstractContextManager[None]:
        """All parameters there for a `with` body, which may overwrite them; all ranks call it."""
        return whole(self.buckets, self.axis)

    def gather_params(self, *, loaded: bool = False) -> None:
        """After an update: begin to give every rank that keeps them the ranges others updated, or,
        if they were `loaded`, those of frozen parameters as well.

        A unit waits for its own when it runs next; who reads parameters else takes `whole_params`.
        """
        if self.stage in (0, 3):
            return
        for bucket in reversed(self.buckets):  # the next forward needs the last ones first
            if bucket.layout.key.frozen and not loaded:
                continue
            settle(bucket)
            bucket.is_whole = False
            start(bucket, self.axis)

    def settle(self) -> None:
        """Wait for the gathers that are under way: nothing is left to be sent."""
        for bucket in self.buckets:
            settle(bucket)

    def _home(self, param: nn.Parameter) -> Tensor:
        """Where a contribution of the current microbatch to this parameter is to be added."""
        number, slot_idx = self._of[id(param)]
        part = (number, self._group)
        if part not in self._open:
            self._open[part] = self._new_lane(self.buckets[number])
        slot = self.buckets[number].layout.slots[slot_idx]
        return self._open[part][slot.start : slot.stop].view(slot.shape)

    def _new_lane(self, bucket: Bucket) -> Tensor:
        """A cleared flat tensor for the whole gradients of a bucket.

        Once LANES of that size are in use, a reduction has to end and give its memory back first.
        """
        size = bucket.layout.size
        spare = self._spare.setdefault(size, [])
        if not spare and self._lanes[size] >= LANES:
            same = [p for p in self._pending if self.buckets[p[0]].layout.size == size]
            for part in same[:1]:
                self._collect(part)
        if spare:
            return spare.pop().zero_()
        self._lanes[size] += 1
        return torch.zeros(size, dtype=bucket.grad_dtype, device=bucket.params.device)

    def _on_landed(self, param: nn.Parameter) -> None:
        number, _ = self._of[id(param)]
        part = (number, self._group)
        self.landed[part] += 1
        # More would be written into memory that is being reduced: `uses` says too little.
        assert self.landed[part] <= self.expected[number], "landed more often than its uses say"
        if self.landed[part] == self.expected[number]:
            self._start(part)

    def _start(self, part: Part) -> None:
        # Else all that are under way would hold their whole gradient a second time.
        copies = self.sent_as is not None or (self.stage > 0 and comm.needs_scratch(self.axis))
        while copies and len(self._pending) >= LANES:
            self._collect(next(iter(self._pending)))
        number, _ = part
        whole = self._open[part]
        for name, (lo, hi) in self._partials[number]:
            comm.all_reduce(whole[lo:hi], self.mesh.axes[name])
        if self.stage == 0:
            self._pending[part] = comm.all_reduce_start(whole, self.axis, dtype=self.sent_as)
        else:
            lo, hi = self.my_range(self.buckets[number])
            self._pending[part] = comm.reduce_scatter_start(
                whole, self.axis, out=whole[lo:hi], dtype=self.sent_as
            )

    def _collect(self, part: Part) -> None:
        """Wait for a reduction; at stage 2 add its shard to the sums and keep its memory."""
        self._pending.pop(part).wait()
        whole, bucket = self._open.pop(part), self.buckets[part[0]]
        if bucket.whole_grads is None:
            lo, hi = self.my_range(bucket)
            bucket.grads.add_(whole[lo:hi])
            self._spare[bucket.layout.size].append(whole)


def units_of(stages: Mapping[int, nn.Module]) -> Callable[[nn.Parameter], str]:
    """The first unit of a rank's stages that uses a parameter, by name."""
    names: dict[int, str] = {}
    for _, stage in sorted(stages.items()):
        for unit in cast(HasUnits, stage).units():
            for param in unit.params:
                names.setdefault(id(param), unit.name)
    return lambda param: names[id(param)]
