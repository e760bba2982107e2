"""Cross entropy in pieces, for a vocabulary cut over ranks: no rank ever sees all the logits.

Between the pieces stand the collectives of layers/loss.py: `begin`, then a max; `partials`, then a
sum. `gradient_` is the backward. All of them work in the logits' own storage; what is added up over
the vocabulary is at least float32: a sum of thousands of numbers is worth little in bfloat16.

torch takes a pass for each piece. The kernels (kernels/csrc/cross_entropy.cuh) read the logits once
forward, and read and write them once backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megalite.ops import backend

# t tokens, v vocabulary entries on this rank


def begin(logits: Tensor, column: Tensor, here: Tensor, known: int) -> tuple[Tensor, Tensor | None]:
    """Largest logit of each row of `logits` [t, v]: [t]; and what kernels have found besides.

    Columns from `known` on are padding, which is never predicted. `column` [t] is the label's place
    on this rank where `here` [t] is true.
    """
    if backend.takes(logits):
        label = column.masked_fill(~here, -1)
        top = logits.new_empty(len(logits), dtype=torch.float32)
        sums = logits.new_empty(3, len(logits), dtype=torch.float32)
        backend.launch(
            "cross_entropy_forward", logits, top, sums, logits, label, *logits.shape, known
        )
        return top, sums
    logits[:, known:] = -torch.inf
    return logits.amax(-1), None


def partials(
    logits: Tensor,
    top: Tensor,
    column: Tensor,
    here: Tensor,
    begun: tuple[Tensor, Tensor | None],
) -> Tensor:
    """[2, t]: this rank's sum of exp(logit - top), and its label's logit - top, else 0.

    Without kernels `logits` [t, v] is overwritten with exp(logit - top).
    """
    mine, sums = begun
    if sums is not None:
        # A rank all of whose columns are padding has -inf, and nothing to add.
        shift = (mine - top).masked_fill_(mine == -torch.inf, 0.0).exp_()
        return torch.stack((sums[0] * shift, (sums[1] - top).masked_fill_(~here, 0.0)))
    wide = torch.promote_types(logits.dtype, torch.float32)
    picked = logits.gather(1, column[:, None]).squeeze(1).to(wide).sub_(top)
    logits.sub_(top[:, None]).exp_()
    return torch.stack((logits.sum(-1, dtype=wide), picked.masked_fill_(~here, 0.0)))


def gradient_(
    logits: Tensor,
    top: Tensor,
    total: Tensor,
    column: Tensor,
    here: Tensor,
    scale: Tensor,
    known: int,
) -> Tensor:
    """Turn what `partials` has left in `logits` [t, v] into scale * (softmax - one-hot), in place.

    `total` [t] is the sum over all ranks, `scale` [t] the gradient of each token's loss.
    """
    if backend.takes(logits):
        label = column.masked_fill(~here, -1)
        lse = top + total.log()
        rows, width = logits.shape
        backend.launch(
            "cross_entropy_backward",
            logits,
            logits,
            lse,
            scale,
            label,
            rows,
            width,
            known,
            width,
            0.0,
            0.0,
        )
        return logits
    logits.mul_((scale / total)[:, None])
    at_label = torch.where(here, -scale, torch.zeros_like(scale)).to(logits.dtype)
    return logits.scatter_add_(1, column[:, None], at_label[:, None])
