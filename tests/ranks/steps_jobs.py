"""Ranks that take the same steps twice: past the barrier of the gradient norm, and up to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from megalite.core.config import Config
from megalite.core.errors import RunError
from megalite.train.build import Engine
from megalite.train.steps import Steps
from tests.ranks.jobs import calls_of, engine_of
from tests.ranks.resume_jobs import state_of

PATIENCE = 60.0
"""Seconds after which a rank that waits for a file gives up."""


def both(rank: int, world: int, config: dict, steps: int, nan_at: int = -1) -> dict:
    """Loss and norm of each step in both forms, a hash of all numbers after it, and how often an
    update was taken back. `nan_at`: the step in which a gradient of the last rank becomes NaN.
    """
    found: dict = {}
    for late in (False, True):
        form = Steps(_engine(config, rank, world, late))
        engine = form.engine
        spoil = _spoiling(engine, at=nan_at if rank == world - 1 else -1)
        reports, states = [], []
        for step in range(steps):
            spoil(step)
            reports.append(form.take(calls_of(engine, step, varying=True), lr=1e-2))
            if step == steps - 1 or step == steps // 2:  # not after each: it would wait for it
                form.settle()
                states.append(state_of(engine))
        scalars = [(r.loss.item().hex(), r.norm.item().hex()) for r in reports]
        found["late" if late else "barrier"] = [scalars, states]
        found["norms"], found["undone"] = [r.norm.item() for r in reports], form.undone
    return found


def _engine(config: dict, rank: int, world: int, late: bool) -> Engine:
    built = Config.from_dict(config)
    layout = replace(built.layout, post_validation=late)
    return engine_of(replace(built, layout=layout), rank, world, "float32")


def _spoiling(engine: Engine, at: int) -> Callable[[int], None]:
    """What is told of each step before it; in step `at` a reduced gradient becomes NaN."""
    finish, now = engine.zero.finish, [-1]

    def spoilt() -> None:
        finish()
        if now[0] == at:
            bucket = engine.zero.buckets[0]
            lo, hi = bucket.layout.owned_spans(engine.zero.my_range(bucket))[0]
            bucket.grads[lo - bucket.updated[0] : hi - bucket.updated[0]].fill_(torch.nan)

    engine.zero.finish = spoilt  # type: ignore[method-assign]
    return lambda step: now.__setitem__(0, step)


def run_ahead(rank: int, world: int, config: dict, flag: str) -> list[str]:
    """Two steps, in the first of which the last rank gives its part of the norm only when the first
    has done the second step's forwards up to its first backward. Gives the first rank's actions.
    """
    engine = _engine(config, rank, world, late=True)
    form, ahead, actions = Steps(engine), Path(flag), []
    settle, sum_of_squares = form.settle, engine.optimizer.sum_of_squares
    engine.mesh.log.stretches = []

    def settle_noted() -> bool:
        if rank == 0 and form.undo is not None:
            ahead.touch()
        return settle()

    def held_back() -> torch.Tensor:
        deadline = time.monotonic() + PATIENCE
        while rank == world - 1 and not ahead.exists():
            if time.monotonic() > deadline:
                raise RunError("the first rank waits for the norm before it goes on")
            time.sleep(0.01)
        return sum_of_squares()

    form.settle = settle_noted  # type: ignore[method-assign]
    engine.optimizer.sum_of_squares = held_back  # type: ignore[method-assign]
    for step in range(2):
        form.take(calls_of(engine, step, varying=False), lr=1e-2)
    form.settle()
    for stretch in engine.mesh.log.stretches:
        if stretch.what in ("act", "optimizer", "validate"):
            actions.append(str(stretch.action or stretch.what))
    return actions
