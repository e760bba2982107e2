"""Cross entropy in pieces, for a vocabulary that is cut over ranks: no rank ever sees all the logits.

The three steps have a collective between them, which layers/loss.py adds: `peak` and then a max,
`partials` and then a sum, and `loss_and_weights`; `gradient_` is their backward. All work in the
logits' own storage.
"""

from __future__ import annotations

import torch
from torch import Tensor

# t tokens, v vocabulary entries on this rank


def peak(logits: Tensor) -> Tensor:
    """Largest logit of each row: [t, v] -> [t]."""
    return logits.amax(-1)


def partials(logits: Tensor, top: Tensor, column: Tensor, here: Tensor) -> Tensor:
    """[2, t]: this rank's sum of exp(logit - top), and its label's logit - top (0 where the label is elsewhere).

    Overwrites `logits` with exp(logit - top). `column` [t] is the label's place on this rank where
    `here` [t].
    """
    logits.sub_(top[:, None])
    picked = logits.gather(1, column[:, None]).squeeze(1).masked_fill_(~here, 0.0)
    logits.exp_()
    return torch.stack((logits.sum(-1), picked))


def gradient_(
    weights: Tensor, total: Tensor, column: Tensor, here: Tensor, scale: Tensor
) -> Tensor:
    """Turn exp(logit - top) [t, v] into scale * (softmax - one-hot), in place; `scale` [t] is the loss's gradient."""
    weights.mul_((scale / total)[:, None])
    weights.scatter_add_(
        1, column[:, None], torch.where(here, -scale, torch.zeros_like(scale))[:, None]
    )
    return weights
