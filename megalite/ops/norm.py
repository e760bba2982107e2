"""LayerNorm (Ba, Kiros and Hinton 2016) and RMSNorm (Zhang and Sennrich 2019), over the last dim.

`add_norm` adds a residual first and gives the sum, too: x is read once for both. In kernels, sums
are float32 whatever x is; kernels/csrc/norm.cuh has them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.ops import backend
from megalite.ops.registry import define

# h hidden: the dimension that is normalised, r rows


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, over the last dimension of `x` [..., h]."""
    if backend.takes(x, weight, bias):
        return _normalised(x, None, weight, bias, eps, True)[1]
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension of `x` [..., h]."""
    if backend.takes(x, weight):
        return _normalised(x, None, weight, None, eps, False)[1]
    return F.rms_norm(x, weight.shape, weight, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x + residual, and its layer_norm; all [..., h]."""
    if backend.takes(x, residual, weight, bias):
        return _normalised(x, residual, weight, bias, eps, True)
    total = x + residual
    return total, layer_norm(total, weight, bias, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual, and its rms_norm; all [..., h]."""
    if backend.takes(x, residual, weight):
        return _normalised(x, residual, weight, None, eps, False)
    total = x + residual
    return total, rms_norm(total, weight, eps)


def _normalised(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor]:
    given = (x, residual, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return _Norm.apply(*given, eps, centered)
    y, total, _, _ = _forward_op(*given, eps, centered)
    return x if residual is None else total, y


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, centered):
        y, total, mean, rstd = _forward_op(x, residual, weight, bias, eps, centered)
        ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
        ctx.has_bias, ctx.adds = bias is not None, residual is not None
        if residual is None:
            ctx.mark_non_differentiable(total)
        return total, y

    @staticmethod
    def backward(ctx, dtotal: Tensor, dy: Tensor):
        x, weight, mean, rstd = ctx.saved_tensors
        more = dtotal if ctx.adds else None
        dx, dweight, dbias = _backward_op(dy, more, x, weight, mean, rstd, ctx.has_bias)
        return dx, dx if ctx.adds else None, dweight, dbias if ctx.has_bias else None, None, None


# -- the ops -----------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    rows, h = x.numel() // x.shape[-1], x.shape[-1]
    out = _forward_shapes(x, residual, weight, bias, eps, centered)
    y, total, mean, rstd = out
    backend.launch(
        "norm_forward",
        x,
        y,
        None if residual is None else total,
        mean if centered else None,
        rstd,
        x,
        residual,
        weight,
        bias,
        int(weight.dtype == torch.float32),
        rows,
        h,
        eps,
    )
    return out


def _forward_shapes(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = x.new_empty(0) if residual is None else torch.empty_like(y)
    mean = x.new_empty(rows if centered else 0, dtype=torch.float32)
    return y, total, mean, x.new_empty(rows, dtype=torch.float32)


def _forward_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    total = x.new_empty(0) if residual is None else x + residual
    wide = backend.wide(x if residual is None else total).flatten(0, -2)
    mean = wide.mean(-1) if centered else wide.new_empty(0)
    unit = wide - mean[:, None] if centered else wide
    rstd = (unit.square().mean(-1) + eps).rsqrt()
    y = unit * rstd[:, None] * backend.wide(weight)
    y = y if bias is None else y + backend.wide(bias)
    return y.to(x.dtype).view(x.shape), total, mean, rstd


def _backward(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dy, x = dy.contiguous(), x.contiguous()
    dtotal = None if dtotal is None else dtotal.contiguous()
    rows, h = len(rstd), x.shape[-1]
    out = _backward_shapes(dy, dtotal, x, weight, mean, rstd, has_bias)
    dx, dweight, dbias = out
    blocks, packs = backend.blocks_to_fill(x), backend.aligned16(dx, dy, x, dtotal, weight)
    count = backend.ask("norm_backward_shares", backend.TYPES[x.dtype], h, blocks, packs)
    shares = x.new_empty(1 + has_bias, count, h, dtype=torch.float32)
    backend.launch(
        "norm_backward",
        x,
        dx,
        dweight,
        dbias if has_bias else None,
        shares,
        dy,
        x,
        dtotal,
        weight,
        int(weight.dtype == torch.float32),
        mean if len(mean) else None,
        rstd,
        rows,
        h,
        blocks,
        int(packs),
    )
    return out


def _backward_shapes(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(weight), weight.new_empty(len(weight) if has_bias else 0)


def _backward_reference(
    dy: Tensor,
    dtotal: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide, along = backend.wide(x).flatten(0, -2), backend.wide(dy).flatten(0, -2)
    centered = len(mean) == len(rstd)
    unit = (wide - mean[:, None] if centered else wide) * rstd[:, None]
    g = along * backend.wide(weight)
    dx = g - unit * (g * unit).mean(-1, keepdim=True)
    dx = (dx - g.mean(-1, keepdim=True) if centered else dx) * rstd[:, None]
    dx = dx.view(x.shape) if dtotal is None else dx.view(x.shape) + backend.wide(dtotal)
    dbias = along.sum(0) if has_bias else along.new_empty(0)
    return dx.to(x.dtype), (along * unit).sum(0).to(weight.dtype), dbias.to(weight.dtype)


_forward_op: Any = define(
    "norm(Tensor x, Tensor? residual, Tensor weight, Tensor? bias, float eps, bool centered)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    kernel=_forward,
    reference=_forward_reference,
    shapes=_forward_shapes,
)
_backward_op: Any = define(
    "norm_backward(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, Tensor mean, Tensor rstd,"
    " bool has_bias) -> (Tensor, Tensor, Tensor)",
    kernel=_backward,
    reference=_backward_reference,
    shapes=_backward_shapes,
)
