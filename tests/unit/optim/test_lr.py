"""Learning-rate curves: where they begin, end and bend; in steps and in tokens."""

import pytest

from megalite.core.config import OptimConfig
from megalite.optim.lr import learning_rate

SHAPES = ["cosine", "linear", "wsd", "inverse-square-root", "constant"]
UNITS = {"steps": 1.0, "tokens": 4096.0}
WARMUP, TOTAL = 10, 100


def rate(shape, step, unit=1.0, warmup=WARMUP, total=TOTAL, **fields):
    cfg = OptimConfig(lr=2.0, min_lr_ratio=0.1, lr_decay=shape, wsd_decay_share=0.2, **fields)
    return learning_rate(cfg, done=step * unit, warmup=warmup * unit, total=total * unit, step=unit)


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rate_warms_up_from_nearly_nothing_to_the_peak(shape, unit):
    assert rate(shape, 1, unit) == pytest.approx(0.2)
    assert rate(shape, 5, unit) == pytest.approx(1.0)
    assert rate(shape, WARMUP, unit) == pytest.approx(2.0)


@pytest.mark.parametrize("unit", UNITS.values(), ids=UNITS)
@pytest.mark.parametrize(
    ("shape", "half", "end"),
    [
        ("cosine", 1.1, 0.2),
        ("linear", 1.1, 0.2),
        ("wsd", 2.0, 0.2),
        ("inverse-square-root", 2 * (10 / 55) ** 0.5, 2 * 0.1**0.5),
        ("constant", 2.0, 2.0),
    ],
)
def test_rate_halfway_and_at_the_last_step(shape, half, end, unit):
    assert rate(shape, 55, unit) == pytest.approx(half)
    assert rate(shape, TOTAL, unit) == pytest.approx(end)


def test_wsd_is_halfway_down_in_the_middle_of_its_last_share():
    assert rate("wsd", 80) == pytest.approx(2.0) and rate("wsd", 90) == pytest.approx(1.1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("warmup", [1, 10, 90, 99])
def test_rate_has_no_jump_at_the_end_of_warmup(shape, warmup):
    before, at, after = (rate(shape, warmup + d, 4096.0, warmup=warmup) for d in (-1e-6, 0.0, 1e-6))
    assert at == pytest.approx(2.0)
    assert before == pytest.approx(at, abs=1e-4) and after == pytest.approx(at, abs=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_rate_never_rises_after_warmup_nor_falls_below_its_floor(shape):
    rates = [rate(shape, step) for step in range(WARMUP, TOTAL + 20)]
    assert all(b <= a + 1e-12 for a, b in zip(rates, rates[1:], strict=False))
    assert min(rates) >= 0.2 - 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_rate_does_not_depend_on_the_unit_without_warmup_either(shape):
    for step in (1, 2, 50, 100):
        assert rate(shape, step, 4096.0, warmup=0) == pytest.approx(rate(shape, step, warmup=0))


def test_first_step_without_warmup_has_the_peak_rate_of_inverse_square_root():
    assert rate("inverse-square-root", 1, warmup=0) == pytest.approx(2.0)
    assert rate("inverse-square-root", 4, warmup=0) == pytest.approx(1.0)
