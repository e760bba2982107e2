"""Cross entropy, summed over unmasked tokens, of logits cut over tp and never gathered."""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.core import comm
from megalite.core.mesh import Axis
from megalite.ops import cross_entropy as ops

# t tokens, v vocabulary entries (padded), v/tp of them here


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, vocab_size, tp, smoothing, z_loss):
        width = logits.shape[1]
        known = min(width, max(0, vocab_size - tp.idx * width))
        here = (labels >= tp.idx * width) & (labels < (tp.idx + 1) * width)
        column = (labels - tp.idx * width).masked_fill_(~here, 0)
        ctx.part = ops.Part(column, here, known, vocab_size, smoothing, z_loss)
        begun = ops.begin(logits, ctx.part)
        top = comm.all_reduce(begun[0].clone(), tp, op="max")
        sums = comm.all_reduce(ops.partials(logits, top, ctx.part, begun), tp)
        counted = labels >= 0
        ctx.save_for_backward(logits, top, sums[0], counted)
        losses = ops.losses(top, sums, ctx.part)
        return torch.where(counted, losses, torch.zeros_like(losses)).sum()

    @staticmethod
    def backward(ctx, grad):
        logits, top, total, counted = ctx.saved_tensors
        scale = grad * counted.to(total.dtype)
        dx = ops.gradient_(logits, top, total, ctx.part, scale)
        return dx, None, None, None, None, None


def cross_entropy_sum(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    tp: Axis,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Sum of -log p(label) over the tokens whose label is not negative.

    The same number on every tp rank, in at least float32. `logits` [t, v/tp] is overwritten,
    forward and backward; backward may run once. `labels` [t]. `smoothing` spreads that share of
    each target over the `vocab_size` entries (Szegedy et al. 2016); `z_loss` times the square of
    log(sum of exp(logits)) is added (Chowdhery et al. 2022, section 5).
    """
    return _CrossEntropy.apply(logits, labels, vocab_size, tp, smoothing, z_loss)
