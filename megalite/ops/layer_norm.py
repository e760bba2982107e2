"""LayerNorm over the last dimension (Ba, Kiros and Hinton 2016)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# h hidden: the dimension that is normalised


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias, over the last dimension of `x` [..., h]."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)
