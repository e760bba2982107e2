"""core/host_group.py: what ranks that share a GPU talk through, here with copies on one CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megalite.core.config import Config, LayoutConfig, ModelConfig
from megalite.train.verify_command import given_row

JOBS = "tests.ranks.host_group_jobs:"


@pytest.mark.parametrize("job", ["check_collectives", "check_pairs_are_adjoint"])
def test_collectives_by_way_of_copies_equal_arithmetic(job, run_ranks, tmp_path):
    asked = {"job": f"tests.ranks.collective_jobs:{job}", "store": str(tmp_path / "store")}
    for seen in run_ranks(JOBS + "by_copies", 3, **asked):
        assert seen["copies"] > 0


@pytest.mark.parametrize(
    "layout",
    [
        {"tp": 2, "pp": 2, "vpp": 2, "schedule": "interleaved"},
        {"cp": 2, "dp": 2, "zero": 3},
        {"cp": 2, "cp_form": "ulysses", "pp": 2, "schedule": "zb-h1"},
    ],
    ids=lambda layout: " ".join(f"{name}{value}" for name, value in layout.items()),
)
def test_layout_by_way_of_copies_equals_one_process(layout, run_ranks, tmp_path):
    row = given_row(Config(model=ModelConfig(), layout=LayoutConfig(**layout)), most=4)
    ref = str(tmp_path / "ref.npz")
    alone = replace(row.config, layout=LayoutConfig(zero=0))
    common = {"varying": False, "steps": 2}
    run_ranks("megalite.train.verify:reference", 1, config=alone.to_dict(), out=ref, **common)
    asked = {**common, "config": row.config.to_dict(), "precision": "fp64", "ref": ref}
    for seen in run_ranks(
        JOBS + "by_copies",
        row.world,
        job="megalite.train.verify:compare",
        store=str(tmp_path / "store"),
        kwargs=asked,
    ):
        assert seen["result"]["first"] is None
        assert seen["copies"] > 20
