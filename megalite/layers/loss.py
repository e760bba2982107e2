"""The loss: cross entropy of logits cut over tp and never gathered, and what is made of it.

In pretraining and fine-tuning the sum over unmasked tokens; in preference tuning (Rafailov et al.
2023, "Direct preference optimization") a term for each pair of answers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

from megalite.core import comm
from megalite.core.call import Call
from megalite.core.mesh import Axis
from megalite.ops import cross_entropy as ops

# t tokens, v vocabulary entries (padded), v/tp of them here, s sequence, b micro batch


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
        return torch.where(counted, losses, torch.zeros_like(losses))

    @staticmethod
    def backward(ctx, grad):
        logits, top, total, counted = ctx.saved_tensors
        scale = grad * counted.to(total.dtype)
        dx = ops.gradient_(logits, top, total, ctx.part, scale)
        return dx, None, None, None, None, None


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    tp: Axis,
    *,
    smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """-log p(label) of each token [t], 0 where the label is negative.

    The same numbers on every tp rank, in at least float32. `logits` [t, v/tp] is overwritten,
    forward and backward; backward may run once. `labels` [t]. `smoothing` spreads that share of
    each target over the `vocab_size` entries (Szegedy et al. 2016); `z_loss` times the square of
    log(sum of exp(logits)) is added (Chowdhery et al. 2022, section 5).
    """
    return _CrossEntropy.apply(logits, labels, vocab_size, tp, smoothing, z_loss)


def log_ratios(losses: Tensor, call: Call) -> Tensor:
    """log p(preferred answer) - log p(other) of each pair of a call: [b].

    From `losses` [s, b], -log p of each label on this context rank; the same on all of them.
    """
    assert call.starts is not None
    preferred = call.starts[call.positions] == 0
    mine = torch.where(preferred, -losses, losses).sum(0)
    return mine if call.context is None else comm.reduce(mine, call.context.axis)


def preference_loss(ratios: Tensor, call: Call) -> Tensor:
    """-log sigmoid(beta (ratio - reference)), summed over the pairs of a call, of log_ratios [b].

    The first context rank has the sum and the others have 0, so that it is counted once; their
    gradients are those of the sum.
    """
    pairs = call.preference
    assert pairs is not None
    gains = pairs.beta * (ratios - pairs.reference.to(ratios.dtype))
    pairs.gains[:] = [gains.detach()]
    each = softplus(-gains)
    total = torch.where(pairs.counts, each, torch.zeros_like(each)).sum()
    return total if call.is_first_part else total - total.detach()
