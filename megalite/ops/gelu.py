"""GELU (Hendrycks and Gimpel 2016), exact and as GPT-2's tanh form.

A bias may be added first: its gradient then comes from the pass that makes that of x.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.ops import backend
from megalite.ops.registry import define

# f ffn_hidden_size, or its part on this rank


def gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """x * Phi(x) of x + `bias`, with the error function; on CPU a third of the tanh form's time."""
    return _gelu_of(x, bias, tanh=False)


def gelu_tanh(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """GPT-2's approximation of it."""
    return _gelu_of(x, bias, tanh=True)


def _gelu_of(x: Tensor, bias: Tensor | None, *, tanh: bool) -> Tensor:
    if backend.takes_alike(x, bias):
        return _Gelu.apply(x, bias, tanh)
    return F.gelu(x if bias is None else x + bias, approximate=_form(tanh))


def _form(tanh: bool) -> str:
    return "tanh" if tanh else "none"


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, tanh):
        ctx.save_for_backward(x, bias)
        ctx.tanh = tanh
        return _forward(x, bias, tanh)

    @staticmethod
    def backward(ctx, dy: Tensor):
        x, bias = ctx.saved_tensors
        dx, dbias = _backward(dy, x, bias, ctx.tanh)
        return dx, None if bias is None else dbias, None


# -- forward -----------------------------------------------------------------------------------


class _Forward(NamedTuple):
    x: Tensor
    bias: Tensor | None
    tanh: bool


def _forward_kernel(a: _Forward) -> Tensor:
    x, bias = _dense(a)
    y = _forward_shapes(a)
    backend.launch("gelu", x, y, x, bias, int(a.tanh), *_sizes(x))
    return y


def _dense(a: _Forward | _Backward) -> tuple[Tensor, Tensor | None]:
    return a.x.contiguous(), None if a.bias is None else a.bias.contiguous().view(a.x.shape[-1])


def _sizes(x: Tensor) -> tuple[int, int]:
    return x.shape[:-1].numel(), x.shape[-1]


def _forward_shapes(a: _Forward) -> Tensor:
    return torch.empty_like(a.x, memory_format=torch.contiguous_format)


def _forward_reference(a: _Forward) -> Tensor:
    return F.gelu(_wide(a.x, a.bias), approximate=_form(a.tanh)).to(a.x.dtype)


def _wide(x: Tensor, bias: Tensor | None) -> Tensor:
    return backend.wide(x) if bias is None else backend.wide(x) + backend.wide(bias)


# -- backward ----------------------------------------------------------------------------------


class _Backward(NamedTuple):
    dy: Tensor
    x: Tensor
    bias: Tensor | None
    tanh: bool


ROWS_OF_A_SHARE = 16
"""At least: a share is written and read in float32, which costs a twelfth of the rest, or less."""


def _backward_kernel(a: _Backward) -> tuple[Tensor, Tensor]:
    """Gradients of x [..., f], and of the bias [f] or empty."""
    dy, (x, bias) = a.dy.contiguous(), _dense(a)
    dx, dbias = out = _backward_shapes(a)
    rows, f = _sizes(x)
    count = min(-(-rows // ROWS_OF_A_SHARE), 8 * backend.blocks_to_fill(x))
    shares = None if bias is None else x.new_empty(count, f, dtype=torch.float32)
    results = dx, None if bias is None else dbias, shares
    backend.launch("gelu_backward", x, *results, dy, x, bias, int(a.tanh), rows, f, count)
    return out


def _backward_shapes(a: _Backward) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(a.x, memory_format=torch.contiguous_format)
    return dx, a.x.new_empty(0 if a.bias is None else len(a.bias))


def _backward_reference(a: _Backward) -> tuple[Tensor, Tensor]:
    wide = _wide(a.x, a.bias)
    dx = torch.ops.aten.gelu_backward(backend.wide(a.dy), wide, approximate=_form(a.tanh))
    dbias = dx.new_empty(0) if a.bias is None else dx.flatten(0, -2).sum(0)
    return dx.to(a.x.dtype), dbias.to(a.x.dtype)


_forward = define(
    "gelu",
    _Forward,
    1,
    kernel=_forward_kernel,
    reference=_forward_reference,
    shapes=_forward_shapes,
)
_backward = define(
    "gelu_backward",
    _Backward,
    2,
    kernel=_backward_kernel,
    reference=_backward_reference,
    shapes=_backward_shapes,
)
