"""Attention scores and their softmax, written out: the path for whatever SDPA does not offer."""

from __future__ import annotations

import torch
from torch import Tensor

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
    scores = scores.masked_fill(~mask, -torch.inf)
    top = scores.amax(-1, keepdim=True).detach()
    weights = torch.exp(scores - torch.where(top.isinf(), torch.zeros_like(top), top))
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, torch.ones_like(total), total)
