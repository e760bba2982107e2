"""`megalite convert one-file`: a checkpoint's weights, of any layout, as one safetensors file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save_file
from tyro.conf import Positional

from megalite.checkpoint import manifest as mf
from megalite.checkpoint.load import Reader
from megalite.core.config import PathText
from megalite.core.errors import RunError, UserError


@dataclass(frozen=True, kw_only=True)
class OneFileArgs:
    """Write the whole weights of a checkpoint into one safetensors file."""

    checkpoint: Positional[PathText]
    """Run directory (its newest valid checkpoint) or one of its checkpoints/step-*."""
    out: PathText = "model.safetensors"
    """File to write; it must not be there yet."""


def one_file(args: OneFileArgs) -> None:
    """Gather every weight and write them, by name, in whole-tensor shapes."""
    directory, manifest = mf.newest_with_warnings(Path(args.checkpoint))
    out = Path(args.out)
    if out.exists():
        raise UserError(f"--out {out}: is there already (name another file)")
    reader = Reader(directory, manifest)
    names = [name for name in manifest.tensors if name.startswith("weights/")]
    weights = {name.removeprefix("weights/"): reader.whole(name) for name in names}
    fresh = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, fresh, metadata={"format": "pt", "step": str(manifest.step)})
        fresh.replace(out)
    except Exception as e:  # safetensors has its own kind of error for a full disk
        fresh.unlink(missing_ok=True)
        raise RunError(f"--out {out}: cannot be written: {e}") from None
    size = sum(w.numel() for w in weights.values())
    print(f"{out}: {len(weights)} tensors, {size:,} numbers, of step {manifest.step}")
