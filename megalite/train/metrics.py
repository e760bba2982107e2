"""What a run writes down: metrics.jsonl with every step, and TensorBoard with the same numbers."""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from megalite.data.atomic import write_atomic

TAGS = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "loss_scale": "train/loss_scale",
    "preferred": "train/preferred",
    "margin": "train/margin",
    "val_loss": "val/loss",
    "val_bits_per_byte": "val/bpb",
    "val_exact_match": "val/exact_match",
    "val_preferred": "val/preferred",
    "val_margin": "val/margin",
    "tokens_per_s": "perf/tokens_per_s",
    "tflops_per_rank": "perf/tflops_per_rank",
    "tflops_per_rank_full": "perf/tflops_per_rank_full",
    "mfu": "perf/mfu",
    "mfu_full": "perf/mfu_full",
    "step_ms": "perf/step_ms",
    "bubble": "perf/bubble",
    "peak_mem_gb": "mem/peak_gb",
    "tokens": "data/tokens",
    "samples": "data/samples",
}
"""TensorBoard tag of each key of metrics.jsonl that has one."""


class Metrics:
    """The two logs of one run, on rank 0; a resumed run goes on in them from its step."""

    def __init__(self, out: Path, *, from_step: int):
        # Slow to import, and rank 0 alone needs it.
        from torch.utils.tensorboard.writer import SummaryWriter

        self.path = out / "metrics.jsonl"
        _forget_after(self.path, from_step)
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (until close)
        purge = from_step + 1 if from_step else None
        self.board = SummaryWriter(str(out / "tb"), purge_step=purge)

    def write(self, step: int, **values: Any) -> None:
        """One line, and one point for each value that is a number."""
        line = {"step": step, **values}
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()
        for key, value in line.items():
            if key in TAGS and value is not None:
                self.board.add_scalar(TAGS[key], value, step)

    def text(self, step: int, sample: str) -> None:
        """A sample of the model's text."""
        self.board.add_text("sample", f"```\n{sample}\n```", step)

    def close(self) -> None:
        """Flush both."""
        self.file.close()
        self.board.close()


def _forget_after(path: Path, step: int) -> None:
    """Drop lines of steps that a resumed run will take again, and a half-written last one."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue  # the run was killed while it wrote this line
    with write_atomic(path) as file:
        file.write("".join(kept).encode())


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def peak_memory_gb(device: torch.device) -> float:
    """Most memory this rank has held so far: of the GPU, or resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
