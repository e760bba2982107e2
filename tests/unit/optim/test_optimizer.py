"""AdamW against torch's own, master copies, the norm on one rank. Cut over ranks: the oracle."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from megalite.core.config import ModelConfig, OptimConfig
from megalite.core.mesh import Mesh
from megalite.core.params import initialize, named_parameters
from megalite.models.build import build_stages
from megalite.ops.adamw import adamw_
from megalite.optim.optimizer import AT_ONCE, Optimizer, squares_at_once, squares_in_turn
from megalite.parallel.zero import Zero

CPU = torch.device("cpu")
CFG = ModelConfig(num_layers=1, hidden_size=8, num_heads=2, vocab_size=11, seq_len=4)


def optimizer_of(dtype, cfg=CFG, **fields):
    stages = build_stages(
        cfg, Mesh({}), placement=(0,), layers=None, sequence_parallel=True, seed=1
    )
    stages[0].to(dtype)
    zero = Zero(stages, Mesh({}), stage=1, bucket_bytes=500, device=CPU)
    initialize(stages[0], 1)
    return stages[0], Optimizer(zero, OptimConfig(**fields))


def fill(stage, step):
    generator = torch.Generator().manual_seed(step)
    for _, param in named_parameters(stage):
        param.grad.copy_(torch.randn(param.shape, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adamw_on_a_flat_range_equals_torch(dtype):
    param = torch.randn(100, dtype=dtype)
    theirs = param.clone().requires_grad_()
    wanted = torch.optim.AdamW(
        [theirs], lr=0.1, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.2, fused=False, foreach=False
    )
    state = torch.zeros(2, 100, dtype=dtype)
    for step in range(1, 6):
        grad = torch.randn(100, dtype=dtype)
        adamw_(param, grad, state[0], state[1], step=step, lr=0.1, beta1=0.8, beta2=0.9, eps=1e-6,
               weight_decay=0.2)  # fmt: skip
        theirs.grad = grad
        wanted.step()
        torch.testing.assert_close(param, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_matrices_decay_and_norms_and_biases_do_not():
    stage, optimizer = optimizer_of(torch.float64, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in named_parameters(stage)}
    optimizer.step(lr=0.1, scale=torch.tensor(1.0))  # gradients are zero: decay alone
    for name, param in named_parameters(stage):
        factor = 0.95 if param.dim() > 1 else 1.0
        torch.testing.assert_close(param.detach(), before[name] * factor, msg=name)


def test_sum_of_squares_is_that_of_every_gradient():
    stage, optimizer = optimizer_of(torch.float64)
    fill(stage, 0)
    expected = sum(p.grad.square().sum() for p in stage.parameters())
    torch.testing.assert_close(optimizer.sum_of_squares(), expected)


def test_a_rank_that_counts_nothing_has_no_squares():
    stage, optimizer = optimizer_of(torch.float32)
    fill(stage, 0)
    optimizer._owned = [[] for _ in optimizer._owned]
    nothing = optimizer.sum_of_squares()
    assert nothing.item() == 0 and nothing.dtype == torch.float64


# Pieces are summed in float32.
@pytest.mark.parametrize(("sum_of", "tol"), [(squares_at_once, 1e-12), (squares_in_turn, 2e-5)])
def test_squares_of_parts_of_all_sizes_add_up(sum_of, tol):
    generator = torch.Generator().manual_seed(7)
    sizes = (1, 3, 64, AT_ONCE + 1, 2 * AT_ONCE)
    parts = [torch.randn(n, generator=generator) * 10**-i for i, n in enumerate(sizes)]
    exact = sum(part.double().square().sum().item() for part in parts)
    total = sum_of(parts)
    assert total.dtype == torch.float64 and total.dim() == 0
    assert total.item() == pytest.approx(exact, rel=tol)
    for bad in (float("inf"), float("nan")):
        parts[2][5] = bad
        assert not sum_of(parts).isfinite()


def test_masters_of_bfloat16_parameters_take_steps_too_small_for_bfloat16():
    stage, optimizer = optimizer_of(torch.bfloat16, weight_decay=0.0)
    weight = stage.final_norm.weight
    assert weight.dtype == torch.bfloat16 and (weight == 1).all()
    moved = []
    for _ in range(40):
        for bucket in optimizer.zero.buckets:
            bucket.grads.fill_(1.0)
        optimizer.step(lr=1e-4, scale=torch.tensor(1.0))
        moved.append(1 - weight[0].item())
    # One step of 1e-4 is a fortieth of what bfloat16 can tell from 1; forty are 4e-3.
    assert moved[0] == 0 and moved[-1] == pytest.approx(4e-3, rel=0.05)


def test_scale_multiplies_the_gradients_before_the_update():
    results = []
    for scale, times in ((0.25, 4.0), (1.0, 1.0)):
        stage, optimizer = optimizer_of(torch.float64, eps=1.0)
        fill(stage, 3)
        for bucket in optimizer.zero.buckets:
            bucket.grads.mul_(times)
        optimizer.step(lr=0.1, scale=torch.tensor(scale, dtype=torch.float64))
        results.append(stage.final_norm.weight.detach().clone())
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0], torch.ones(8, dtype=torch.float64))


def test_norm_of_many_numbers_keeps_its_digits():
    # One float32 sum over the 8 million of the table, number by number, is off by 1e-2.
    stage, optimizer = optimizer_of(torch.float32, cfg=replace(CFG, vocab_size=1_000_000))
    fill(stage, 1)
    grads = [param.grad.double() for _, param in named_parameters(stage)]
    exact = sum(grad.square().sum() for grad in grads)
    squares = torch.cat([grad.square().float().flatten() for grad in grads]).numpy()
    one_sum = np.add.accumulate(squares)[-1]
    assert abs(optimizer.sum_of_squares() - exact) <= 2e-5 * exact < abs(one_sum - exact)
