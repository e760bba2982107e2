"""A checkpoint as a share of a model that generates, at any tp and pp, whatever trained it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from megalite.checkpoint.load import Reader, load_weights
from megalite.checkpoint.manifest import Manifest, newest_with_warnings
from megalite.core import matmul
from megalite.core.config import Config, LayoutConfig, ModelConfig, run_directory
from megalite.core.errors import CheckpointError
from megalite.core.mesh import Mesh
from megalite.core.params import initialize, named_parameters
from megalite.core.precision import default_dtype
from megalite.data.tokenizer import Tokenizer
from megalite.generate.share import Share, make_share
from megalite.layers.attention import Attention
from megalite.layers.linear import ColumnLinear, RowLinear
from megalite.models.build import build_stages, mesh_factors
from megalite.models.gpt import GPT
from megalite.parallel.pipeline import Pipeline
from megalite.schedule.action import Schedule
from megalite.schedule.generators import gpipe


@dataclass(frozen=True)
class Saved:
    """A checkpoint on disk."""

    directory: Path
    manifest: Manifest
    config: Config

    @property
    def model(self) -> ModelConfig:
        return self.config.model

    def tokenizer(self) -> Tokenizer:
        """The one that the run keeps beside its checkpoints. Raises CheckpointError without one."""
        path = run_directory(self.directory) / "tokenizer.json"
        if not path.exists():
            raise CheckpointError(
                f"{path}: not there (this run was trained on tokens without a tokenizer)"
            )
        return Tokenizer.load(path)


def open_checkpoint(path: Path) -> Saved:
    """The newest valid checkpoint of a run directory, or that of a step directory.

    Those that it passes over are told on the screen.
    """
    directory, manifest = newest_with_warnings(path)
    return Saved(directory, manifest, Config.from_dict(manifest.config))


def check_layout(model: ModelConfig, *, tp: int, pp: int) -> None:
    """Raises UserError unless `model` can generate on tp x pp ranks."""
    Config(model=model, layout=_layout(tp, pp)).check(tp * pp)


def _layout(tp: int, pp: int) -> LayoutConfig:
    return LayoutConfig(tp=tp, pp=pp, dp=1, sequence_parallel=False)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how one rank runs its share."""

    slots: int
    """Requests at once."""
    dtype: torch.dtype
    device: torch.device
    tp: int = 1
    pp: int = 1
    rank: int = 0


def load_share(saved: Saved, at: Place) -> Share:
    """This rank's share of the checkpoint's model; all ranks call it together."""
    stages, mesh = _empty_stages(saved.model, at)
    reader = Reader(saved.directory, saved.manifest)
    for stage in stages.values():
        load_weights(reader, dict(named_parameters(stage)))
    return _share(saved.model, stages, mesh, at)


def untrained_share(model: ModelConfig, at: Place, *, seed: int) -> Share:
    """The same of a model with its initial weights."""
    stages, mesh = _empty_stages(model, at)
    for stage in stages.values():
        initialize(stage, seed)
    return _share(model, stages, mesh, at)


def _empty_stages(model: ModelConfig, at: Place) -> tuple[dict[int, GPT], Mesh]:
    kind = "real" if at.tp * at.pp > 1 else "single"
    sizes = {"pp": at.pp, "tp": at.tp}
    mesh = Mesh(sizes, rank=at.rank, kind=kind, factors=mesh_factors(model, at.tp))
    placement = tuple(range(at.pp))
    with default_dtype(at.dtype):
        stages = build_stages(
            model, mesh, placement=placement, layers=None, sequence_parallel=False, seed=0
        )
    return {number: stage.to(at.device) for number, stage in stages.items()}, mesh


def _share(model: ModelConfig, stages: Mapping[int, GPT], mesh: Mesh, at: Place) -> Share:
    _pack(stages)

    @lru_cache(maxsize=1)
    def schedule(num_microbatches: int) -> Schedule:
        return gpipe(at.pp, num_microbatches)

    pipeline = Pipeline(
        schedule, stages, mesh, dtype=at.dtype, device=at.device, enter=_nothing, reduce=_nothing
    )
    return make_share(model, stages, pipeline, slots=at.slots, record=True)


def _pack(stages: Mapping[int, GPT]) -> None:
    """Lay weights out for generation, unless a fork's attention may look at them in its own way."""
    for stage in stages.values():
        if any(type(layer.attention) is not Attention for layer in stage.layers.values()):
            return
        for module in stage.modules():
            if isinstance(module, ColumnLinear | RowLinear):
                matmul.pack(module.weight, keep=False)
        if stage.last:
            tied = stage.cfg.tie_embeddings
            matmul.pack(stage.embedding.weight if tied else stage.head, keep=tied)


def _nothing(number: int) -> None:
    """What generation does where training does something."""
