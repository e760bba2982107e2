"""One train step, for every layout, and the loop around it.

The loss is summed over unmasked tokens and divided by their number in the whole global batch.
Backward starts from a constant, 1 / (samples x tokens of a step); the true count travels with the
gradient norm, and the correction joins the clip factor. So nothing depends on micro-batch size, dp,
or where padding falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.core import comm
from megalite.core.call import Call
from megalite.train.build import Engine

CLIP_EPS = 1e-6  # torch.nn.utils.clip_grad_norm_ adds the same


@dataclass(frozen=True)
class Reduced:
    """What one forward and backward over the global batch found: scalars, alike on every rank."""

    loss: Tensor
    """Mean over unmasked tokens."""
    tokens: Tensor
    """Unmasked tokens."""
    norm: Tensor
    """Of the gradient of that mean."""
    correction: Tensor
    """What the gradients in the buckets are to be multiplied with to be those of the mean."""
    stop: Tensor
    """Above 0 where some rank was asked to stop."""


def forward_backward(engine: Engine, calls: Sequence[Call], *, stop: bool = False) -> Reduced:
    """Run one step's microbatches: reduced gradients are then in the buckets. All ranks call it."""
    train, dp = engine.config.train, engine.mesh.axis("dp")
    expected = len(calls) * train.micro_batch_size * dp.size * engine.config.model.seq_len
    seed = torch.tensor(1.0 / expected, dtype=_wide(engine.dtype), device=engine.device)
    log = engine.mesh.log
    log.doing("clear gradients")
    engine.zero.begin(len(calls))
    loss = engine.pipeline.run(calls, seed=seed)
    log.doing("finish reductions")
    engine.zero.finish()
    log.doing("gradient norm")
    counted = loss.new_zeros((), dtype=torch.float64)
    if engine.counts_loss:
        counted = torch.stack([(c.labels >= 0).sum() for c in calls if c.labels is not None]).sum()
    mine = torch.stack(
        (
            engine.optimizer.sum_of_squares(),
            loss.double() * engine.counts_loss,
            counted.double(),
            counted.new_tensor(float(stop), dtype=torch.float64),
        )
    )
    squares, loss_sum, tokens, stops = comm.all_reduce(mine, engine.mesh.world)
    correction = expected / tokens.clamp(min=1)
    return Reduced(
        loss_sum / tokens.clamp(min=1), tokens, correction * squares.sqrt(), correction, stops
    )


def update(engine: Engine, found: Reduced, *, lr: float) -> None:
    """Clip, and let the optimizer take its step."""
    clip = engine.config.optim.clip_grad
    scale = found.correction
    if clip > 0:
        scale = scale * (clip / (found.norm + CLIP_EPS)).clamp(max=1.0)
    engine.mesh.log.doing("optimizer")
    engine.optimizer.step(lr=lr, scale=scale)


def train_step(engine: Engine, calls: Sequence[Call], *, lr: float, stop: bool = False) -> Reduced:
    """One optimizer step over one global batch."""
    found = forward_backward(engine, calls, stop=stop)
    update(engine, found, lr=lr)
    return found


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
