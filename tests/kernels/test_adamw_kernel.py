"""The optimizer's CUDA body under the emulator, against torch's own."""

from __future__ import annotations

import pytest
import torch

from megalite.ops import backend
from megalite.ops.adamw import adamw_

HOW = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}


def stepped(n: int, steps: int, offset: int = 0) -> list[torch.Tensor]:
    """Master and averages after some steps with gradients of their own."""
    source = torch.Generator().manual_seed(0)
    numbers = torch.randn(steps + 1, n + offset, generator=source)
    param, averages = numbers[0].clone()[offset:], torch.zeros(2, n + offset)[:, offset:]
    for step in range(1, steps + 1):
        adamw_(param, numbers[step][offset:], *averages, step=step, lr=1e-2, **HOW)
    return [param, *averages]


@pytest.mark.parametrize("n", [1, 7, 8, 33, 4097, 50_257])
@pytest.mark.parametrize("offset", [0, 1])
def test_steps_are_torch_s(emulated, n, offset):
    ours = stepped(n, 3, offset)
    assert emulated.count == 3
    backend.use_library(None)
    for one, other in zip(ours, stepped(n, 3, offset), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("offset", [0, 1])
def test_factor_and_copy_are_torch_s(emulated, offset):
    found = []
    for library in (emulated, None):
        backend.use_library(library)
        param, grad, m, v = torch.rand(4, 999, generator=torch.Generator().manual_seed(1))
        copy = torch.zeros(999, dtype=torch.bfloat16)
        tensors = [t[offset:] for t in (param, grad, m, v)]
        extra = {"factor": torch.tensor(0.3), "copy": copy[offset:]}
        adamw_(*tensors, step=2, lr=1e-2, **HOW, **extra)
        assert torch.equal(copy[offset:], param[offset:].bfloat16()) and not copy[:offset].any()
        found.append([param, m, v])
    assert emulated.count == 1
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_factor_copy_and_skip_are_the_device_s(emulated):
    param, grad, m, v = (torch.randn(100).abs() for _ in range(4))
    before = param.clone()
    copy = torch.zeros(100, dtype=torch.bfloat16)
    kind, factor, skip = backend.TYPES[torch.bfloat16], torch.tensor(0.5), torch.tensor(1.0)
    rates = (100, 1, 1e-2, 0.9, 0.95, 1e-8, 0.1)
    tensors = (param, m, v, grad, copy, kind, factor)
    backend.launch("adamw", grad, *tensors, skip, *rates)
    assert torch.equal(param, before) and not copy.any()
    clipped = [before.clone(), grad * 0.5, m.clone(), v.clone()]
    backend.launch("adamw", grad, *tensors, None, *rates)
    assert torch.equal(copy, param.bfloat16())
    adamw_(*clipped, step=1, lr=1e-2, **HOW)
    torch.testing.assert_close(param, clipped[0])
