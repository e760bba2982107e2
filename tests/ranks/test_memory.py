"""The formulas of plan/memory.py against every live byte of a rank, counted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megalite.core.config import Config, LayoutConfig, ModelConfig, TrainConfig
from megalite.plan.memory import stage_memory

TOL = 0.05
DEEP = ModelConfig(num_layers=6, hidden_size=64, num_heads=4, vocab_size=128, seq_len=64)
"""With 4 samples at once nearly all of it is activations."""
HEAVY = replace(DEEP, vocab_size=2048, seq_len=8)
"""With one sample at once nearly all of it is parameters and what belongs to them."""
ADAPTED = replace(DEEP, lora_rank=16)
LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False}

CASES = [
    ("keeps all", DEEP, {}),
    ("selective", DEEP, {"recompute": "selective"}),
    ("selective, norms alone", DEEP,
     {"recompute": "selective", "recompute_modules": ("norm",)}),
    ("full", DEEP, {"recompute": "full"}),
    ("full, 2 layers", DEEP, {"recompute": "full", "recompute_layers": 2}),
    ("llama keeps all", replace(DEEP, **LLAMA), {}),
    ("llama selective", replace(DEEP, **LLAMA), {"recompute": "selective"}),
    ("dropout selective", replace(DEEP, dropout=0.1), {"recompute": "selective"}),
    ("adapters", ADAPTED, {}),
    ("adapters zero3, parameters", replace(HEAVY, lora_rank=4), {"dp": 2, "zero": 3}),
    ("cp2", DEEP, {"cp": 2}),
    ("cp2 gather", DEEP, {"cp": 2, "cp_form": "gather"}),
    ("cp2 ulysses", DEEP, {"cp": 2, "cp_form": "ulysses"}),
    ("tp2 selective", DEEP, {"tp": 2, "recompute": "selective"}),
    ("pp2", DEEP, {"pp": 2}),
    ("pp2 full", DEEP, {"pp": 2, "recompute": "full"}),
    *((f"pp2 {schedule} {name}", model, {"pp": 2, "schedule": schedule, "post_validation": late})
      for schedule, late in (("zb-h1", False), ("zb-h2", False), ("zb-h2", True))
      for name, model in ((f"{late} activations", DEEP), (f"{late} parameters", HEAVY))),
    *((f"dp2 zero{zero} {name}", model, {"dp": 2, "zero": zero})
      for zero in range(4) for name, model in (("activations", DEEP), ("parameters", HEAVY))),
]  # fmt: skip


@pytest.mark.parametrize("model, layout", [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_peak_of_a_step_follows_the_formula(model, layout, run_ranks):
    micro = 4 if model.seq_len > 8 else 1
    lay = LayoutConfig(bucket_mb=0.2, **layout)
    batch = micro * 4 * (lay.dp or 1)
    train = TrainConfig(micro_batch_size=micro, global_batch_size=batch, device="cpu")
    config = Config(model=model, layout=lay, train=train)
    world = lay.tp * lay.pp * lay.cp * (lay.dp or 1)
    config.check(world)
    found = run_ranks("tests.ranks.memory_jobs:peak", world, config=config.to_dict())
    for rank, counted in enumerate(found):
        said = stage_memory(config, world, rank * lay.pp // world, torch.float32)
        moving = said.activations + said.working
        assert said.total == pytest.approx(counted["total"], rel=TOL), (rank, counted, said)
        assert said.optimizer == counted["optimizer"]
        # What is whole for a while need not be so at the moment of the peak.
        assert counted["grads"] <= said.grads and counted["weights"] <= said.weights
        assert lay.zero >= 2 or counted["grads"] == said.grads
        assert lay.zero >= 3 or counted["weights"] == said.weights
        if model is not HEAVY:
            assert moving == pytest.approx(counted["moving"], rel=2 * TOL), (rank, counted, said)
