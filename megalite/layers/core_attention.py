"""Softmax attention of the queries that are here over keys that are here, from whatever rank.

`attend` is for queries all of whose keys are here. `partial` and `partial_grads` are for one block
of the keys: outputs that a log-sum-exp merges, and gradients that add up. Next: context.py, which
brings queries and keys together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.core import rng
from megalite.core.params import acc_dtype
from megalite.ops.dropout import keep_mask
from megalite.ops.softmax import attention_mask, scaled_softmax

# b micro batch, n query heads, m kv heads, q and k positions, d head_dim


@dataclass(frozen=True, eq=False)
class CoreAttention:
    """How the heads of one call turn scores into weights."""

    window: int | None
    soft_cap: float | None
    scale: float
    """Of the scores, 1 / sqrt(d) as a rule."""
    p: float
    """Dropout of the weights."""
    key: int
    """Of its random numbers."""
    samples: Tensor
    """[b] int64."""
    first_head: int
    """Number of the first query head here in the whole model."""
    layer: int
    """Its number in the whole model."""
    starts: Tensor | None = None
    """[length, b]: that of the call."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        """Queries [b, n, q, d] over keys and values [b, m, k, d] at these positions: [b, n, q, d].

        `k_at` that is `q_at` itself says that all are here, in order.
        """
        in_order = k_at is q_at and self.starts is None
        if self.soft_cap is None and self.p == 0:
            grouped = q.shape[1] != k.shape[1]
            is_causal = in_order and self.window is None
            mask = None if is_causal else self._mask(q_at, k_at)
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=is_causal, scale=self.scale, enable_gqa=grouped
            )
        k, v = _per_query_head(k, q), _per_query_head(v, q)
        scores, scale = q @ k.transpose(-1, -2), self.scale
        if self.soft_cap is not None:
            scores, scale = self._capped(scores * scale), 1.0
        weights = scaled_softmax(
            scores,
            scale=scale,
            causal=in_order,
            window=self.window if in_order else None,
            mask=None if in_order else self._mask(q_at, k_at),
        )
        return self._dropped(weights, q_at, k_at) @ v

    def can_batch(self, q: Tensor) -> bool:
        """Whether `attend_all` gives each of the queries the same bits whatever others are there.

        On CPU it is then two products of matrices. SDPA's bits depend there on which thread has
        which head, for each has a buffer of its own to multiply in; on a GPU, on how many blocks
        share the keys of a head.
        """
        return q.device.type == "cpu" and q.dtype == acc_dtype(q.dtype)

    def attend_all(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        """Queries [b, m, q, d] over all keys and values [b, m, k, d], or where `seen` [b, 1, 1, k]
        holds: as q. No dropout.
        """
        if self.soft_cap is None and not self.can_batch(q):
            return F.scaled_dot_product_attention(q, k, v, seen, scale=self.scale)
        # Of three dimensions: a product of more is several operations to torch.
        flat, k, v = (t.flatten(0, 1) for t in (q * self.scale, k, v))
        scores = self._capped(torch.bmm(flat, k.transpose(1, 2)))
        if seen is None:
            weights = scores.softmax(-1)
        else:
            weights = scaled_softmax(scores.unflatten(0, q.shape[:2]), mask=seen).flatten(0, 1)
        return torch.bmm(weights, v).view(q.shape)

    def partial(
        self, q: Tensor, k: Tensor, v: Tensor, q_at: Tensor, k_at: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Output [b, n, q, d] over these keys alone and the log-sum-exp of their scores [b, n, q].

        Both at least in float32; a query that sees none of the keys has zeros and -inf. Written
        out, so that it is one path on every device: torch's kernels that give a log-sum-exp differ
        by device and know neither caps nor dropout.
        """
        k, v = _per_query_head(k, q), _per_query_head(v, q)
        scores = self._block_scores(q, k, q_at, k_at)[0]
        lse = scores.logsumexp(-1)
        weights = self._dropped(torch.exp(scores - finite(lse).unsqueeze(-1)), q_at, k_at)
        return (weights.to(v.dtype) @ v).to(lse.dtype), lse

    def partial_grads(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_at: Tensor,
        k_at: Tensor,
        *,
        lse: Tensor,
        dy: Tensor,
        dot: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v through these keys, in the dtype of `lse`.

        Of all keys: `lse` [b, n, q], the output's gradient `dy` [b, n, q, d] in the dtype of v, and
        `dot` [b, n, q], the inner product of output and `dy`.
        """
        m, wide = k.shape[1], lse.dtype
        k, v = _per_query_head(k, q), _per_query_head(v, q)
        scores, slope = self._block_scores(q, k, q_at, k_at)
        weights = torch.exp(scores - finite(lse).unsqueeze(-1))
        dv = self._dropped(weights, q_at, k_at).to(dy.dtype).transpose(-1, -2) @ dy
        dweights = self._dropped((dy @ v.transpose(-1, -2)).to(wide), q_at, k_at)
        dscores = weights * (dweights - dot.unsqueeze(-1)) * slope * self.scale
        dscores = dscores.to(q.dtype)
        dq, dk = dscores @ k, dscores.transpose(-1, -2) @ q
        by_kv_head = [t.to(wide).unflatten(1, (m, -1)).sum(2) for t in (dk, dv)]
        return dq.to(wide), by_kv_head[0], by_kv_head[1]

    def _block_scores(
        self, q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor
    ) -> tuple[Tensor, Tensor | float]:
        """Masked scores [b, n, q, k] and the slope of their cap, which is 1 where there is none."""
        raw = (q @ k.transpose(-1, -2)).to(acc_dtype(q.dtype)) * self.scale
        scores = self._capped(raw)
        slope = 1.0 if self.soft_cap is None else 1.0 - (scores / self.soft_cap) ** 2
        return scores.masked_fill(~self._mask(q_at, k_at), -torch.inf), slope

    def _mask(self, q_at: Tensor, k_at: Tensor) -> Tensor:
        """Where a query may look at a key: [q, k], or [b, 1, q, k] where samples hold documents."""
        return attention_mask(q_at, k_at, self.window, self.starts)

    def _capped(self, scores: Tensor) -> Tensor:
        if self.soft_cap is None:
            return scores
        return self.soft_cap * torch.tanh(scores / self.soft_cap)

    def _dropped(self, weights: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        """Dropout on [b, n, q, k], each number named by its sample, head, query and key."""
        if self.p == 0:
            return weights
        heads = torch.arange(weights.shape[1], device=weights.device) + self.first_head
        hashed = rng.rows(
            self.key, self.samples[:, None, None, None], heads[:, None, None], q_at[:, None]
        )  # [b, n, q, 1]
        return weights.masked_fill(~keep_mask(hashed, k_at, self.p), 0.0) / (1 - self.p)


def finite(lse: Tensor) -> Tensor:
    """`lse` with 0 for -inf: what may be subtracted from scores that are all -inf."""
    return lse.masked_fill(lse.isinf(), 0.0)


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [b, m, k, d], each repeated for the queries [b, n, q, d] that share it."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
