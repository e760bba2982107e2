"""Attention scores and their softmax, written out: the path for whatever SDPA does not offer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalite.ops import backend
from megalite.ops.registry import define

# b micro batch, n heads, q and k positions, length of the whole sequence


def attention_mask(
    q: Tensor, k: Tensor, window: int | None, starts: Tensor | None = None
) -> Tensor:
    """[q, k] booleans: True where a query may look at a key (causal, within `window`).

    With `starts` [length, b], which has where the document of each position starts, [b, 1, q, k]:
    no query looks at a key before its own document.
    """
    ahead = q[:, None] - k[None, :]
    mask = ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)
    if starts is None:
        return mask
    return mask & (k >= starts[q].t()[:, None, :, None])


def scaled_softmax(
    scores: Tensor,
    *,
    scale: float = 1.0,
    causal: bool = False,
    window: int | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Softmax over the last dimension of scale * `scores` + `bias`, of what is seen.

    `scores` [b, n, q, k]. `mask` (booleans, True: seen) and `bias`, which gets no gradient, are
    broadcast to it. `causal`: the last query sees up to the last key, the one before up to the one
    before; `window`, with it: that many keys at most. A query that sees nothing gets zeros.
    """
    assert causal or window is None, "a window needs causal"
    return _Softmax.apply(scores, mask, bias, causal, window or 0, scale)


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, mask, bias, causal, window, scale):
        y = _forward(scores, mask, bias, causal, window, scale)
        ctx.save_for_backward(y)
        ctx.how = causal, window, scale
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        return _backward(dy, *ctx.saved_tensors, *ctx.how), None, None, None, None, None


# -- forward -----------------------------------------------------------------------------------


class _Forward(NamedTuple):
    scores: Tensor
    mask: Tensor | None
    bias: Tensor | None
    causal: bool
    window: int
    scale: float


def _forward_kernel(a: _Forward) -> Tensor:
    scores, y = a.scores.contiguous(), _forward_shapes(a)
    hidden = *_strides(a.mask, scores), *_strides(a.bias, scores)
    how = int(a.causal), a.window, a.scale
    backend.launch("softmax_forward", scores, y, scores, *hidden, *scores.shape, *how)
    return y


def _strides(t: Tensor | None, like: Tensor) -> tuple[Tensor | None, int, int, int]:
    """`t` with neighbouring keys, broadcast to `like`, and its strides of the other dimensions."""
    if t is None:
        return None, 0, 0, 0
    if t.shape[-1] != like.shape[-1] or t.stride(-1) != 1:
        t = t.expand(*t.shape[:-1], like.shape[-1]).contiguous()
    whole = t.expand(like.shape)
    batch, head, query, _ = whole.stride()
    return whole, batch, head, query


def _forward_shapes(a: _Forward) -> Tensor:
    return torch.empty_like(a.scores, memory_format=torch.contiguous_format)


def _forward_reference(a: _Forward) -> Tensor:
    wide = backend.wide(a.scores)
    wide = wide if a.scale == 1.0 else wide * a.scale
    wide = wide if a.bias is None else wide + backend.wide(a.bias)
    seen = _seen(a)
    wide = wide if seen is None else wide.masked_fill(~seen, -torch.inf)
    return torch._safe_softmax(wide, -1).to(a.scores.dtype)


def _seen(a: _Forward) -> Tensor | None:
    if not a.causal:
        return a.mask
    queries, keys = a.scores.shape[-2:]
    own, at = (torch.arange(first, keys, device=a.scores.device) for first in (keys - queries, 0))
    seen = attention_mask(own, at, a.window or None)
    return seen if a.mask is None else seen & a.mask


# -- backward ----------------------------------------------------------------------------------


class _Backward(NamedTuple):
    dy: Tensor
    y: Tensor
    causal: bool
    window: int
    scale: float


def _backward_kernel(a: _Backward) -> Tensor:
    dy, dx = a.dy.contiguous(), torch.empty_like(a.y)
    how = int(a.causal), a.window, a.scale
    backend.launch("softmax_backward", a.y, dx, dy, a.y, *a.y.shape, *how)
    return dx


def _backward_reference(a: _Backward) -> Tensor:
    """What weighs nothing adds nothing, whatever its gradient is, even where that is NaN."""
    wide, along = backend.wide(a.y), backend.wide(a.dy).masked_fill(a.y == 0, 0.0)
    dx = a.scale * wide * (along - (wide * along).sum(-1, keepdim=True))
    return dx.masked_fill(a.y == 0, 0.0).to(a.y.dtype)


_forward = define(
    "softmax",
    _Forward,
    1,
    kernel=_forward_kernel,
    reference=_forward_reference,
    shapes=_forward_shapes,
)
_backward = define(
    "softmax_backward",
    _Backward,
    1,
    kernel=_backward_kernel,
    reference=_backward_reference,
    shapes=lambda a: torch.empty_like(a.y),
)
