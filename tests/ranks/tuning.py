"""A small run of `megalite pretrain`, and runs that fine-tune it: for the tests of sft and dpo."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import pytest

from megalite.core.config import (
    Config,
    DataConfig,
    LayoutConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from tests.unit.data.samples import make_tokenizer

JOB = "tests.ranks.pretrain_jobs:train"
VOCAB = 300


class Tuned(NamedTuple):
    """A run that has ended."""

    said: str
    """By rank 0 on the screen."""
    lines: list
    """Of its metrics."""
    out: Path
    errors: str
    """What rank 0 wrote to stderr."""


@dataclass(frozen=True)
class Base:
    """A directory with the run `base` and the files train.jsonl and valid.jsonl."""

    home: Path
    config: Config
    run_ranks: Callable

    def tune(
        self,
        name: str,
        layout: dict,
        *,
        data: dict,
        lr: float,
        micro: int = 1,
        code: int = 0,
        lora: int = 0,
        **train,
    ) -> Tuned:
        """Four steps from `base`, at a layout; all ranks have to end with `code`."""
        out = self.home / name
        files = {kind: str(self.home / f"{kind}.jsonl") for kind in ("train", "valid")}
        tuned = replace(
            self.config,
            model=replace(self.config.model, lora_rank=lora),
            layout=LayoutConfig(**layout),
            data=DataConfig(data=files["train"], valid_data=files["valid"], **data),
            optim=OptimConfig(lr=lr),
            train=replace(
                self.config.train, out=str(out), init_from=str(self.home / "base"), train_steps=4,
                micro_batch_size=micro, log_interval=1, **train,
            ),
        )  # fmt: skip
        world = math.prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))
        ended = self.run_ranks(JOB, world, config=tuned.to_dict())
        assert all(one["code"] == code for one in ended), ended
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return Tuned(ended[0]["out"], [json.loads(x) for x in lines], out, ended[0].get("err", ""))

    def entered(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
        """Inside the directory, as no rank; pytest gets its signals back."""
        monkeypatch.chdir(self.home)
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        yield self.home
        for number, handler in handlers.items():
            signal.signal(number, handler)


def pretrained(home: Path, run_ranks: Callable, example: Callable[[int], dict]) -> Base:
    """A short run in `home`, with 40 examples to learn from and 7 held out."""
    for name, count in (("train", 40), ("valid", 7)):
        lines = [json.dumps(example(i)) + "\n" for i in range(count)]
        (home / f"{name}.jsonl").write_text("".join(lines))
    make_tokenizer(VOCAB).save(home / "tokenizer.json")
    config = Config(
        model=ModelConfig(
            num_layers=2, hidden_size=16, num_heads=2, vocab_size=VOCAB, seq_len=96,
            position="rope",
        ),
        data=DataConfig(tokenizer=str(home / "tokenizer.json")),
        train=TrainConfig(
            out=str(home / "base"), precision="fp64", device="cpu", train_steps=2,
            micro_batch_size=2, global_batch_size=8,
        ),
    )  # fmt: skip
    (ended,) = run_ranks(JOB, 1, config=config.to_dict())
    assert ended["code"] == 0, ended
    return Base(home, config, run_ranks)
