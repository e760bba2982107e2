"""Runs on a GPU as a user starts them: the same bits twice, and memory that is not enough."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from megalite.checkpoint import manifest as mf
from megalite.core.config import Config, ModelConfig, TrainConfig
from megalite.plan.memory import stage_memory

HOME = Path(__file__).resolve().parents[2]
DEVICE = "cuda"
DROPS = ("--dropout", "0.1", "--attention-dropout", "0.1")
SHAPE = ("--hidden-size", "256", "--global-batch-size", "16", "--micro-batch-size", "8")
COMPUTED = ("step", "tokens", "loss", "grad_norm", "lr")
SHARE = 0.02
"""Of the GPU's memory, all that a process is given which is to find it short: what asks for more is
then still of a size that every kernel takes."""


def pretrain(out: Path, *flags: str, **settings: str) -> subprocess.CompletedProcess:
    """`megalite pretrain` on the GPU, in a process of its own, with these environment variables."""
    command = [sys.executable, "-m", "megalite", "pretrain", "--out", str(out), "--device", DEVICE]
    env = {**os.environ, **settings}
    return subprocess.run(
        [*command, *flags], cwd=HOME, env=env, capture_output=True, text=True, timeout=300
    )


def test_deterministic_runs_are_equal_in_every_bit(tmp_path):
    """Losses, gradient norms and checkpoints of 50 steps, with all that draws random numbers."""
    found = []
    for name in ("one", "two"):
        out = tmp_path / name
        done = pretrain(out, "--deterministic", "--train-steps", "50", *SHAPE, *DROPS)
        assert done.returncode == 0, done.stderr
        lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        folder, manifest, _ = mf.newest(out)
        files = {file: (folder / file).read_bytes() for file in manifest.files}
        found.append(([{key: line[key] for key in COMPUTED} for line in lines], files))
    (steps, files), again = found
    assert [line["step"] for line in steps] == list(range(1, 51)) and files
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert (steps, files) == again


def test_too_large_a_batch_is_one_line_that_says_what_frees_most(tmp_path):
    model = ModelConfig(num_layers=16, hidden_size=512)
    config = Config(model=model, train=TrainConfig(micro_batch_size=1, global_batch_size=1))
    config.check(1)
    one = stage_memory(config, 1, 0, torch.bfloat16)
    memory = SHARE * torch.cuda.get_device_properties(0).total_memory
    size = str(2 ** int(4 * memory / one.activations).bit_length())
    sizes = ("--num-layers", "16", "--hidden-size", "512")
    batch = ("--micro-batch-size", size, "--global-batch-size", size)
    short = {"PYTORCH_CUDA_ALLOC_CONF": f"per_process_memory_fraction:{SHARE}"}
    done = pretrain(tmp_path / "run", *sizes, *batch, **short)
    assert done.returncode == 5, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("megalite: error")]
    assert len(lines) == 1, done.stderr
    pattern = (
        r"megalite: error: rank 0 \(pp0 dp0 tp0\): out of memory: asked for \S+ [GM]iB, "
        r"held (\S+) ([GM])iB at most; the plan of pp0 is weights .* MiB, gradients .* MiB, "
        r"optimizer states .* MiB, activations (\S+) GiB, working .*; "
        r"--\S+ \S+ frees most of it, \S+ GiB \(traceback in \S+\)"
    )
    said = re.fullmatch(pattern, lines[0])
    assert said, done.stderr
    held = float(said[1]) * {"G": 2**30, "M": 2**20}[said[2]]
    assert held <= 1.01 * memory < float(said[3]) * 2**30
