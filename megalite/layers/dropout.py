"""Dropout whose mask is a function of (seed, layer, sample, position, feature), at every layout."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.core import rng
from megalite.core.call import Call

# r rows of the residual stream on this rank, b micro batch, h hidden


def keep_mask(hashed: Tensor, columns: Tensor, p: float) -> Tensor:
    """True with probability 1 - p: `hashed` row keys [..., 1] and `columns` [n] give [..., n]."""
    return rng.uniform(rng.mix(hashed ^ columns)) >= p


def dropout(x: Tensor, p: float, key: int, call: Call) -> Tensor:
    """Zero each element of `x` [r, b, h] with probability p, and divide the others by 1 - p."""
    if p == 0.0 or not call.training:
        return x
    hashed = rng.rows(key, call.samples[None, :, None], call.row_positions[:, None, None])
    columns = torch.arange(x.shape[-1], device=x.device)
    # Division by a number: a factor 1 / (1 - p) in bfloat16 would shift the mean by up to 0.4 %.
    # Filled, not multiplied: backward then keeps one byte for each element.
    return x.masked_fill(~keep_mask(hashed, columns, p), 0.0) / (1.0 - p)
