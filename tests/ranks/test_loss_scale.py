"""An overflow that one rank alone finds skips the step on all of them, and moves one scale."""

from __future__ import annotations

import math
from math import prod

import pytest

from megalite.core.config import Config, LayoutConfig, ModelConfig, OptimConfig, TrainConfig

JOBS = "tests.ranks.loss_scale_jobs"
MODEL = ModelConfig(
    num_layers=2, hidden_size=24, num_heads=4, vocab_size=61, seq_len=12, init_std=0.1
)
SCALE = 256.0
LAYOUTS = [
    ({"tp": 2, "dp": 2}, 3, math.inf),
    ({"tp": 2, "dp": 2, "zero": 3}, 0, math.nan),
    ({"pp": 2}, 0, math.inf),
    ({"pp": 2, "dp": 2, "zero": 2, "schedule": "zb-h1"}, 3, -math.inf),
]


def config_of(layout: dict, **optim) -> dict:
    return Config(
        model=MODEL,
        layout=LayoutConfig(**layout),
        optim=OptimConfig(initial_loss_scale=SCALE, **optim),
        train=TrainConfig(micro_batch_size=1, global_batch_size=4),
    ).to_dict()


def world_of(layout: dict) -> int:
    return prod(layout.get(axis, 1) for axis in ("tp", "pp", "dp"))


@pytest.mark.parametrize("layout, who, value", LAYOUTS, ids=str)
def test_overflow_on_one_rank_skips_the_step_on_all(layout, who, value, run_ranks):
    config = config_of(layout, loss_scale_window=2)
    job = {"config": config, "who": who, "value": value}
    ranks = run_ranks(
        f"{JOBS}:train", world_of(layout), steps=[*range(7)], planted=[1, 3, 4], **job
    )
    # Two overflows halve it, and each one more; two good steps in a row double it.
    for rank in ranks:
        assert [step["with"] for step in rank] == [SCALE / by for by in (1, 1, 1, 1, 2, 4, 4)]
        assert rank[-1]["then"] == SCALE / 2
        assert [step["steps"] for step in rank] == [1, 1, 2, 2, 2, 3, 4]
        for number, (before, after) in enumerate(zip(rank, rank[1:], strict=False), start=1):
            assert (after["state"] == before["state"]) == (number in (1, 3, 4))
            assert math.isfinite(after["norm"]) == (number not in (1, 3, 4))
        assert [(s["loss"], s["norm"]) for s in rank if math.isfinite(s["norm"])] == [
            (s["loss"], s["norm"]) for s in ranks[0] if math.isfinite(s["norm"])
        ]


@pytest.mark.parametrize("layout, who, value", LAYOUTS[:3], ids=str)
def test_run_goes_on_as_if_a_skipped_step_had_not_been(layout, who, value, run_ranks):
    config, world = config_of(layout), world_of(layout)
    job = {"config": config, "who": who, "value": value}
    skipped = run_ranks(f"{JOBS}:train", world, steps=[0, 1, 2, 3], planted=[1], **job)
    without = run_ranks(f"{JOBS}:train", world, steps=[0, 2, 3], planted=[], **job)
    for ours, theirs in zip(skipped, without, strict=True):
        assert [ours[0], *ours[2:]] == theirs
        assert len({step["state"] for step in theirs}) == 3


def test_norm_and_loss_are_those_of_the_loss_whatever_the_scale(run_ranks):

    def trained(scale: float) -> list[dict]:
        config = config_of({"tp": 2}, loss_scale=scale, clip_grad=0.5)
        job = {"config": config, "who": 0, "value": 0.0, "planted": []}
        ranks = run_ranks(f"{JOBS}:train", 2, steps=[0], **job)
        return [step for rank in ranks for step in rank]

    small, large = trained(SCALE), trained(2 * SCALE)
    assert [s["loss"] for s in small] == [s["loss"] for s in large]
    for ours, theirs in zip(small, large, strict=True):
        assert ours["norm"] == pytest.approx(theirs["norm"], rel=1e-3)
        assert ours["norm"] > 0.5 and (ours["with"], theirs["with"]) == (SCALE, 2 * SCALE)
