"""Causal self-attention with grouped queries, heads cut over tp.

Fewer kv heads than tp ranks are replicated. Next: context.py, which brings together the queries and
keys of a sequence cut over cp, and core_attention.py, which attends. A fork's own attention is a
class with this constructor and forward; over cp it has to mind `call.context`, with
--reset-attention-mask `call.starts`, and to generate by a cache `call.cache`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import sqrt

from torch import Tensor, nn

from megalite.core import rng
from megalite.core.call import Call
from megalite.core.check_values import unknown
from megalite.core.config import ModelConfig
from megalite.core.errors import UserError
from megalite.core.mesh import Mesh
from megalite.core.params import gaussian
from megalite.core.shard import Block
from megalite.layers.context import attend
from megalite.layers.core_attention import CoreAttention
from megalite.layers.linear import ColumnLinear, RowLinear
from megalite.layers.norm import Norm
from megalite.layers.rope import Rope
from megalite.schedule.custom import load_callable

# s sequence on this context rank, b micro batch, h hidden, n query heads and m kv heads on this
# rank, d head_dim


class Attention(nn.Module):
    """[s or s/tp, b, h] -> the same."""

    keeps_documents_apart = True
    """It minds `call.starts`. All layouts of one that does not agree with each other, so that no
    comparison would tell: a class has to say it."""
    keeps_keys = True
    """It minds `call.cache`. With a class that does not, generation runs the whole text again for
    every token."""

    def __init__(
        self, cfg: ModelConfig, mesh: Mesh, *, layer: int, seed: int, row_sum: tuple[str, ...]
    ):
        super().__init__()
        tp = mesh.axis("tp")
        q_size, kv_size = cfg.num_heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        # With fewer kv heads than ranks, tp.rep ranks share a head; each sees some of its queries.
        shared = cfg.kv_heads < tp.size
        kv = Block(kv_size, ("tp.kv" if shared else "tp", None), ("tp.rep",) if shared else ())
        blocks = (Block(q_size, ("tp", None)), kv, kv)
        self.qkv = ColumnLinear(
            cfg.hidden_size,
            blocks,
            tp,
            bias=cfg.bias,
            init=gaussian(cfg.init_std),
            lora=cfg.lora("qkv"),
            row_sum=row_sum,
        )
        out = gaussian(cfg.init_std / sqrt(2 * cfg.num_layers))
        self.out = RowLinear(
            q_size,
            cfg.hidden_size,
            tp,
            bias=cfg.bias,
            row_sum=row_sum,
            init=out,
            lora=cfg.lora("out"),
        )
        self.num_heads, self.head_dim = cfg.num_heads // tp.size, cfg.head_dim
        self.kv_heads = max(1, cfg.kv_heads // tp.size)
        self.first_head = tp.idx * self.num_heads
        self.rope = Rope(cfg) if cfg.position == "rope" else None
        # Each tp rank normalises its own heads only, whatever the sequence cut.
        self.q_norm = Norm(cfg.head_dim, cfg, tp, row_sum=("tp",)) if cfg.qk_norm else None
        self.k_norm = Norm(cfg.head_dim, cfg, tp, row_sum=("tp",)) if cfg.qk_norm else None
        self.window, self.soft_cap = cfg.sliding_window, cfg.attention_soft_cap
        self.p, self.scale = cfg.attention_dropout, cfg.attention_scale
        self.key, self.layer = rng.key(seed, "attention dropout", layer), layer

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """Project, attend over the whole sequence, of which s rows are here, project back."""
        fused = self.qkv(x, call)  # [s, b, (n + 2m) d]
        y = call.part("core-attention", partial(self._attend, call), fused)  # [s, b, n d]
        return self.out(y, call)

    def _attend(self, call: Call, fused: Tensor) -> Tensor:
        return attend(self.core(call), *self.heads(call, fused), call).flatten(2)

    def heads(self, call: Call, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [s, b, n, d], keys and values [s, b, m, d] of their projection, normalised and
        turned to their places.
        """
        n, m, d = self.num_heads, self.kv_heads, self.head_dim
        q, k, v = fused.unflatten(-1, (n + 2 * m, d)).split((n, m, m), dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope is not None:
            q, k = self.rope(q, call), self.rope(k, call)
        return q, k, v

    def core(self, call: Call) -> CoreAttention:
        """How the heads here turn the scores of a call into weights."""
        return CoreAttention(
            window=self.window,
            soft_cap=self.soft_cap,
            scale=self.scale,
            p=self.p if call.training else 0.0,
            key=self.key,
            samples=call.samples,
            first_head=self.first_head,
            layer=self.layer,
            starts=call.starts,
        )


ATTENTION: dict[str, Callable[..., nn.Module]] = {"softmax": Attention}


def load_attention(spec: str) -> Callable[..., nn.Module]:
    """The class that `spec` names: one of ATTENTION, or a user's own as FILE.py:NAME.

    Runs the file. Raises UserError, in one line, if there is nothing to call.
    """
    if not spec.rpartition(":")[0].endswith(".py"):
        if spec not in ATTENTION:
            raise UserError(unknown("--attention", spec, [*ATTENTION, "FILE.py:NAME"]))
        return ATTENTION[spec]
    try:
        return load_callable(spec)[1]
    except ValueError as error:
        raise UserError(f"--attention {error}") from None
