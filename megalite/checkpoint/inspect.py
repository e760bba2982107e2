"""`megalite inspect PATH`: what a checkpoint, dataset or tokenizer holds, told apart by content.

No torch and no ranks: the manifest says everything of a checkpoint but its numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path

from tyro.conf import Positional

from megalite.checkpoint import manifest as mf
from megalite.core.config import PathText
from megalite.core.errors import UserError
from megalite.data.indexed import IndexedDataset
from megalite.data.tokenizer import Tokenizer, TokenizerShowArgs, show_tokenizer

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class InspectArgs:
    """Show what is in a checkpoint, a dataset or a tokenizer."""

    path: Positional[PathText]
    """Run directory, checkpoints/step-*, prefix of .bin/.idx (or one of them), tokenizer.json."""


def inspect(args: InspectArgs) -> None:
    """Print what `args.path` is and holds. Raises the error of its kind if it is damaged."""
    path = Path(args.path)
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if path.is_dir():
        _show_checkpoint(path)
    elif prefix.with_name(prefix.name + ".idx").exists():
        _show_dataset(prefix)
    elif path.is_file():
        Tokenizer.load(path)
        show_tokenizer(TokenizerShowArgs(path=str(path), text=""))
    else:
        kinds = "a run, a checkpoint, a dataset's prefix or a tokenizer.json"
        raise UserError(f"{path}: no such file or directory (expected {kinds})")


def _show_checkpoint(path: Path) -> None:
    directory, manifest = mf.newest_with_warnings(path)
    made = manifest.made_with
    layout = " x ".join(f"{axis}{n}" for axis, n in made.get("layout", {}).items() if n > 1)
    print(
        f"{directory}: step {manifest.step}, {manifest.samples:,} samples, "
        f"{manifest.tokens:,} tokens"
    )
    print(f"saved by {layout or 'one process'}, torch {made.get('torch')}, {made.get('device')}")
    kinds = sorted({name.partition("/")[0] for name in manifest.tensors})
    for kind in kinds:
        tensors = {n: t for n, t in manifest.tensors.items() if n.partition("/")[0] == kind}
        numbers = sum(prod(t.shape) for t in tensors.values())
        print(
            f"{kind}: {len(tensors)} tensors, {numbers:,} numbers, {_megabytes(tensors.values())}"
        )
    print("weights by name:")
    names = [n for n in manifest.tensors if n.startswith("weights/")]
    width = max((len(n) for n in names), default=8) - len("weights/")
    for name in sorted(names, key=_in_order):
        saved = manifest.tensors[name]
        shape = " x ".join(map(str, saved.shape))
        boxes = f"{len(saved.boxes)} box" + ("es" if len(saved.boxes) > 1 else "")
        files = len({b.file for b in saved.boxes})
        print(
            f"  {name.removeprefix('weights/'):{width}}  {shape:>14}  {saved.dtype}  {boxes} in "
            f"{files} file{'s' if files > 1 else ''}"
        )
    total = sum(f.size for f in manifest.files.values())
    print(f"files: {len(manifest.files)}, {total / 2**20:.1f} MB, all as the manifest says")


def _in_order(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts layer 10 after layer 9."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _megabytes(tensors) -> str:
    return f"{sum(prod(t.shape) * SIZES[t.dtype] for t in tensors) / 2**20:.1f} MB"


def _show_dataset(prefix: Path) -> None:
    data = IndexedDataset(prefix)
    tokens = len(data.tokens)
    print(
        f"{prefix}: {tokens:,} tokens as {data.dtype.name}, {data.num_documents:,} documents, "
        f"{len(data.lengths):,} sequences"
    )
    longest, shortest = int(data.lengths.max()), int(data.lengths.min())
    print(f"sequence lengths: {shortest:,} to {longest:,}, mean {tokens / len(data.lengths):,.0f}")
    first = data.tokens[:12].tolist()
    print(f"ids: {int(data.tokens.min())} to {int(data.tokens.max())}; first: {first}")
