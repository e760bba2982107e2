"""The built kernels, and tensors that tests make on the GPU; without one all of this is skipped."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from megalite.ops.library import BUILT
from tests.kernels.conftest import Counting, run_by

NAMES = ("arange", "empty", "full", "ones", "rand", "randint", "randn", "tensor", "zeros")
MADE = {getattr(torch, name) for name in NAMES}


class MadeOnGPU(TorchFunctionMode):
    """What is drawn by a generator of the CPU, with its numbers, is on the GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        return made.cuda() if func in MADE and "device" not in (kwargs or {}) else made


@pytest.fixture(scope="session", autouse=True)
def a_gpu():
    """Skips, with the reason, where there is none."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU is visible to torch")


@pytest.fixture(scope="session")
def built_library(a_gpu):
    """What `make kernels` has put beside its reader; there is nothing to test without it."""
    if not BUILT.exists():
        pytest.fail("the kernels are not built (run make kernels)")
    return Counting(BUILT)


@pytest.fixture
def emulated(built_library):
    """The name that the emulator's tests ask for: here ops run on the GPU."""
    with run_by(built_library) as library, MadeOnGPU():
        yield library
