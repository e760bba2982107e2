"""One process that rounds as tp ranks do which share a kv head: what their bits are compared with.

Each of those ranks multiplies with the head's gradient through its own queries, and the products
are added: other roundings than of one product with the whole gradient. Here each rank's share of
the queries has keys and values of its own, made from the same weights. Next: verify.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.core.call import Call
from megalite.layers.attention import Attention

# s sequence, b micro batch, h hidden, n query heads and m kv heads of the model, d head_dim


class KeysOfEachRank(Attention):
    """Attention in one process with the keys and values of `ranks` tp ranks, more than kv heads."""

    def __init__(self, *args: Any, ranks: int, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.own_kv_heads, self.kv_heads = self.kv_heads, ranks

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """[s, b, h] -> the same."""
        bias = self.qkv.bias
        fused = F.linear(
            x, self._repeated(self.qkv.weight), None if bias is None else self._repeated(bias)
        )
        return self.out(call.part("core-attention", partial(self._core, call), fused), call)

    def _repeated(self, rows: Tensor) -> Tensor:
        """[(n + 2m) d, ...] with a copy of keys and values for each rank."""
        n, m, d = self.num_heads, self.own_kv_heads, self.head_dim
        q, *kv = rows.unflatten(0, (n + 2 * m, d)).split((n, m, m))
        copies = self.kv_heads // m
        kv = [t.unsqueeze(1).expand(m, copies, *t.shape[1:]).flatten(0, 1) for t in kv]
        return torch.cat((q, *kv)).flatten(0, 1)
