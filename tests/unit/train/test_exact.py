"""Exact sums: the same bits in any order and cut, and the numbers that torch has."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalite.core.errors import RunError
from megalite.train.exact import GRID, exact_sums, on_grid

TOL = 1e-11  # the grid's 3e-14, times what a gradient is made of

# t rows (tokens), i inputs, o outputs


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def shuffled(n: int, seed: int = 1) -> torch.Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


# -- sums --------------------------------------------------------------------------------------


def matmul_in_parts(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x y with the inner dimension in another order and in three uneven parts."""
    order = shuffled(x.shape[-1])
    parts = [x[..., part] @ y[..., part, :] for part in order.split((5, 31, x.shape[-1] - 36))]
    return parts[2] + parts[0] + parts[1]


def test_plain_sums_depend_on_their_order():
    x, y = draw(30, 70), draw(70, 40, seed=1)
    assert not torch.equal(x @ y, matmul_in_parts(x, y))
    assert not torch.equal(x.sum(0), x[shuffled(30)].sum(0))


@pytest.mark.parametrize("batch", [(), (3,)], ids=["mm", "bmm"])
def test_matmul_is_the_same_in_any_order_and_cut(batch):
    x, y = draw(*batch, 30, 70), draw(*batch, 70, 40, seed=1)
    with exact_sums():
        whole, parts = x @ y, matmul_in_parts(x, y)
    assert torch.equal(whole, parts)
    assert torch.equal(whole, on_grid(whole))
    torch.testing.assert_close(whole, x @ y, rtol=0, atol=70 * 2.0**-GRID)


def test_gradients_added_over_microbatches_are_the_same_in_any_order():
    x, dy = draw(90, 20), draw(90, 30, seed=1)
    found = []
    with exact_sums():
        for order, sizes in ((torch.arange(90), (90,)), (shuffled(90), (7, 50, 33))):
            grad, bias = torch.zeros(30, 20, dtype=torch.float64), torch.zeros(30).double()
            table = torch.zeros(11, 30, dtype=torch.float64)
            for rows in order.split(sizes):
                grad.addmm_(dy[rows].t(), x[rows])
                bias.add_(dy[rows].sum(0))
                table.index_add_(0, rows % 11, dy[rows])
            found.append((grad, bias, table))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch.testing.assert_close(found[0][0], dy.t() @ x, rtol=0, atol=TOL)


# Functions of rows [t, i] and of parameters, whose gradients are sums over the rows.
ROWWISE = {
    "linear": lambda x, w, b: F.linear(x, w, b),
    "layer_norm": lambda x, w, b: F.layer_norm(x, (16,), w[0], w[1]),
    "rms_norm": lambda x, w, b: F.rms_norm(x, (16,), w[0], 1e-5),
    "softmax": lambda x, w, b: (x * w[0]).softmax(-1),
    "logsumexp": lambda x, w, b: (x * w[0]).logsumexp(-1),
    "mean": lambda x, w, b: (x * w[0]).mean(-1),
    "norm": lambda x, w, b: torch.linalg.vector_norm(x * w[0], dim=-1),
    "gelu": lambda x, w, b: F.gelu(x + b),
    "embedding": lambda x, w, b: x * F.embedding(x[:, 0].long() % 16, w),
    "attention": lambda x, w, b: F.scaled_dot_product_attention(*([(x * w[0])[:, None]] * 3)),
}


@pytest.mark.parametrize("name", ROWWISE)
def test_op_has_torch_s_numbers_and_the_same_bits_in_any_order(name):
    rows, order = draw(37, 16), shuffled(37)
    dy = draw(37, 16, seed=2)

    def trained(rows: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
        x = rows.clone().requires_grad_()
        w, b = draw(16, 16, seed=3).requires_grad_(), draw(16, seed=4).requires_grad_()
        y = ROWWISE[name](x, w, b).reshape(37, -1)
        grads = torch.autograd.grad(y, (x, w, b), dy[:, : y.shape[1]], allow_unused=True)
        return [y.detach(), *(torch.zeros(()).double() if g is None else g for g in grads)]

    plain = trained(rows, dy)
    with exact_sums():
        exact, other = trained(rows, dy), trained(rows[order], dy[order])
    for ours, theirs in zip(exact, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=TOL)
    (y, dx, *grads), (other_y, other_dx, *other_grads) = exact, other
    assert torch.equal(y[order], other_y) and torch.equal(dx[order], other_dx)
    assert all(torch.equal(a, b) for a, b in zip(grads, other_grads, strict=True))


def test_key_gradients_add_up_over_queries_of_several_ranks():
    # Grouped: keys [1, 2, 50, 4] of queries [1, 6, 50, 4].
    q, dy = draw(1, 6, 50, 4), draw(1, 6, 50, 4, seed=1)
    k, v = draw(1, 2, 50, 4, seed=2), draw(1, 2, 50, 4, seed=3)
    mask = torch.ones(50, 50).tril().bool()

    def grads(rows: torch.Tensor | slice, **which: object) -> tuple[torch.Tensor, ...]:
        leaves = [k.clone().requires_grad_(), v.clone().requires_grad_()]
        y = F.scaled_dot_product_attention(q[:, :, rows], *leaves, enable_gqa=True, **which)
        return torch.autograd.grad(y, leaves, dy[:, :, rows])

    plain = grads(slice(None), is_causal=True)
    with exact_sums():
        whole = grads(slice(None), is_causal=True)
        parts = [grads(rows, attn_mask=mask[rows]) for rows in shuffled(50).split((9, 23, 18))]
    for i in range(2):
        assert torch.equal(whole[i], parts[2][i] + parts[0][i] + parts[1][i])
        torch.testing.assert_close(whole[i], plain[i], rtol=0, atol=TOL)


def test_sum_that_could_round_is_refused():
    with exact_sums():
        assert draw(3).mul(0).add(170).sum(0) == 510
        with pytest.raises(RunError, match="magnitude 512 is not exact on a grid of 2\\^-44"):
            (draw(2).mul(0) + torch.tensor([256.0, -256.0])).sum(0)


@pytest.mark.parametrize(
    "op, text",
    [
        (lambda x: x.prod(), "aten.prod.default"),
        (lambda x: x.std(0), "aten.std.correction"),
        (lambda x: torch.linalg.vector_norm(x, 3), "knows the 2-norm only"),
    ],
)
def test_op_that_is_not_known_is_refused(op, text):
    with exact_sums(), pytest.raises(RunError, match=text):
        op(draw(4, 5))


# -- functions of single numbers ---------------------------------------------------------------

POINTWISE = {
    "exp": torch.exp,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu-tanh": lambda x: F.gelu(x, approximate="tanh"),
    "pow": lambda x: x.abs() ** 1.7,
    "lerp": lambda x: x.lerp(x * 3, 0.3),
    "add": lambda x: x.add(x * 3, alpha=0.3),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_function_of_single_numbers_does_not_depend_on_their_place(name):
    x, f = draw(501), POINTWISE[name]
    strided = draw(501, 3)
    strided[:, 1] = x
    with exact_sums():
        whole, in_parts = f(x), torch.cat([f(part) for part in x.split(7)])
        column = f(strided[:, 1])
    assert torch.equal(whole, in_parts) and torch.equal(whole, column)
    torch.testing.assert_close(whole, f(x), rtol=1e-14, atol=1e-14)


def test_function_in_place_writes_where_it_is_told_and_gives_that():
    x = draw(9, 6)
    ours, theirs = x.clone(), x.clone()
    with exact_sums():
        column = ours[:, 2]
        assert column.exp_() is column
        ours[:4].clamp_(min=0.0)
    theirs[:, 2].exp_()
    theirs[:4].clamp_(min=0.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=0)
