"""The token table, cut over the vocabulary, as lookup and as tied head; and learned positions."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.core import comm, shard
from megalite.core.call import Call
from megalite.core.config import ModelConfig
from megalite.core.mesh import Axis
from megalite.core.params import gaussian, grad_of, landed, new_param

# s sequence, b micro batch, h hidden, v vocabulary


def _local_rows(ids: Tensor, table: Tensor, tp: Axis) -> tuple[Tensor, Tensor]:
    """Row of each id on this rank, and where the id is another rank's (its row is then 0)."""
    local = ids - tp.idx * table.shape[0]
    elsewhere = (local < 0) | (local >= table.shape[0])
    return local.masked_fill_(elsewhere, 0), elsewhere


def _table_grad(table: nn.Parameter, local: Tensor, elsewhere: Tensor, dy: Tensor) -> None:
    if not table.requires_grad:
        return
    dy = dy.masked_fill(elsewhere.unsqueeze(-1), 0.0)
    grad = grad_of(table)
    grad.index_add_(0, local.flatten(), dy.flatten(0, 1).to(grad.dtype))
    landed(table)


def _lookup(local: Tensor, elsewhere: Tensor, table: Tensor, tp: Axis, call: Call) -> Tensor:
    x = F.embedding(local, table)
    x.masked_fill_(elsewhere.unsqueeze(-1), 0.0)  # [s, b, h], partial over tp
    return comm.reduce_scatter(x, call.seq_cut) if call.seq_cut else comm.all_reduce(x, tp)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx, local, elsewhere, anchor, params, tp, call):
        (table,) = params
        ctx.local, ctx.elsewhere, ctx.table = local, elsewhere, table
        ctx.seq_cut, ctx.later = call.seq_cut, call.later
        return _lookup(local, elsewhere, table, tp, call)

    @staticmethod
    def backward(ctx, dy):
        dy = comm.all_gather(dy, ctx.seq_cut) if ctx.seq_cut else dy  # [s/tp, b, h] -> [s, b, h]
        job = partial(_table_grad, ctx.table, ctx.local, ctx.elsewhere, dy)
        if ctx.later is None:
            job()
        else:
            ctx.later.append(job)
        return None, None, None, None, None, None


class Embedding(nn.Module):
    """The token table [v, h], rows cut over tp.

    `tied` names the two stages that hold it; `uses` counts its gradients in one backward.
    """

    def __init__(self, cfg: ModelConfig, tp: Axis, *, uses: int, tied: tuple[int, int] | None):
        super().__init__()
        self.tp = tp
        cut = shard.vocabulary(cfg.vocab_size, cfg.hidden_size, tied=tied)
        self.weight = new_param(cut, tp.named, init=gaussian(cfg.init_std), uses=uses)

    def forward(self, call: Call) -> Tensor:
        """The rows of `call.tokens` [s, b]: [s or s/tp, b, h]."""
        rows = _local_rows(call.tokens, self.weight, self.tp)
        if not torch.is_grad_enabled():
            return _lookup(*rows, self.weight, self.tp, call)
        # The table's gradient is added by hand; the anchor makes autograd run backward at all.
        anchor = self.weight.new_zeros((), requires_grad=True)
        return _Lookup.apply(*rows, anchor, (self.weight,), self.tp, call)


class Positions(nn.Module):
    """Learned absolute positions [seq_len, h]."""

    def __init__(self, cfg: ModelConfig, tp: Axis, *, row_sum: tuple[str, ...]):
        super().__init__()
        cut = shard.whole(cfg.seq_len, cfg.hidden_size, grad_sum=row_sum)
        self.weight = new_param(cut, tp.named, init=gaussian(cfg.init_std))

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """`x` [s or s/tp, b, h] plus the table's row of each place."""
        return x + F.embedding(call.row_places, self.weight)
