"""Dropout whose mask is a function of (seed, layer, sample, position, feature), at every layout."""

from __future__ import annotations

from torch import Tensor

from megalite.core import rng
from megalite.core.call import Call
from megalite.ops import dropout as ops

# r rows of the residual stream on this rank, b micro batch, h hidden


def dropout(x: Tensor, p: float, key: int, call: Call, *, residual: Tensor | None = None) -> Tensor:
    """Zero each element of `x` [r, b, h] with probability p, and divide the others by 1 - p.

    Then add `residual`, of the same shape.
    """
    if p == 0.0 or not call.training:
        return x if residual is None else residual + x
    hashed = rng.rows(key, call.samples[None, :, None], call.row_positions[:, None, None])
    return ops.dropout(x, hashed, p, residual)
