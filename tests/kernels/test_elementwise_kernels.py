"""GeLU, SwiGLU, rotary positions and dropout: the CUDA bodies under the emulator, against torch.

Gradients and results against the formula in float64 by torch's autograd; masks of dropout bit for
bit against core/rng.py.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.core import rng
from megalite.core.call import make_call
from megalite.core.mesh import Axis
from megalite.layers.dropout import dropout as dropout_of_call
from megalite.ops import backend
from megalite.ops.dropout import dropout, keep_mask
from megalite.ops.gelu import gelu, gelu_tanh
from megalite.ops.rope import rope, rope_angles
from megalite.ops.swiglu import swiglu

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of a tensor's largest number: some units in the last place."""
WIDTHS = (1, 7, 8, 31, 33, 1000, 1023, 4097, 12288, 50257)
all_types = pytest.mark.parametrize("dtype", TOLERANCE)


def drawn(*shape: int, dtype: torch.dtype, seed: int, offset: int = 0) -> Tensor:
    """Numbers about 0, which start `offset` elements into their storage."""
    size = torch.Size(shape).numel()
    numbers = torch.randn(size + offset, generator=torch.Generator().manual_seed(seed))
    return numbers.to(dtype)[offset:].view(shape)


def assert_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype) -> None:
    """`ours` is of `dtype`, and near what float64 says."""
    assert ours.shape == theirs.shape and ours.dtype == dtype
    bound = TOLERANCE[dtype] * max(1.0, theirs.abs().max().item() if theirs.numel() else 0.0)
    assert ((ours.double() - theirs).abs() <= bound).all()


def compare(ours, formula, *given: Tensor) -> None:
    """Results of two functions of tensors, and the gradients of all of these, agree."""
    found = []
    for fn, wide in ((ours, False), (formula, True)):
        leaves = [t.detach().to(torch.float64) if wide else t.detach() for t in given]
        leaves = [t.requires_grad_() for t in leaves]
        y = fn(*leaves)
        dy = drawn(*y.shape, dtype=given[0].dtype, seed=99)
        y.backward(dy.to(y.dtype))
        found.append([y, *(leaf.grad for leaf in leaves)])
    for mine, theirs in zip(*found, strict=True):
        assert_close(mine, theirs, given[0].dtype)


# -- GeLU --------------------------------------------------------------------------------------

FORMS = {"exact": (gelu, "none"), "tanh": (gelu_tanh, "tanh")}


def compare_gelu(form: str, x: Tensor, bias: Tensor | None = None) -> None:
    ours, name = FORMS[form]
    given = (x,) if bias is None else (x, bias)
    compare(ours, lambda x, *bias: F.gelu(sum(bias, x), approximate=name), *given)


@all_types
@pytest.mark.parametrize("f", WIDTHS)
def test_gelu_of_any_width(emulated, f, dtype):
    x, bias = 2 * drawn(3, f, dtype=dtype, seed=0), drawn(f, dtype=dtype, seed=1)
    for form in FORMS:
        compare_gelu(form, x)
        compare_gelu(form, x, bias)
    assert emulated.count == 8


@all_types
@pytest.mark.parametrize("offset", [1, 4])
def test_gelu_of_tensors_that_start_anywhere(emulated, offset, dtype):
    x, bias = (drawn(*n, dtype=dtype, seed=2, offset=offset) for n in ((5, 40), (40,)))
    compare_gelu("exact", x, bias)
    compare_gelu("tanh", x)
    assert emulated.count == 4


def test_gelu_of_many_rows_and_none(emulated):
    bias = drawn(8, dtype=torch.float32, seed=1)
    compare_gelu("exact", drawn(65_600, 8, dtype=torch.float32, seed=0), bias)
    compare_gelu("exact", drawn(0, 8, dtype=torch.float32, seed=0), bias)
    compare_gelu("tanh", drawn(0, 8, dtype=torch.float32, seed=0))
    assert emulated.count == 6


def test_gelu_far_from_zero_neither_overflows_nor_drifts(emulated):
    for dtype in TOLERANCE:
        for form in FORMS:
            compare_gelu(form, torch.tensor([-300.0, -12, -6, 6, 12, 300], dtype=dtype))


def test_bias_gradient_has_the_same_bits_in_any_order(emulated, monkeypatch):
    x, bias = (drawn(*n, dtype=torch.bfloat16, seed=0) for n in ((333, 96), (96,)))
    found = []
    for order in ("forward", "backward", "1"):
        monkeypatch.setenv("EMULATOR_ORDER", order)
        leaf = bias.clone().requires_grad_()
        gelu(x, leaf).backward(x)
        found.append(leaf.grad)
    assert all(torch.equal(found[0], other) for other in found[1:])


# -- SwiGLU ------------------------------------------------------------------------------------


def compare_swiglu(x: Tensor) -> None:
    def formula(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up

    compare(swiglu, formula, x)


@all_types
@pytest.mark.parametrize("f", WIDTHS)
def test_swiglu_of_any_width(emulated, f, dtype):
    compare_swiglu(2 * drawn(3, 2 * f, dtype=dtype, seed=0))
    assert emulated.count == 2


@all_types
@pytest.mark.parametrize("offset", [1, 4])
def test_swiglu_of_tensors_that_start_anywhere(emulated, offset, dtype):
    compare_swiglu(drawn(2, 5, 80, dtype=dtype, seed=2, offset=offset))
    assert emulated.count == 2


def test_swiglu_of_many_rows_and_none(emulated):
    compare_swiglu(drawn(65_600, 16, dtype=torch.bfloat16, seed=0))
    compare_swiglu(drawn(0, 16, dtype=torch.bfloat16, seed=0))
    assert emulated.count == 4


def test_swiglu_far_from_zero_is_finite(emulated):
    compare_swiglu(torch.tensor([[-300.0, -90, 90, 300, 1, 2, 3, 4]]))


# -- rotary positions --------------------------------------------------------------------------


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of `x` as plane vectors, by the angles that rope_angles gives."""
    a, b = x.chunk(2, dim=-1)
    c, s = (angles.double().chunk(2, dim=-1)[1] for angles in (cos, sin))
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


def compare_rope(x: Tensor, places: Tensor) -> None:
    """`places` [s, b] or [s, 1]."""
    cos, sin = rope_angles(places, x.shape[-1], 10_000.0, x.dtype)
    compare(lambda x: rope(x, cos, sin), lambda x: turned(x, cos, sin), x)


@all_types
@pytest.mark.parametrize("d", [2, 6, 14, 16, 62, 64, 128, 256])
def test_rope_of_any_head(emulated, d, dtype):
    x = drawn(5, 2, 3, d, dtype=dtype, seed=0)
    compare_rope(x, torch.arange(5)[:, None])
    compare_rope(x, torch.tensor([[0, 3, 4, 9, 1], [7, 7, 0, 1, 2]]).t())
    assert emulated.count == 4


@all_types
def test_rope_of_a_fused_projection_and_of_gradients_in_another_order(emulated, dtype):
    s, b, n, m, d = 7, 2, 4, 2, 16
    fused = drawn(s, b, (n + 2 * m) * d, dtype=dtype, seed=1)
    cos, sin = rope_angles(torch.arange(s)[:, None], d, 10_000.0, dtype)

    def attended(fused: Tensor, rotate) -> Tensor:
        """What attention does: heads before positions, so that gradients come in that order."""
        q, k, _ = fused.unflatten(-1, (n + 2 * m, d)).split((n, m, m), dim=2)
        q, k = (rotate(t, cos, sin).permute(1, 2, 0, 3) for t in (q, k))
        return (q * k.repeat_interleave(2, dim=1)).contiguous()

    compare(lambda fused: attended(fused, rope), lambda fused: attended(fused, turned), fused)
    assert emulated.count == 4


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_rope_of_tensors_that_start_anywhere(emulated, offset):
    compare_rope(drawn(3, 1, 2, 32, dtype=torch.bfloat16, seed=0, offset=offset), torch.ones(3, 1))
    assert emulated.count == 2


def test_rope_of_heads_that_are_apart(emulated):
    s, b, n, d = 3, 2, 8, 16  # samples are 16 bytes from each other, heads are not
    x = drawn(s, b, n, d + 1, dtype=torch.bfloat16, seed=0)[..., :d]
    cos, sin = rope_angles(torch.arange(s)[:, None], d, 10_000.0, torch.bfloat16)
    assert torch.equal(rope(x, cos, sin), rope(x.contiguous(), cos, sin))
    assert emulated.count == 2


def test_rope_of_many_rows_and_none(emulated):
    places = torch.arange(65_600)[:, None]
    compare_rope(drawn(65_600, 1, 1, 4, dtype=torch.float32, seed=0), places)
    compare_rope(drawn(0, 2, 3, 4, dtype=torch.float32, seed=0), places[:0])
    assert emulated.count == 4


def test_rope_leaves_angles_of_another_type_to_torch(emulated):
    x = drawn(3, 1, 2, 8, dtype=torch.bfloat16, seed=0)
    cos, sin = rope_angles(torch.arange(3)[:, None], 8, 10_000.0, torch.float32)
    assert rope(x, cos, sin).dtype == torch.float32 and emulated.count == 0


# -- dropout -----------------------------------------------------------------------------------


def names(*shape: int, seed: int = 1) -> Tensor:
    return rng.rows(rng.key(seed, "names"), torch.arange(torch.Size(shape).numel()).view(*shape, 1))


@all_types
@pytest.mark.parametrize("h", WIDTHS)
def test_mask_is_bit_for_bit_that_of_the_reference(emulated, h, dtype):
    for p in (1e-9, 0.1, 1 / 3, 0.9):
        x, hashed = torch.ones(3, h, dtype=dtype), names(3)
        leaf = x.clone().requires_grad_()
        y = dropout(leaf, hashed, p)
        y.backward(torch.ones_like(y))
        kept = keep_mask(hashed, torch.arange(h), p)
        assert torch.equal(y != 0, kept) and torch.equal(leaf.grad != 0, kept)
    assert emulated.count == 8


def test_mask_is_the_reference_s_where_a_number_is_exactly_p(emulated):
    hashed, columns = names(1), torch.arange(64)
    halves = (rng.mix(hashed ^ columns // 2) >> 32 * (columns % 2)).to(torch.int32)[0]
    for i in range(16):
        exact = (halves[i].item() + 2**31) / 2**32
        for p, kept in ((exact, True), (exact + 2**-33, False)):
            mask = dropout(torch.ones(1, 64), hashed, p) != 0
            assert mask[0, i] == kept
            assert torch.equal(mask, keep_mask(hashed, columns, p))
    assert emulated.count == 32


def compare_dropout(x: Tensor, hashed: Tensor, residual: Tensor | None, p: float = 0.3) -> None:
    kept = keep_mask(hashed, torch.arange(x.shape[-1]), p)
    given = (x,) if residual is None else (x, residual)
    compare(
        lambda x, *more: dropout(x, hashed, p, *more),
        lambda x, *more: sum(more, x * kept / (1 - p)),
        *given,
    )


@all_types
@pytest.mark.parametrize("h", WIDTHS)
def test_dropout_of_any_width(emulated, h, dtype):
    x, residual = (drawn(3, h, dtype=dtype, seed=seed) for seed in (0, 1))
    compare_dropout(x, names(3), None)
    compare_dropout(x, names(3), residual)
    assert emulated.count == 4


@all_types
@pytest.mark.parametrize("offset", [1, 4])
def test_dropout_of_tensors_that_start_anywhere(emulated, offset, dtype):
    x, residual = (drawn(2, 5, 40, dtype=dtype, seed=s, offset=offset) for s in (0, 1))
    compare_dropout(x, names(2, 5), residual)
    assert emulated.count == 2


def test_dropout_of_many_rows_and_none(emulated):
    for rows in (65_600, 0):
        x, residual = (drawn(rows, 8, dtype=torch.bfloat16, seed=seed) for seed in (0, 1))
        compare_dropout(x, names(rows), residual)
    assert emulated.count == 4


def test_dropout_of_a_call_names_what_the_reference_names(emulated):
    tokens = torch.zeros(6, 2, dtype=torch.int64)
    call = make_call(tokens, None, torch.tensor([5, 11]), seq_cut=Axis("tp", 2, 1))
    x = drawn(3, 2, 33, dtype=torch.float32, seed=0)
    ours = dropout_of_call(x, 0.4, 7, call, residual=x)
    assert emulated.count == 1
    backend.use_library(None)
    torch.testing.assert_close(ours, dropout_of_call(x, 0.4, 7, call, residual=x))


def test_residual_of_another_type_is_torch_s(emulated):
    x = drawn(3, 8, dtype=torch.bfloat16, seed=0)
    y = dropout(x, names(3), 0.5, torch.ones(3, 8))
    assert y.dtype == torch.float32 and emulated.count == 0


def test_names_of_other_rows_than_those_are_refused(emulated):
    with pytest.raises(RuntimeError, match="expand"):
        dropout(torch.ones(3, 8), names(6), 0.5)
    assert emulated.count == 0


# -- all of them -------------------------------------------------------------------------------


def test_nan_stays_where_it_is(emulated):
    x = drawn(4, 1, 2, 16, dtype=torch.float32, seed=0)
    x[2, 0, 1, 3] = torch.nan
    cos, sin = rope_angles(torch.arange(4)[:, None], 16, 10_000.0, torch.float32)
    p, hashed = 0.5, names(4, 1, 2)
    kept = keep_mask(hashed, torch.arange(16), p)
    pair = torch.zeros_like(x, dtype=torch.bool)
    pair[2, 0, 1, [3, 11]] = True  # what NaN is rotated with
    for y, expected in (
        (gelu(x), x.isnan()),
        (gelu_tanh(x), x.isnan()),
        (swiglu(x), x.isnan()[..., :8]),
        (rope(x, cos, sin), pair),
        (dropout(x, hashed, p), x.isnan() & kept),
        (dropout(torch.zeros_like(x), hashed, p, x), x.isnan()),
    ):
        assert torch.equal(y.isnan(), expected)
    assert emulated.count == 6


def test_more_rows_of_blocks_than_a_grid_may_have(emulated):
    x = drawn(65_537, 2 * 129, dtype=torch.float32, seed=0)
    gate, up = x.double().chunk(2, dim=-1)
    assert_close(swiglu(x), F.silu(gate) * up, torch.float32)
    assert emulated.count == 1


def test_without_kernels_torch_s_own_functions_run():
    x = drawn(3, 2, 2, 16, dtype=torch.float32, seed=0)
    bias = drawn(16, dtype=torch.float32, seed=1)
    gate, up = x.chunk(2, dim=-1)
    assert torch.equal(gelu(x, bias), F.gelu(x + bias))
    assert torch.equal(gelu_tanh(x), F.gelu(x, approximate="tanh"))
    assert torch.equal(swiglu(x), F.silu(gate) * up)
    hashed = names(3, 2, 2)
    kept = keep_mask(hashed, torch.arange(16), 0.3)
    assert torch.equal(
        dropout(x, hashed, 0.3, up.repeat(1, 1, 1, 2)),
        up.repeat(1, 1, 1, 2) + x.masked_fill(~kept, 0.0) / 0.7,
    )
