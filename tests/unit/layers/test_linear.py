"""The linears by themselves: against F.linear, and with their weight gradients left for later."""

import pytest
import torch
import torch.nn.functional as F

from megalite.core import comm
from megalite.core.call import make_call
from megalite.core.mesh import Axis
from megalite.core.params import gaussian, initialize
from megalite.core.shard import Block
from megalite.layers.linear import ColumnLinear, RowLinear
from megalite.train.exact import exact_sums

ONE = Axis("tp")
LINEARS = {
    "column": lambda: ColumnLinear(
        6, (Block(5, ("tp", None)),), ONE, bias=True, init=gaussian(1.0)
    ),
    "row": lambda: RowLinear(6, 5, ONE, bias=True, init=gaussian(1.0)),
}


def made(kind):
    linear = LINEARS[kind]()
    initialize(linear, seed=1)
    linear.bias.data.copy_(torch.arange(5.0))
    return linear


def call_of(rows=4, batch=3):
    tokens = torch.zeros(rows, batch, dtype=torch.int64)
    return make_call(tokens, None, torch.arange(batch), seq_cut=None)


@pytest.mark.parametrize("kind", LINEARS)
def test_linear_equals_autograd_on_one_rank(kind):
    linear, x = made(kind), torch.randn(4, 3, 6, requires_grad=True)
    y = linear(x, call_of())
    dy = torch.randn_like(y)
    weight, bias = (p.detach().clone().requires_grad_() for p in (linear.weight, linear.bias))
    expected = F.linear(x, weight, bias)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    wanted = torch.autograd.grad(expected, (x, weight, bias), dy)
    (dx,) = torch.autograd.grad(y, x, dy)
    for ours, theirs in zip((dx, linear.weight.grad, linear.bias.grad), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_row_of_one_rank_has_in_fixed_order_the_bits_of_two():
    """Though it adds its bias within the product, and two to the sum of their products."""
    row, x = made("row").double(), torch.randn(4, 3, 6, dtype=torch.float64)
    row.bias.data.normal_()
    weight, bias = row.weight.detach(), row.bias.detach()
    with exact_sums():
        alone = row(x, call_of())
        parts = [F.linear(x[..., part], weight[:, part]) for part in (slice(0, 2), slice(2, 6))]
        assert torch.equal(alone, parts[0] + parts[1] + bias)


def test_row_of_one_rank_writes_its_output_once(monkeypatch):
    row = made("row")
    monkeypatch.setattr(torch.Tensor, "add_", lambda *_: pytest.fail("a pass for the bias"))
    row(torch.randn(4, 3, 6), call_of())


@pytest.mark.parametrize("kind", LINEARS)
def test_deferred_weight_gradient_is_bit_for_bit_that_of_at_once(kind):
    x, dy, at_once = torch.randn(4, 3, 6), torch.randn(4, 3, 5), made(kind)
    at_once(x, call_of()).backward(dy)
    deferred, later = made(kind), []
    deferred(x, call_of().deferring(later)).backward(dy)
    assert deferred.weight.grad is None and len(later) == 1
    for job in later:
        job()
    assert torch.equal(deferred.weight.grad, at_once.weight.grad)
    assert torch.equal(deferred.bias.grad, at_once.bias.grad)


def test_first_layer_trains_though_its_input_needs_no_gradient():
    linear = made("column")
    linear(torch.randn(4, 3, 6), call_of()).sum().backward()
    assert linear.weight.grad.abs().sum() > 0


def test_gradients_of_several_microbatches_add_up():
    linear, x = made("row"), torch.randn(4, 3, 6)
    linear(x, call_of()).sum().backward()
    once = linear.weight.grad.clone()
    linear(x, call_of()).sum().backward()
    torch.testing.assert_close(linear.weight.grad, 2 * once)


@pytest.mark.parametrize("kind", LINEARS)
def test_bias_gradient_of_bfloat16_is_never_rounded_to_it(kind):
    linear, dy = made(kind).to(torch.bfloat16), torch.randn(50, 3, 5).bfloat16()
    linear(torch.randn(50, 3, 6).bfloat16(), call_of(50)).backward(dy)
    wanted = dy.double().sum((0, 1)).float()
    assert not torch.equal(wanted, wanted.bfloat16().float())
    torch.testing.assert_close(linear.bias.grad, wanted, rtol=1e-5, atol=1e-5)


def of_two_ranks(monkeypatch, seen):
    """A column and a row linear of one of two ranks, alone: sums over them are what it has."""
    two = Axis("tp", 2, 0)

    class Mine:
        def wait(self):
            return seen.pop("dx")

    def all_reduce_start(dx, axis):
        seen["dx"], seen["at start"] = dx, row.weight.grad is not None
        return Mine()

    monkeypatch.setattr(comm, "all_reduce", lambda x, axis: x)
    monkeypatch.setattr(comm, "all_reduce_start", all_reduce_start)
    column = ColumnLinear(6, (Block(8, ("tp", None)),), two, bias=False, init=gaussian(1.0))
    row = RowLinear(8, 6, two, bias=False, init=gaussian(1.0))
    for linear in (column, row):
        initialize(linear, seed=1)
    return column, row


def test_row_weight_gradient_is_made_beside_the_next_collective(monkeypatch):
    seen = {}
    column, row = of_two_ranks(monkeypatch, seen)
    x, call = torch.randn(4, 3, 6), call_of()
    up = column(x, call)
    row(up, call).backward(dy := torch.randn(4, 3, 6))
    assert seen["at start"] is False and not call.beside
    wanted = dy.flatten(0, 1).t() @ up.detach().flatten(0, 1)
    torch.testing.assert_close(row.weight.grad, wanted)
    assert column.weight.grad is not None


def test_row_weight_gradient_does_not_wait_beyond_the_backward_pass(monkeypatch):
    _, row = of_two_ranks(monkeypatch, {})
    x, call = torch.randn(4, 3, 4), call_of()
    for times in (1, 2):
        row(x, call).backward(dy := torch.ones(4, 3, 6))
        wanted = times * dy.flatten(0, 1).t() @ x.flatten(0, 1)
        torch.testing.assert_close(row.weight.grad, wanted)
        assert not call.beside
