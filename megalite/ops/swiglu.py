"""SwiGLU (Shazeer 2020)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.ops import backend
from megalite.ops.registry import define

# f ffn_hidden_size, or its part on this rank


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, for `x` [..., 2f] with gate in its first half: gives [..., f].

    The kernels keep x alone for backward; torch keeps silu(gate), too.
    """
    if backend.takes(x):
        return _Swiglu.apply(x)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _forward(x)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return _backward(dy, *ctx.saved_tensors)


# -- forward -----------------------------------------------------------------------------------


class _Forward(NamedTuple):
    x: Tensor


def _forward_kernel(a: _Forward) -> Tensor:
    x, y = a.x.contiguous(), _forward_shapes(a)
    backend.launch("swiglu", x, y, x, y.shape[:-1].numel(), y.shape[-1])
    return y


def _forward_shapes(a: _Forward) -> Tensor:
    return a.x.new_empty(*a.x.shape[:-1], a.x.shape[-1] // 2)


def _forward_reference(a: _Forward) -> Tensor:
    gate, up = backend.wide(a.x).chunk(2, dim=-1)
    return (F.silu(gate) * up).to(a.x.dtype)


# -- backward ----------------------------------------------------------------------------------


class _Backward(NamedTuple):
    dy: Tensor
    x: Tensor


def _backward_kernel(a: _Backward) -> Tensor:
    dy, x, dx = a.dy.contiguous(), a.x.contiguous(), _backward_shapes(a)
    backend.launch("swiglu_backward", x, dx, dy, x, dy.shape[:-1].numel(), dy.shape[-1])
    return dx


def _backward_shapes(a: _Backward) -> Tensor:
    return torch.empty_like(a.x, memory_format=torch.contiguous_format)


def _backward_reference(a: _Backward) -> Tensor:
    dy = backend.wide(a.dy)
    gate, up = backend.wide(a.x).chunk(2, dim=-1)
    share = gate.sigmoid()
    slope = share * (1 + gate * (1 - share))
    return torch.cat((dy * up * slope, dy * gate * share), dim=-1).to(a.x.dtype)


_forward = define(
    "swiglu",
    _Forward,
    1,
    kernel=_forward_kernel,
    reference=_forward_reference,
    shapes=_forward_shapes,
)
_backward = define(
    "swiglu_backward",
    _Backward,
    1,
    kernel=_backward_kernel,
    reference=_backward_reference,
    shapes=_backward_shapes,
)
