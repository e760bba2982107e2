"""AdamW (Loshchilov and Hutter 2019) on a flat range of numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from megalite.ops import backend


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One update in place, in one pass; all tensors flat, of one dtype; `step` counts from 1."""
    rates = (lr, beta1, beta2, eps, weight_decay)
    apex = backend.apex_for(grad, param, exp_avg, exp_avg_sq)
    if apex and param.dtype == torch.float32:
        apex.adamw_((grad, param, exp_avg, exp_avg_sq), step, rates)
        return
    if param.dtype == torch.float32 and backend.takes(param, grad, exp_avg, exp_avg_sq):
        tensors = (param, exp_avg, exp_avg_sq, grad)
        no_copy = (None, backend.TYPES[torch.float32])
        backend.launch("adamw", grad, *tensors, *no_copy, None, None, param.numel(), step, *rates)
        return
    adamw(
        [param],
        [grad],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.full((), step - 1, dtype=torch.float32, device=param.device)],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
