"""Held-out loss is of the model as it is used: nothing in it is there for training."""

from __future__ import annotations

import torch

from megalite.core.config import Config, ModelConfig, TrainConfig
from megalite.core.mesh import Mesh
from megalite.data.loader import Synthetic
from megalite.train.build import build_engine, build_loader

SIZES = {"num_layers": 2, "hidden_size": 16, "num_heads": 2, "seq_len": 8, "vocab_size": 31}
TRAINING = {"dropout": 0.5, "attention_dropout": 0.3, "label_smoothing": 0.2, "z_loss": 0.1}


def losses(**more: float) -> list[torch.Tensor]:
    train = TrainConfig(micro_batch_size=2, global_batch_size=4, device="cpu")
    config = Config(model=ModelConfig(**SIZES, **more), train=train)
    config.check(1)
    mesh = Mesh({"tp": 1, "pp": 1, "dp": 1, "cp": 1}, rank=0, kind="single")
    engine = build_engine(config, mesh, device=torch.device("cpu"), dtype=torch.float64)
    calls = build_loader(engine, Synthetic(31, 8, seed=1)).ordered(0, 4)
    with torch.no_grad():
        trained = [engine.stages[0](None, call) for call in calls]
    return [*engine.pipeline.evaluate(calls), *trained]


def test_evaluation_has_neither_dropout_nor_what_is_added_to_the_loss():
    plain, regular = losses(), losses(**TRAINING)
    assert len(plain) == len(regular) == 4
    for idx, (one, other) in enumerate(zip(plain, regular, strict=True)):
        assert torch.equal(one, other) == (idx < 2)
