"""SwiGLU (Shazeer 2020)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

# f ffn_hidden_size, or its part on this rank


def swiglu(x: Tensor) -> Tensor:
    """silu(gate) * up, for `x` [..., 2f] with gate in its first half: gives [..., f]."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up
