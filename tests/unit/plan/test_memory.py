"""What a dry run says a rank holds is what an engine holds; a step's peak: ranks/test_memory.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megalite.core.config import (
    Config,
    DataConfig,
    LayoutConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from megalite.core.mesh import Mesh
from megalite.models.presets import num_parameters
from megalite.plan.dry_run import dry_run
from megalite.plan.memory import stage_memory
from megalite.train.build import build_engine, mesh_sizes

MODEL = ModelConfig(num_layers=4, hidden_size=64, num_heads=4, vocab_size=512, seq_len=32)
TRAIN = TrainConfig(micro_batch_size=2, global_batch_size=32)


def config_of(**layout) -> Config:
    return Config(model=MODEL, layout=LayoutConfig(**layout), train=TRAIN)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_static_bytes_are_those_of_the_engine(zero, optimizer):
    config = config_of(tp=2, pp=2, dp=4, zero=zero)
    config = replace(config, optim=OptimConfig(optimizer=optimizer))
    for pp in range(2):
        said = stage_memory(config, 16, pp, torch.float32)
        mesh = Mesh(mesh_sizes(config, 16), rank=8 * pp, kind="fake")
        engine = build_engine(config, mesh, device=torch.device("cpu"), dtype=torch.float32)
        buckets = engine.zero.buckets
        held = [b.weights if zero == 3 else b.params for b in buckets]
        grads = [b.grads if b.whole_grads is None else b.whole_grads for b in buckets]
        states = [t for state in engine.optimizer.states for t in state.values()]
        # Beside what is kept there is what is whole for a while, from stages 2 and 3 on.
        assert bytes_of(states) == said.optimizer
        assert bytes_of(grads) <= said.grads and (zero >= 2 or bytes_of(grads) == said.grads)
        assert bytes_of(held) <= said.weights and (zero == 3 or bytes_of(held) == said.weights)


def bytes_of(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_stages_hold_every_parameter():
    config = config_of(pp=4, dp=1)
    stages = [stage_memory(config, 4, pp, torch.float32) for pp in range(4)]
    table = MODEL.vocab_size * MODEL.hidden_size  # tied: there is a second copy at the other end
    assert sum(s.parameters for s in stages) == num_parameters(MODEL) + table
    assert sum(s.layers for s in stages) == MODEL.num_layers


def test_zero_falls_in_order():
    model = replace(MODEL, num_layers=16)
    config = replace(config_of(dp=16, bucket_mb=0.1), model=model)
    totals = []
    for zero in range(4):
        asked = replace(config, layout=replace(config.layout, zero=zero))
        totals.append(stage_memory(asked, 16, 0, torch.float32).total)
    assert totals == sorted(totals, reverse=True)


def test_recomputation_falls_in_order():
    asked = [{}, {"recompute_modules": ("norm",)}, {}, {"recompute_layers": 2}, {}]
    forms = ("none", "selective", "selective", "full", "full")
    totals = [
        stage_memory(config_of(recompute=how, **more), 1, 0, torch.float32).total
        for how, more in zip(forms, asked, strict=True)
    ]
    assert totals[:3] == sorted(totals[:3], reverse=True) and totals[3] > totals[4]
    assert totals[2] > totals[4]


def test_dry_run_prints_each_stage(capsys):
    dry_run(config_of(tp=2, pp=2, dp=2), 8)
    printed = capsys.readouterr().out
    assert "[r0 r1]" in printed and "pp1" in printed and "nothing was started" in printed


@pytest.mark.parametrize(
    ("verb", "data"),
    [
        ("pretrain", DataConfig()),
        ("sft", DataConfig(data="talks.jsonl")),
        ("dpo", DataConfig(data="pairs.jsonl", dpo_beta=0.1)),
    ],
)
def test_dry_run_says_what_would_train(verb, data, capsys):
    dry_run(replace(config_of(tp=2, dp=2), data=data), 4)
    assert capsys.readouterr().out.startswith(f"megalite {verb}, dry run | 4 ranks")
