"""Cross entropy in pieces, for a vocabulary cut over ranks: no rank ever sees all the logits.

Between the pieces stand the collectives of layers/loss.py: `begin`, then a max; `partials`, then a
sum; `losses`. `gradient_` is the backward. All of them work in the logits' own storage; what is
added up over the vocabulary is at least float32: a sum of thousands of numbers is worth little in
bfloat16.

torch takes a pass for each piece. The kernels (kernels/csrc/cross_entropy.cuh) read the logits once
forward, and read and write them once backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megalite.ops import backend

# t tokens, v vocabulary entries on this rank


class Part(NamedTuple):
    """What a rank has of the vocabulary, and what the loss is."""

    column: Tensor
    """[t] int64: each label's place here, where `here` is true."""
    here: Tensor
    """[t] booleans."""
    known: int
    """Columns from this one on are padding, which is never predicted."""
    size: int
    """Of the whole vocabulary."""
    smoothing: float = 0.0
    z_loss: float = 0.0

    @property
    def label(self) -> Tensor:
        """[t] int64: the column, or -1."""
        return self.column.masked_fill(~self.here, -1)


def begin(logits: Tensor, part: Part) -> tuple[Tensor, Tensor | None]:
    """Largest logit of each row of `logits` [t, v]: [t]; and what kernels have found besides."""
    if backend.takes(logits):
        assert logits.is_contiguous(), "logits are overwritten where they lie"
        top = logits.new_empty(len(logits), dtype=torch.float32)
        sums = logits.new_empty(3, len(logits), dtype=torch.float32)
        sizes = (*logits.shape, part.known)
        backend.launch("cross_entropy_forward", logits, top, sums, logits, part.label, *sizes)
        return top, sums
    logits[:, part.known :] = -torch.inf
    return logits.amax(-1), None


def partials(
    logits: Tensor, top: Tensor, part: Part, begun: tuple[Tensor, Tensor | None]
) -> Tensor:
    """[2, t]: this rank's sum of exp(logit - top), and its label's logit - top, else 0.

    With smoothing [3, t]: the sum of logit - top as well. `top` is that of all ranks. Without
    kernels `logits` [t, v] is overwritten with exp(logit - top).
    """
    mine, sums = begun
    if sums is not None:
        # A rank all of whose columns are padding has -inf, and nothing to add.
        shift = (mine - top).masked_fill_(mine == -torch.inf, 0.0).exp_()
        found = [sums[0] * shift, (sums[1] - top).masked_fill_(~part.here, 0.0)]
        if part.smoothing:
            found.append(sums[2] - part.known * top)
        return torch.stack(found)
    wide = torch.promote_types(logits.dtype, torch.float32)
    picked = logits.gather(1, part.column[:, None]).squeeze(1).to(wide).sub_(top)
    logits.sub_(top[:, None])
    plain = logits[:, : part.known].sum(-1, dtype=wide) if part.smoothing else None
    logits.exp_()
    found = [logits.sum(-1, dtype=wide), picked.masked_fill_(~part.here, 0.0)]
    return torch.stack(found if plain is None else [*found, plain])


def losses(top: Tensor, sums: Tensor, part: Part) -> Tensor:
    """[t]: the loss of each token, of what `partials` gave, summed over all ranks."""
    lse = sums[0].log()  # over top, as the others are
    if part.smoothing:
        aim = (1.0 - part.smoothing) * sums[1] + part.smoothing / part.size * sums[2]
    else:
        aim = sums[1]
    loss = lse - aim
    return loss + part.z_loss * (top + lse) ** 2 if part.z_loss else loss


def gradient_(logits: Tensor, top: Tensor, total: Tensor, part: Part, scale: Tensor) -> Tensor:
    """Turn what `partials` has left in `logits` [t, v] into the losses' gradient, in place.

    scale * (softmax - one-hot), but for smoothing and z-loss. `total` [t] is the sum of
    exp(logit - top) over all ranks, `scale` [t] the gradient of each token's loss.
    """
    lse = top + total.log()
    if backend.takes(logits):
        more = (part.size, part.smoothing, part.z_loss)
        sizes = (*logits.shape, part.known)
        given = (logits, lse, scale, part.label)
        backend.launch("cross_entropy_backward", logits, *given, *sizes, *more)
        return logits
    of_p = scale * (1.0 + 2.0 * part.z_loss * lse) if part.z_loss else scale
    logits.mul_((of_p / total)[:, None])
    if part.smoothing:
        logits[:, : part.known].sub_((part.smoothing / part.size * scale)[:, None])
    at_label = torch.where(part.here, (part.smoothing - 1.0) * scale, torch.zeros_like(scale))
    return logits.scatter_add_(1, part.column[:, None], at_label.to(logits.dtype)[:, None])
