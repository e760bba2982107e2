"""muP: what one step does to activations does not depend on the width; without it, it does.

The coordinate check of Yang et al. 2022 (arXiv 2203.03466), appendix D.1: widths 64 to 512 at one
learning rate, and how far activations have moved after a few steps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from megalite.core.call import Call
from megalite.core.config import Config, ModelConfig, OptimConfig, TrainConfig
from megalite.core.mesh import Mesh
from megalite.core.params import named_parameters, traits_of
from megalite.data.loader import Synthetic
from megalite.train.build import build_engine, build_loader
from megalite.train.loop import train_step

CPU = torch.device("cpu")
WIDTHS = (64, 192, 512)
BASE = 64
STEPS = 3
MODEL = ModelConfig(
    num_layers=2, num_heads=4, vocab_size=128, seq_len=16, tie_embeddings=False, init_std=0.1
)


def engine_of(width: int, mup: bool):
    config = Config(
        model=replace(MODEL, hidden_size=width, mup_base_width=BASE if mup else None),
        optim=OptimConfig(lr=1e-2, clip_grad=0.0, weight_decay=0.0),
        train=TrainConfig(micro_batch_size=4, global_batch_size=4),
    )
    config.check(1)
    return build_engine(config, Mesh({}), device=CPU, dtype=torch.float32)


@cache
def moved(width: int, mup: bool) -> dict[str, float]:
    """How far, root mean square, STEPS steps move the residual after the layers, and the logits."""
    engine = engine_of(width, mup)
    stage, seen = engine.stages[0], {}
    data = Synthetic(MODEL.vocab_size, MODEL.seq_len, 1)
    probe = torch.from_numpy(data.window(10**6)[:-1].copy())[:, None]
    stage.final_norm.register_forward_pre_hook(
        lambda module, args: seen.update(residual=args[0].detach().clone())
    )

    @torch.no_grad()
    def look() -> dict[str, torch.Tensor]:
        at, samples = torch.arange(len(probe)), torch.zeros(1, dtype=torch.int64)
        logits = stage(None, Call(probe, None, at, samples, training=False))
        return {"logits": logits.clone(), **seen}

    loader = build_loader(engine, data)
    before = look()
    for step in range(STEPS):
        train_step(engine, loader.step(4 * step), lr=engine.config.optim.lr)
    after = look()
    return {name: (after[name] - before[name]).square().mean().sqrt().item() for name in before}


@pytest.mark.parametrize("what", ["residual", "logits"])
def test_updates_move_activations_alike_at_every_width_with_mup_alone(what):
    with_mup = [moved(width, True)[what] for width in WIDTHS]
    without = [moved(width, False)[what] for width in WIDTHS]
    assert max(with_mup) < 2 * min(with_mup), with_mup
    assert without[-1] > 3 * without[0] and without == sorted(without), without


def test_weights_and_rates_are_those_of_table_8():
    wide, base = engine_of(128, True), engine_of(64, True)
    plain = engine_of(128, False)
    there = dict(named_parameters(base.stages[0]))
    usual = dict(named_parameters(plain.stages[0]))
    for name, param in named_parameters(wide.stages[0]):
        hidden = name.startswith("layers.") and param.dim() == 2
        assert traits_of(param).lr_mult == (0.5 if hidden else 1.0)
        assert traits_of(there[name]).lr_mult == 1.0
        torch.testing.assert_close(param.data, usual[name].data * (0.5**0.5 if hidden else 1.0))


def test_decay_of_a_step_is_the_same_at_every_width():
    engine = engine_of(128, True)
    optimizer = engine.optimizer
    optimizer.cfg = replace(optimizer.cfg, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in named_parameters(engine.stages[0])}
    optimizer.step(lr=0.1, scale=torch.tensor(1.0))  # gradients are zero: decay alone
    for name, param in named_parameters(engine.stages[0]):
        factor = 0.95 if param.dim() == 2 else 1.0
        torch.testing.assert_close(param.detach(), before[name] * factor, msg=name)
