"""What the ranks of an oracle row do: megalite/train/verify.py, by the names of torch's dtypes."""

from __future__ import annotations

from typing import Any

import torch

from megalite.core.config import Config
from megalite.train import verify
from megalite.train.build import Engine
from megalite.train.verify import calls_of as calls_of

CPU = torch.device("cpu")
PRECISION = {"float64": "fp64", "float32": "fp32", "float16": "fp16"}


def engine_of(config: Config, rank: int, world: int, dtype: str, **kwargs: Any) -> Engine:
    """The engine of this rank, on gloo where there is more than one."""
    return verify.engine_of(config, rank, world, PRECISION[dtype], **kwargs)


def reference(rank: int, world: int, **kwargs: Any) -> list[float]:
    """Train one process and write every number to `out` (npz); gives the losses."""
    return verify.reference(rank, world, **kwargs)


def compare(rank: int, world: int, dtype: str, **kwargs: Any) -> dict:
    """Train this layout and compare it with the file `ref`: the worst errors, and where."""
    found = verify.compare(rank, world, precision=PRECISION[dtype], **kwargs)
    gaps = [verify.gap_from(gap) for gap in found["worst"].values()]
    worst = {gap.kind: (gap.error, f"{gap.where} step {gap.step}") for gap in gaps}
    return {**found, "worst": worst}
