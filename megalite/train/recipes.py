"""Whole runs by name (`--recipe demo`): a recipe is a function that returns a Config.

No torch here, so that `megalite pretrain --help` stays quick. Flags beside a recipe win over it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megalite.core.config import (
    Config,
    DataConfig,
    LayoutConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)


def demo() -> Config:
    """A small GPT that learns Python on two cores in minutes, as TP2 x PP2 x DP2: 8 processes."""
    return Config(
        model=ModelConfig(
            num_layers=4,
            hidden_size=160,
            num_heads=4,
            vocab_size=2048,
            seq_len=256,
            position="rope",
        ),
        layout=LayoutConfig(tp=2, pp=2, dp=2, schedule="1f1b", zero=1),
        data=DataConfig(
            data="runs/demo/data/train",
            valid_data="runs/demo/data/valid",
            tokenizer="runs/demo/tokenizer.json",
        ),
        optim=OptimConfig(lr=4e-3, warmup_steps=30, lr_decay="linear", min_lr_ratio=0.02),
        train=TrainConfig(
            out="runs/demo",
            micro_batch_size=4,
            global_batch_size=16,
            train_steps=400,
            log_interval=20,
            eval_interval=100,
            save_interval=200,
        ),
    )


def chat() -> Config:
    """The demo's model, fine-tuned on the default questions until it answers them; 2 processes."""
    begun = demo()
    return replace(
        begun,
        layout=LayoutConfig(dp=2, zero=1),
        data=DataConfig(
            data="runs/demo/conversations/train.jsonl",
            valid_data="runs/demo/conversations/valid.jsonl",
        ),
        optim=replace(begun.optim, lr=2e-3, warmup_steps=20),
        train=replace(begun.train, out="runs/demo-chat", init_from="runs/demo"),
    )


def prefer() -> Config:
    """The demo's chat model, taught to prefer right answers to wrong ones; 2 processes."""
    begun = chat()
    return replace(
        begun,
        data=DataConfig(
            data="runs/demo/conversations/pairs.jsonl",
            valid_data="runs/demo/conversations/valid-pairs.jsonl",
            dpo_beta=0.1,
        ),
        optim=replace(begun.optim, lr=1e-4, warmup_steps=10),
        train=replace(
            begun.train,
            out="runs/demo-dpo",
            init_from="runs/demo-chat",
            train_steps=60,
            eval_interval=20,
        ),
    )


RECIPES: dict[str, Callable[[], Config]] = {"demo": demo, "chat": chat, "prefer": prefer}
"""Recipe by name, called without arguments."""
