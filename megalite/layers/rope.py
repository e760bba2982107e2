"""Rotary positions for one call: queries and keys share the angles of its tokens' places."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.core.call import Call
from megalite.core.config import ModelConfig
from megalite.ops.rope import rope, rope_angles

# s sequence, b micro batch, n heads, d head_dim


class Rope:
    """Rotates queries and keys [s, b, n, d] by the places of a call."""

    def __init__(self, cfg: ModelConfig):
        self.head_dim, self.theta = cfg.head_dim, cfg.rope_theta
        self._places: Tensor | None = None
        self._angles: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        """`x` rotated; the angles are kept until a call with other places comes."""
        return rope(x, *self._angles_of(call.places, x.dtype))

    def _angles_of(self, places: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        kept = self._angles
        if kept is None or self._places is not places or kept[0].dtype != dtype:
            kept = rope_angles(places, self.head_dim, self.theta, dtype)
            self._places, self._angles = places, kept
        return kept
