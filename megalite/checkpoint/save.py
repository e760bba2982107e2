"""Writes a checkpoint: each rank its own boxes to its own file, rank 0 the manifest last, then a rename.

A number is written by exactly one rank: the one whose flat range it is in and whose Shard owns it. A run that is
killed at any instant leaves either the old checkpoints or the new one beside them. Next: manifest.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from megalite.checkpoint import manifest as mf
from megalite.core import comm
from megalite.core.errors import PeerFailed, RunError
from megalite.core.mesh import Mesh
from megalite.optim.optimizer import Optimizer


def save(root: Path, optimizer: Optimizer, mesh: Mesh, facts: mf.Manifest) -> Path:
    """Write `root/step-NNNNNNNN` from every rank's part; all ranks call it together, on one file system.

    `facts` has everything but tensors and files. Raises RunError on every rank if one of them cannot write;
    what was there before is then untouched.
    """
    target = root / f"step-{facts.step:08d}"
    partial = root / f".partial-{facts.step:08d}"
    if mesh.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        _attempt(mesh, "prepare", lambda: partial.mkdir(parents=True))
    else:
        _attempt(mesh, "prepare", lambda: None)
    _attempt(mesh, "write", lambda: _write_part(partial, optimizer, mesh))
    if mesh.rank == 0:
        _attempt(mesh, "commit", lambda: _commit(partial, target, facts, mesh.world_size))
    else:
        _attempt(mesh, "commit", lambda: None)
    return target


def _attempt(mesh: Mesh, what: str, action: Callable[[], None]) -> None:
    """Run `action` here and learn whether it went well everywhere: the barrier and the error exchange."""
    failure: OSError | None = None
    try:
        action()
    except OSError as e:
        failure = e
    failed = comm.any_true(failure is not None, mesh.world)
    if failure is not None:
        raise RunError(f"checkpoint: cannot {what}: {failure} (earlier checkpoints are intact)")
    if failed:
        raise PeerFailed("checkpoint: another rank could not write its part")


def _write_part(partial: Path, optimizer: Optimizer, mesh: Mesh) -> None:
    zero = optimizer.zero
    file = f"shard-{mesh.rank:05d}.safetensors"
    data: dict[str, Tensor] = {}
    tensors: dict[str, dict] = {}
    for idx, bucket in enumerate(zero.buckets):
        base = zero.updated_range(bucket)[0]
        for kind, flat in optimizer.numbers(idx).items():
            for part in bucket.layout.boxes(zero.my_range(bucket), lambda slot: slot.owned):
                name = f"{kind}/{part.slot.name}"
                fresh = {"shape": part.slot.shard.shape, "dtype": str(flat.dtype)[6:], "boxes": []}
                entry = tensors.setdefault(name, fresh)
                key = f"{name}#{len(entry['boxes'])}"
                data[key] = (
                    part.of(flat, base).detach().cpu().clone(memory_format=torch.contiguous_format)
                )
                entry["boxes"].append({"box": part.whole, "file": file, "key": key})
    if data:
        save_file(data, partial / file)
        _sync_file(partial / file)
    size, digest = (
        ((partial / file).stat().st_size, mf.file_sha256(partial / file)) if data else (0, "")
    )
    part = {"tensors": tensors, "files": {file: {"size": size, "sha256": digest}} if data else {}}
    (partial / f"part-{mesh.rank:05d}.json").write_text(json.dumps(part), encoding="utf-8")


def _commit(partial: Path, target: Path, facts: mf.Manifest, world_size: int) -> None:
    tensors: dict[str, mf.SavedTensor] = {}
    files: dict[str, mf.SavedFile] = {}
    for rank in range(world_size):
        path = partial / f"part-{rank:05d}.json"
        part = json.loads(path.read_text(encoding="utf-8"))
        files |= {name: mf.SavedFile(**f) for name, f in part["files"].items()}
        for name, tree in part["tensors"].items():
            boxes = tuple(mf.SavedBox(b["box"], b["file"], b["key"]) for b in tree["boxes"])
            known = tensors.get(name)
            if known is not None:
                boxes = known.boxes + boxes
            tensors[name] = mf.SavedTensor(tuple(tree["shape"]), tree["dtype"], boxes)
        path.unlink()
    text = mf.to_json(replace(facts, tensors=tensors, files=files))
    # The manifest is written last: a run killed before this line leaves no checkpoint that looks complete.
    (partial / mf.NAME).write_text(text, encoding="utf-8")
    _sync_file(partial / mf.NAME)
    mf.sync_directory(partial)
    if target.exists():
        # The same step saved twice holds the same numbers; the older directory makes room.
        shutil.rmtree(target)
    os.rename(partial, target)
    mf.sync_directory(target.parent)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def remove_partial(root: Path) -> None:
    """Delete what killed saves left behind."""
    for leftover in root.glob(".partial-*") if root.is_dir() else ():
        shutil.rmtree(leftover, ignore_errors=True)
