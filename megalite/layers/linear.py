"""Column- and row-split linears: an autograd function each, Megatron's f and g inside.

With sequence parallelism (`call.seq_cut`) a column linear gathers its input along s and a row
linear reduce-scatters its output; without it they all-reduce. What is gathered to be multiplied
comes while this rank's own rows are. In backward the collective of the input gradient runs while
the weight gradient is computed, and that of the row linear before it, which has nothing of its own
to hide; or weight gradients are left in `call.later` for W. Shoeybi et al. 2019 (arXiv 1909.08053);
Korthikanti et al. 2022 (arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from megalite.core import comm, matmul, shard
from megalite.core.call import Call, run_jobs
from megalite.core.mesh import Axis
from megalite.core.params import (
    add_weight_grad,
    constant,
    gaussian,
    grad_of,
    landed,
    new_param,
)

# s sequence, b micro batch, i inputs, o outputs; s/tp means cut over the tp axis


_ALONE = Axis("alone")

Params = tuple[nn.Parameter, nn.Parameter | None]
"""Weight and bias."""


def _rows(x: Tensor) -> Tensor:
    return x.flatten(0, -2)


def _gathered_product(
    x: Tensor, weight: Tensor, seq_cut: Axis, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`x` [s/tp, b, i] gathered along s, and that times `weight` [o, i]: [s, b, i], [s, b, o].

    My own rows are multiplied while the others are on their way.
    """
    coming = comm.all_gather_start(x, seq_cut)
    product = x.new_empty((seq_cut.size * x.shape[0], *x.shape[1:-1], weight.shape[0]))
    start, stop = seq_cut.idx * x.shape[0], (seq_cut.idx + 1) * x.shape[0]

    matmul.linear_into(_rows(product[start:stop]), _rows(x), weight, bias)
    full = coming.wait()
    for others in (slice(0, start), slice(stop, full.shape[0])):
        if others.start < others.stop:
            matmul.linear_into(_rows(product[others]), _rows(full[others]), weight, bias)
    return full, product


def _weight_grad(weight: nn.Parameter, dy: Tensor, x: Tensor, jobs: list) -> None:
    if not weight.requires_grad:
        return
    # Detached: what is left for W would hold the graph that holds it, until a garbage collection.
    jobs.append(partial(add_weight_grad, weight, _rows(dy), _rows(x.detach())))


def _bias_grad(bias: nn.Parameter | None, dy: Tensor) -> None:
    if bias is not None and bias.requires_grad:
        grad = grad_of(bias)
        # Not rounded to bfloat16 before it is added to what is wider.
        grad.add_(_rows(dy).sum(0, dtype=grad.dtype))
        landed(bias)


_when_backward_ends = torch.autograd.Variable._execution_engine.queue_callback


def _tracked(x: Tensor) -> Tensor:
    """`x` such that backward reaches the function it is given to.

    Parameters go in a tuple, out of autograd's sight: their gradients are added by hand, once, and
    autograd would call their hooks a second time.
    """
    return x if x.requires_grad else x.detach().requires_grad_()


def _column(x: Tensor, params: Params, tp: Axis, call: Call) -> Tensor:
    weight, bias = params
    if call.seq_cut is None:
        return matmul.linear(x, weight, bias)  # [s, b, o/tp]
    return _gathered_product(x, weight, call.seq_cut, bias)[1]  # from [s/tp, b, i]


class _Column(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, params, tp, call):
        ctx.save_for_backward(x if params[0].requires_grad else None)
        ctx.params, ctx.tp, ctx.seq_cut = params, tp, call.seq_cut
        ctx.jobs, ctx.beside = call.weight_jobs, call.beside
        return _column(x, params, tp, call)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        weight, bias = ctx.params
        cut = ctx.seq_cut
        gathering = comm.all_gather_start(x, cut) if cut and weight.requires_grad else None
        dx = matmul.linear(dy, weight.t())
        summing = comm.reduce_scatter_start(dx, cut) if cut else comm.all_reduce_start(dx, ctx.tp)
        _bias_grad(bias, dy)
        _weight_grad(weight, dy, gathering.wait() if gathering else x, ctx.jobs)
        run_jobs(ctx.beside)
        return summing.wait(), None, None, None


def _row(x: Tensor, params: Params, tp: Axis, call: Call) -> Tensor:
    weight, bias = params
    if tp.size == 1:
        return matmul.linear(x, weight, bias)  # whole: the bias takes no pass of its own
    y = matmul.linear(x, weight)  # [s, b, o], partial over tp
    cut = call.seq_cut
    y = comm.reduce_scatter(y, cut) if cut else comm.all_reduce(y, tp)
    return y if bias is None else y.add_(bias)


class _Row(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, params, tp, call):
        ctx.save_for_backward(x if params[0].requires_grad else None)
        ctx.params, ctx.tp, ctx.seq_cut = params, tp, call.seq_cut
        ctx.jobs, ctx.beside = call.weight_jobs, call.beside
        return _row(x, params, tp, call)

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        weight, bias = ctx.params
        _bias_grad(bias, dy)
        dy = dy.contiguous()
        matrix = weight.t()
        if ctx.seq_cut:
            full, dx = _gathered_product(dy, matrix, ctx.seq_cut)
        else:
            full, dx = dy, matmul.linear(dy, matrix)
        _weight_grad(weight, full, x, ctx.jobs)
        if ctx.tp.size == 1:
            run_jobs(ctx.beside)
        else:  # where no column linear comes before it
            _when_backward_ends(partial(run_jobs, ctx.beside))
        return dx, None, None, None


def column_linear(
    x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, tp: Axis, call: Call
) -> Tensor:
    """[s or s/tp, b, i] times a column-cut weight: [s, b, o/tp]."""
    if not torch.is_grad_enabled():
        return _column(x, (weight, bias), tp, call)
    return _Column.apply(_tracked(x), (weight, bias), tp, call)


def row_linear(
    x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, tp: Axis, call: Call
) -> Tensor:
    """[s, b, i/tp] times a row-cut weight, summed over tp: [s or s/tp, b, o]."""
    if not torch.is_grad_enabled():
        return _row(x, (weight, bias), tp, call)
    return _Row.apply(_tracked(x), (weight, bias), tp, call)


def whole_linear(x: Tensor, weight: nn.Parameter, call: Call) -> Tensor:
    """[..., i] times a weight that every rank holds whole: [..., o], of the rows that are here."""
    return column_linear(x, weight, None, _ALONE, replace(call, seq_cut=None))


class ColumnLinear(nn.Module):
    """A linear whose outputs are cut over tp. `blocks` are its fused parts (q, k, v; gate, up).

    With `lora`, rank and scale, it has an adapter: see Adapter, which `row_sum` is for.
    """

    def __init__(
        self,
        d_in: int,
        blocks: tuple[shard.Block, ...],
        tp: Axis,
        *,
        bias: bool,
        init: Callable[[int, Tensor], Tensor],
        lora: tuple[int, float] | None = None,
        row_sum: tuple[str, ...] = (),
    ):
        super().__init__()
        self.tp = tp
        d_out = sum(b.size for b in blocks)
        cut = shard.Shard((d_out, d_in), blocks)
        self.weight = new_param(cut, tp.named, init=init)
        self.bias = (
            new_param(shard.without_dim(cut, 1), tp.named, init=constant(0.0)) if bias else None
        )
        self.lora = None
        if lora is not None:
            down = shard.whole(lora[0], d_in, grad_sum=row_sum)
            self.lora = Adapter(down, shard.Shard((d_out, lora[0]), blocks), tp, scale=lora[1])

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """[s or s/tp, b, d_in] -> [s, b, d_out/tp]."""
        y = column_linear(x, self.weight, self.bias, self.tp, call)
        if self.lora is None:
            return y
        thin = whole_linear(x, self.lora.down, call) * self.lora.scale  # [s or s/tp, b, r]
        return y + column_linear(thin, self.lora.up, None, self.tp, call)


class RowLinear(nn.Module):
    """A linear whose inputs are cut over tp.

    `row_sum` names the axes over which the gradient of its bias stays partial. `lora` is that of
    ColumnLinear.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        tp: Axis,
        *,
        bias: bool,
        row_sum: tuple[str, ...] = (),
        init: Callable[[int, Tensor], Tensor],
        lora: tuple[int, float] | None = None,
    ):
        super().__init__()
        self.tp = tp
        self.weight = new_param(shard.row(d_out, d_in), tp.named, init=init)
        whole = shard.whole(d_out, grad_sum=row_sum)
        self.bias = new_param(whole, tp.named, init=constant(0.0)) if bias else None
        self.lora = None
        if lora is not None:
            up = shard.whole(d_out, lora[0], grad_sum=row_sum)
            self.lora = Adapter(shard.row(lora[0], d_in), up, tp, scale=lora[1])

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """[s, b, d_in/tp] -> [s or s/tp, b, d_out]."""
        y = row_linear(x, self.weight, self.bias, self.tp, call)
        if self.lora is None:
            return y
        thin = row_linear(x, self.lora.down, None, self.tp, call) * self.lora.scale
        return y + whole_linear(thin, self.lora.up, call)  # from [s or s/tp, b, r]


class Adapter(nn.Module):
    """Two thin matrices beside a weight [o, i], which then stays as it is: `down` [r, i] and `up`
    [o, r], at first zero.

    One of them is cut as the weight is; the other, whole on every tp rank, acts on rows of the
    residual stream, so that where these are cut its gradient is partial. Hu et al. 2021 (arXiv
    2106.09685).
    """

    def __init__(self, down: shard.Shard, up: shard.Shard, tp: Axis, *, scale: float):
        super().__init__()
        self.scale = scale
        spread = down.shape[1] ** -0.5
        self.down = new_param(down, tp.named, init=gaussian(spread))
        self.up = new_param(up, tp.named, init=constant(0.0))


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an Adapter."""
    return ".lora." in name
