"""What a dry run says a rank holds is what an engine holds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megalite.core.call import make_call
from megalite.core.config import Config, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from megalite.core.mesh import Mesh
from megalite.models.presets import num_parameters
from megalite.plan.dry_run import dry_run
from megalite.plan.memory import layer_activations, stage_memory
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


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_activations_are_what_autograd_keeps_of_a_layer(recompute):
    config = replace(config_of(recompute=recompute), train=replace(TRAIN, global_batch_size=2))
    engine = build_engine(config, Mesh({}), device=torch.device("cpu"), dtype=torch.float32)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.zeros(MODEL.seq_len, TRAIN.micro_batch_size, dtype=torch.int64)
    call = make_call(tokens, tokens, torch.arange(2), seq_cut=None)
    stage = engine.stages[0]
    layer = stage.units()[1]
    x = torch.randn(MODEL.seq_len, TRAIN.micro_batch_size, MODEL.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = stage.run_unit(layer, x, call)
    parameters = {p.untyped_storage().data_ptr() for p in layer.params}
    found = sum(size for pointer, size in kept.items() if pointer not in parameters)
    assert y.grad_fn is not None
    assert found == pytest.approx(layer_activations(MODEL, config, 4), rel=0.05)


def test_dry_run_prints_each_stage(capsys):
    dry_run(config_of(tp=2, pp=2, dp=2), 8)
    printed = capsys.readouterr().out
    assert "[r0 r1]" in printed and "pp1" in printed and "nothing was started" in printed
