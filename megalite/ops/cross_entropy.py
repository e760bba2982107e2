"""Cross entropy in pieces, for a vocabulary cut over ranks: no rank ever sees all the logits.

Between the pieces stand the collectives of layers/loss.py: `peak`, then a max; `partials`, then a
sum. `gradient_` is the backward. All of them work in the logits' own storage; what is added up over
the vocabulary is at least float32: a sum of thousands of numbers is worth little in bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor

# t tokens, v vocabulary entries on this rank


def peak(logits: Tensor) -> Tensor:
    """Largest logit of each row: [t, v] -> [t]."""
    return logits.amax(-1)


def partials(logits: Tensor, top: Tensor, column: Tensor, here: Tensor) -> Tensor:
    """[2, t]: this rank's sum of exp(logit - top), and its label's logit - top, else 0.

    Overwrites `logits` [t, v] with exp(logit - top). `column` [t] is the label's place on this rank
    where `here` [t] is true.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    picked = logits.gather(1, column[:, None]).squeeze(1).to(wide).sub_(top)
    logits.sub_(top[:, None]).exp_()
    return torch.stack((logits.sum(-1, dtype=wide), picked.masked_fill_(~here, 0.0)))


def gradient_(
    weights: Tensor, total: Tensor, column: Tensor, here: Tensor, scale: Tensor
) -> Tensor:
    """Turn exp(logit - top) [t, v] into scale * (softmax - one-hot), in place.

    `total` [t] is the sum over all ranks, `scale` [t] the gradient of each token's loss.
    """
    weights.mul_((scale / total)[:, None])
    at_label = torch.where(here, -scale, torch.zeros_like(scale)).to(weights.dtype)
    return weights.scatter_add_(1, column[:, None], at_label[:, None])
