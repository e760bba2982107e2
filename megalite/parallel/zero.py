"""ZeRO as one policy over flat buckets: which of optimizer state, gradients, parameters is cut.

Stage 0 shards nothing, 1 the optimizer state. Rajbhandari et al. 2020 (arXiv 1910.02054). A
bucket's reduction starts when the last contribution to it has landed in the last backward of a
step, so it runs beside what is left of that backward; `reduce` (the schedule's R) starts the rest,
`finish` waits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megalite.core import comm
from megalite.core.mesh import Mesh
from megalite.core.params import listen
from megalite.parallel.buckets import Bucket, Span, plan


class Zero:
    """The buckets of this rank's stages and how they are kept over the data and context ranks."""

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        mesh: Mesh,
        *,
        stage: int,
        bucket_bytes: float,
        device: torch.device,
    ):
        self.mesh, self.stage = mesh, stage
        self.axis = mesh.axis("dp", "cp")
        self.buckets: list[Bucket] = []
        self.expected: list[int] = []
        self._of: dict[int, int] = {}
        for layout, params in plan(stages, ways=self.axis.size, bucket_bytes=bucket_bytes):
            for param in params:
                self._of[id(param)] = len(self.buckets)
                listen(param, self._on_landed)
            self.buckets.append(Bucket(layout, params, device))
        self._partials = [b.layout.partial_spans(mesh.axes) for b in self.buckets]
        self.begin(0)

    def begin(self, num_microbatches: int) -> None:
        """Start a step of that many microbatches: clear the gradients."""
        self.expected = [b.uses * num_microbatches for b in self.buckets]
        self.landed = [0] * len(self.buckets)
        self._pending: list[comm.Pending | None] = [None] * len(self.buckets)
        for bucket in self.buckets:
            bucket.grads.zero_()

    def reduce(self, stage: int) -> None:
        """Start those reductions of a stage, its gradients complete, that have not started yet."""
        for number, bucket in enumerate(self.buckets):
            if bucket.layout.key.stage == stage and self._pending[number] is None:
                self._start(number)

    def finish(self) -> None:
        """Wait for all reductions: `grads_of` then has sums over microbatches and data ranks."""
        tying = []
        for number, bucket in enumerate(self.buckets):
            if bucket.layout.key.tied:
                self._wait(number)
                assert self.mesh.tie is not None
                tying.append(comm.all_reduce_start(self.grads_of(bucket), self.mesh.tie))
        for number in range(len(self.buckets)):
            self._wait(number)
        for pending in tying:
            pending.wait()

    def my_range(self, bucket: Bucket) -> Span:
        """The range this rank looks after: counts in the norm and saves."""
        return bucket.layout.range_of(self.axis.idx)

    def updated_range(self, bucket: Bucket) -> Span:
        """The range this rank updates: its own, or all where the optimizer state is replicated."""
        return self.my_range(bucket) if self.stage >= 1 else (0, bucket.layout.size)

    def grads_of(self, bucket: Bucket) -> Tensor:
        """The reduced gradients of the updated range, flat; valid after `finish`."""
        lo, hi = self.updated_range(bucket)
        return bucket.grads[lo:hi]

    def gather_params(self) -> None:
        """After an update: give every rank the ranges that the others updated."""
        if self.stage == 0:
            return
        pending = []
        for bucket in self.buckets:
            lo, hi = self.my_range(bucket)
            pending.append(
                comm.all_gather_start(bucket.params[lo:hi], self.axis, out=bucket.params)
            )
        for gathering in pending:
            gathering.wait()

    def _on_landed(self, param: nn.Parameter) -> None:
        number = self._of[id(param)]
        self.landed[number] += 1
        # One more would be written into memory that is being reduced.
        assert self.landed[number] <= self.expected[number], (
            "a gradient landed more often than its parameter's `uses` says, or before `begin`"
        )
        if self.landed[number] == self.expected[number]:
            self._start(number)

    def _start(self, number: int) -> None:
        bucket = self.buckets[number]
        for name, (lo, hi) in self._partials[number]:
            comm.all_reduce(bucket.grads[lo:hi], self.mesh.axes[name])
        if self.stage == 0:
            self._pending[number] = comm.all_reduce_start(bucket.grads, self.axis)
        else:
            mine = self.grads_of(bucket)
            self._pending[number] = comm.reduce_scatter_start(bucket.grads, self.axis, out=mine)

    def _wait(self, number: int) -> None:
        pending = self._pending[number]
        assert pending is not None, "R was not run for every stage"
        pending.wait()
