"""A rank that runs out of memory names what it held, and the flag that the plan says frees most."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megalite.core.config import Config, LayoutConfig, ModelConfig, TrainConfig
from megalite.core.world import World
from megalite.plan import out_of_memory
from megalite.plan.memory import stage_memory
from megalite.plan.out_of_memory import alternatives, explain

MODEL = ModelConfig(num_layers=8, hidden_size=256, num_heads=8, vocab_size=512, seq_len=64)
CPU_ERROR = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 3221225472 bytes. Error code 12 (Cannot allocate memory)"
)
GPU_ERROR = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB"
)
WORLD = World(rank=5, size=8, local_rank=5, local_size=8, launched=True)


def config_of(micro: int = 1, seq_len: int = 64, **layout) -> Config:
    train = TrainConfig(micro_batch_size=micro, global_batch_size=64, device="cpu")
    model = replace(MODEL, seq_len=seq_len)
    return Config(model=model, layout=LayoutConfig(**layout), train=train)


def test_line_has_what_was_asked_and_the_plan_by_class():
    config = config_of(pp=2)
    said, plan = explain(CPU_ERROR, config, WORLD), stage_memory(config, 8, 1, torch.float32)
    assert said.startswith("out of memory: asked for 3.00 GiB, held ")
    assert f"the plan of pp1 is weights {plan.weights / 2**20:.2f} MiB, gradients " in said
    assert f"optimizer states {plan.optimizer / 2**20:.2f} MiB, activations " in said
    assert f"in all {plan.total / 2**20:.2f} MiB; --" in said and "\n" not in said


@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (config_of(zero=0), "--zero 3"),
        (config_of(micro=8, seq_len=512, zero=3), "--recompute full"),
        (config_of(micro=8, seq_len=512, zero=3, recompute="full"), "--micro-batch-size 4"),
    ],
)
def test_flag_is_the_one_whose_plan_is_smallest(config, flag):
    totals = {f: stage_memory(c, 8, 0, torch.float32).total for f, c in alternatives(config, 8)}
    assert min(totals, key=totals.get) == flag
    saved = stage_memory(config, 8, 0, torch.float32).total - totals[flag]
    said = explain(CPU_ERROR, config, WORLD)
    amount = f"{saved / 2**20:.2f} MiB" if saved < 2**30 else f"{saved / 2**30:.2f} GiB"
    assert said.endswith(f"; {flag} frees most of it, {amount}")


def test_flags_that_cannot_run_are_not_proposed():
    """Parts are named, and full recomputation has none."""
    config = config_of(recompute="selective", recompute_modules=("norm",))
    flags = [flag for flag, _ in alternatives(config, 8)]
    assert "--zero 2" in flags and "--recompute full" not in flags


def test_where_no_flag_is_left_more_ranks_are():
    config = config_of(zero=3, tp=8, recompute="full")
    said = explain(MemoryError(), config, replace(WORLD, rank=0))
    assert said.startswith("out of memory: held ") and said.endswith("raise --tp or --pp")


def test_gpu_s_own_words_and_count_are_used(monkeypatch):
    monkeypatch.setattr(out_of_memory, "pick_device", lambda *_: torch.device("cuda"))
    monkeypatch.setattr(out_of_memory, "peak_memory_gb", lambda device: 77.0)
    config = config_of(pp=2)
    config = replace(config, train=replace(config.train, device="cuda"))
    said = explain(GPU_ERROR, config, WORLD)
    assert said.startswith("out of memory: asked for 2.50 GiB, held 77.00 GiB at most; the plan")
    plan = stage_memory(config, 8, 1, torch.bfloat16)
    assert f"in all {plan.total / 2**20:.2f} MiB" in said
    host = explain(CPU_ERROR, config, WORLD)
    assert host.startswith("out of memory of the host: asked for 3.00 GiB") and "plan" not in host
