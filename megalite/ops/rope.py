"""Rotary positions (Su et al. 2021), in the half-split form of LLaMA's public checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

# s sequence, b micro batch (or 1: the same for all), n heads, d head_dim


def rope_angles(
    places: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [s, b, 1, d/2] of the angles of each place [s, b], computed in float64."""
    exponent = torch.arange(0, head_dim, 2, device=places.device, dtype=torch.float64) / head_dim
    angles = places.to(torch.float64)[:, :, None, None] * theta**-exponent
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [s, b, n, d]: element i of the first half with element i of the second."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
