"""Model flops of a token, and MFU: their share of what the GPU could multiply in the same time.

Two rules are in use, and both are written down. With N the weights of matmuls (linears and output
head; no table, norm or bias), L layers, s tokens in a sample and h numbers in all query heads:

    causal  6 N + 6 L s h     attention to earlier tokens alone; this is `mfu`
    full    6 N + 12 L s h    the masked half counted, too (Narayanan et al. 2021, Chowdhery et al.
                              2022, appendix B); `mfu_full`

With adapters of n weights, 4 (N + n) + 2 n stands in the place of 6 N: of frozen weights there is
no gradient. Recomputation counts in neither: it is no part of the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from megalite.core.config import ModelConfig
from megalite.models.build import head_flops, layer_flops
from megalite.models.presets import num_adapter_parameters

PEAK_TFLOPS = {
    "B200": 2250.0,
    "GH200": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100 HBM3": 989.0,
    "H800 PCIe": 756.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A40": 150.0,
    "A30": 165.0,
    "A10": 125.0,
}
"""Dense bf16, as NVIDIA's data sheets have it; of the first row whose words a device's name has."""


@dataclass(frozen=True)
class TokenFlops:
    """Flops of one token in training, forward and backward."""

    weights: float
    """N."""
    causal: float
    full: float


def token_flops(model: ModelConfig) -> TokenFlops:
    """By both rules. A sliding window is not looked at, nor are documents kept apart."""
    forward = model.num_layers * layer_flops(model) + head_flops(model)
    attention = 6 * model.num_layers * model.seq_len * model.num_heads * model.head_dim
    weights = (forward - attention / 3) / 2
    adapters = num_adapter_parameters(model)
    trained = adapters if model.lora_rank else weights
    causal = 4 * (weights + adapters) + 2 * trained + attention
    return TokenFlops(weights, causal, causal + attention)


def peak_tflops(name: str) -> float | None:
    """Dense bf16 TFLOP/s of a device that torch gives this name; None if it is not in the table."""
    words = set(re.split(r"[\s-]+", name))
    if "MIG" in words:  # a part of a GPU
        return None
    found = (peak for key, peak in PEAK_TFLOPS.items() if words.issuperset(key.split()))
    return next(found, None)


def peak_of(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense bf16 TFLOP/s of a rank's device; None where that is unknown, or is not what is used."""
    if device.type != "cuda" or dtype.itemsize != 2:
        return None
    return peak_tflops(torch.cuda.get_device_name(device))


def rates(model: ModelConfig, tokens_per_s: float, peak: float | None) -> dict[str, float | None]:
    """What metrics.jsonl has of them, from a rank's share of the tokens of a second."""
    flops = token_flops(model)
    causal, full = (each * tokens_per_s / 1e12 for each in (flops.causal, flops.full))
    return {
        "tflops_per_rank": causal,
        "tflops_per_rank_full": full,
        "mfu": None if peak is None else causal / peak,
        "mfu_full": None if peak is None else full / peak,
    }
