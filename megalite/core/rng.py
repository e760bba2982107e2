"""Random numbers with names: pure functions of (seed, name, index), the same at every layout.

There is no generator state to save, to restore or to keep apart between ranks. A key is hashed from
the seed and any names; a number is hashed from a key and the index of the element in the *whole*
tensor. The hash is SplitMix64's finaliser (Steele, Lea and Flood 2014), in wrapping 64-bit
integers.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB
_MIX_1 = -0x40A7B892E31B1A47
_MIX_2 = -0x6B2FB644ECCEEE15


def key(seed: int, *names: object) -> int:
    """A signed 64-bit key of the seed and these names."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def mix(x: Tensor) -> Tensor:
    """Scramble int64 `x`; every bit of the result depends on every bit of `x`."""
    x = x * _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX_1
    x = (x ^ _shift(x, 27)) * _MIX_2
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's own carries the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def bits(key: int, index: Tensor) -> Tensor:
    """64 random bits for each int64 index, as int64."""
    return mix(index ^ key)


def uniform(bits: Tensor) -> Tensor:
    """Bits to float64 in [0, 1), from the upper 53 of them."""
    return _shift(bits, 11).to(torch.float64) * 2.0**-53


def normal(key: int, index: Tensor) -> Tensor:
    """A standard normal float64 for each int64 index (Box and Muller 1958)."""
    both = bits(key, index)
    radius = _shift(both, 32).to(torch.float64).add_(1.0).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = (both & 0xFFFFFFFF).to(torch.float64).mul_(2.0 * math.pi * 2.0**-32)
    return radius.mul_(angle.cos_())


def rows(key: int, *coordinates: Tensor) -> Tensor:
    """A key for each element of the broadcast int64 coordinates; `mix(key ^ column)` uses it."""
    hashed = mix(coordinates[0] ^ key)
    for c in coordinates[1:]:
        hashed = mix(hashed ^ c)
    return hashed
