"""megalite in a peer comparison: the library's own engine and train step."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import torch
from harness import BETAS, EPS, LR, WEIGHT_DECAY, Case, Workload, open_case, serve

from megalite.core.config import Config, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from megalite.core.world import World
from megalite.data.loader import TokenSource
from megalite.train.build import build_engine, build_loader, build_mesh
from megalite.train.loop import train_step

LAYOUTS: dict[str, dict[str, object]] = {
    "one": {"zero": 0},
    "dp2": {"dp": 2, "zero": 0},
    "dp2-zero1": {"dp": 2, "zero": 1},
    "dp2-zero3": {"dp": 2, "zero": 3},
    "tp2": {"tp": 2},
    "tp2-nosp": {"tp": 2, "sequence_parallel": False},
    "pp2": {"pp": 2},
    "pp2-zb-h2": {"pp": 2, "schedule": "zb-h2"},
}
CPU = torch.device("cpu")


class Rows(TokenSource):
    """The case's sequences in order, as a source of windows."""

    def __init__(self, tokens: np.ndarray):
        self.rows = tokens.reshape(-1, tokens.shape[-1])

    def __len__(self) -> int:
        return len(self.rows)

    def window(self, idx: int) -> np.ndarray:
        """Tokens [s + 1] of sequence `idx`."""
        return self.rows[idx]


def model_config(workload: Workload, *, llama: bool) -> ModelConfig:
    """GPT-2's form with a tied head, or LLaMA's as picotron has it."""
    w = workload
    gpt = ModelConfig(
        num_layers=w.num_layers,
        hidden_size=w.hidden_size,
        num_heads=w.num_heads,
        seq_len=w.seq_len,
        vocab_size=w.vocab_size,
    )
    if not llama:
        return gpt
    return replace(
        gpt,
        norm="rmsnorm",
        activation="swiglu",
        # A gated MLP of GPT-2's number of multiplications: 8/3 of the hidden size, even.
        ffn_hidden_size=2 * round(w.hidden_size * 4 / 3),
        position="rope",
        rope_theta=10000.0,
        bias=False,
        tie_embeddings=False,
    )


def build(case: Case) -> None:
    """This rank's engine, and steps with it."""
    config = Config(
        model=model_config(case.workload, llama=case.llama),
        layout=LayoutConfig(**({"dp": 1} | LAYOUTS[case.layout])),
        optim=OptimConfig(
            lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=WEIGHT_DECAY, clip_grad=0.0
        ),
        train=TrainConfig(
            micro_batch_size=case.workload.micro_batch_size,
            global_batch_size=case.workload.global_batch_size,
            device="cpu",
        ),
    )
    world = World.from_environment(os.environ)
    config.check(world.size)
    mesh = build_mesh(config, world, CPU)
    engine = build_engine(config, mesh, device=CPU, dtype=torch.float32)
    loader = build_loader(engine, Rows(case.tokens.numpy()))
    batch = config.train.global_batch_size

    def step(number: int) -> float:
        calls = loader.ordered(number * batch, batch)
        return train_step(engine, calls, lr=LR).loss.item()

    serve(step)


if __name__ == "__main__":
    build(open_case())
