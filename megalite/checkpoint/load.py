"""Reads a checkpoint into any layout: each rank asks for its boxes and takes what overlaps them.

The saving layout plays no part: boxes are in whole-tensor coordinates on both sides. Next: save.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from megalite.checkpoint.manifest import Manifest, SavedTensor, newest, read, step_dir
from megalite.core import comm
from megalite.core.errors import CheckpointError, PeerFailed
from megalite.core.mesh import Mesh
from megalite.core.params import traits_of
from megalite.core.shard import Box, box_shape, overlap, shift, slices
from megalite.optim.optimizer import Optimizer


def newest_for_all(
    path: Path, mesh: Mesh, device: torch.device
) -> tuple[Path, Manifest, list[str]]:
    """`manifest.newest`, decided and verified by rank 0 for every rank; all ranks call it together.

    So no two ranks read different steps, and a checkpoint is hashed once, not once a rank. Raises
    CheckpointError on the rank that saw what is wrong, PeerFailed on the others.
    """
    found: tuple[Path, Manifest, list[str]] | None = None
    failure: CheckpointError | None = None
    try:
        found = newest(path) if mesh.rank == 0 else None
    except CheckpointError as e:
        failure = e
    mine = torch.tensor(-1 if found is None else found[1].step, device=device)
    step = int(comm.all_reduce(mine, mesh.world, op="max"))
    if mesh.rank > 0 and step >= 0:
        try:
            directory = step_dir(path, step)
            found = directory, read(directory), []
        except CheckpointError as e:
            failure = e
    if comm.any_true(failure is not None, mesh.world):
        raise failure or PeerFailed(f"{path}: another rank cannot read the checkpoint")
    assert found is not None
    return found


class Reader:
    """The tensors of one step directory, by name and box."""

    def __init__(self, directory: Path, manifest: Manifest):
        self.directory, self.manifest = directory, manifest
        self._open: dict[str, safe_open] = {}

    def fill(self, target: Tensor, name: str, box: Box, shape: tuple[int, ...]) -> None:
        """Copy `box` of the whole tensor `name` into `target`, of the box's shape.

        Raises CheckpointError if the tensor is not there, has another shape than `shape`, or has a
        hole.
        """
        saved = self._find(name, shape)
        filled = 0
        for part in saved.boxes:
            both = overlap(box, part.box)
            if both is None:
                continue
            numbers = self._slice(part.file, part.key, shift(both, part.box, _origin(part.box)))
            target[slices(shift(both, box, _origin(box)))].copy_(numbers)
            filled += prod(box_shape(both))
        if filled != prod(box_shape(box)):
            raise CheckpointError(
                f"{self.directory}: {name}: {filled} of {prod(box_shape(box))} numbers found"
            )

    def whole(self, name: str) -> Tensor:
        """The whole tensor of that name, as it was saved. Raises CheckpointError as `fill` does."""
        saved = self._find(name)
        found = torch.empty(saved.shape, dtype=getattr(torch, saved.dtype))
        self.fill(found, name, tuple((0, n) for n in saved.shape), saved.shape)
        return found

    def _find(self, name: str, shape: tuple[int, ...] | None = None) -> SavedTensor:
        saved = self.manifest.tensors.get(name)
        if saved is None:
            raise CheckpointError(
                f"{self.directory}: {name} is not in this checkpoint (another model, optimizer?)"
            )
        if shape is not None and saved.shape != shape:
            raise CheckpointError(
                f"{self.directory}: {name}: checkpoint is {list(saved.shape)}, "
                f"model wants {list(shape)}"
            )
        return saved

    def _slice(self, file: str, key: str, box: Box) -> Tensor:
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.directory / file, framework="pt")
            return self._open[file].get_slice(key)[slices(box)]
        except (OSError, SafetensorError) as e:
            raise CheckpointError(
                f"{self.directory / file}: cannot be read: {e} (file damaged)"
            ) from None


def _origin(box: Box) -> Box:
    return tuple((0, hi - lo) for lo, hi in box)


@torch.no_grad()
def load_weights(reader: Reader, params: Mapping[str, nn.Parameter]) -> None:
    """Fill every parameter's local tensor; padding rows become zero."""
    for name, param in params.items():
        traits = traits_of(param)
        param.zero_()
        for piece in traits.shard.pieces(traits.axes):
            reader.fill(
                param[slices(piece.local)], f"weights/{name}", piece.whole, traits.shard.shape
            )


@torch.no_grad()
def load_optimizer(reader: Reader, optimizer: Optimizer) -> None:
    """Fill masters and optimizer state of this rank's ranges, tied copies and replicas included,
    and take the loss scale.
    """
    zero = optimizer.zero
    zero.settle()  # a gather of a step before would put its numbers over those that are read
    axes = zero.mesh.axes
    for idx, bucket in enumerate(zero.buckets):
        base, end = bucket.updated
        for kind, flat in optimizer.numbers(idx).items():
            for part in bucket.layout.boxes((base, end), lambda slot: slot.shard.pieces(axes)):
                name = f"{kind}/{part.slot.name}"
                reader.fill(part.of(flat, base), name, part.whole, part.slot.shard.shape)
    optimizer.step_count = reader.manifest.optimizer_steps
    if optimizer.scaler is not None:
        optimizer.scaler.load(reader.manifest.loss_scaler)
    optimizer.write_params()
