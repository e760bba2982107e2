"""Flops and MFU of GPT-2 124M, by hand: 12 layers of 768 over 1024 tokens, 50257 ids."""

from __future__ import annotations

import pytest
import torch

from megalite.core.config import Config, ModelConfig, TrainConfig
from megalite.models.presets import PRESETS
from megalite.train import console
from megalite.train.flops import peak_of, peak_tflops, rates, token_flops

GPT2 = ModelConfig(**PRESETS["gpt2-124m"])
N = 12 * (4 + 8) * 768 * 768 + 50257 * 768  # attention 4 h^2, mlp 8 h^2; the tied head
CAUSAL = 741_192_192 + 56_623_104  # 6 N + 6 * 12 * 1024 * 768
FULL = 741_192_192 + 113_246_208


def test_flops_of_a_token_by_both_rules():
    found = token_flops(GPT2)
    assert N == 123_532_032 and 6 * N == 741_192_192
    assert (found.weights, found.causal, found.full) == (N, CAUSAL, FULL)


def test_grouped_queries_and_swiglu_count_the_weights_there_are():
    cfg = ModelConfig(**PRESETS["llama-1b"])
    layer = 2048 * (2 * 2048 + 2 * 512) + 3 * 2048 * 8192
    assert token_flops(cfg).weights == 16 * layer + 128256 * 2048
    assert token_flops(cfg).full - token_flops(cfg).causal == 6 * 16 * 8192 * 2048


def test_rates_of_a_rank():
    found = rates(GPT2, 500_000.0, 989.0)
    assert found["tflops_per_rank"] == pytest.approx(398.907648)
    assert found["tflops_per_rank_full"] == pytest.approx(427.2192)
    assert found["mfu"] == pytest.approx(0.403344, abs=1e-6)
    assert found["mfu_full"] == pytest.approx(0.431971, abs=1e-6)


def test_no_mfu_without_a_peak():
    found = rates(GPT2, 1.0, peak_of(torch.device("cpu"), torch.float32))
    assert found["mfu"] is None and found["mfu_full"] is None and found["tflops_per_rank"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_peak_is_of_the_device_that_is_named(name, peak):
    assert peak_tflops(name) == peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bf16_s_peak_is_not_that_of_wider_numbers(dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_of(torch.device("cuda"), dtype) is None
    assert peak_of(torch.device("cuda"), torch.bfloat16) == 989.0


def test_screen_names_rule_device_and_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    config = Config(model=GPT2)
    assert console.flops_rule(config, torch.device("cuda"), 989.0) == (
        "flops  a token 798M = 6N + 6Lsh (causal), 854M = 6N + 12Lsh (full), N 124M; MFU of 989T, "
        "NVIDIA H200's dense bf16"
    )
    said = console.flops_rule(config, torch.device("cuda"), None)
    assert said.endswith("; no MFU, as no peak is known of NVIDIA H200 in this precision")


def test_running_line_has_the_mfu_of_all_ranks(monkeypatch):
    config = Config(model=GPT2, train=TrainConfig(global_batch_size=8))
    now = iter([100.0, 100.1])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(now))
    progress = console.Progress(config, 0, 0, peak=2 * 989.0)
    line = progress.line(1, samples=8, loss=5.0, norm=1.0, lr=1e-3)
    mfu = CAUSAL * 8 * 1024 / 0.1 / (2 * 989e12)
    assert f"  mfu {100 * mfu:.1f}%" in line and f"{100 * mfu:.1f}" == "3.3"
    monkeypatch.setattr(console.time, "monotonic", iter([1.0, 2.0]).__next__)
    assert "mfu" not in console.Progress(config, 0, 0).line(1, samples=8, loss=1, norm=1, lr=1)
