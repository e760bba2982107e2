"""Rotary positions for one call: queries and keys share the angles of its tokens' places."""

from __future__ import annotations

from torch import Tensor

from megalite.core.call import Call
from megalite.core.config import ModelConfig
from megalite.ops.rope import rope, rope_angles

# s sequence, b micro batch, n heads, d head_dim


class Rope:
    """Rotates queries and keys [s, b, n, d] by the places of a call."""

    def __init__(self, cfg: ModelConfig):
        self.head_dim, self.theta = cfg.head_dim, cfg.rope_theta

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        """`x` rotated."""
        name = ("rope", self.head_dim, self.theta, x.dtype)
        if name not in call.known:
            angles = rope_angles(call.places, self.head_dim, self.theta, x.dtype)
            call.known[name] = angles
        cos, sin = call.known[name]
        return rope(x, cos, sin)
