"""The cross entropy's CUDA bodies under the emulator, whole and cut, against torch in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalite.core.mesh import Axis
from megalite.layers.loss import cross_entropy
from megalite.ops import cross_entropy as ops

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
    loss = cross_entropy(leaf * 1.0, labels, width, Axis("tp")).sum()
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
    loss = cross_entropy(leaf * 1.0, labels.clamp(min=0), 50, Axis("tp")).sum()
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(leaf.grad[:, :50].double(), grad, rtol=1e-4, atol=1e-5)
    assert not leaf.grad[:, 50:].any()


def in_parts(logits, labels, known, **how):
    """Losses and gradient of two ranks, each of which has half of the columns."""
    width, size = logits.shape[1] // 2, known
    pieces, parts = [piece.contiguous() for piece in logits.split(width, 1)], []
    for idx in range(2):
        here = (labels >= width * idx) & (labels < width * (idx + 1))
        column = (labels - width * idx).masked_fill(~here, 0)
        mine = min(width, max(0, known - width * idx))
        parts.append(ops.Part(column, here, mine, size, **how))
    both = list(zip(pieces, parts, strict=True))
    begun = [ops.begin(piece, part) for piece, part in both]
    top = torch.maximum(begun[0][0], begun[1][0])
    found = [
        ops.partials(piece, top, part, first)
        for (piece, part), first in zip(both, begun, strict=True)
    ]
    sums = found[0] + found[1]
    ones = torch.ones(len(logits))
    grads = [ops.gradient_(piece, top, sums[0], part, ones) for piece, part in both]
    return ops.losses(top, sums, parts[0]), torch.cat(grads, 1)


@pytest.mark.parametrize("known", [17, 25, 48])
def test_two_ranks_find_what_one_does(emulated, known):
    """The second rank's columns are padding, all, but for one, or none."""
    logits, labels = drawn(5, 48, torch.float32)
    labels = labels.clamp(min=0) % known
    wanted, grad = in_float64(logits[:, :known], labels)
    losses, grads = in_parts(logits, labels, known)
    assert emulated.count == 4
    assert losses.sum().item() == pytest.approx(wanted, rel=1e-5)
    torch.testing.assert_close(grads[:, :known].double(), grad, rtol=1e-4, atol=1e-5)
    assert not grads[:, known:].any()


@pytest.mark.parametrize("how", [{"smoothing": 0.1}, {"z_loss": 0.01}, {}], ids=str)
@pytest.mark.parametrize("known", [17, 48])
def test_smoothing_and_z_loss_over_two_ranks(emulated, how, known):
    how = how or {"smoothing": 0.2, "z_loss": 0.02}
    logits, labels = drawn(5, 48, torch.float32)
    labels = labels.clamp(min=0) % known
    leaf = logits[:, :known].double().requires_grad_()
    smoothing, z_loss = how.get("smoothing", 0.0), how.get("z_loss", 0.0)
    wanted = F.cross_entropy(leaf, labels, label_smoothing=smoothing, reduction="none")
    wanted = wanted + z_loss * leaf.logsumexp(-1) ** 2
    wanted.sum().backward()
    losses, grads = in_parts(logits, labels, known, **how)
    torch.testing.assert_close(losses.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[:, :known].double(), leaf.grad, rtol=1e-4, atol=1e-5)
    assert not grads[:, known:].any()
