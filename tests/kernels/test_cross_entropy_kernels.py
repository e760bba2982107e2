"""The cross entropy's CUDA bodies under the emulator, whole and cut, against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalite.core.mesh import Axis
from megalite.layers.loss import cross_entropy_sum
from megalite.ops import backend, cross_entropy

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
WIDTHS = (1, 7, 8, 31, 33, 1000, 1023, 4097, 12288, 50257)


def drawn(rows: int, width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(width)
    logits = (torch.randn(rows, width, generator=source) * 3).to(dtype)
    labels = torch.randint(0, width, (rows,), generator=source)
    labels[1] = -1  # takes no part
    return logits, labels


def in_float64(logits, labels):
    leaf = logits.double().requires_grad_()
    loss = F.cross_entropy(leaf, labels, ignore_index=-1, reduction="sum")
    loss.backward()
    return loss.item(), leaf.grad


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", WIDTHS)
def test_any_vocabulary(emulated, width, dtype):
    logits, labels = drawn(3, width, dtype)
    wanted, grad = in_float64(logits, labels)
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy_sum(leaf * 1.0, labels, width, Axis("tp"))
    loss.backward()
    assert emulated.count == 2
    assert abs(loss.item() - wanted) <= 1e-4 * max(1.0, abs(wanted))
    assert ((leaf.grad.double() - grad).abs() <= TOLERANCE[dtype]).all()
    assert not leaf.grad[1].any()


def test_padding_is_never_predicted(emulated):
    logits, labels = drawn(4, 64, torch.float32)
    labels %= 50
    wanted, grad = in_float64(logits[:, :50], labels.clamp(min=0))
    padded = logits.clone()
    padded[:, 50:] = torch.nan  # not looked at
    leaf = padded.requires_grad_()
    loss = cross_entropy_sum(leaf * 1.0, labels.clamp(min=0), 50, Axis("tp"))
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(leaf.grad[:, :50].double(), grad, rtol=1e-4, atol=1e-5)
    assert not leaf.grad[:, 50:].any()


def test_two_ranks_find_what_one_does(emulated):
    """The second rank's columns are padding, but for one."""
    logits, labels = drawn(5, 48, torch.float32)
    known, wanted = 25, in_float64(logits[:, :25], labels := labels.clamp(min=0) % 25)
    parts = [logits[:, :24].contiguous(), logits[:, 24:].contiguous()]
    begun, columns = [], []
    for idx, part in enumerate(parts):
        here = (labels >= 24 * idx) & (labels < 24 * (idx + 1))
        columns.append(((labels - 24 * idx).masked_fill(~here, 0), here))
        begun.append(cross_entropy.begin(part, *columns[idx], min(24, known - 24 * idx)))
    top = torch.maximum(begun[0][0], begun[1][0])
    sums = sum(
        cross_entropy.partials(part, top, *columns[idx], begun[idx])
        for idx, part in enumerate(parts)
    )
    assert (sums[0].log() - sums[1]).sum().item() == pytest.approx(wanted[0], rel=1e-5)
    grads = [
        cross_entropy.gradient_(
            part, top, sums[0], *columns[idx], torch.ones(5), min(24, known - 24 * idx)
        )
        for idx, part in enumerate(parts)
    ]
    torch.testing.assert_close(
        torch.cat(grads, 1)[:, :25].double(), wanted[1], rtol=1e-4, atol=1e-5
    )
    assert not torch.cat(grads, 1)[:, 25:].any()


def test_smoothing_and_z_loss(emulated):
    """Of the bodies alone: the model has neither yet."""
    logits, labels = drawn(3, 40, torch.float32)
    labels, s, z = labels.clamp(min=0), 0.1, 0.01
    leaf = logits.double().requires_grad_()
    lse = leaf.logsumexp(-1)
    losses = F.cross_entropy(leaf, labels, label_smoothing=s, reduction="none") + z * lse**2
    losses.sum().backward()
    top, sums = cross_entropy.begin(logits, labels, labels >= 0, 40)
    ours = top + sums[0].log()
    torch.testing.assert_close(ours.double(), lse.detach(), rtol=1e-6, atol=1e-6)
    smoothed = ours - (1 - s) * sums[1] - s * sums[2] / 40 + z * ours**2
    torch.testing.assert_close(smoothed.double(), losses.detach(), rtol=1e-5, atol=1e-5)
    given = (logits, logits, ours, torch.ones(3), labels, 3, 40, 40, 40, s, z)
    backend.launch("cross_entropy_backward", *given)
    torch.testing.assert_close(logits.double(), leaf.grad, rtol=1e-4, atol=1e-5)
