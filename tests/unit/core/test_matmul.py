"""Both CPU libraries give the products of a linear, to float32's rounding of the float64 ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megalite.core import matmul

# (tokens, inputs, outputs): some on either side of what is enough for oneDNN
SIZES = [(1, 3, 5), (64, 256, 128), (256, 384, 96), (130, 64, 1030), (16, 1024, 1024)]


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _agree(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(found, exact.float(), rtol=1e-5, atol=1e-4)


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """With oneDNN on and off; the shapes that it is called with."""
    seen: list[tuple] = []
    onednn: Callable[..., Tensor] = matmul._onednn

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.append((tuple(x.shape), tuple(weight.shape)))
        return onednn(x, weight, bias)

    monkeypatch.setattr(matmul, "_onednn", counted)
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", request.param)
    return seen


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_products_of_a_linear(size: tuple[int, int, int], calls: list[tuple]) -> None:
    t, i, o = size
    x, weight, bias, dy = _random(t, i), _random(o, i), _random(o), _random(t, o)
    exact = x.double() @ weight.double().t()
    _agree(matmul.linear(x.view(t, 1, i), weight), exact.view(t, 1, o))
    _agree(matmul.linear(x, weight, bias), exact + bias)
    _agree(matmul.linear(dy, weight.t()), dy.double() @ weight.double())
    out = torch.full((2 * t, o), 7.0)
    matmul.linear_into(out[t:], x, weight, bias)
    _agree(out[t:], exact + bias)
    assert (out[:t] == 7).all()
    total = torch.ones(o, i)
    matmul.add_product(total, dy, x)
    _agree(total, dy.double().t() @ x.double() + 1)
    big = t * i * o >= matmul.ENOUGH
    expected = 0
    if torch.backends.mkldnn.enabled:
        if big and i >= matmul.ENOUGH_TERMS:
            expected += 3
        expected += big and o >= matmul.ENOUGH_TERMS
        expected += big and t >= matmul.ENOUGH_TERMS
    assert len(calls) == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_go_the_usual_way(dtype: torch.dtype, calls: list[tuple]) -> None:
    x, weight, dy = (_random(*s).to(dtype) for s in ((128, 256), (128, 256), (128, 128)))
    assert torch.equal(matmul.linear(x, weight), x @ weight.t())
    total = torch.zeros(128, 256, dtype=torch.promote_types(dtype, torch.float32))
    matmul.add_product(total, dy, x)
    assert torch.equal(total, (dy.t() @ x).to(total.dtype))
    assert not calls


def test_the_result_may_be_written_into(calls: list[tuple]) -> None:
    """As the loss writes into logits that an autograd function has given it."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            return matmul.linear(x, weight)

        @staticmethod
        def backward(ctx, dy):
            return dy, None

    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            return x.mul_(2)

        @staticmethod
        def backward(ctx, dy):
            return 2 * dy

    x = _random(64, 2, 256).requires_grad_()
    y = Doubled.apply(Product.apply(x, _random(256, 256)))
    y.sum().backward()
    assert x.grad is not None and (x.grad == 2).all()


@pytest.mark.parametrize("size", [(768, 256), (96, 1030)], ids=str)
def test_a_token_beside_any_others_has_the_same_bits_by_a_packed_weight(
    size: tuple[int, int],
) -> None:
    i, o = size
    x, weight, bias = _random(40, i), torch.nn.Parameter(_random(o, i)), _random(o)
    exact = x.double() @ weight.detach().double().t() + bias
    matmul.pack(weight, keep=False)
    y = matmul.linear(x, weight, bias)
    _agree(y, exact)
    for t in (0, 1, 2, 3, 4, 5, 6, 15, 16, 17, 33):
        assert torch.equal(matmul.linear(x[:t], weight, bias), y[:t])
        assert torch.equal(matmul.linear(x[None, 40 - t :], weight, bias)[0], y[40 - t :])
