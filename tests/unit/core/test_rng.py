"""Named random numbers: their statistics, and that they follow the index alone. Seeds are fixed."""

import math

import pytest
import torch

from megalite.core import rng
from megalite.core.call import Context, make_call
from megalite.core.mesh import Axis
from megalite.layers.dropout import dropout

N = 1 << 18
INDEX = torch.arange(N)


def within(value, expected, spread, sigmas=4.5):
    """Whether a mean of N numbers with that standard deviation is as near as it should be."""
    return abs(value - expected) < sigmas * spread / math.sqrt(N)


@pytest.mark.parametrize("low_bit", range(0, 64, 8))
def test_every_byte_of_the_bits_is_uniform_by_chi_squared(low_bit):
    byte = (rng.bits(rng.key(3, "bytes"), INDEX) >> low_bit) & 255
    counts = torch.bincount(byte, minlength=256).double()
    chi2 = ((counts - N / 256).square() / (N / 256)).sum().item()
    # 255 degrees of freedom: 4.5 standard deviations either way; too even is wrong as well
    assert abs(chi2 - 255) < 4.5 * math.sqrt(2 * 255), chi2


def test_neighbouring_numbers_are_not_correlated():
    u = rng.uniform(rng.bits(rng.key(3, "lag"), INDEX)) - 0.5
    for lag in (1, 2, 64, 1024):
        assert within((u[lag:] * u[:-lag]).mean().item(), 0, 1 / 12)


def test_one_flipped_bit_of_the_index_flips_half_of_the_result():
    base = rng.mix(INDEX[1:4097])
    for bit in (0, 1, 31, 62):
        changed = base ^ rng.mix(INDEX[1:4097] ^ (1 << bit))
        ones = sum(((changed >> b) & 1).double().mean().item() for b in range(64)) / 64
        assert abs(ones - 0.5) < 0.01


def test_uniform_has_the_moments_of_the_unit_interval():
    u = rng.uniform(rng.bits(rng.key(1, "u"), INDEX))
    assert u.min() >= 0 and u.max() < 1
    assert within(u.mean().item(), 0.5, math.sqrt(1 / 12))
    assert within(u.square().mean().item(), 1 / 3, math.sqrt(4 / 45))


def test_normal_has_the_first_four_moments_and_tails_of_a_gaussian():
    z = rng.normal(rng.key(2, "z"), INDEX)
    assert z.isfinite().all()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert within((z**power).mean().item(), moment, spread), power
    for edge in (1.0, 2.0, 3.0):
        p = math.erfc(edge / math.sqrt(2))
        assert within((z.abs() > edge).double().mean().item(), p, math.sqrt(p * (1 - p)))


def test_numbers_of_a_subset_are_the_subset_of_the_numbers():
    key = rng.key(5, "init", "x")
    some = torch.tensor([7, 3, 100000, 42])
    assert torch.equal(rng.normal(key, some), rng.normal(key, INDEX)[some])


def test_keys_of_different_names_and_seeds_differ():
    keys = [
        rng.key(seed, kind, name, layer)
        for seed in range(20)
        for kind in ("init", "dropout")
        for name in ("a", "b", "a.b")
        for layer in range(50)
    ]
    assert len(set(keys)) == len(keys)
    assert all(-(2**63) <= k < 2**63 for k in keys)


def test_numbers_of_two_names_are_independent():
    a, b = (rng.normal(rng.key(5, "init", name), INDEX) for name in ("x", "y"))
    assert within((a * b).mean().item(), 0, 1)


def test_rows_give_every_coordinate_its_own_key():
    keys = rng.rows(rng.key(1), torch.arange(60)[:, None], torch.arange(70))
    assert keys.shape == (60, 70) and keys.unique().numel() == 4200
    assert keys[3, 4] != keys[4, 3]


def mask_of(rows, batch, features, *, samples, seq_cut=None, context=None):
    tokens = torch.zeros(rows, batch, dtype=torch.int64)
    call = make_call(tokens, None, samples, seq_cut=seq_cut, context=context)
    return dropout(torch.ones(call.rows, batch, features), 0.3, rng.key(1, "drop"), call)


def test_dropout_mask_is_the_same_under_any_cut_of_rows_and_samples():
    full = mask_of(12, 6, 10, samples=torch.arange(6))
    for tp in (2, 3, 4):
        parts = [
            mask_of(12, 6, 10, samples=torch.arange(6), seq_cut=Axis("tp", tp, idx))
            for idx in range(tp)
        ]
        assert torch.equal(torch.cat(parts), full)
    assert torch.equal(mask_of(12, 2, 10, samples=torch.tensor([4, 5])), full[:, 4:])
    for cp_idx in range(2):
        context, samples = Context(Axis("cp", 2, cp_idx), "ring"), torch.arange(6)
        parts = [
            mask_of(12, 6, 10, samples=samples, seq_cut=Axis("tp", 3, idx), context=context)
            for idx in range(3)
        ]
        assert torch.equal(torch.cat(parts), context.take(full))


def test_dropout_keeps_the_mean_and_drops_the_asked_share():
    y = mask_of(256, 8, 64, samples=torch.arange(8))
    n = y.numel()
    assert abs((y == 0).double().mean().item() - 0.3) < 4.5 * math.sqrt(0.21 / n)
    assert torch.allclose(y[y > 0], torch.tensor(1 / 0.7))


def test_dropout_drops_neighbours_that_share_a_hash_independently():
    dropped = mask_of(256, 8, 64, samples=torch.arange(8)) == 0
    both = dropped[..., 0::2] & dropped[..., 1::2]
    n, p = both.numel(), 0.3 * 0.3
    assert abs(both.double().mean().item() - p) < 4.5 * math.sqrt(p * (1 - p) / n)
