"""The optimizer over buckets: norm by ownership, one scale, and an update rule on each flat range.

A rule is a class with `state_names` and `update(param, grad, state, *, step, lr, decay)`; it sees
flat tensors of numbers and nothing of the layout. Where parameters are narrower than float32 the
optimizer keeps a master copy of its range. Next: parallel/zero.py for which range that is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.core.config import OptimConfig
from megalite.optim.adamw import AdamW
from megalite.parallel.zero import Zero


class Optimizer:
    """State of the ranges this rank updates; `step_count` and the state tensors are all to save."""

    def __init__(self, zero: Zero, cfg: OptimConfig):
        self.zero, self.rule = zero, OPTIMIZERS[cfg.optimizer](cfg)
        self.step_count = 0
        self.masters: list[Tensor | None] = []
        self.states: list[dict[str, Tensor]] = []
        for bucket in zero.buckets:
            grads = bucket.grads
            narrow = bucket.params.dtype != bucket.grad_dtype
            self.masters.append(torch.zeros_like(grads) if narrow else None)
            self.states.append({name: torch.zeros_like(grads) for name in self.rule.state_names})
        self._owned = [b.layout.owned_spans(zero.my_range(b)) for b in zero.buckets]
        self.read_params()

    def read_params(self) -> None:
        """Take the parameters as they are for the master copies: after initialisation."""
        for bucket, master in zip(self.zero.buckets, self.masters, strict=True):
            if master is not None:
                master.copy_(bucket.weights)

    def numbers(self, bucket_idx: int) -> dict[str, Tensor]:
        """What a checkpoint keeps of that bucket: flat tensors over the updated range, by name."""
        bucket, master = self.zero.buckets[bucket_idx], self.masters[bucket_idx]
        weights = bucket.weights if master is None else master
        return {"weights": weights, **self.states[bucket_idx]}

    def write_params(self) -> None:
        """Make the parameters follow the master copies, and give every rank all of them."""
        for bucket, master in zip(self.zero.buckets, self.masters, strict=True):
            if master is not None:
                bucket.weights.copy_(master)
        self.zero.gather_params()

    def sum_of_squares(self) -> Tensor:
        """Of the reduced gradients this rank counts, in float64: over all ranks, norm squared."""
        total = torch.zeros((), dtype=torch.float64, device=self.zero.buckets[0].grads.device)
        for bucket, spans in zip(self.zero.buckets, self._owned, strict=True):
            base = bucket.updated[0]
            for lo, hi in spans:
                grads = bucket.grads[lo - base : hi - base]
                total += torch.dot(grads, grads).to(torch.float64)
        return total

    def step(self, *, lr: float, scale: Tensor) -> None:
        """Multiply the gradients by `scale` (normalisation and clipping) and update every range."""
        self.step_count += 1
        for idx, bucket in enumerate(self.zero.buckets):
            grads = bucket.grads.mul_(scale.to(bucket.grad_dtype))
            numbers = self.numbers(idx)
            key = bucket.layout.key
            self.rule.update(
                numbers["weights"],
                grads,
                self.states[idx],
                step=self.step_count,
                lr=lr * key.lr_mult,
                decay=key.decay,
            )
        self.write_params()


OPTIMIZERS = {"adamw": AdamW}
