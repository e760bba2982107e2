"""The softmax's CUDA bodies under the emulator, against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalite.ops import backend
from megalite.ops.softmax import scaled_softmax

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
"""Of weights, which are at most 1, and of gradients of about 1."""


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def compare(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0, **how) -> Tensor:
    """Weights and gradient agree; gives our weights."""
    size = torch.Size(shape).numel()
    scores, dy = ((drawn(size + offset, seed=i) * 2).to(dtype)[offset:] for i in (0, 1))
    scores, dy = scores.view(shape), dy.view(shape)
    found = []
    for wide in (False, True):
        leaf = (scores.double() if wide else scores).detach().requires_grad_()
        before = backend.use_library(None) if wide else None
        bias = how.get("bias")
        given = {**how, "bias": bias.double()} if wide and bias is not None else how
        y = scaled_softmax(leaf, **given)
        if wide:
            backend.use_library(before)
        else:
            assert y.grad_fn.name().startswith("_Softmax")
        y.backward(dy.to(leaf.dtype))
        found.append((y.detach(), leaf.grad))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == dtype and ours.shape == theirs.shape
        bound = TOLERANCE[dtype] * max(1.0, theirs.abs().max().item() if theirs.numel() else 0.0)
        assert ((ours.double() - theirs).abs() <= bound).all()
    return found[0][0]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("keys", [1, 7, 8, 31, 33, 1000, 1023, 4097, 12288, 50257])
def test_any_length(emulated, keys, dtype):
    compare((1, 2, 3, keys), dtype, scale=0.3)


@pytest.mark.parametrize("shape", [(2, 3, 40, 40), (1, 2, 5, 64), (1, 1, 24, 16)])
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
def test_causal_and_windows(emulated, shape, window):
    for dtype in (torch.float32, torch.bfloat16):
        y = compare(shape, dtype, causal=True, window=window, scale=0.5)
        queries, keys = shape[-2:]
        own = torch.arange(keys - queries, keys)[:, None]
        hidden = torch.arange(keys) > own
        assert not y[..., hidden].any()
        empty = own.squeeze(1) < 0
        assert torch.equal(y.sum(-1)[..., empty], torch.zeros(*shape[:2], int(empty.sum())))


def test_what_causal_hides_is_not_read(emulated):
    scores = drawn(1, 1, 24, 24, seed=0)
    seen = scaled_softmax(scores, causal=True)
    hidden = torch.ones(24, 24, dtype=torch.bool).triu(1)
    assert torch.equal(scaled_softmax(scores.masked_fill(hidden, torch.nan), causal=True), seen)


@pytest.mark.parametrize("mask", [(2, 1, 16, 24), (16, 24), (1, 3, 1, 24), (2, 3, 16, 24), (16, 1)])
def test_masks_and_biases_of_any_broadcast(emulated, mask):
    seen, bias = drawn(*mask, seed=2) > 0, drawn(*mask, seed=3)
    for times, dtype in enumerate(TOLERANCE):
        assert emulated.count == 4 * times  # two forward, two backward
        compare((2, 3, 16, 24), dtype, mask=seen, causal=True)
        compare((2, 3, 16, 24), dtype, mask=seen, bias=bias.to(dtype), scale=0.7)


def test_query_that_sees_nothing_gives_zeros(emulated):
    y = compare((1, 1, 2, 40), torch.float32, mask=torch.tensor([[True], [False]]))
    assert y[0, 0, 0].sum() > 0.99 and not y[0, 0, 1].any()


def test_nan_stays_in_its_row(emulated):
    scores = drawn(1, 1, 3, 700, seed=0)
    scores[0, 0, 1, 3] = torch.nan
    y = scaled_softmax(scores)
    assert y[0, 0, 1].isnan().all() and not y[0, 0, [0, 2]].isnan().any()
    behind = torch.arange(700) != 3
    assert not scaled_softmax(scores, mask=behind).isnan().any()


def test_rows_that_start_anywhere_and_many_of_them(emulated):
    compare((1, 2, 3, 64), torch.bfloat16, offset=1)
    compare((1, 2, 3, 64), torch.float32, offset=4)
    compare((1, 2, 33_000, 8), torch.bfloat16, causal=False)
    compare((0, 2, 3, 8), torch.float32)
