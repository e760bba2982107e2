"""Our one-process engine equals a plain torch model: what the oracle's reference rests on."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megalite.core.config import (
    Config,
    DataConfig,
    LayoutConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)

TOL = 1e-10
STEPS = 3

GPT = ModelConfig(
    num_layers=2, hidden_size=24, num_heads=4, vocab_size=37, seq_len=10, init_std=0.2
)
LLAMA = replace(
    GPT,
    norm="rmsnorm",
    activation="swiglu",
    position="rope",
    bias=False,
    ffn_hidden_size=32,
    num_kv_heads=2,
)
MODELS = {
    "gpt2": replace(GPT, activation="gelu-tanh"),
    "gelu, untied": replace(GPT, tie_embeddings=False),
    "llama with shared kv heads": replace(LLAMA, tie_embeddings=False),
    "everything": replace(
        LLAMA,
        activation="gelu-tanh",
        qk_norm=True,
        sliding_window=4,
        logit_soft_cap=2.0,
        attention_soft_cap=1.5,
    ),
    "sliding window, SDPA": replace(GPT, sliding_window=3),
    "layernorm on q and k": replace(GPT, qk_norm=True, num_kv_heads=1),
}


OPTIMS = {
    "muon, gate and up apart": (replace(LLAMA, tie_embeddings=False), {"optimizer": "muon"}),
    "muon": (GPT, {"optimizer": "muon", "momentum": 0.8}),
    "sgd": (GPT, {"optimizer": "sgd", "momentum": 0.8}),
    "muP": (replace(GPT, mup_base_width=8), {}),
    "muP, explicit softmax": (
        replace(LLAMA, mup_base_width=96, attention_soft_cap=1.5, logit_soft_cap=2.0),
        {},
    ),
}
CASES = {**{name: (model, {}) for name, model in MODELS.items()}, **OPTIMS}
RUNS = [(name, False) for name in CASES] + [(name, True) for name in MODELS]


@pytest.mark.parametrize("name, apart", RUNS, ids=[n + " documents" * a for n, a in RUNS])
def test_engine_equals_the_plain_twin(name: str, apart: bool, run_ranks):
    model, optim = CASES[name]
    # Several microbatches and masked labels on our side; one batch and one mean on the twin's.
    config = Config(
        model=model,
        layout=LayoutConfig(bucket_mb=0.01),
        data=DataConfig(reset_attention_mask=apart),
        optim=OptimConfig(lr=1e-2, clip_grad=0.3, eps=1e-4, **optim),
        train=TrainConfig(micro_batch_size=2, global_batch_size=6),
    )
    config.check(1)
    (worst,) = run_ranks(
        "tests.ranks.twin_jobs:compare_with_twin", 1, config=config.to_dict(), steps=STEPS
    )
    assert max(worst.values()) <= TOL, worst
