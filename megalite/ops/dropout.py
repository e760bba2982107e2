"""Dropout by a mask that is a function of names: a row's, hashed already, and a column's number.

The kernel (kernels/csrc/elementwise.cuh) makes the same mask, bit for bit, and makes it again in
backward. torch keeps it, one byte for each element, rather than hash twice.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from megalite.ops import backend
from megalite.ops.registry import define
from megalite.ops.splitmix import mix

# h hidden


def keep_mask(hashed: Tensor, columns: Tensor, p: float) -> Tensor:
    """True with probability 1 - p: `hashed` row keys [..., 1] and `columns` [n] give [..., n].

    Columns 2 i and 2 i + 1 share a hash: its lower and its upper 32 bits, as signed numbers.
    """
    halves = mix(hashed ^ (columns >> 1)) >> 32 * (columns & 1)
    return halves.to(torch.int32) >= _least(p)


def _least(p: float) -> int:
    """What a signed number of 32 bits is not below with probability 1 - p."""
    return min(math.ceil(p * 2**32) - 2**31, 2**31 - 1)


def dropout(x: Tensor, hashed: Tensor, p: float, residual: Tensor | None = None) -> Tensor:
    """Zero `x` [..., h] with probability p < 1, divide the rest by 1 - p, and add `residual`.

    `hashed` [..., 1] has the keys of the rows of `x`; element i is kept as keep_mask says of i.
    """
    if backend.takes_alike(x, residual):
        return _Dropout.apply(x, hashed, residual, p)
    return _reference(_Inputs(x, hashed, residual, p))


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hashed, residual, p):
        ctx.save_for_backward(hashed)
        ctx.p, ctx.adds = p, residual is not None
        return _dropout(x, hashed, residual, p)

    @staticmethod
    def backward(ctx, dy: Tensor):
        (hashed,) = ctx.saved_tensors
        return _dropout(dy, hashed, None, ctx.p), None, dy if ctx.adds else None, None


class _Inputs(NamedTuple):
    x: Tensor
    hashed: Tensor
    residual: Tensor | None
    p: float


def _kernel(a: _Inputs) -> Tensor:
    x, y = a.x.contiguous(), _shapes(a)
    hashed = a.hashed.expand(*x.shape[:-1], 1).contiguous()
    residual = None if a.residual is None else a.residual.expand_as(x).contiguous()
    sizes = hashed.numel(), x.shape[-1]
    how = _least(a.p), 1.0 / (1.0 - a.p)
    backend.launch("dropout", x, y, x, residual, hashed, *sizes, *how)
    return y


def _shapes(a: _Inputs) -> Tensor:
    return torch.empty_like(a.x, memory_format=torch.contiguous_format)


def _reference(a: _Inputs) -> Tensor:
    columns = torch.arange(a.x.shape[-1], device=a.x.device)
    # Division by a number: a factor 1 / (1 - p) in bfloat16 would shift the mean by up to 0.4 %.
    # Filled, not multiplied: backward then keeps one byte for each element.
    y = a.x.masked_fill(~keep_mask(a.hashed, columns, a.p), 0.0) / (1.0 - a.p)
    return y if a.residual is None else a.residual + y


_dropout = define("dropout", _Inputs, 1, kernel=_kernel, reference=_reference, shapes=_shapes)
