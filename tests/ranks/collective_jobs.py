"""What the ranks of test_collectives.py do: collectives against what one process would compute."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.core import comm
from megalite.core.call import IGNORE
from megalite.core.log import Hold
from megalite.core.mesh import Axis, Mesh
from megalite.layers.loss import cross_entropy


def tp_axis(rank: int, world: int) -> Axis:
    return Mesh({"tp": world}, rank=rank, kind="real").axis("tp")


def drawn(world: int, *shape: int, seed: int = 1) -> Tensor:
    """Every rank's tensor of that shape, [world, *shape], known to all of them."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(world, *shape, generator=generator, dtype=torch.float64)


def check_pairs_are_adjoint(rank: int, world: int) -> None:
    """<f(x), y> = <x, f*(y)>, each side summed over the ranks on which its numbers differ."""
    axis = tp_axis(rank, world)
    rows = 2 * world
    cases = [
        # (pair, x here, y here, whether f(x) and y are one replicated tensor, whether x is)
        (comm.replicate, drawn(1, rows, 3)[0], drawn(world, rows, 3, seed=2)[rank], False, True),
        (comm.reduce, drawn(world, rows, 3)[rank], drawn(1, rows, 3, seed=2)[0], True, False),
        (comm.gather, drawn(world, 2, 3)[rank], drawn(world, rows, 3, seed=2)[rank], False, False),
        (comm.scatter_sum, drawn(world, rows, 3)[rank], drawn(world, 2, 3)[rank], False, False),
    ]
    for pair, x, y, one_output, one_input in cases:
        x.requires_grad_()
        z = pair(x, axis)
        (back,) = torch.autograd.grad(z, x, y)
        left, right = (z * y).sum().detach(), (x * back).sum().detach()
        left = left if one_output else comm.all_reduce(left, axis)
        right = right if one_input else comm.all_reduce(right, axis)
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12, msg=pair.__name__)


def check_collectives(rank: int, world: int) -> None:
    """Each function against the same thing worked out of every rank's tensor."""
    axis = tp_axis(rank, world)
    every = drawn(world, 2 * world, 3)
    mine = every[rank]
    mine_rows = slice(2 * rank, 2 * rank + 2)
    close = torch.testing.assert_close
    for op in ("sum", "max", "min"):
        wanted = every.sum(0) if op == "sum" else getattr(every, f"a{op}")(0)
        close(comm.all_reduce(mine.clone(), axis, op), wanted, rtol=1e-14, atol=1e-14)
    close(comm.reduce_scatter(mine.clone(), axis), every.sum(0)[mine_rows], rtol=1e-14, atol=1e-14)
    turned = mine.t().contiguous().t()
    close(comm.reduce_scatter(turned, axis), every.sum(0)[mine_rows], rtol=1e-14, atol=1e-14)
    own = mine.clone()
    pending = comm.reduce_scatter_start(own, axis, out=own[mine_rows])
    assert pending.wait() is pending.wait()
    close(own[mine_rows], every.sum(0)[mine_rows], rtol=1e-14, atol=1e-14)
    assert torch.equal(comm.all_gather(mine, axis), every.flatten(0, 1))
    assert torch.equal(comm.all_gather(mine, axis, dim=1), torch.cat(list(every), dim=1))
    inside = torch.zeros(world, 2, 3, dtype=torch.float64)
    inside[rank] = every[rank, :2]
    comm.all_gather_start(inside[rank], axis, out=inside.view(-1, 3)).wait()
    assert torch.equal(inside, every[:, :2])
    last = world - 1
    assert torch.equal(comm.broadcast(mine.clone(), axis, src=last), every[last])
    assert comm.any_true(rank == last, axis) and not comm.any_true(False, axis)
    comm.barrier(axis)


def check_narrow_sums(rank: int, world: int) -> None:
    """What is sent as bfloat16 takes half the bytes, and is added up as float32 where gloo can."""
    axis = tp_axis(rank, world)
    every = drawn(world, 2 * world, 3).to(torch.float32)
    rounded = every.bfloat16().to(torch.float32)
    mine_rows = slice(2 * rank, 2 * rank + 2)

    def sent() -> tuple[str, int]:
        return axis.log.entries[-1].op, axis.log.entries[-1].nbytes

    x = every[rank].clone()
    made = comm.all_reduce_start(x, axis, dtype=torch.bfloat16).wait()
    assert made is x and made.dtype == torch.float32 and sent() == ("all_reduce", 2 * x.numel())
    # Each of world - 1 additions rounds to 8 bits.
    bound = world * 2**-8 * rounded.abs().sum(0)
    assert ((made - rounded.sum(0)).abs() <= bound).all() and not torch.equal(made, every.sum(0))
    x = every[rank].clone()
    out = x[mine_rows]
    made = comm.reduce_scatter_start(x, axis, out=out, dtype=torch.bfloat16).wait()
    assert made is out and made.dtype == torch.float32
    assert sent() == ("reduce_scatter", 2 * x.numel())
    # gloo's parts are added up in float32: what was sent is all that is rounded.
    torch.testing.assert_close(out, rounded.sum(0)[mine_rows], rtol=1e-6, atol=1e-6)
    assert not torch.equal(out, every.sum(0)[mine_rows])


def logged(rank: int, world: int) -> list[list]:
    """[op, wire, axis, bytes, file, completed before and after the wait] of three calls."""
    axis = tp_axis(rank, world)
    x = torch.zeros(2 * world, 3)
    seen = []
    for start in (comm.all_reduce_start, comm.all_gather_start, comm.reduce_scatter_start):
        pending = start(x.clone(), axis)
        entry = axis.log.entries[-1]
        before = entry.completed
        pending.wait()
        file = entry.site.rpartition("/")[2].partition(":")[0]
        seen.append([entry.op, entry.wire, entry.axis, entry.nbytes, file, before, entry.completed])
    return seen


def check_cross_entropy(rank: int, world: int, vocab: int, width: int) -> None:
    """The vocabulary cut over all ranks, `width` columns each, against F.cross_entropy."""
    axis, tokens = tp_axis(rank, world), 9
    whole = 4 * drawn(1, tokens, width * world)[0]
    labels = torch.arange(tokens) * 5 % vocab
    labels[2::4] = IGNORE
    here = slice(rank * width, (rank + 1) * width)
    expected = whole.clone().requires_grad_()
    wanted = F.cross_entropy(expected[:, :vocab], labels, ignore_index=IGNORE, reduction="sum")
    (0.7 * wanted).backward()
    ours = whole[:, here].clone().requires_grad_()
    loss = cross_entropy(ours * 1, labels, vocab, axis).sum()
    (0.7 * loss).backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours.grad, expected.grad[:, here], rtol=1e-12, atol=1e-12)


def held(rank: int, world: int, overlap: bool, seconds: float) -> list:
    """[ended where it started, seconds held are over, sum is right] of a held all-reduce."""
    axis = tp_axis(rank, world)
    every = drawn(world, 6)
    axis.log.hold = Hold(lambda entry: seconds, overlap)
    pending = comm.all_reduce_start(every[rank].clone(), axis)
    entry = axis.log.entries[-1]
    at_once = entry.completed
    total = pending.wait()
    assert entry.ended is not None
    close = torch.allclose(total, every.sum(0), rtol=1e-14, atol=1e-14)
    return [at_once, entry.ended - entry.issued >= seconds, close]
