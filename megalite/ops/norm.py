"""LayerNorm (Ba, Kiros and Hinton 2016) and RMSNorm (Zhang and Sennrich 2019), over the last dim.

`add_layer_norm` and `add_rms_norm` add a residual first and give the sum, too: x is read once for
both. Sums are at least float32 whatever x is; kernels/csrc/norm.cuh has the kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.ops import backend
from megalite.ops.registry import define

# h hidden: the dimension that is normalised, r rows


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, over the last dimension of `x` [..., h]."""
    if bias is not None and (apex := backend.apex_for(x, weight, bias)):
        return apex.layer_norm(x, weight, bias, eps)
    if backend.takes(x, weight, bias):
        return _Norm.apply(x, None, weight, bias, eps, True)[1]
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension of `x` [..., h].

    Where torch computes, too, it is one function of autograd, with one gradient of `x`: torch's own
    is several, which meet the residual's in another order when the norm is run again in backward.
    """
    if apex := backend.apex_for(x, weight):
        return apex.rms_norm(x, weight, eps)
    if not torch.is_grad_enabled():
        return _forward(x, None, weight, None, eps, False)[0]
    return _Norm.apply(x, None, weight, None, eps, False)[1]


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """x + residual, and its layer_norm; all [..., h]."""
    apex = backend.apex_for(x, residual, weight, bias)
    if not apex and backend.takes(x, residual, weight, bias):
        return _Norm.apply(x, residual, weight, bias, eps, True)
    total = x + residual
    return total, layer_norm(total, weight, bias, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual, and its rms_norm; all [..., h]."""
    if not backend.apex_for(x, residual, weight) and backend.takes(x, residual, weight):
        return _Norm.apply(x, residual, weight, None, eps, False)
    total = x + residual
    return total, rms_norm(total, weight, eps)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, centered):
        ctx.set_materialize_grads(False)  # a sum that nobody uses has no gradient to be read
        y, total, mean, rstd = _forward(x, residual, weight, bias, eps, centered)
        ctx.save_for_backward(x if residual is None else total, weight, mean, rstd)
        ctx.has_bias, ctx.adds = bias is not None, residual is not None
        if residual is None:
            ctx.mark_non_differentiable(total)
        return total, y

    @staticmethod
    def backward(ctx, dtotal: Tensor | None, dy: Tensor | None):
        x, *others = ctx.saved_tensors
        dy, more = torch.zeros_like(x) if dy is None else dy, dtotal if ctx.adds else None
        dx, dweight, dbias = _backward(dy, more, x, *others, ctx.has_bias)
        return dx, dx if ctx.adds else None, dweight, dbias if ctx.has_bias else None, None, None


def _fit(x: Tensor, rows: tuple[Tensor | None, ...], weights: tuple[Tensor | None, ...]) -> bool:
    """Whether `rows` are of the type of `x`, and `weights` all of that one or all of float32."""
    in_float32 = all(w is None or w.dtype == torch.float32 for w in weights)
    return backend.alike(x, *rows) and (in_float32 or backend.alike(x, *weights))


# -- forward -----------------------------------------------------------------------------------


class _Forward(NamedTuple):
    x: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor | None
    eps: float
    centered: bool


def _forward_kernel(a: _Forward) -> tuple[Tensor, ...]:
    """y and the sum [..., h], mean and 1 / spread of each row [r]; empty, what there is none of."""
    x = a.x.contiguous()
    residual = None if a.residual is None else a.residual.contiguous()
    y, total, mean, rstd = out = _forward_shapes(a)
    results = (y, None if residual is None else total, mean if a.centered else None, rstd)
    weights = (a.weight, a.bias, int(a.weight.dtype == torch.float32))
    sizes = (len(rstd), x.shape[-1])
    backend.launch("norm_forward", x, *results, x, residual, *weights, *sizes, a.eps)
    return out


def _forward_shapes(a: _Forward) -> tuple[Tensor, ...]:
    rows = a.x.shape[:-1].numel()
    y = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    total = a.x.new_empty(0) if a.residual is None else torch.empty_like(y)
    mean = a.x.new_empty(rows if a.centered else 0, dtype=torch.float32)
    return y, total, mean, a.x.new_empty(rows, dtype=torch.float32)


def _forward_reference(a: _Forward) -> tuple[Tensor, ...]:
    total = a.x.new_empty(0) if a.residual is None else a.x + a.residual
    wide = backend.wide(a.x if a.residual is None else total).flatten(0, -2)
    mean = wide.mean(-1) if a.centered else wide.new_empty(0)
    unit = wide - mean[:, None] if a.centered else wide
    length = torch.linalg.vector_norm(unit, dim=-1)
    eps = wide.new_full((), a.eps)
    rstd = torch.addcmul(eps, length, length, value=1 / wide.shape[-1]).rsqrt_()
    y = (unit * rstd[:, None]).mul_(backend.wide(a.weight))
    y = y if a.bias is None else y.add_(backend.wide(a.bias))
    return y.to(a.x.dtype).view(a.x.shape), total, mean, rstd


# -- backward ----------------------------------------------------------------------------------


class _Backward(NamedTuple):
    dy: Tensor
    dtotal: Tensor | None
    x: Tensor
    weight: Tensor
    mean: Tensor
    rstd: Tensor
    has_bias: bool


def _backward_kernel(a: _Backward) -> tuple[Tensor, ...]:
    """Gradients of x and the sum [..., h], of the weight [h], and of the bias [h] or empty."""
    dy, x = a.dy.contiguous(), a.x.contiguous()
    dtotal = None if a.dtotal is None else a.dtotal.contiguous()
    h = x.shape[-1]
    dx, dweight, dbias = out = _backward_shapes(a)
    count = backend.blocks_to_fill(x)
    shares = x.new_empty(1 + a.has_bias, count, h, dtype=torch.float32)
    results = (dx, dweight, dbias if a.has_bias else None, shares)
    weight = (a.weight, int(a.weight.dtype == torch.float32))
    statistics = (a.mean if len(a.mean) else None, a.rstd)
    sizes = (len(a.rstd), h, count)
    backend.launch("norm_backward", x, *results, dy, x, dtotal, *weight, *statistics, *sizes)
    return out


def _backward_shapes(a: _Backward) -> tuple[Tensor, ...]:
    dx = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    return dx, torch.empty_like(a.weight), a.weight.new_empty(a.has_bias * len(a.weight))


def _backward_reference(a: _Backward) -> tuple[Tensor, ...]:
    wide, along = backend.wide(a.x).flatten(0, -2), backend.wide(a.dy).flatten(0, -2)
    centered = len(a.mean) == len(a.rstd)
    unit = (wide - a.mean[:, None] if centered else wide) * a.rstd[:, None]
    g = along * backend.wide(a.weight)
    dx = g - unit * (g * unit).mean(-1, keepdim=True)
    dx = (dx - g.mean(-1, keepdim=True) if centered else dx) * a.rstd[:, None]
    dx = dx.to(a.x.dtype).view(a.x.shape)
    dweight = (along * unit).sum(0).to(a.weight.dtype)
    dbias = along.sum(0) if a.has_bias else along.new_empty(0)
    return dx if a.dtotal is None else dx + a.dtotal, dweight, dbias.to(a.weight.dtype)


_forward = define(
    "norm",
    _Forward,
    4,
    kernel=_forward_kernel,
    reference=_forward_reference,
    shapes=_forward_shapes,
    fits=lambda a: _fit(a.x, (a.residual,), (a.weight, a.bias)),
)
_backward = define(
    "norm_backward",
    _Backward,
    3,
    kernel=_backward_kernel,
    reference=_backward_reference,
    shapes=_backward_shapes,
    fits=lambda a: _fit(a.x, (a.dy, a.dtotal), (a.weight,)),
)
