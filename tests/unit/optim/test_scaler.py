"""The rule of the loss scale, step by step. On ranks: tests/ranks/test_loss_scale.py."""

from __future__ import annotations

import pytest

from megalite.core.config import OptimConfig
from megalite.optim.scaler import LossScaler


def scaler_of(**fields) -> LossScaler:
    settings = {"initial_loss_scale": 64.0, "loss_scale_window": 3, "hysteresis": 2}
    return LossScaler(OptimConfig(**{**settings, **fields}))


def scales(scaler: LossScaler, steps: str) -> list[float]:
    """The scale after each step: o overflows, any other is good."""
    found = []
    for step in steps:
        scaler.follow(overflow=step == "o")
        found.append(scaler.scale)
    return found


def test_scale_doubles_after_a_window_of_good_steps_in_a_row():
    assert scales(scaler_of(), "......") == [64, 64, 128, 128, 128, 256]
    assert scales(scaler_of(), "..o...") == [64, 64, 64, 64, 64, 128]


def test_scale_halves_at_the_overflow_that_hysteresis_names_and_at_each_after_it():
    assert scales(scaler_of(), "oooo") == [64, 32, 16, 8]
    assert scales(scaler_of(hysteresis=1), "o.o") == [32, 32, 16]
    assert scales(scaler_of(hysteresis=3), "o.ooo") == [64, 64, 64, 32, 16]


def test_hysteresis_is_whole_again_after_a_window_of_good_steps():
    # The window's end doubles the scale, and one overflow is forgiven again.
    assert scales(scaler_of(), "oo...oo") == [64, 32, 32, 32, 64, 64, 32]


def test_scale_never_falls_below_its_minimum():
    assert scales(scaler_of(hysteresis=1, min_loss_scale=20.0), "ooo") == [32, 20, 20]
    assert scales(scaler_of(hysteresis=1), "o" * 10)[-1] == 1


def test_fixed_scale_stays_and_keeps_no_state():
    scaler = scaler_of(loss_scale=128.0)
    assert scales(scaler, "oooo....") == [128] * 8
    scaler.load({"scale": 2.0, "good_steps": 1, "tolerance": 1})
    assert scaler.scale == 128 and scaler.state() == {}


@pytest.mark.parametrize("steps", ["", "o", "oo.", "oo..", "..o...o"])
def test_scale_that_is_loaded_goes_on_as_the_one_that_was_saved(steps):
    first, second = scaler_of(), scaler_of(initial_loss_scale=4.0)
    scales(first, steps)
    second.load(first.state())
    assert scales(second, "..oo...o") == scales(first, "..oo...o")


def test_checkpoint_without_a_scale_leaves_the_first_one():
    scaler = scaler_of()
    scaler.load({})
    assert scales(scaler, "...") == [64, 64, 128]
