"""Attention scores and their softmax, written out: the path for whatever SDPA does not offer."""

from __future__ import annotations

import torch
from torch import Tensor

# b micro batch, n heads, q and k positions


def attention_mask(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """[q, k] booleans: True where a query may look at a key (causal, within `window`)."""
    ahead = q[:, None] - k[None, :]
    return ahead >= 0 if window is None else (ahead >= 0) & (ahead < window)


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax of `scores` [b, n, q, k] over the k where `mask` [q, k] holds; no key gives zeros."""
    scores = scores.masked_fill(~mask, -torch.inf)
    top = scores.amax(-1, keepdim=True).detach()
    weights = torch.exp(scores - torch.where(top.isinf(), torch.zeros_like(top), top))
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total == 0, torch.ones_like(total), total)
