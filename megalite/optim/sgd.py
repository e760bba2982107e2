"""Gradient descent with momentum: the smallest update rule, and a pattern for one's own."""

from __future__ import annotations

from torch import Tensor

from megalite.core.config import OptimConfig


class SGD:
    """Steps along a running sum of gradients (Polyak 1964), with decoupled weight decay."""

    state_names = ("momentum",)

    def __init__(self, cfg: OptimConfig):
        self.momentum = cfg.momentum

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        *,
        step: int,
        lr: float,
        decay: float,
    ) -> None:
        """Update `param` in place from `grad`; all flat, of one dtype; `step` counts from 1."""
        param.mul_(1 - lr * decay)
        param.sub_(state["momentum"].mul_(self.momentum).add_(grad), alpha=lr)
