"""A pytest plugin: this machine has a GPU, says torch, which is its CPU; kernels are emulated ones.

So the tests of tests/gpu that need no more of CUDA than tensors and kernels run anywhere.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megalite.ops import library

library.BUILT = Path(__file__).resolve().parents[2] / "build" / "libmegalite_emulated.so"
torch.cuda.is_available = lambda: True
torch.Tensor.cuda = lambda self, *args, **settings: self  # type: ignore[method-assign]
