"""transformers says the same from our weights, and cuts distributions as its processors do."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megalite.generate.sample import Sampling, probabilities

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.peers


@pytest.mark.parametrize("shape", ["gpt2-tiny", "llama-tiny"])
def test_greedy_text_is_that_of_transformers(shape: str, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    small = ["--shape", shape, "--rounds", "1", "--new", "24", "--json", str(out)]
    command = [sys.executable, str(ROOT / "tools" / "bench_generate.py"), *small]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())
    systems = ("megalite", "transformers")
    want = [(system, f"batch {size}") for size in (1, 16) for system in systems]
    assert [(row["system"], row["layout"]) for row in rows] == want
    assert all(row["same_text"] and row["tokens_per_s"] > 0 for row in rows)


@pytest.mark.parametrize(
    "how",
    [
        {"temperature": 0.7},
        {"top_k": 12},
        {"top_p": 0.8},
        {"min_p": 0.1},
        {"repetition_penalty": 1.4},
        {"temperature": 1.3, "top_k": 20, "top_p": 0.9, "repetition_penalty": 0.8},
        {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "min_p": 0.05},
    ],
    ids=lambda how: " ".join(how),
)
def test_distribution_is_that_of_their_processors(how: dict) -> None:
    logits = 2 * torch.randn(64, generator=torch.Generator().manual_seed(4)).double()
    text = [3, 9, 9, 60, 1]
    sampling = Sampling(**{"temperature": 1.0, **how})
    chain = [
        RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty),
        TemperatureLogitsWarper(sampling.temperature),
    ]
    chain += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    chain += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    chain += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    scores = logits[None].clone()
    for step in chain:
        scores = step(torch.tensor([text]), scores)
    want = torch.softmax(scores, -1)[0]
    found = probabilities(logits, sampling, text)
    assert ((found > 0) == (want > 0)).all()
    assert ((found - want).abs() <= 1e-12).all()
