"""Random numbers with names: pure functions of (seed, name, index), the same at every layout.

There is no generator state to save, to restore or to keep apart between ranks. A key is hashed from
the seed and any names; a number is hashed from a key and the index of the element in the *whole*
tensor. The hash is ops/splitmix.py's.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from megalite.ops.splitmix import mix, shift, uniform

__all__ = ["bits", "key", "mix", "normal", "rows", "uniform"]


def key(seed: int, *names: object) -> int:
    """A signed 64-bit key of the seed and these names."""
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little", signed=True)


def bits(key: int, index: Tensor) -> Tensor:
    """64 random bits for each int64 index, as int64."""
    return mix(index ^ key)


def normal(key: int, index: Tensor) -> Tensor:
    """A standard normal float64 for each int64 index (Box and Muller 1958)."""
    both = bits(key, index)
    radius = shift(both, 32).to(torch.float64).add_(1.0).mul_(2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = (both & 0xFFFFFFFF).to(torch.float64).mul_(2.0 * math.pi * 2.0**-32)
    return radius.mul_(angle.cos_())


def rows(key: int, *coordinates: Tensor) -> Tensor:
    """A key for each element of the broadcast int64 coordinates; `mix(key ^ column)` uses it."""
    hashed = mix(coordinates[0] ^ key)
    for c in coordinates[1:]:
        hashed = mix(hashed ^ c)
    return hashed
