"""What the ranks of test_context.py do: attention over a cut sequence against the whole one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from megalite.core import comm
from megalite.core.call import Context, make_call
from megalite.core.mesh import Mesh
from megalite.layers.context import attend
from megalite.layers.core_attention import CoreAttention
from tests.ranks.collective_jobs import drawn

BATCH, HEADS, HEAD_DIM = 2, 4, 6


def core_of(how: dict[str, Any], samples: torch.Tensor) -> CoreAttention:
    plain = {
        "window": None,
        "soft_cap": None,
        "scale": HEAD_DIM**-0.5,
        "p": 0.0,
        "key": 7,
        "first_head": 8,
        "layer": 0,
    }
    return CoreAttention(samples=samples, **{**plain, **how})


def check_forms(
    rank: int,
    world: int,
    form: str,
    length: int,
    heads: int,
    kv_heads: int,
    how: dict,
    starts: list[int] | None = None,
) -> None:
    """Output and gradients of my rows are those of the same rows of one process."""
    axis = Mesh({"cp": world}, rank=rank, kind="real").axis("cp")
    context, samples = Context(axis, form), torch.arange(BATCH) + 3
    tokens = torch.zeros(length, BATCH, dtype=torch.int64)
    cut = make_call(tokens, None, samples, seq_cut=None, context=context)
    whole = replace(cut, tokens=tokens, positions=torch.arange(length), context=None)
    shapes = [(length, BATCH, n, HEAD_DIM) for n in (heads, kv_heads, kv_heads, heads)]
    *qkv, dy = (drawn(1, *shape, seed=i)[0] for i, shape in enumerate(shapes))
    if starts is not None:
        documents = torch.tensor([starts, [0] * length]).T  # the second sample is one document
        how = {**how, "starts": documents}
    core = core_of(how, samples)
    results = []
    for call, take in ((whole, lambda x: x), (cut, context.take)):
        leaves = [take(x).clone().requires_grad_() for x in qkv]
        y = attend(core, *leaves, call)
        y.backward(take(dy))
        results.append([y.detach(), *(x.grad for x in leaves)])
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, context.take(theirs), rtol=1e-12, atol=1e-12)


def check_ring_in_bfloat16(rank: int, world: int) -> None:
    """The merged output is as near to float64 as bfloat16 inputs allow, and comes in bfloat16."""
    axis = Mesh({"cp": world}, rank=rank, kind="real").axis("cp")
    context, samples = Context(axis, "ring"), torch.arange(BATCH)
    call = make_call(
        torch.zeros(32, BATCH, dtype=torch.int64), None, samples, seq_cut=None, context=context
    )
    whole = replace(call, positions=torch.arange(32), context=None)
    qkv = [drawn(1, 32, BATCH, HEADS, HEAD_DIM, seed=i)[0].bfloat16() for i in range(3)]
    core = core_of({}, samples)
    wanted = context.take(attend(core, *(x.double() for x in qkv), whole))
    leaves = [context.take(x).requires_grad_() for x in qkv]
    ours = attend(core, *leaves, call)
    ours.sum().backward()
    assert ours.dtype == torch.bfloat16 and all(x.grad.dtype == torch.bfloat16 for x in leaves)
    torch.testing.assert_close(ours.double(), wanted, rtol=2e-2, atol=2e-2)


def check_shift_and_all_to_all(rank: int, world: int) -> None:
    """Both against arithmetic on what every rank has; two shifts may be under way at once."""
    axis = Mesh({"cp": world}, rank=rank, kind="real").axis("cp")
    every, other = drawn(world, 2 * world, 3), drawn(world, 5, seed=2)
    first, second = comm.shift_start(every[rank], axis), comm.shift_start(other[rank], axis)
    assert torch.equal(second.wait(), other[rank - 1])
    assert torch.equal(first.wait(), every[rank - 1]) and first.wait() is first.wait()
    x = every[rank].clone().requires_grad_()
    y = comm.all_to_all(x, axis)
    mine = slice(2 * rank, 2 * rank + 2)
    assert torch.equal(y, torch.cat([every[r, mine] for r in range(world)]))
    y.backward(y.detach())
    assert torch.equal(x.grad, every[rank]), "backward is the way back"
