"""RMSNorm has the same bits with a gradient and without one."""

from __future__ import annotations

import pytest
import torch

from megalite.ops.norm import rms_norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (2, 3, 64), (4, 1, 1000)], ids=str)
def test_a_gradient_changes_no_bit(shape, dtype):
    x = (30 * torch.randn(shape)).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype).requires_grad_()
    with torch.no_grad():
        without = rms_norm(x, weight, 1e-5)
    found = rms_norm(x, weight, 1e-5)
    assert found.grad_fn is not None and without.grad_fn is None
    assert torch.equal(found, without)
