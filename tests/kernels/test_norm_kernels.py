"""The norms' CUDA bodies under the emulator, against the formula in float64 by torch's autograd."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megalite.ops import backend
from megalite.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

EPS = 1e-5
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of a tensor's largest number: some units in the last place."""
WIDTHS = (1, 7, 8, 31, 33, 256, 1000, 1023, 4097, 12288)


def drawn(*shape: int, dtype: torch.dtype, seed: int, offset: int = 0) -> Tensor:
    """Numbers about 0, which start `offset` elements into their storage."""
    size = torch.Size(shape).numel()
    numbers = torch.randn(size + offset, generator=torch.Generator().manual_seed(seed))
    return numbers.to(dtype)[offset:].view(shape)


def in_float64(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None):
    """The sum and its norm: LayerNorm with a bias, RMSNorm without."""
    total = x if residual is None else x + residual
    unit = total if bias is None else total - total.mean(-1, keepdim=True)
    y = unit * (unit.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight
    return total, y if bias is None else y + bias


def by_kernels(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None):
    if residual is None:
        y = rms_norm(x, weight, EPS) if bias is None else layer_norm(x, weight, bias, EPS)
        return x, y
    if bias is None:
        return add_rms_norm(x, residual, weight, EPS)
    return add_layer_norm(x, residual, weight, bias, EPS)


def compare(
    rows: int,
    h: int,
    dtype: torch.dtype,
    *,
    centered: bool = True,
    adds: bool = False,
    offset: int = 0,
    of_weight: torch.dtype | None = None,
) -> None:
    """Results and all gradients agree."""
    like = {"dtype": of_weight or dtype, "offset": offset}
    x, residual, dy, dtotal = (
        drawn(rows, h, dtype=dtype, seed=seed, offset=offset) for seed in range(4)
    )
    weight, bias = drawn(h, seed=4, **like), drawn(h, seed=5, **like)
    given = [x * 2 + 1, residual if adds else None, weight, bias if centered else None]
    if adds and dtype != torch.float32:  # both round the sum alike, if it needs no rounding
        given[:2] = [(t * 8).round() / 8 for t in given[:2]]
    found = []
    for formula, wide in ((by_kernels, False), (in_float64, True)):
        leaves = [None if t is None else t.double() if wide else t for t in given]
        leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
        total, y = formula(*leaves)
        loss = (y.double() * dy.double()).sum()
        (loss + (total.double() * dtotal.double()).sum() if adds else loss).backward()
        found.append([y, total, *(leaf.grad for leaf in leaves if leaf is not None)])
    for ours, theirs in zip(*found, strict=True):
        assert ours.shape == theirs.shape and ours.dtype in (dtype, weight.dtype)
        bound = TOLERANCE[dtype] * max(1.0, theirs.abs().max().item() if theirs.numel() else 0.0)
        assert ((ours.double() - theirs).abs() <= bound).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("h", WIDTHS)
def test_any_width(emulated, h, dtype):
    compare(5, h, dtype)
    compare(5, h, dtype, centered=False)
    assert emulated.count == 4


@pytest.mark.parametrize("h", [33, 256, 4096])
@pytest.mark.parametrize("centered", [True, False])
def test_residual_is_added_first(emulated, h, centered):
    for dtype in TOLERANCE:
        compare(9, h, dtype, centered=centered, adds=True)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("adds", [True, False])
def test_many_rows_of_a_block(emulated, monkeypatch, adds, centered):
    """One block, with eight rows at once: on four or five of every eighth, one after the other."""
    monkeypatch.setattr(backend, "blocks_to_fill", lambda like: 1)  # on a GPU, too
    compare(36, 2048, torch.bfloat16, centered=centered, adds=adds)


@pytest.mark.parametrize("adds", [True, False])
def test_gradients_are_the_same_bits_on_gpus_with_less_shared_memory(emulated, monkeypatch, adds):
    """That of sm_90, sm_80 and sm_86: fewer rows are on their way, and no sum changes its order."""
    monkeypatch.setattr(backend, "blocks_to_fill", lambda like: 1)
    x, residual, dy = (drawn(36, 2048, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    weight = drawn(2048, dtype=torch.bfloat16, seed=3)
    found = []
    for kib in ("227", "163", "99"):
        monkeypatch.setenv("EMULATOR_SHARED", kib)
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight)]
        total, y = by_kernels(leaves[0], leaves[1] if adds else None, leaves[2], None)
        torch.autograd.backward((total, y), (dy, dy)) if adds else y.backward(dy)
        found.append([leaf.grad for leaf in leaves if leaf.grad is not None])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("h", [33, 256, 16400])
@pytest.mark.parametrize("centered", [True, False])
def test_one_pass_has_the_bits_of_addition_and_norm(emulated, h, centered, dtype):
    x, residual, dy, dtotal = (drawn(5, h, dtype=dtype, seed=seed) for seed in range(4))
    weight, bias = (drawn(h, dtype=dtype, seed=seed) for seed in (4, 5))
    found = []
    for fused in (True, False):
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
        given = (*leaves[:3], leaves[3] if centered else None)
        if fused:
            total, y = by_kernels(*given)
        else:
            total, y = by_kernels(given[0] + given[1], None, *given[2:])
        torch.autograd.backward((total, y), (dtotal, dy))
        found.append([total, y, *(leaf.grad for leaf in leaves[: 3 + centered])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert emulated.count == 4


@pytest.mark.parametrize("h", [16400, 33000, 50257])
def test_rows_too_long_for_registers(emulated, h):
    for adds in (False, True):
        compare(2, h, torch.bfloat16, adds=adds)


@pytest.mark.parametrize("offset", [1, 4])
def test_rows_that_start_anywhere(emulated, offset):
    for h in (8, 1000):
        compare(3, h, torch.bfloat16, offset=offset, adds=True)
        compare(3, h, torch.float32, offset=offset)


def test_weights_in_float32_beside_bfloat16(emulated):
    for h in (31, 512):
        compare(4, h, torch.bfloat16, of_weight=torch.float32)


def test_too_little_shared_memory_for_a_row_takes_the_form_without(emulated, monkeypatch):
    monkeypatch.setenv("EMULATOR_SHARED", "64")
    compare(9, 256, torch.bfloat16, adds=True)


def test_many_rows_and_none(emulated):
    compare(65_600, 8, torch.bfloat16)
    compare(0, 24, torch.float32)


def test_nan_stays_in_its_row(emulated):
    x = drawn(3, 64, dtype=torch.float32, seed=0)
    x[1, 5] = torch.nan
    y = layer_norm(x, torch.ones(64), torch.zeros(64), EPS)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


def test_any_order_of_warps_gives_the_same_bits(emulated, monkeypatch):
    x = drawn(70, 2048, dtype=torch.bfloat16, seed=0)
    weight = drawn(2048, dtype=torch.bfloat16, seed=1)
    found = []
    for order in ("forward", "backward", "1", "2"):
        monkeypatch.setenv("EMULATOR_ORDER", order)
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = rms_norm(*leaves, EPS)
        y.backward(x)
        found.append((y, *(leaf.grad for leaf in leaves)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_without_grad_nothing_is_kept(emulated):
    x = drawn(4, 64, dtype=torch.float32, seed=0).requires_grad_()
    with torch.no_grad():
        assert rms_norm(x, torch.ones(64), EPS).grad_fn is None
    assert not backend.takes(torch.ones(3, dtype=torch.float64))
