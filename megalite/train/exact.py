"""Float64 arithmetic in which no sum depends on its order: what `verify --fixed-order` trains in.

Each term of a sum (each product, in a matmul) is first rounded to a multiple of one fixed number,
2^-GRID. Multiples of it whose magnitudes add up to less than 2^53 of them are added by float64
without any rounding, so all orders give the same bits: cut over ranks or not, over microbatches,
threads, or through gloo. Neither layers nor collectives know of it. A layout that computes the
same terms as one process has the same gradients and weights to the last bit, and whatever bit
differs is no rounding.

`exact_sums` intercepts the ATen ops below torch.nn and autograd, backward too. An op is
- a sum, and its exact form is in SUMS;
- a function of single numbers (torch tags those `pointwise`): these are computed in one form,
  contiguous and in whole vectors, as torch's vector code and its scalar code for odd ends differ in
  the last bit;
- one that only moves or picks numbers: a view, MOVES, or an op without floating-point input;
- or else it is made of such ops, in COMPOSED or by torch itself. One that is none of these is
  refused.
A sum left inexact would show as bits that differ. What cannot show is a term that is
wrong by less than the grid.

Bits differ rightly where a layout rounds what is no sum of the same terms: as_ranks.py.

Demmel and Nguyen 2013 (Fast Reproducible Floating-Point Summation) round to a grid too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.core.errors import RunError

# p pairs (batch) of matrices, m rows, k inner, n columns

GRID = 44
"""Terms are multiples of 2^-44: an error of 3e-14 each, and sums below 512."""
SCALAR_GRID = 36
"""Of a sum to one number: the loss of all tokens goes to 10^5."""
AT_ONCE = 1 << 16
"""Products of a matmul in memory at a time."""
VECTOR = 64
"""Elements: a multiple of all vector lengths, unrolled."""

aten = torch.ops.aten


@contextmanager
def exact_sums() -> Iterator[None]:
    """All float64 sums of the body are exact, those of its backward passes too.

    Raises RunError at an op that is not known, and at a sum too large to be exact.
    """
    with _ExactSums():
        yield


class _ExactSums(TorchDispatchMode):
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here, and the wrapper would import the compiler in every rank.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # A collective adds what are multiples already. One sum too many would show in the bits.
        moves = func.is_view or func.overloadpacket in MOVES or func.namespace == "c10d"
        if moves or not any(x.is_floating_point() for x in _tensors(args, kwargs)):
            return func(*args, **kwargs)
        if func in SUMS:
            return SUMS[func](*args, **kwargs)
        if torch.Tag.pointwise in func.tags or func.overloadpacket in POINTWISE:
            return _pointwise(func, args, kwargs)
        with self:
            if func in COMPOSED:
                return COMPOSED[func](*args, **kwargs)
            result = func.decompose(*args, **kwargs)
        if result is NotImplemented:
            raise RunError(
                f"--fixed-order does not know the op {func} (train/exact.py has a table)"
            )
        return result


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    for arg in (*args, *kwargs.values()):
        for x in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(x, Tensor):
                yield x


# -- sums --------------------------------------------------------------------------------------


def on_grid(x: Tensor, grid: int = GRID) -> Tensor:
    """`x` rounded to multiples of 2^-grid; float64."""
    assert x.dtype == torch.float64, x.dtype
    # One unit in the last place of a number between 2^(52 - grid) and twice that is 2^-grid.
    shift = 1.5 * 2.0 ** (52 - grid)
    return (x + shift).sub_(shift)


def _check(magnitude: Tensor, grid: int = GRID) -> None:
    """Refuse sums whose terms' magnitudes add up to this: some order of them might round."""
    most = magnitude.max().item() if magnitude.numel() else 0.0
    if most >= 2.0 ** (53 - grid):
        raise RunError(
            f"--fixed-order: a sum of magnitude {most:.3g} is not exact on a grid of 2^-{grid} "
            f"(below {2 ** (53 - grid)} it is; use a smaller model, batch or --init-std)"
        )


def _sum(
    x: Tensor,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
    grid: int = GRID,
) -> Tensor:
    x = on_grid(x if dtype is None else x.to(dtype), grid)
    _check(x.abs().sum(dim, keepdim), grid)
    return x.sum(dim, keepdim)


def _sum_all(x: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return _sum(x, dtype=dtype, grid=SCALAR_GRID)


def _dot(x: Tensor, y: Tensor) -> Tensor:
    return _sum(x * y)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """[p, m, k] times [p, k, n], or both without p."""
    result = (a.abs() @ b.abs()).contiguous()
    _check(result)
    result.zero_()
    columns, rows = a.movedim(-1, 0), b.movedim(-2, 0)  # [k, p, m], [k, p, n]
    step = max(1, AT_ONCE // max(1, result.numel()))
    for at in range(0, columns.shape[0], step):
        some = slice(at, at + step)
        result += on_grid(columns[some].unsqueeze(-1) * rows[some].unsqueeze(-2)).sum(0)
    return result


def _matvec(a: Tensor, x: Tensor) -> Tensor:
    return _matmul(a, x.unsqueeze(1)).squeeze(1)


def _add_matmul(
    x: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Any = None
) -> Tensor:
    product = _matmul(a, b)
    total = (x if beta == 1 else beta * x) + (product if alpha == 1 else alpha * product)
    return total if out is None else out.copy_(total)


def _add_matmul_(x: Tensor, a: Tensor, b: Tensor, **factors: float) -> Tensor:
    return x.copy_(_add_matmul(x, a, b, **factors))


def _into(func: Any, terms: int) -> Callable[..., Tensor]:
    """Of an op that adds its argument number `terms` into its first: the same, exactly."""

    def exact(*args: Any, **kwargs: Any) -> Tensor:
        args = tuple(on_grid(arg) if i == terms else arg for i, arg in enumerate(args))
        sizes = [arg.abs() if i in (0, terms) else arg for i, arg in enumerate(args)]
        _check(func(*sizes, **kwargs))
        return func(*args, **kwargs)

    return exact


def _index_put(func: Any) -> Callable[..., Tensor]:
    adding = _into(func, 2)

    def exact(x: Tensor, index: Any, values: Tensor, accumulate: bool = False) -> Tensor:
        return (adding if accumulate else func)(x, index, values, accumulate)

    return exact


SUMS: dict[Any, Callable[..., Any]] = {
    aten.sum.default: _sum_all,
    aten.sum.dim_IntList: _sum,
    # With `out` it is a collective's (core/comm.py), of what the ranks have: the sums of terms, or
    # a number that is zero on all ranks but one, which like gloo's must not be rounded.
    aten.sum.IntList_out: aten.sum.IntList_out,
    aten.cumsum.default: lambda x, dim, dtype=None: _sum_along(x, dim),
    aten.dot.default: _dot,
    aten.mm.default: _matmul,
    aten.mm.out: lambda a, b, *, out: out.copy_(_matmul(a, b)),
    aten.bmm.default: _matmul,
    aten.mv.default: _matvec,
    aten.addmm.default: _add_matmul,
    aten.addmm.out: _add_matmul,
    aten.addmm_.default: _add_matmul_,
    aten.baddbmm.default: _add_matmul,
    aten.baddbmm_.default: _add_matmul_,
    aten.index_add.default: _into(aten.index_add.default, 3),
    aten.index_add_.default: _into(aten.index_add_.default, 3),
    aten.scatter_add.default: _into(aten.scatter_add.default, 3),
    aten.scatter_add_.default: _into(aten.scatter_add_.default, 3),
    aten.index_put.default: _index_put(aten.index_put.default),
    aten.index_put_.default: _index_put(aten.index_put_.default),
    aten._unsafe_index_put.default: _index_put(aten._unsafe_index_put.default),
}


def _sum_along(x: Tensor, dim: int) -> Tensor:
    x = on_grid(x)
    _check(x.abs().sum(dim))
    return x.cumsum(dim)


# -- ops made of sums and functions of single numbers ------------------------------------------


def _mean(x: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    total = x.sum(dim, keepdim, dtype=dtype)
    return total / (x.numel() // max(1, total.numel()))


def _norm(
    x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    if ord != 2:
        raise RunError(f"--fixed-order knows the 2-norm only (got {ord})")
    x = x if dtype is None else x.to(dtype)
    return (x * x).sum(list(range(x.dim())) if dim is None else dim, keepdim).sqrt()


def _log_sum_exp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    top = x.amax(dim, keepdim=True)
    top = top.masked_fill(top.isinf(), 0.0)
    total = (x - top).exp().sum(dim, True).log() + top
    return total if keepdim else total.squeeze(dim)


def _softmax(x: Tensor, dim: int, half_to_float: bool) -> Tensor:
    weights = (x - x.amax(dim, keepdim=True)).exp()
    return weights / weights.sum(dim, True)


def _safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    top = x.amax(dim, keepdim=True)
    weights = (x - top.masked_fill(top.isinf(), 0.0)).exp()
    total = weights.sum(dim, True)
    return weights / total.masked_fill(total == 0, 1.0)


def _softmax_backward(dy: Tensor, y: Tensor, dim: int, input_dtype: torch.dtype) -> Tensor:
    return y * (dy - (y * dy).sum(dim, True))


def _attention_weights(
    q: Tensor, k: Tensor, p: float, is_causal: bool, mask: Tensor | None
) -> Tensor:
    if p:
        raise RunError("--fixed-order knows attention of torch without dropout only")
    scores = q @ k.transpose(-1, -2)
    if is_causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(ahead, -torch.inf)
    return torch._safe_softmax(scores if mask is None else scores + mask, -1)


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: float = 0.0,
    is_causal: bool = False,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    weights = _attention_weights(q, _per_query_head(k, q), p, is_causal, attn_mask)
    return weights @ _per_query_head(v, q), q.new_zeros(q.shape[:-1])


def _attention_backward(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    p: float,
    is_causal: bool,
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weights are computed again; `lse` is not looked at.

    The queries carry the scale: the gradient of a key may be a sum over ranks, which multiplied in
    parts would round otherwise than multiplied whole.
    """
    heads, scale = k.shape[1], q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = q * scale, _per_query_head(k, q), _per_query_head(v, q)
    weights = _attention_weights(q, k, p, is_causal, attn_mask)
    dweights = dy @ v.transpose(-1, -2)
    dscores = weights * (dweights - (weights * dweights).sum(-1, True))
    dk, dv = dscores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ dy
    dk, dv = (x.unflatten(1, (heads, -1)).sum(2) for x in (dk, dv))
    return (dscores @ k) * scale, dk, dv


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dims = list(range(x.dim() - len(shape), x.dim()))
    mean = x.mean(dims, keepdim=True)
    rstd = (((x - mean) ** 2).mean(dims, keepdim=True) + eps).rsqrt()
    y = (x - mean) * rstd
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, mean, rstd


def _layer_norm_backward(
    dy: Tensor,
    x: Tensor,
    shape: list[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    rows, dims = list(range(x.dim() - len(shape))), list(range(x.dim() - len(shape), x.dim()))
    unit = (x - mean) * rstd
    inner = dy if weight is None else dy * weight
    dx = inner - inner.mean(dims, keepdim=True) - unit * (inner * unit).mean(dims, keepdim=True)
    grads = (dx * rstd, (dy * unit).sum(rows), dy.sum(rows))
    return tuple(grad if want else None for grad, want in zip(grads, wanted, strict=True))


def _embedding_backward(
    dy: Tensor, ids: Tensor, rows: int, padding_idx: int, scale_grad_by_freq: bool
) -> Tensor:
    if padding_idx >= 0 or scale_grad_by_freq:
        raise RunError("--fixed-order knows plain embeddings only")
    table = dy.new_zeros(rows, dy.shape[-1])
    return table.index_add_(0, ids.flatten(), dy.reshape(-1, dy.shape[-1]))


COMPOSED: dict[Any, Callable[..., Any]] = {
    aten.mean.default: _mean,
    aten.mean.dim: _mean,
    aten.linalg_vector_norm.default: _norm,
    aten.logsumexp.default: _log_sum_exp,
    aten._softmax.default: _softmax,
    aten._safe_softmax.default: _safe_softmax,
    aten._softmax_backward_data.default: _softmax_backward,
    aten._scaled_dot_product_flash_attention_for_cpu.default: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _attention_backward,
    aten.native_layer_norm.default: _layer_norm,
    aten.native_layer_norm_backward.default: _layer_norm_backward,
    aten.embedding_dense_backward.default: _embedding_backward,
}


# -- functions of single numbers ---------------------------------------------------------------

POINTWISE = {aten._foreach_add_, aten._fused_adamw_, aten.softplus_backward}
"""Such functions that torch does not tag."""
ROUNDED_ONCE = {aten.add, aten.add_, aten.sub, aten.sub_, aten.mul, aten.mul_, aten.div, aten.div_}
"""Those that IEEE 754 defines to the last bit (without `alpha`, which may be a fused product)."""


def _pointwise(func: Any, args: Any, kwargs: Any) -> Any:
    """`func` of contiguous tensors that fill whole vectors."""
    given = [x for x in _tensors(args, kwargs) if x.dim()]
    if not given or (func.overloadpacket in ROUNDED_ONCE and "alpha" not in kwargs):
        return func(*args, **kwargs)
    shape = np.broadcast_shapes(*{tuple(x.shape) for x in given})
    n = prod(shape)
    if n % VECTOR == 0 and all(x.shape == shape and x.is_contiguous() for x in given):
        return func(*args, **kwargs)
    padded = {}
    for x in given:
        padded[id(x)] = whole = x.new_ones(-(-n // VECTOR) * VECTOR)
        whole[:n].view(shape).copy_(x)

    def inside(arg: Any) -> Any:
        if isinstance(arg, (list, tuple)):
            return [inside(x) for x in arg]
        return padded.get(id(arg), arg)

    result = func(*map(inside, args), **{name: inside(arg) for name, arg in kwargs.items()})
    written = list(_written(func, args, kwargs))
    for x in written:
        if x.dim():
            x.copy_(padded[id(x)][:n].view(shape))
    if written:
        return written[0] if isinstance(result, Tensor) else result
    return result[:n].view(shape)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that an op overwrites."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            yield from _tensors((given,), {})


# -- what moves numbers ------------------------------------------------------------------------

_MOVING = """
alias all amax amin any argmax argmin _to_copy cat clone constant_pad_nd copy copy_ embedding
empty_like equal fill fill_ flip full_like gather index index_fill index_fill_ index_select isinf
isnan lift_fresh _local_scalar_dense masked_fill masked_fill_ masked_select max maximum min minimum
new_empty new_empty_strided new_full new_ones new_zeros ones_like repeat resize_ roll
select_backward set_ slice_backward sort split_with_sizes_copy stack topk tril triu _unsafe_view
zero_ zeros_like
"""
MOVES = {getattr(aten, name) for name in _MOVING.split()}
"""Ops that are no views and give numbers that they were given, or zeros and ones."""
