"""What the ranks of test_memory.py do: one train step, every live byte counted."""

from __future__ import annotations

import gc

import torch

from megalite.core.config import Config
from megalite.core.mesh import Mesh
from megalite.train.build import build_engine, mesh_sizes
from megalite.train.steps import Steps
from tests.live_bytes import LiveBytes
from tests.ranks.jobs import CPU, calls_of


def peak(rank: int, world: int, config: dict) -> dict[str, int]:
    """The most bytes this rank held in its second step, and of which kind they were."""
    cfg = Config.from_dict(config)
    mesh = Mesh(mesh_sizes(cfg, world), rank=rank, kind="real" if world > 1 else "single")
    with LiveBytes() as live:
        engine = build_engine(cfg, mesh, device=CPU, dtype=torch.float32)
        steps = Steps(engine)
        for step in range(2):
            gc.collect()
            calls = calls_of(engine, step, False)
            if step == 1:
                live.mark()
            steps.take(calls, lr=1e-3)
            del calls
    buckets, states = engine.zero.buckets, engine.optimizer.states
    pool = [lane for lanes in engine.zero._spare.values() for lane in lanes]
    whole = [b.whole_grads for b in buckets if b.whole_grads is not None]
    found = {
        "weights": live.peak_of([t for b in buckets for t in (b.params, b.weights)]),
        "grads": live.peak_of([*(b.grads for b in buckets), *whole, *pool]),
        "optimizer": live.peak_of([t for state in states for t in state.values()]),
    }
    return {**found, "moving": live.peak - sum(found.values()), "total": live.peak}
