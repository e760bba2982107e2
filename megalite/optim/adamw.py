"""AdamW as an update rule on flat ranges."""

from __future__ import annotations

from torch import Tensor

from megalite.core.config import OptimConfig
from megalite.ops.adamw import adamw_


class AdamW:
    """Decoupled weight decay; running means of the gradient and of its square."""

    state_names = ("exp_avg", "exp_avg_sq")
    in_one_pass = True

    def __init__(self, cfg: OptimConfig):
        self.cfg = cfg

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        *,
        step: int,
        lr: float,
        decay: float,
        factor: Tensor,
        copy: Tensor | None,
    ) -> None:
        """Update `param` in place from `grad` times `factor`, and give `copy` what comes of it.

        All flat, of one dtype but for the copy; `step` counts from 1.
        """
        adamw_(
            param,
            grad,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=step,
            lr=lr,
            beta1=self.cfg.beta1,
            beta2=self.cfg.beta2,
            eps=self.cfg.eps,
            weight_decay=decay,
            factor=factor,
            copy=copy,
        )
