"""SplitMix64's finaliser (Steele, Lea and Flood 2014), in wrapping 64-bit integers.

What core/rng.py makes named random numbers of, and the reference of the dropout kernel, which
computes the same bits (kernels/csrc/elementwise.cuh).
"""

from __future__ import annotations

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


def mix(x: Tensor) -> Tensor:
    """Scramble int64 `x`; every bit of the result depends on every bit of `x`."""
    x = x * _GOLDEN
    x = (x ^ shift(x, 30)) * _MIX_1
    x = (x ^ shift(x, 27)) * _MIX_2
    return x ^ shift(x, 31)


def shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own carries the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def uniform(bits: Tensor) -> Tensor:
    """Bits to float64 in [0, 1), from the upper 53 of them."""
    return shift(bits, 11).to(torch.float64) * 2.0**-53
