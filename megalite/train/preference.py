"""Preference tuning: what the model that training begins from thinks of each pair, found once, and
how many held-out pairs the model in training has come to prefer. The loss: layers/loss.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megalite.core import comm
from megalite.core.errors import CheckpointError, UserError
from megalite.data.atomic import write_atomic
from megalite.data.loader import Loader
from megalite.data.preferences import Pairs
from megalite.train.build import Engine
from megalite.train.evaluate import Found, passes

REFERENCE = "reference.npz"
"""In a run's directory: float64 for each pair in the order of its windows, and what they are of."""


def log_ratios(engine: Engine, loader: Loader, count: int) -> np.ndarray:
    """log p(preferred answer) - log p(other) of the first `count` pairs, under the model as it is.

    At any layout; all ranks call it together and get the same.
    """
    found = torch.zeros(count, dtype=torch.float64)
    for calls, results in passes(engine, loader, count):
        for call, ratios in zip(calls, results, strict=False):
            if engine.counts_loss and call.is_first_part:
                assert call.preference is not None
                counts = call.preference.counts.cpu()
                found[call.samples.cpu()[counts]] = ratios.cpu().double()[counts]
    return comm.all_reduce(found.to(engine.device), engine.mesh.world).cpu().numpy()


def set_reference(engine: Engine, loaders: Mapping[str, Loader], out: Path) -> None:
    """Ask the model as it is about all pairs, and write down in `out` what it says.

    `loaders` of Pairs, by name. All ranks call it together.
    """
    said = {}
    for name, loader in loaders.items():
        pairs = _pairs(loader)
        pairs.reference = said[name] = log_ratios(engine, loader, len(pairs))
        said[f"{name}-sha256"] = np.array(pairs.sha256)
    if engine.mesh.rank == 0:
        with write_atomic(out / REFERENCE) as file:
            np.savez(file, **said)  # type: ignore[arg-type]


def read_reference(loaders: Mapping[str, Loader], out: Path) -> None:
    """Take what `set_reference` wrote when the run began. Raises UserError for other pairs."""
    path = out / REFERENCE
    if not path.exists():
        raise CheckpointError(f"{path}: no such file (a run of megalite dpo begins with it)")
    with np.load(path) as said:
        for name, loader in loaders.items():
            pairs = _pairs(loader)
            if name not in said or str(said[f"{name}-sha256"]) != pairs.sha256:
                raise UserError(
                    f"{path}: is of other {name} pairs than this run's (resume with the same data "
                    "and --tokenizer, or begin a run in another --out)"
                )
            pairs.reference = said[name]


def _pairs(loader: Loader) -> Pairs:
    assert isinstance(loader.source, Pairs)
    return loader.source


@dataclass(frozen=True)
class Preferred:
    """How a model in training judges held-out pairs."""

    loader: Loader

    def take(self, engine: Engine, *, last: bool) -> Found:
        """Loss, share of pairs whose preferred answer has gained on the other, and by how much."""
        pairs, beta = _pairs(self.loader), self.loader.dpo_beta
        count = len(pairs) if last else min(len(pairs), engine.config.train.eval_samples)
        assert pairs.reference is not None
        gains = beta * (log_ratios(engine, self.loader, count) - pairs.reference[:count])
        loss, margin = float(np.logaddexp(0, -gains).mean()), float(gains.mean())
        right = int((gains > 0).sum())
        share = right / count
        line = f"  held-out preferred {share:.2f} ({right} of {count}) | loss {loss:.3f} | "
        numbers = {"val_loss": loss, "val_preferred": share, "val_margin": margin}
        return Found([f"{line}margin {margin:.3f}"], numbers)
