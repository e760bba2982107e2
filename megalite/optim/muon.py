"""Muon: momentum made orthogonal, for the 2-d matrices inside layers.

Jordan et al. 2024 (kellerjordan.github.io/posts/muon). Each update is scaled to the size that
AdamW's have, so that one learning rate and one weight decay serve both: Liu et al. 2025 (arXiv
2502.16982), section 2.2. Who has a whole matrix, and which parameters are AdamW's: rules.py,
matrices.py.
"""

from __future__ import annotations

from math import sqrt

import torch
from torch import Tensor

from megalite.core.config import OptimConfig
from megalite.optim.matrices import EachMatrix

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic: steep at 0, so that five steps bring all singular values to 0.7 to 1.2."""
STEPS = 5
RMS = 0.2
"""Root mean square of an update, in learning rates: about that of AdamW."""
EPS = 1e-7


class Muon:
    """Nesterov momentum of whole matrices, its singular values made nearly equal."""

    state_names = ("momentum",)
    layout = "matrix"

    def __init__(self, cfg: OptimConfig):
        self.momentum = cfg.momentum

    def update(
        self,
        param: Tensor,
        grad: Tensor,
        state: dict[str, Tensor],
        *,
        step: int,
        lr: float,
        decay: float,
        each_matrix: EachMatrix,
    ) -> None:
        """Update `param` in place; all flat. `each_matrix` gives the matrices that it is cut of."""
        mean = state["momentum"].lerp_(grad, 1 - self.momentum)
        direction = each_matrix(grad.lerp(mean, self.momentum), _scaled)
        param.mul_(1 - lr * decay).sub_(direction, alpha=lr)


def _scaled(x: Tensor) -> Tensor:
    # A matrix with all singular values 1 has a mean square of 1 / (its longer side).
    return orthogonalized(x) * (RMS * sqrt(max(x.shape)))


def orthogonalized(x: Tensor) -> Tensor:
    """`x` [rows, cols] with its singular values brought near 1, by Newton-Schulz, in its dtype."""
    a, b, c = COEFFICIENTS
    tall = x.shape[0] > x.shape[1]
    y = x.T if tall else x
    y = y / torch.linalg.matrix_norm(y).clamp(min=EPS)
    for _ in range(STEPS):
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.T if tall else y
