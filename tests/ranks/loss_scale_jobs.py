"""Ranks that train in float16, one of which finds an overflow in the steps that are named."""

from __future__ import annotations

from collections.abc import Sequence

from megalite.core.config import Config
from megalite.train.build import Engine
from megalite.train.steps import Steps
from tests.ranks.jobs import calls_of, engine_of
from tests.ranks.resume_jobs import state_of


def train(
    rank: int, world: int, config: dict, steps: Sequence[int], planted: Sequence[int], who: int,
    value: float,
) -> list[dict]:  # fmt: skip
    """Take the `steps`, by their numbers. In those of `planted` a reduced gradient of rank `who`,
    and of no other, becomes `value`. Gives for each step what it left, on this rank.
    """
    engine = engine_of(Config.from_dict(config), rank, world, "float16")
    form, finish, found = Steps(engine), engine.zero.finish, []
    assert engine.optimizer.scaler is not None
    for step in steps:

        def spoilt(spoils: bool = rank == who and step in planted) -> None:
            finish()
            if spoils:
                _plant(engine, value)

        engine.zero.finish = spoilt  # type: ignore[method-assign]
        scale = engine.optimizer.scaler.scale
        report = form.take(calls_of(engine, step, varying=False), lr=1e-2)
        found.append(
            {
                "with": scale,
                "then": engine.optimizer.scaler.scale,
                "steps": engine.optimizer.step_count,
                "state": state_of(engine),
                "loss": report.loss.item(),
                "norm": report.norm.item(),
            }
        )
    return found


def _plant(engine: Engine, value: float) -> None:
    """Set one number that this rank counts."""
    for bucket in engine.zero.buckets:
        for lo, _ in bucket.layout.owned_spans(engine.zero.my_range(bucket))[:1]:
            bucket.grads[lo - bucket.updated[0]] = value
            return
    raise AssertionError("this rank counts no gradient")
