"""Rotary positions (Su et al. 2021), in the half-split form of LLaMA's public checkpoints."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalite.ops import backend
from megalite.ops.registry import define

# s sequence, b micro batch (or 1: the same for all), n heads, d head_dim


def rope_angles(
    places: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [s, b, 1, d] of the angles of each place [s, b], computed in float64.

    The angles of the first half are those of the second, its sines have the other sign: `rope` is
    then two products, whatever the half.
    """
    exponent = torch.arange(0, head_dim, 2, device=places.device, dtype=torch.float64) / head_dim
    angles = places.to(torch.float64)[:, :, None, None] * theta**-exponent
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [s, b, n, d] by what rope_angles gives: element i of its first half, a, and of its
    second, b, become a cos - b sin and b cos + a sin.
    """
    if backend.takes_alike(x, cos, sin):
        return _Rope.apply(x, cos, sin)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rope(x, cos, sin, False)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return _rope(dy, *ctx.saved_tensors, True), None, None


class _Inputs(NamedTuple):
    x: Tensor
    cos: Tensor
    sin: Tensor
    back: bool
    """By the negative angles."""


def _kernel(a: _Inputs) -> Tensor:
    # Queries and keys are views of one projection, their gradients views of another order: the
    # kernel goes by strides, and neither is copied.
    x = a.x if a.x.stride(-1) == 1 else a.x.contiguous()
    s, b, n, d = x.shape
    cos, sin = (t[..., d // 2 :].expand(s, b, 1, d // 2) for t in (a.cos, a.sin))
    y = _shapes(a)
    strides = *x.stride()[:3], *cos.stride()[:2]
    backend.launch("rope", x, y, x, cos, sin, *strides, s, b, n, d // 2, int(a.back))
    return y


def _shapes(a: _Inputs) -> Tensor:
    return torch.empty_like(a.x, memory_format=torch.contiguous_format)


def _reference(a: _Inputs) -> Tensor:
    x, cos, sin = backend.wide(a.x), backend.wide(a.cos), backend.wide(a.sin)
    sin = -sin if a.back else sin
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(a.x.dtype)


_rope = define("rope", _Inputs, 1, kernel=_kernel, reference=_reference, shapes=_shapes)
