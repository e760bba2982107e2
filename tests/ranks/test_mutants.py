"""A seeded few of the mutants of tools/mutate.py: verify catches each, or it is said why it cannot.

The whole suite is `python tools/mutate.py`.
"""

from __future__ import annotations

import pytest

from tools.mutate import EQUIVALENT, LAYOUTS, Bench, drawn, every_mutant

COUNT, SEED = 40, 1


@pytest.fixture(scope="module")
def bench(ranks, tmp_path_factory):
    return Bench(ranks, tmp_path_factory.mktemp("mutants"))


@pytest.fixture(scope="module")
def mutants(bench):
    return every_mutant(bench)


def test_mutants_are_of_every_place(mutants):
    """Every collective that a step makes, every parameter, and every edge of the schedules."""
    files = {m.where.partition(":")[0] for m in mutants if m.kind == "comm"}
    assert files >= {
        "layers/linear.py", "layers/embedding.py", "layers/loss.py", "layers/context.py",
        "parallel/zero.py", "parallel/gather.py", "parallel/pipeline.py", "train/loop.py",
        "core/comm.py",
    }  # fmt: skip
    assert {m.where for m in mutants if m.kind == "shard"} >= {
        "embedding.weight", "layers.N.attention.qkv.weight", "layers.N.attention.q_norm.weight",
    }  # fmt: skip
    assert sum(m.kind == "schedule" for m in mutants) > 150
    assert {m.change for m in mutants if m.kind == "comm"} == {
        "drop", "double", "wrong axis", "stale",
    }  # fmt: skip
    assert {name for m in mutants for name in m.layouts} == set(LAYOUTS)


def test_equivalent_mutants_are_few_and_have_a_reason(mutants):
    dear = [m for m in mutants if m.kind != "schedule"]
    equal = [m for m in dear if m.why_equivalent]
    assert len(equal) < len(dear) / 10
    assert {(m.op, m.change) for m in equal} <= set(EQUIVALENT)


def test_drawn_mutants_are_caught(mutants, bench):
    chosen = [m for m in drawn(mutants, COUNT, SEED) if not m.why_equivalent]
    survived = [str(mutant) for mutant in chosen if not bench.caught(mutant)]
    assert len(chosen) > COUNT - 8
    assert not survived
