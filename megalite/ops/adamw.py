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
    factor: Tensor | None = None,
    copy: Tensor | None = None,
) -> None:
    """One update in place; all tensors flat, `copy` of any dtype, the others of one.

    `step` counts from 1. The gradient counts `factor` times (a number on its device), and may be
    overwritten. `copy` is given the new parameters. The kernel does all of it in one pass.
    """
    rates = (lr, beta1, beta2, eps, weight_decay)
    states = (param, exp_avg, exp_avg_sq, factor)
    in_float32 = all(t is None or t.dtype == torch.float32 for t in states)
    if in_float32 and backend.takes(*states, grad, copy):
        kind = backend.TYPES[torch.float32 if copy is None else copy.dtype]
        given = (param, exp_avg, exp_avg_sq, grad, copy, kind, factor, None)
        backend.launch("adamw", grad, *given, param.numel(), step, *rates)
        return
    if factor is not None:
        grad.mul_(factor)
    _update(param, grad, exp_avg, exp_avg_sq, step, rates)
    if copy is not None:
        copy.copy_(param)


def _update(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    rates: tuple[float, float, float, float, float],
) -> None:
    """By Apex, or by torch."""
    lr, beta1, beta2, eps, weight_decay = rates
    apex = backend.apex_for(grad, param, exp_avg, exp_avg_sq)
    if apex and param.dtype == torch.float32:
        apex.adamw_((grad, param, exp_avg, exp_avg_sq), step, rates)
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
