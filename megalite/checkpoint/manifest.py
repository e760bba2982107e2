"""What a checkpoint directory says of itself: one self-hashed JSON file, read without torch.

A step directory holds shard files (safetensors) and MANIFEST.json, which names every tensor of the
*whole* model with the boxes it was saved in (box, file, key) and every file with its size and
sha256. It is written last and the directory is renamed into place, so a directory with a name is
whole. Next: save.py, load.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megalite.core.errors import CheckpointError

NAME = "MANIFEST.json"
FORMAT = 1
STEP = re.compile(r"step-\d{8,}")


@dataclass(frozen=True)
class SavedBox:
    """One box of a tensor in whole-tensor coordinates, and where its numbers are."""

    box: tuple[tuple[int, int], ...]
    file: str
    key: str


@dataclass(frozen=True)
class SavedTensor:
    """A tensor of the whole model: `weights/NAME`, `exp_avg/NAME`, ..."""

    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[SavedBox, ...]


@dataclass(frozen=True)
class SavedFile:
    """A shard file's size in bytes and sha256."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything but the numbers."""

    step: int
    samples: int
    """Samples consumed: the whole state of the loader."""
    tokens: int
    optimizer_steps: int
    config: dict[str, Any]
    """The run's Config."""
    made_with: dict[str, Any]
    """Versions, threads and layout: what bitwise equality depends on."""
    tensors: dict[str, SavedTensor] = field(default_factory=dict)
    files: dict[str, SavedFile] = field(default_factory=dict)
    loss_scaler: dict[str, float] = field(default_factory=dict)
    """State of the dynamic loss scale; empty where there is none."""


def to_json(manifest: Manifest) -> str:
    """The manifest with the sha256 of everything else in it."""
    return _signed({"format": FORMAT, **asdict(manifest)})


def read(directory: Path) -> Manifest:
    """The manifest of a step directory. Raises CheckpointError unless it is whole and unchanged."""
    path = directory / NAME
    try:
        text = path.read_bytes().decode("utf-8")
        tree = json.loads(text)
        del tree["sha256"]
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: not there (an unfinished save, or not a checkpoint)"
        ) from None
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: is not a manifest (file damaged)") from None
    # The text, not its meaning, is compared: a changed blank is a changed byte too.
    if text != _signed(tree):
        raise CheckpointError(f"{path}: does not match its own sha256 (file damaged)")
    if tree.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: format {tree.get('format')}, this version reads {FORMAT} "
            "(written by another version)"
        )
    try:
        return _parse(tree)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{path}: is not a manifest of ours (edited by hand?)") from None


def check_files(directory: Path, manifest: Manifest) -> None:
    """Raise CheckpointError unless every file is there with its size and sha256."""
    for name, saved in sorted(manifest.files.items()):
        path = directory / name
        if Path(name).name != name:
            raise CheckpointError(f"{directory / NAME}: file name {name!r} leaves the directory")
        if not path.is_file():
            raise CheckpointError(f"{path}: missing (the manifest lists it)")
        if path.stat().st_size != saved.size:
            raise CheckpointError(
                f"{path}: {path.stat().st_size} bytes, the manifest says {saved.size}"
            )
        try:
            digest = file_sha256(path)
        except OSError as e:
            raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from None
        if digest != saved.sha256:
            raise CheckpointError(f"{path}: sha256 differs from the manifest (file damaged)")


def step_dirs(root: Path) -> list[Path]:
    """The step directories of a run, newest first."""
    if not root.is_dir():
        return []
    found = [d for d in root.iterdir() if STEP.fullmatch(d.name) and d.is_dir()]
    return sorted(found, key=lambda d: int(d.name[5:]), reverse=True)


def newest_with_warnings(path: Path) -> tuple[Path, Manifest]:
    """`newest`, with a line on the screen for each that was passed over."""
    directory, manifest, passed_over = newest(path)
    for reason in passed_over:
        print(f"megalite: warning: {reason}; using {directory.name}")
    return directory, manifest


def newest(path: Path) -> tuple[Path, Manifest, list[str]]:
    """The newest valid checkpoint of a run directory, or that step directory itself.

    Gives also the reasons for which newer ones were passed over. Raises CheckpointError if there is
    none.
    """
    if _is_step(path):
        manifest = read(path)
        check_files(path, manifest)
        return path, manifest, []
    passed_over: list[str] = []
    for directory in step_dirs(path / "checkpoints"):
        try:
            manifest = read(directory)
            check_files(directory, manifest)
            return directory, manifest, passed_over
        except CheckpointError as e:
            passed_over.append(str(e))
    if passed_over:
        raise CheckpointError(passed_over[0])
    what = "no checkpoint found" if path.is_dir() else "no such directory"
    raise CheckpointError(
        f"{path}: {what} (expected a run directory, or one of its checkpoints/step-*)"
    )


def step_dir(path: Path, step: int) -> Path:
    """The directory of that step of a run; `path` itself where it is a step directory."""
    return path if _is_step(path) else path / "checkpoints" / f"step-{step:08d}"


def _is_step(path: Path) -> bool:
    return (path / NAME).exists() or STEP.fullmatch(path.name) is not None


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in a directory last: without it a power cut may forget a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _signed(tree: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    return json.dumps({**tree, "sha256": digest}, indent=1, sort_keys=True) + "\n"


def _parse(tree: dict[str, Any]) -> Manifest:
    values = {name: value for name, value in tree.items() if name != "format"}
    values["files"] = {name: SavedFile(**f) for name, f in tree["files"].items()}
    values["tensors"] = {name: tensor_of(t) for name, t in tree["tensors"].items()}
    listed = {box.file for tensor in values["tensors"].values() for box in tensor.boxes}
    if not listed <= set(values["files"]):
        raise ValueError("a box is in a file that is not listed")
    return Manifest(**values)


def tensor_of(tree: dict[str, Any]) -> SavedTensor:
    """The SavedTensor that `asdict` and JSON made a tree of."""
    boxes = tuple(
        SavedBox(tuple((lo, hi) for lo, hi in b["box"]), b["file"], b["key"]) for b in tree["boxes"]
    )
    return SavedTensor(tuple(tree["shape"]), tree["dtype"], boxes)
