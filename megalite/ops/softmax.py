"""Attention scores and their softmax, written out: the path for whatever SDPA does not offer."""

from __future__ import annotations

from typing import Any

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


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax of `scores` [b, n, q, k] over the k where `mask` holds; no key gives zeros."""
    return scaled_softmax(scores, mask=mask)


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
    if not backend.takes(scores, mask, bias):
        seen = _seen(scores, causal, window, mask)
        scores = scores if scale == 1.0 else scores * scale
        scores = scores if bias is None else scores + bias
        scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
        top = scores.amax(-1, keepdim=True).detach()
        weights = torch.exp(scores - torch.where(top.isinf(), torch.zeros_like(top), top))
        total = weights.sum(-1, keepdim=True)
        return weights / torch.where(total == 0, torch.ones_like(total), total)
    given = (scores, mask, bias, causal, window or 0, scale)
    if torch.is_grad_enabled() and scores.requires_grad:
        return _Softmax.apply(*given)
    return _forward_op(*given)


def _seen(scores: Tensor, causal: bool, window: int | None, mask: Tensor | None) -> Tensor | None:
    if not causal:
        return mask
    queries, keys = scores.shape[-2:]
    at = torch.arange(keys, device=scores.device)
    own = torch.arange(keys - queries, keys, device=scores.device)
    seen = attention_mask(own, at, window)
    return seen if mask is None else seen & mask


class _Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, mask, bias, causal, window, scale):
        y = _forward_op(scores, mask, bias, causal, window, scale)
        ctx.save_for_backward(y)
        ctx.how = causal, window, scale
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        return _backward_op(dy, *ctx.saved_tensors, *ctx.how), None, None, None, None, None


# -- the ops -----------------------------------------------------------------------------------


def _strides(t: Tensor | None, like: Tensor) -> tuple[Tensor | None, int, int, int]:
    """`t` with neighbouring keys, broadcast to `like`, and its strides of the other dimensions."""
    if t is None:
        return None, 0, 0, 0
    if t.shape[-1] != like.shape[-1] or t.stride(-1) != 1:
        t = t.expand(*t.shape[:-1], like.shape[-1]).contiguous()
    whole = t.expand(like.shape)
    batch, head, query, _ = whole.stride()
    return whole, batch, head, query


def _forward(
    scores: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
) -> Tensor:
    scores = scores.contiguous()
    y = torch.empty_like(scores)
    whole_mask, whole_bias = _strides(mask, scores), _strides(bias, scores)
    backend.launch(
        "softmax_forward",
        scores,
        y,
        scores,
        *whole_mask,
        *whole_bias,
        *scores.shape,
        int(causal),
        window,
        scale,
    )
    return y


def _forward_shapes(
    scores: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
) -> Tensor:
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


def _forward_reference(
    scores: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    window: int,
    scale: float,
) -> Tensor:
    wide = backend.wide(scores) * scale
    wide = wide if bias is None else wide + backend.wide(bias)
    seen = _seen(scores, causal, window or None, mask)
    wide = wide if seen is None else wide.masked_fill(~seen, -torch.inf)
    return torch._safe_softmax(wide, -1).to(scores.dtype)


def _backward(dy: Tensor, y: Tensor, causal: bool, window: int, scale: float) -> Tensor:
    dy = dy.contiguous()
    dx = torch.empty_like(y)
    backend.launch("softmax_backward", y, dx, dy, y, *y.shape, int(causal), window, scale)
    return dx


def _backward_shapes(dy: Tensor, y: Tensor, causal: bool, window: int, scale: float) -> Tensor:
    return torch.empty_like(y)


def _backward_reference(dy: Tensor, y: Tensor, causal: bool, window: int, scale: float) -> Tensor:
    wide, along = backend.wide(y), backend.wide(dy).masked_fill(y == 0, 0.0)
    dx = scale * wide * (along - (wide * along).sum(-1, keepdim=True))
    return dx.masked_fill(y == 0, 0.0).to(y.dtype)


_forward_op: Any = define(
    "softmax(Tensor scores, Tensor? mask, Tensor? bias, bool causal, int window, float scale)"
    " -> Tensor",
    kernel=_forward,
    reference=_forward_reference,
    shapes=_forward_shapes,
)
_backward_op: Any = define(
    "softmax_backward(Tensor dy, Tensor y, bool causal, int window, float scale) -> Tensor",
    kernel=_backward,
    reference=_backward_reference,
    shapes=_backward_shapes,
)
