"""Rotary positions for one call: the angles of its rows, computed once for all layers of a stage."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.core.call import Call
from megalite.core.config import ModelConfig
from megalite.ops.rope import rope, rope_angles


class Rope:
    """Rotates queries and keys [s, b, n, d] by the positions of a call."""

    def __init__(self, cfg: ModelConfig):
        self.head_dim, self.theta = cfg.head_dim, cfg.rope_theta
        self._last: tuple[tuple, tuple[Tensor, Tensor]] | None = None

    def __call__(self, x: Tensor, call: Call) -> Tensor:
        """`x` rotated; the angles are kept until a call with other positions comes."""
        return rope(x, *self._angles(call.positions, x.dtype))

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        asked = (id(positions), dtype)
        if self._last is None or self._last[0] != asked:
            # Keeping `positions` alive with its angles keeps its id from being given to another
            # tensor.
            self._last = (asked, rope_angles(positions, self.head_dim, self.theta, dtype))
            self._positions = positions
        return self._last[1]
