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
    def forward(ctx, logits, labels, vocab_size, tp):
        width = logits.shape[1]
        known = min(width, max(0, vocab_size - tp.idx * width))
        here = (labels >= tp.idx * width) & (labels < (tp.idx + 1) * width)
        column = (labels - tp.idx * width).masked_fill_(~here, 0)
        begun = ops.begin(logits, column, here, known)
        top = comm.all_reduce(begun[0].clone(), tp, op="max")
        total, picked = comm.all_reduce(ops.partials(logits, top, column, here, begun), tp)
        counted = labels >= 0
        ctx.save_for_backward(logits, top, total, column, here, counted)
        ctx.known = known
        return torch.where(counted, total.log() - picked, torch.zeros_like(picked)).sum()

    @staticmethod
    def backward(ctx, grad):
        logits, top, total, column, here, counted = ctx.saved_tensors
        scale = grad * counted.to(total.dtype)
        dx = ops.gradient_(logits, top, total, column, here, scale, ctx.known)
        return dx, None, None, None


def cross_entropy_sum(logits: Tensor, labels: Tensor, vocab_size: int, tp: Axis) -> Tensor:
    """Sum of -log p(label) over the tokens whose label is not negative.

    The same number on every tp rank, in at least float32. `logits` [t, v/tp] is overwritten,
    forward and backward; backward may run once. `labels` [t].
    """
    return _CrossEntropy.apply(logits, labels, vocab_size, tp)
