"""Blocks of attention and what the forms send, in one process; real ranks: tests/ranks."""

import pytest
import torch

from megalite.core.call import Context, make_call
from megalite.core.log import CollectiveLog
from megalite.core.mesh import Axis
from megalite.layers.context import attend, blocks, merged
from megalite.layers.core_attention import CoreAttention

S, B, N, M, D = 8, 2, 4, 2, 6
AT = torch.arange(S)


def core_of(**how):
    plain = {
        "window": None,
        "soft_cap": None,
        "scale": D**-0.5,
        "p": 0.0,
        "key": 7,
        "first_head": 0,
        "layer": 0,
    }
    return CoreAttention(samples=torch.arange(B), **{**plain, **how})


def drawn():
    generator = torch.Generator().manual_seed(1)
    shapes = [(B, heads, S, D) for heads in (N, M, M)]
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]


def fake_context(form, size=4, idx=1):
    return Context(Axis("cp", size, idx, tuple(range(size)), CollectiveLog()), form)


@pytest.mark.parametrize("how", [{}, {"window": 3}, {"soft_cap": 2.0, "p": 0.3}])
def test_merged_blocks_of_keys_equal_all_keys_at_once(how):
    q, k, v = drawn()
    core = core_of(**how)
    y, lse = torch.zeros_like(q), torch.full(q.shape[:-1], -torch.inf, dtype=q.dtype)
    for start in (4, 0, 6, 2):
        at = slice(start, start + 2)
        y, lse = merged(y, lse, *core.partial(q, k[:, :, at], v[:, :, at], AT, AT[at]))
    torch.testing.assert_close(y, core.attend(q, k, v, AT, AT), rtol=1e-12, atol=1e-12)


def test_query_without_a_key_gives_zeros_and_minus_infinity_and_no_gradient():
    q, k, v = drawn()
    y, lse = core_of().partial(q[:, :, :4], k[:, :, 2:], v[:, :, 2:], AT[:4], AT[2:])
    assert (y[:, :, :2] == 0).all() and (lse[:, :, :2] == -torch.inf).all()
    assert y[:, :, 2:].abs().min() > 0 and lse[:, :, 2:].isfinite().all()
    none = (torch.zeros_like(y), torch.full_like(lse, -torch.inf))
    both, both_lse = merged(*none, *none)
    assert (both == 0).all() and (both_lse == -torch.inf).all()
    grads = core_of().partial_grads(
        q[:, :, :2], k[:, :, 2:], v[:, :, 2:], AT[:2], AT[2:],
        lse=lse[:, :, :2], dy=torch.ones_like(y[:, :, :2]), dot=torch.zeros_like(lse[:, :, :2]),
    )  # fmt: skip
    assert all((grad == 0).all() for grad in grads)


def test_blocks_that_no_query_sees_are_skipped():
    def pairs(idx, source, window=None):
        context = fake_context("ring", idx=idx)
        mine, theirs = context.spans(32), context.spans(32, source)
        found = blocks(mine, theirs, window, torch.zeros(1))
        return [(q_at[0].item(), k_at[0].item()) for _, _, q_at, k_at in found]

    assert pairs(1, 1) == [(4, 4), (24, 4), (24, 24)]
    assert pairs(1, 0) == [(4, 0), (24, 0)], "the last block of rank 0 is ahead of both of mine"
    assert pairs(1, 2) == [(24, 8), (24, 20)]
    assert pairs(1, 2, window=2) == [(24, 20)]
    assert pairs(1, 3, window=2) == []
    everyone = [sum(len(pairs(i, j)) for j in range(4)) for i in range(4)]
    assert everyone == [9] * 4, "every rank has the same work"


SENT = {
    "ring": ["shift"] * 3 + ["shift"] * 7,
    "gather": ["all_gather", "reduce_scatter"],
    "ulysses": ["all_to_all"] * 4,
}
"""Over 4 ranks. The ring's keys hop 3 times each way, the gradients of the keys 4 times."""


@pytest.mark.parametrize("form", SENT)
def test_collectives_of_a_form_forward_and_backward(form):
    context = fake_context(form)
    tokens = torch.zeros(4 * S, B, dtype=torch.int64)
    call = make_call(tokens, None, torch.arange(B), seq_cut=None, context=context)
    q, k, v = (t.permute(2, 0, 1, 3).contiguous().requires_grad_() for t in drawn())
    y = attend(core_of(), q, k, v, call)
    assert y.shape == q.shape
    y.sum().backward()
    log = list(context.axis.log.entries)
    assert [entry.op for entry in log] == SENT[form]
    one = S * B * D * 8
    kv = 2 * M * one
    sizes = {
        "ring": {kv},
        "gather": {4 * kv},
        # One kv head for each rank: 2 are repeated to 4.
        "ulysses": {(N + 2 * 4) * one, N * one},
    }
    assert {entry.nbytes for entry in log} == sizes[form]
