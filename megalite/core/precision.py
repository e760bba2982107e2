"""Dtypes by the names of --precision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def dtype_of(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of weights and matmuls; `auto` goes by the device."""
    if precision == "auto":
        precision = "fp32" if device.type == "cpu" else "bf16"
    return DTYPES[precision]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Makes new tensors of `dtype` where nothing else is said."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
