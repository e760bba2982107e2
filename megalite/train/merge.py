"""`megalite convert merge-lora`: a run whose adapters are part of its weights.

The new run directory has the plain model, the same tokenizer and one checkpoint, with no optimizer
state: to be generated from, exported, or named by --init-from.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from tyro.conf import Positional

from megalite.checkpoint import manifest as mf
from megalite.checkpoint.load import Reader
from megalite.checkpoint.save import save
from megalite.core.config import FILE_NAME, Config, LayoutConfig, PathText, run_directory
from megalite.core.errors import UserError
from megalite.core.mesh import Mesh
from megalite.core.params import named_parameters, traits_of
from megalite.core.shard import slices
from megalite.data.atomic import write_json
from megalite.layers.linear import is_adapter
from megalite.train.build import build_engine

BESIDE = ("tokenizer.json", "chat_template.jinja")
"""Files of a run that go with its model."""


@dataclass(frozen=True, kw_only=True)
class MergeArgs:
    """Add the product of each adapter to the weight beside it, in a new run."""

    checkpoint: Positional[PathText]
    """Run directory (its newest valid checkpoint) or one of its checkpoints/step-*."""
    out: PathText = "runs/merged"
    """Run directory to make; it must not be there yet."""


def merge_lora(args: MergeArgs) -> None:
    """Write the merged run."""
    directory, manifest = mf.newest_with_warnings(Path(args.checkpoint))
    config, out = Config.from_dict(manifest.config), Path(args.out)
    if config.model.lora_rank == 0:
        raise UserError(f"{directory}: has no adapters (it was trained without --lora-rank)")
    if out.exists():
        raise UserError(f"--out {out}: is there already (name another directory)")
    plain = replace(
        config,
        model=replace(config.model, lora_rank=0),
        layout=LayoutConfig(dp=1),
        train=replace(config.train, out=str(out), resume=False, init_from=""),
    )
    # In the dtype in which the checkpoint keeps what was learned: at least float32.
    dtype = torch.float64 if config.train.precision == "fp64" else torch.float32
    engine = build_engine(plain, Mesh({}), device=torch.device("cpu"), dtype=dtype)
    reader, scale = Reader(directory, manifest), config.model.lora_alpha / config.model.lora_rank
    for stage in engine.stages.values():
        for name, param in named_parameters(stage):
            fill_merged(param, name, reader, scale)
    merged = sum(is_adapter(name) for name in manifest.tensors) // 2
    tree = json.loads(json.dumps(plain.to_dict()))
    facts = replace(manifest, optimizer_steps=0, config=tree, tensors={}, files={}, loss_scaler={})
    save(out / "checkpoints", engine.optimizer, engine.mesh, facts)
    write_json(out / FILE_NAME, tree)
    for name in BESIDE:
        if (file := run_directory(directory) / name).exists():
            shutil.copy(file, out / name)
    print(f"{out}: {merged} adapters of rank {config.model.lora_rank} are part of its weights now")


@torch.no_grad()
def fill_merged(param: nn.Parameter, name: str, reader: Reader, scale: float) -> None:
    """Fill a whole parameter with the checkpoint's, and what the adapter beside it adds."""
    wide = reader.whole(f"weights/{name}").double()
    beside = f"weights/{name.removesuffix('weight')}lora."
    if f"{beside}up" in reader.manifest.tensors:
        up, down = (reader.whole(beside + half).double() for half in ("up", "down"))
        wide += scale * up @ down
    param.zero_()
    traits = traits_of(param)
    for piece in traits.shard.pieces(traits.axes):
        param[slices(piece.local)] = wide[slices(piece.whole)].to(param.dtype)
