"""The only door to collectives. Whatever wants to know about communication attaches here, once.

Every function takes the Axis it runs over and must be called by all ranks of that axis, in one
order. On an axis of one rank it is the identity; on a fake axis it is logged and answered with
empty tensors. `*_start` forms return a Pending whose `wait()` gives the result. The last five
functions are autograd pairs: what a layer of one's own is made of, where ours overlap their
collectives by hand (layers/linear.py). What it is not: point-to-point transfers between pipeline
stages (parallel/p2p.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megalite.core.errors import PeerFailed
from megalite.core.log import Collective
from megalite.core.mesh import Axis

# n ranks of the axis, m rows of one rank; dim is the dimension that is cut or gathered

_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
# torch 2.13 renames these two; 2.11 and 2.12 only know the old names.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Pending:
    """A collective under way. `wait()` gives its result when it has ended; again is free."""

    def __init__(
        self, works: Sequence[dist.Work], entry: Collective | None, finish: Callable[[], Tensor]
    ):
        self._works, self._entry, self._finish = works, entry, finish
        self._result: Tensor | None = None
        if entry is not None and entry.at_once:
            self.wait()

    def wait(self) -> Tensor:
        if self._result is None:
            for work in self._works:
                wait_for(work)
            if self._entry is not None:
                self._entry.end()
            self._result = self._finish()
            self._works = ()
        return self._result


class Work(Protocol):
    """A transfer under way: torch's, or one of ours."""

    def wait(self) -> object: ...

    def is_completed(self) -> bool: ...


def wait_for(work: Work) -> None:
    """Wait for a transfer; raises PeerFailed where the other side has gone, or does not come."""
    try:
        work.wait()
    except RuntimeError as e:
        raise PeerFailed(f"lost another rank: {e}") from e


def _done(x: Tensor) -> Pending:
    return Pending((), None, lambda: x)


def _log(op: str, wire: str, axis: Axis, whole: Tensor) -> Collective:
    nbytes = whole.numel() * whole.element_size()
    entry = axis.log.issue(op, wire, axis.name, axis.size, nbytes)
    if axis.is_fake:
        entry.end()
    return entry


def _is_gloo(axis: Axis) -> bool:
    """Also where it goes through the host (host_group.py)."""
    return axis.group is not None and dist.get_backend(axis.group) != "nccl"


def stays_on_device(axis: Axis) -> bool:
    """Whether no collective over the axis passes through the host."""
    return axis.size == 1 or not _is_gloo(axis)


def all_reduce_start(
    x: Tensor, axis: Axis, op: str = "sum", *, dtype: torch.dtype | None = None
) -> Pending:
    """Begin to sum (or `max`, `min`) `x` over the axis, in place; `x` must be contiguous.

    `dtype`: what is sent, and here added up, in place of x's own.
    """
    if axis.size == 1:
        return _done(x)
    sent = x.to(dtype or x.dtype)
    entry = _log("all_reduce", "all_reduce", axis, sent)
    if axis.is_fake:
        return _done(x)
    work = dist.all_reduce(sent, _OPS[op], group=axis.group, async_op=True)
    return Pending([work], entry, lambda: x if sent is x else x.copy_(sent))


def all_reduce(x: Tensor, axis: Axis, op: str = "sum") -> Tensor:
    """Sum (or `max`, `min`) `x` over the axis, in place, and return it."""
    return all_reduce_start(x, axis, op).wait()


def all_gather_start(x: Tensor, axis: Axis, *, out: Tensor | None = None) -> Pending:
    """Begin to concatenate every rank's `x` along dim 0: [m, ...] -> [n m, ...].

    `out` may be given; `x` may be this rank's part of it (an in-place gather).
    """
    if axis.size == 1:
        return _done(x if out is None or out.data_ptr() == x.data_ptr() else out.copy_(x))
    x = x.contiguous()
    whole = x.new_empty((axis.size * x.shape[0], *x.shape[1:])) if out is None else out
    entry = _log("all_gather", "all_gather", axis, whole)
    if axis.is_fake:
        return _done(whole)
    work = _all_gather_single(whole, x, group=axis.group, async_op=True)
    return Pending([work], entry, lambda: whole)


def all_gather(x: Tensor, axis: Axis, dim: int = 0) -> Tensor:
    """Concatenate every rank's `x` along `dim`."""
    if dim == 0:
        return all_gather_start(x, axis).wait()
    moved = all_gather_start(x.movedim(dim, 0), axis).wait()
    return moved.movedim(0, dim)


def needs_scratch(axis: Axis) -> bool:
    """Whether a reduce-scatter over the axis holds a second tensor as large until it ends."""
    return not stays_on_device(axis)


def reduce_scatter_start(
    x: Tensor, axis: Axis, *, out: Tensor | None = None, dtype: torch.dtype | None = None
) -> Pending:
    """Begin to sum `x` over the axis and keep my part along dim 0: [n m, ...] -> [m, ...].

    `x` must not be used by the caller until `wait()` returns. `out` may be given; it may be my part
    of `x`. `dtype`: what is sent in place of x's own; gloo's parts are then added up in x's, NCCL
    adds in what it sends.
    """
    if axis.size == 1:
        return _done(x)
    assert x.shape[0] % axis.size == 0, (tuple(x.shape), axis.name, axis.size)
    x = x.contiguous()
    mine = x.shape[0] // axis.size
    # gloo's reduce-scatter costs up to twice its all-reduce; an all-to-all moves half the bytes of
    # that all-reduce and leaves a sum in rank order.
    wire = "all_to_all" if _is_gloo(axis) else "reduce_scatter"
    sent = x.to(dtype or x.dtype)
    entry = _log("reduce_scatter", wire, axis, sent)
    result = x.new_empty((mine, *x.shape[1:])) if out is None else out
    if axis.is_fake:
        return _done(result)
    if wire == "all_to_all":
        parts = torch.empty_like(sent)
        work = dist.all_to_all_single(parts, sent, group=axis.group, async_op=True)

        def add_up() -> Tensor:
            each = parts.unflatten(0, (axis.size, mine))
            return torch.sum(each, 0, dtype=result.dtype, out=result)

        return Pending([work], entry, add_up)
    came = result if sent is x else torch.empty_like(result, dtype=sent.dtype)
    work = _reduce_scatter_single(came, sent, group=axis.group, async_op=True)
    return Pending([work], entry, lambda: result if came is result else result.copy_(came))


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """Sum `x` over the axis and keep my part along dim 0."""
    return reduce_scatter_start(x, axis).wait()


def broadcast(x: Tensor, axis: Axis, src: int = 0) -> Tensor:
    """Overwrite `x` with that of place `src` on the axis, and return it."""
    if axis.size > 1:
        entry = _log("broadcast", "broadcast", axis, x)
        if not axis.is_fake:
            work = dist.broadcast(x, axis.ranks[src], group=axis.group, async_op=True)
            Pending([work], entry, lambda: x).wait()
    return x


def shift_start(x: Tensor, axis: Axis) -> Pending:
    """Begin to send `x` to the next rank, from the last to the first, and to receive likewise.

    `x` has one shape on all ranks and must not be written to until `wait()` returns.
    """
    if axis.size == 1:
        return _done(x)
    x = x.contiguous()
    entry = _log("shift", "send_recv", axis, x)
    result = torch.empty_like(x)
    if axis.is_fake:
        return _done(result)
    ahead, behind = (axis.ranks[(axis.idx + step) % axis.size] for step in (1, -1))
    # One batch: NCCL would wait for ever in a ring of sends that each come before their receive.
    both = [
        dist.P2POp(dist.isend, x, ahead, axis.group),
        dist.P2POp(dist.irecv, result, behind, axis.group),
    ]
    return Pending(dist.batch_isend_irecv(both), entry, lambda: result)


def _exchange(x: Tensor, axis: Axis) -> Tensor:
    if axis.size == 1:
        return x.view_as(x)
    assert x.shape[0] % axis.size == 0, (tuple(x.shape), axis.name, axis.size)
    x = x.contiguous()
    entry = _log("all_to_all", "all_to_all", axis, x)
    result = torch.empty_like(x)
    if axis.is_fake:
        return result
    work = dist.all_to_all_single(result, x, group=axis.group, async_op=True)
    return Pending([work], entry, lambda: result).wait()


def any_true(flag: bool, axis: Axis) -> bool:
    """Whether `flag` holds on any rank of the axis; also a barrier."""
    device = "cuda" if axis.group is not None and not _is_gloo(axis) else "cpu"
    return bool(all_reduce(torch.tensor([float(flag)], device=device), axis, op="max").item())


def barrier(axis: Axis) -> None:
    """Wait for every rank of the axis."""
    any_true(False, axis)


class _Replicate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad.clone(memory_format=torch.contiguous_format), ctx.axis), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        return all_reduce(x.clone(memory_format=torch.contiguous_format), axis)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return all_gather(x, axis) if axis.size > 1 else x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return reduce_scatter(grad, ctx.axis), None


class _ScatterSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return reduce_scatter(x, axis) if axis.size > 1 else x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return all_gather(grad, ctx.axis), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, axis):
        ctx.axis = axis
        return _exchange(x, axis)

    @staticmethod
    def backward(ctx, grad):
        return _exchange(grad, ctx.axis), None


def replicate(x: Tensor, axis: Axis) -> Tensor:
    """`x` as it is; backward sums the gradients over the axis (Megatron's f)."""
    return _Replicate.apply(x, axis)


def reduce(x: Tensor, axis: Axis) -> Tensor:
    """The sum of `x` over the axis; backward passes the gradient on (Megatron's g)."""
    return _Reduce.apply(x, axis)


def gather(x: Tensor, axis: Axis) -> Tensor:
    """[m, ...] -> [n m, ...] along dim 0; backward sums and scatters."""
    return _Gather.apply(x, axis)


def scatter_sum(x: Tensor, axis: Axis) -> Tensor:
    """The sum of `x` over the axis, my part along dim 0; backward gathers."""
    return _ScatterSum.apply(x, axis)


def all_to_all(x: Tensor, axis: Axis) -> Tensor:
    """[n m, ...]: part i of dim 0 goes to rank i, and part i comes from it; backward likewise."""
    return _AllToAll.apply(x, axis)
