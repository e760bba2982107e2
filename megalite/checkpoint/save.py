"""Writes a checkpoint: each rank its boxes to its own file, rank 0 the manifest, then a rename.

A number is written by exactly one rank: the one whose flat range it is in and whose Shard owns it.
A run that is killed at any instant leaves either the old checkpoints or the new one beside them.
Next: manifest.py.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megalite.checkpoint import manifest as mf
from megalite.core import comm
from megalite.core.errors import PeerFailed, RunError, UserError
from megalite.core.mesh import Mesh
from megalite.optim.optimizer import Optimizer

PARTIAL = ".partial-"
"""What a directory is called until its checkpoint is whole."""


def save(root: Path, optimizer: Optimizer, mesh: Mesh, facts: mf.Manifest) -> Path:
    """Write `root/step-NNNNNNNN` from every rank's part.

    All ranks call it together, on one file system. `facts` has everything but tensors, files and
    loss scale. Raises RunError on every rank if one of them cannot write; what was there before is
    then untouched.
    """
    target = root / f"step-{facts.step:08d}"
    partial = root / f"{PARTIAL}{facts.step:08d}"
    first = mesh.rank == 0
    if optimizer.scaler is not None:
        facts = replace(facts, loss_scaler=optimizer.scaler.state())
    try:
        _together(mesh, "prepare", lambda: _make_empty(partial), here=first)
        _together(mesh, "write", lambda: _write_part(partial, optimizer, mesh))
        _together(mesh, "commit", lambda: _commit(partial, target, facts, mesh), here=first)
    except RunError:
        if first:  # a full disk needs the room
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _together(mesh: Mesh, what: str, action: Callable[[], None], *, here: bool = True) -> None:
    """Run `action` where it is to run, and learn whether it went well everywhere."""
    failure: Exception | None = None
    try:
        if here:
            action()
    except (OSError, SafetensorError) as e:  # the second is safetensors' word for a full disk
        failure = e
    failed = comm.any_true(failure is not None, mesh.world)
    if failure is not None:
        raise RunError(f"checkpoint: cannot {what}: {failure} (earlier checkpoints are intact)")
    if failed:
        raise PeerFailed(f"checkpoint: another rank could not {what}")


def _make_empty(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _write_part(partial: Path, optimizer: Optimizer, mesh: Mesh) -> None:
    """This rank's numbers as one file, and what rank 0 needs to know of them as another."""
    file = f"shard-{mesh.rank:05d}.safetensors"
    tensors, views = my_boxes(optimizer, file)
    files = {}
    if views:
        # safetensors refuses tensors that share a storage, which views of the flat ones do.
        data = {key: view.to("cpu", copy=True).contiguous() for key, view in views.items()}
        save_file(data, partial / file)
        _sync_file(partial / file)
        size = (partial / file).stat().st_size
        files[file] = {"size": size, "sha256": mf.file_sha256(partial / file)}
    part = {"tensors": {n: asdict(t) for n, t in tensors.items()}, "files": files}
    (partial / f"part-{mesh.rank:05d}.json").write_text(json.dumps(part), encoding="utf-8")


def my_boxes(
    optimizer: Optimizer, file: str
) -> tuple[dict[str, mf.SavedTensor], dict[str, Tensor]]:
    """What this rank saves: its boxes of each whole tensor, and views of their numbers by key."""
    zero = optimizer.zero
    views: dict[str, Tensor] = {}
    tensors: dict[str, mf.SavedTensor] = {}
    for idx, bucket in enumerate(zero.buckets):
        base = bucket.updated[0]
        for kind, flat in optimizer.numbers(idx).items():
            for part in bucket.layout.boxes(zero.my_range(bucket), lambda slot: slot.owned):
                name = f"{kind}/{part.slot.name}"
                dtype = str(flat.dtype).removeprefix("torch.")
                empty = mf.SavedTensor(part.slot.shard.shape, dtype, ())
                known = tensors.get(name, empty)
                key = f"{name}#{len(known.boxes)}"
                views[key] = part.of(flat, base).detach()
                boxes = (*known.boxes, mf.SavedBox(part.whole, file, key))
                tensors[name] = replace(known, boxes=boxes)
    return tensors, views


def _commit(partial: Path, target: Path, facts: mf.Manifest, mesh: Mesh) -> None:
    """Join what the ranks wrote under one manifest, and give the directory its name."""
    tensors: dict[str, mf.SavedTensor] = {}
    files: dict[str, mf.SavedFile] = {}
    for rank in range(mesh.world_size):
        path = partial / f"part-{rank:05d}.json"
        part = json.loads(path.read_text(encoding="utf-8"))
        files |= {name: mf.SavedFile(**f) for name, f in part["files"].items()}
        for name, tree in part["tensors"].items():
            found = mf.tensor_of(tree)
            known = tensors.get(name, replace(found, boxes=()))
            tensors[name] = replace(known, boxes=known.boxes + found.boxes)
        path.unlink()
    text = mf.to_json(replace(facts, tensors=tensors, files=files))
    # The manifest is written last: a run killed before this line leaves no checkpoint that looks
    # complete.
    (partial / mf.NAME).write_text(text, encoding="utf-8")
    _sync_file(partial / mf.NAME)
    mf.sync_directory(partial)
    replaced = target.with_name(f"{PARTIAL}replaced-{facts.step:08d}")
    if target.exists():
        # The same step again, after a fall back to an older one: the new directory takes the name.
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(target, replaced)
    os.rename(partial, target)
    mf.sync_directory(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_file(path: Path) -> None:
    with open(path, "rb") as f:
        os.fsync(f.fileno())


def remove_partial(root: Path) -> None:
    """Delete what killed saves left behind."""
    for leftover in root.glob(f"{PARTIAL}*") if root.is_dir() else ():
        shutil.rmtree(leftover, ignore_errors=True)


def check_space(out: Path, optimizer: Optimizer, mesh: Mesh) -> None:
    """Raise UserError, alike on every rank, unless `out` has room for one checkpoint.

    All ranks call it together, once `out` exists; rank 0's view of its file system counts.
    """
    mine = sum(x.numel() * x.element_size() for x in my_boxes(optimizer, "")[1].values())
    free = shutil.disk_usage(out).free if mesh.rank == 0 else 0
    device = optimizer.zero.buckets[0].grads.device
    both = torch.tensor([mine, free], dtype=torch.int64, device=device)
    needed, free = comm.all_reduce(both, mesh.world).tolist()
    if free < needed:
        raise UserError(
            f"--out {out}: {_gib(free)} free, a checkpoint needs {_gib(needed)} "
            "(make room, or use another --out)"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 / 10 else f"{size / 2**20:.1f} MiB"
