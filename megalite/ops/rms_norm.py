"""RMSNorm over the last dimension (Zhang and Sennrich 2019)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# h hidden: the dimension that is normalised


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension of `x` [..., h]."""
    return F.rms_norm(x, weight.shape, weight, eps)
