"""The products of a linear, forward and backward; on CPU by the faster of torch's two libraries.

torch multiplies float32 matrices on CPU by MKL, which takes its slower kernels on a processor that
is not Intel's: half the speed of oneDNN's there (docs/peers.md has figures). oneDNN is in torch,
too, behind an operator that torch's own compiler calls. Any other dtype or device, and a product
too small to pay for its start, goes the usual way. Both compute the same up to rounding.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# t tokens, i inputs, o outputs

ENOUGH = 1 << 21
"""Multiplications of a product from which oneDNN's kernels pay for their start."""
PACKED_FOR = 16
"""Tokens that a packed weight is laid out for: those of a batch that decodes."""
AT_LEAST = 5
"""Rows that a packed weight is multiplied by: one row alone takes another kernel, whose sums are
rounded otherwise, and fewer than these read the weight more slowly (docs/peers.md)."""
ENOUGH_TERMS = 64
"""Of each sum, likewise: a weight gradient over fewer tokens is mostly copying."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[..., i] times [o, i] transposed, plus [o]: [..., o]. No gradient is recorded."""
    packed = getattr(weight, "packed", None)
    if packed is not None:
        return _packed_linear(x, packed, bias)
    if _by_onednn(x, weight):
        y = _onednn(x.flatten(0, -2), weight, bias)
        # Not a view, as from F.linear: a loss may write into the logits that a Function gave it.
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))
    return F.linear(x, weight, bias)


def linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """`linear` of [t, i], written into `out` [t, o]."""
    if _by_onednn(x, weight):
        out.copy_(_onednn(x, weight, bias))
    elif bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias, x, weight.t(), out=out)


def add_product(total: Tensor, dy: Tensor, x: Tensor) -> None:
    """Add dy^T x, from [t, o] and [t, i], to `total` [o, i], which may be of a wider dtype."""
    if _by_onednn(x.t(), dy.t()):
        # The first of the two is copied to lie in rows: the smaller one.
        narrow = x.shape[1] < dy.shape[1]
        total.add_(_onednn(x.t(), dy.t()).t() if narrow else _onednn(dy.t(), x.t()))
    elif total.dtype == dy.dtype:
        total.addmm_(dy.t(), x)
    elif total.is_cuda:
        # In one pass over `total`, and the product is never rounded to the narrow type.
        torch.addmm(total, dy.t(), x, out_dtype=total.dtype, out=total)
    else:
        total.add_(dy.t() @ x)


def pack(weight: Tensor, *, keep: bool) -> None:
    """Lay `weight` [o, i] out as oneDNN reads it, for `linear` without gradients from now on.

    Twice as fast where few tokens meet many weights, and each token's result is then the same bits
    whatever tokens are beside it. The weight itself is empty afterwards, or, with `keep`, a second
    copy, which `linear` does not look at. Nothing happens unless it is float32 on CPU.
    """
    if _onednn_can(weight, weight):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), PACKED_FOR)
        weight.packed = packed  # type: ignore[attr-defined]
        if not keep:
            weight.data = weight.new_empty(0)


def _packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    t = x.shape[:-1].numel()
    if t >= AT_LEAST:
        return _onednn(x, packed, bias)
    if t == 0:
        return x.new_empty((*x.shape[:-1], packed.shape[0]))
    rows = F.pad(x.flatten(0, -2), (0, 0, 0, AT_LEAST - t))
    return _onednn(rows, packed, bias)[:t].view(*x.shape[:-1], -1)


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _by_onednn(x: Tensor, weight: Tensor) -> bool:
    enough = x.shape[-1] >= ENOUGH_TERMS and x.numel() * weight.shape[0] >= ENOUGH
    return enough and _onednn_can(x, weight)


def _onednn_can(x: Tensor, weight: Tensor) -> bool:
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    return bool(torch.backends.mkldnn.enabled) and _has_onednn()


@functools.cache
def _has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
