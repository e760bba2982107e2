"""Rotary positions (Su et al. 2021), in the half-split form of LLaMA's public checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

# s sequence, b micro batch, n heads, d head_dim


def rope_angles(
    positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [s, 1, 1, d/2] of each position's angles, computed in float64."""
    exponent = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim
    angles = positions.to(torch.float64)[:, None] * theta**-exponent
    return angles.cos()[:, None, None].to(dtype), angles.sin()[:, None, None].to(dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [s, b, n, d]: element i of the first half with element i of the second."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
