"""Initial weights are the same at every cut, and a gradient lands once."""

import pytest
import torch
from torch import nn

from megalite.core.mesh import Mesh
from megalite.core.params import (
    acc_dtype,
    add_weight_grad,
    constant,
    gaussian,
    grad_of,
    initialize,
    listen,
    new_param,
    traits_of,
)
from megalite.core.shard import Block, Shard, column, row, slices, whole

SHAPES = {
    "column": column(7, 3),
    "row": row(3, 7),
    "whole": whole(5),
    "fused": Shard((11, 2), (Block(6, ("tp", None)), Block(5, ("tp", None)))),
    "shared": Shard((10, 2), (Block(6, ("tp", None)), Block(4, ("tp.kv", None), ("tp.rep",)))),
}


def module_of(tp, rank, *, factors=True):
    axes = Mesh({"tp": tp}, rank=rank, kind="fake", factors={"tp": 2 if tp % 2 == 0 else 1}).axes
    module = nn.Module()
    for name, shard in SHAPES.items():
        setattr(module, name, new_param(shard, axes, init=gaussian(0.5)))
    return module


@pytest.mark.parametrize("tp", [2, 3, 4, 6])
@pytest.mark.parametrize("chunk", [1 << 20, 4])
def test_initial_weights_equal_one_process_under_any_cut(tp, chunk):
    one = module_of(1, 0)
    initialize(one, seed=3)
    for rank in range(tp):
        cut = module_of(tp, rank)
        for param in cut.parameters():
            param.data.fill_(7.0)
        initialize(cut, seed=3, chunk=chunk)
        for name, param in cut.named_parameters():
            expected = torch.zeros_like(param)  # padding is zero
            for piece in traits_of(param).shard.pieces(traits_of(param).axes):
                expected[slices(piece.local)] = one.get_parameter(name)[slices(piece.whole)]
            assert torch.equal(param, expected), (name, rank)


def test_initial_weights_differ_by_name_and_by_seed():
    module = nn.Module()
    axes = Mesh({}).axes
    module.a = new_param(whole(50), axes, init=gaussian(1.0))
    module.b = new_param(whole(50), axes, init=gaussian(1.0))
    initialize(module, seed=1)
    before = module.a.clone()
    assert not torch.equal(module.a, module.b)
    initialize(module, seed=2)
    assert not torch.equal(module.a, before)


def test_constant_init_and_gaussian_std_are_what_they_say():
    module = nn.Module()
    module.ones = new_param(whole(4), Mesh({}).axes, init=constant(1.0))
    module.noise = new_param(whole(300, 300), Mesh({}).axes, init=gaussian(0.02))
    initialize(module, seed=1)
    assert module.ones.tolist() == [1.0] * 4
    assert abs(module.noise.std().item() - 0.02) < 0.0003


def test_matrices_decay_and_vectors_do_not_unless_told():
    axes = Mesh({}).axes
    made = [
        new_param(shard, axes, init=constant(0.0), decay=decay)
        for shard, decay in ((whole(2, 2), None), (whole(2), None), (whole(2), True))
    ]
    assert [traits_of(p).decay for p in made] == [True, False, True]


def test_parameter_without_a_shard_is_a_type_error_that_says_so():
    with pytest.raises(TypeError, match="has no Shard: make it with new_param"):
        initialize(nn.Linear(2, 2), seed=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_weight_gradient_is_summed_in_at_least_float32(dtype):
    weight = nn.Parameter(torch.zeros(3, 2, dtype=dtype))
    dy, x = torch.randn(5, 3).to(dtype), torch.randn(5, 2).to(dtype)
    for _ in range(2):
        add_weight_grad(weight, dy, x)
    assert weight.grad.dtype == acc_dtype(dtype)
    expected = 2 * (dy.double().T @ x.double())
    torch.testing.assert_close(weight.grad.double(), expected, rtol=1e-2, atol=1e-2)


def test_every_contribution_is_heard_by_hand_and_from_autograd():
    weight, heard = nn.Parameter(torch.ones(2, 2)), []
    listen(weight, lambda param: heard.append(param is weight))
    add_weight_grad(weight, torch.ones(1, 2), torch.ones(1, 2))
    (weight * 3).sum().backward()
    assert heard == [True, True] and grad_of(weight).tolist() == [[4, 4], [4, 4]]
