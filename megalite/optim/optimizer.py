"""The optimizer over buckets: norm by ownership, one scale, and an update rule on each flat range.

Rules see flat tensors of numbers and nothing of the layout; rules.py has what they are and which
bucket is whose. Where parameters are narrower than float32 the optimizer keeps a master copy of its
range. Next: parallel/zero.py for which range that is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megalite.core.config import OptimConfig
from megalite.optim.matrices import EachMatrix, WholeMatrices
from megalite.optim.rules import Rules
from megalite.optim.scaler import LossScaler
from megalite.parallel.buckets import Bucket, Span
from megalite.parallel.zero import Zero

AT_ONCE = 1 << 20
"""Squares that a CPU sums in their own dtype: of 30 times as many float32 loses 1e-3."""


class Optimizer:
    """State of the ranges this rank updates: `step_count`, the state tensors and the state of
    `scaler` (None: losses are not scaled) are all to save.

    `zero` has sorted the parameters by `rules.of`.
    """

    def __init__(
        self,
        zero: Zero,
        cfg: OptimConfig,
        rules: Rules | None = None,
        scaler: LossScaler | None = None,
    ):
        self.zero, self.cfg, self.scaler = zero, cfg, scaler
        self.rules = (rules or Rules(cfg)).named
        self.step_count = 0
        self.masters: list[Tensor | None] = []
        self.states: list[dict[str, Tensor]] = []
        self._learned: list[tuple[int, Bucket]] = []
        self._owned: list[list[Span]] = []
        for idx, bucket in enumerate(zero.buckets):
            if bucket.layout.key.frozen:
                self.masters.append(None)
                self.states.append({})
                continue
            self._learned.append((idx, bucket))
            narrow = bucket.params.dtype != bucket.grad_dtype
            self.masters.append(torch.zeros_like(bucket.grads) if narrow else None)
            names = self.rules[bucket.layout.key.optimizer].state_names
            self.states.append({name: torch.zeros_like(bucket.grads) for name in names})
            self._owned.append(bucket.layout.owned_spans(zero.my_range(bucket)))
        self._more = [self._given_more(bucket) for bucket in zero.buckets]
        self.read_params()

    def _given_more(self, bucket: Bucket) -> dict[str, EachMatrix]:
        """What the rule of a bucket is given beside numbers."""
        if not bucket.layout.key.matrix:
            return {}
        tp = self.zero.mesh.axis("tp")
        return {"each_matrix": WholeMatrices(bucket.layout, bucket.updated, tp)}

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
        for idx in range(len(self.masters)):
            self._write(idx)
        self.zero.gather_params(loaded=True)

    def _write(self, bucket_idx: int) -> None:
        master = self.masters[bucket_idx]
        if master is not None:
            self.zero.buckets[bucket_idx].weights.copy_(master)

    def snapshot(self) -> Callable[[], None]:
        """Copies all that `step` changes, gradients too; what it gives puts them back.

        Parameters that are gathered are to be gathered again.
        """
        count, kept = self.step_count, []
        for idx, bucket in self._learned:
            for tensor in (*self.numbers(idx).values(), bucket.grads):
                kept.append((tensor, tensor.detach().clone()))

        def restore() -> None:
            self.zero.settle()  # a gather under way would still send what is overwritten
            self.step_count = count
            for tensor, copy in kept:
                tensor.detach().copy_(copy)

        return restore

    def sum_of_squares(self) -> Tensor:
        """Of the reduced gradients this rank counts, in float64: over all ranks, norm squared."""
        parts = []
        for (_, bucket), spans in zip(self._learned, self._owned, strict=True):
            base = bucket.updated[0]
            parts += [bucket.grads[lo - base : hi - base] for lo, hi in spans]
        device = self.zero.buckets[0].grads.device
        if not parts:  # all that this rank updates is another's to count
            return torch.zeros((), dtype=torch.float64, device=device)
        return (squares_at_once if device.type == "cuda" else squares_in_turn)(parts)

    def step(self, *, lr: float, scale: Tensor) -> None:
        """Multiply the gradients by `scale` (normalisation and clipping) and update every range."""
        self.step_count += 1
        for idx, bucket in self._learned:
            numbers, key, factor = self.numbers(idx), bucket.layout.key, scale.to(bucket.grad_dtype)
            rule, more = self.rules[key.optimizer], dict[str, Any](self._more[idx])
            in_one_pass = getattr(rule, "in_one_pass", False)
            if in_one_pass:
                copy = None if self.masters[idx] is None else bucket.weights
                more |= {"factor": factor, "copy": copy}
            else:
                bucket.grads.mul_(factor)
            # lr x weight decay is the same whatever a parameter's own rate (Loshchilov and Hutter).
            decay = self.cfg.weight_decay / key.lr_mult if key.decay else 0.0
            rule.update(
                numbers["weights"],
                bucket.grads,
                self.states[idx],
                step=self.step_count,
                lr=lr * key.lr_mult,
                decay=decay,
                **more,
            )
            if not in_one_pass:
                self._write(idx)
        self.zero.gather_params()


def squares_at_once(parts: list[Tensor]) -> Tensor:
    """Sum of the squares of all parts, in float64: on a GPU one call, in a fixed order.

    The norms' kernels widen each number as they read it; `vector_norm` would copy a part to
    float64 first.
    """
    norms = torch._foreach_norm(parts, 2, dtype=torch.float64)
    return torch.stack(norms).square().sum()


def squares_in_turn(parts: list[Tensor]) -> Tensor:
    """The same by products of pieces, which a CPU does faster."""
    total = parts[0].new_zeros((), dtype=torch.float64)
    for part in parts:
        for piece in part.split(AT_ONCE):
            total += torch.dot(piece, piece)
    return total
