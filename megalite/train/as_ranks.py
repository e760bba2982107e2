"""One process whose attention rounds as a layout's ranks do: what their bits are compared with.

Cuts change the order of sums, and exact sums have no order (exact.py). Two things are rounded that
are no sum of the same terms:
- tp ranks that share a kv head multiply with its gradient, each through its own queries, before
  the products are added. Here each rank's share of the queries has keys and values of its own, made
  from the same weights.
- ring attention merges outputs by their log-sum-exp, block by block of the keys. Here the blocks of
  all ranks are merged in the order in which each rank would.
Next: verify.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.core.call import Call, Context
from megalite.core.config import Config
from megalite.core.mesh import Axis
from megalite.layers.attention import Attention
from megalite.layers.context import FORMS, blocks, heads_first, merged, seq_first
from megalite.layers.core_attention import CoreAttention

# s sequence, b micro batch, h hidden, n query heads and m kv heads of the model, d head_dim


@dataclass(frozen=True)
class AllOfTheRing:
    """In the place of a call's Context, where one process has the rows of all `size` ranks."""

    size: int
    rows: int
    """Ranks over which each one's part of a sequence is cut again."""
    form: str = "all of the ring"

    def pairs(self, length: int, window: int | None, like: Tensor) -> Iterator[tuple[slice, slice]]:
        """Blocks of queries and keys, for each rank in the order in which it meets them."""
        contexts = [Context(Axis("cp", self.size, idx), "ring") for idx in range(self.size)]
        whole = length + -length % contexts[0].multiple(self.rows)  # as the ranks pad it
        spans = [
            [range(r.start, min(r.stop, length)) for r in context.spans(whole) if r.start < length]
            for context in contexts
        ]
        for idx in range(self.size):
            for hop in range(self.size):
                for _, _, q_at, k_at in blocks(spans[idx], spans[idx - hop], window, like):
                    yield _slice(q_at), _slice(k_at)


def _slice(at: Tensor) -> slice:
    return slice(int(at[0]), int(at[-1]) + 1)


def _all_of_the_ring(
    core: CoreAttention, q: Tensor, k: Tensor, v: Tensor, call: Call, ring: AllOfTheRing
) -> Tensor:
    q, k, v = map(heads_first, (q, k, v))
    return seq_first(_AllOfTheRing.apply(q, k, v, core, call.positions, ring))


FORMS["all of the ring"] = _all_of_the_ring  # type: ignore[assignment]


class _AllOfTheRing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, core, at, ring):
        y, lse = torch.zeros_like(q), q.new_full(q.shape[:-1], -torch.inf)
        for mine, theirs in ring.pairs(len(at), core.window, q):
            k_block, v_block = k[:, :, theirs], v[:, :, theirs]
            found = core.partial(q[:, :, mine], k_block, v_block, at[mine], at[theirs])
            y[:, :, mine], lse[:, :, mine] = merged(y[:, :, mine], lse[:, :, mine], *found)
        ctx.save_for_backward(q, k, v, y, lse, at)
        ctx.core, ctx.ring = core, ring
        return y

    @staticmethod
    def backward(ctx, dy):
        q, k, v, y, lse, at = ctx.saved_tensors
        dot = (y * dy).sum(-1)
        dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
        for mine, theirs in ctx.ring.pairs(len(at), ctx.core.window, q):
            grads = ctx.core.partial_grads(
                q[:, :, mine],
                k[:, :, theirs],
                v[:, :, theirs],
                at[mine],
                at[theirs],
                lse=lse[:, :, mine],
                dy=dy[:, :, mine],
                dot=dot[:, :, mine],
            )
            dq[:, :, mine] += grads[0]
            dk[:, :, theirs] += grads[1]
            dv[:, :, theirs] += grads[2]
        return dq, dk, dv, None, None, None


class AttentionAsRanks(Attention):
    """Attention in one process with the roundings of the ranks of a layout."""

    def __init__(self, *args: Any, tp: int, ring: tuple[int, int] | None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.own_kv_heads, self.kv_heads = self.kv_heads, max(tp, self.kv_heads)
        self.ring = AllOfTheRing(*ring) if ring else None

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """[s, b, h] -> the same."""
        bias = None if self.qkv.bias is None else self._repeated(self.qkv.bias)
        fused = F.linear(x, self._repeated(self.qkv.weight), bias)
        if (lora := self.qkv.lora) is not None:
            thin = F.linear(x, lora.down) * lora.scale  # there, as the layer has it
            fused = fused + F.linear(thin, self._repeated(lora.up))
        if self.ring is not None:
            call = replace(call, context=self.ring)  # type: ignore[arg-type]
        return self.out(call.part("core-attention", partial(self._attend, call), fused), call)

    def _repeated(self, rows: Tensor) -> Tensor:
        """[(n + 2m) d, ...] with a copy of keys and values for each rank that has its own."""
        n, m, d = self.num_heads, self.own_kv_heads, self.head_dim
        q, *kv = rows.unflatten(0, (n + 2 * m, d)).split((n, m, m))
        copies = self.kv_heads // m
        kv = [t.unsqueeze(1).expand(m, copies, *t.shape[1:]).flatten(0, 1) for t in kv]
        return torch.cat((q, *kv)).flatten(0, 1)


def rounding_of(config: Config) -> dict[str, Any]:
    """The arguments with which AttentionAsRanks rounds as this layout; none if it is of no need."""
    layout, shares = config.layout, config.model.kv_heads < config.layout.tp
    if layout.cp > 1 and layout.cp_form == "ring":
        rows = layout.tp if layout.sequence_parallel else 1
        return {"tp": layout.tp if shares else 1, "ring": (layout.cp, rows)}
    return {"tp": layout.tp, "ring": None} if shares else {}
