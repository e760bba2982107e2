"""One train step, for every layout, and the loop around it.

The loss is summed over unmasked tokens and divided by their number in the whole global batch.
Backward starts from a constant, 1 / (samples x tokens of a step); the true count travels with the
gradient norm, and the correction joins the clip factor. So nothing depends on micro-batch size, dp,
or where padding falls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class Reducing:
    """A `Reduced` on its way: the sums over all ranks are not waited for yet."""

    sums: comm.Pending
    expected: int
    """Tokens of a step, masked or not."""

    def finish(self) -> Reduced:
        """Wait for it; again is free."""
        squares, loss_sum, tokens, stops = self.sums.wait()
        correction = correction_of(self.expected, tokens)
        loss = loss_sum / tokens.clamp(min=1)
        return Reduced(loss, tokens, correction * squares.sqrt(), correction, stops)


def forward_backward(engine: Engine, calls: Sequence[Call], *, stop: bool = False) -> Reduced:
    """Run one step's microbatches: reduced gradients are then in the buckets. All ranks call it."""
    engine.mesh.log.doing("clear gradients")
    engine.zero.begin(len(calls))
    return begin_reduced(engine, calls, stop=stop).finish()


def begin_reduced(
    engine: Engine,
    calls: Sequence[Call],
    *,
    stop: bool = False,
    stands: Callable[[], bool] | None = None,
) -> Reducing:
    """`forward_backward` up to its last wait. Gradients have been cleared, or `stands`, which the
    pipeline's `run` is given, does it.
    """
    expected = expected_tokens(engine, calls)
    seed = torch.tensor(1.0 / expected, dtype=_wide(engine.dtype), device=engine.device)
    log = engine.mesh.log
    loss = engine.pipeline.run(calls, seed=seed, stands=stands)
    log.doing("finish reductions")
    engine.zero.finish()
    log.doing("gradient norm")
    mine = torch.stack(
        (
            engine.optimizer.sum_of_squares(),
            loss.double() * engine.counts_loss,
            count_of(engine, calls),
            loss.new_tensor(float(stop), dtype=torch.float64),
        )
    )
    return Reducing(comm.all_reduce_start(mine, engine.mesh.world), expected)


def expected_tokens(engine: Engine, calls: Sequence[Call]) -> int:
    """Tokens of a step, masked or not."""
    train, dp = engine.config.train, engine.mesh.axis("dp")
    return len(calls) * train.micro_batch_size * dp.size * engine.config.model.seq_len


def count_of(engine: Engine, calls: Sequence[Call]) -> Tensor:
    """Unmasked tokens that this rank counts."""
    count = torch.zeros((), dtype=torch.float64, device=engine.device)
    if engine.counts_loss:
        for call in calls:
            if call.labels is not None:
                count += (call.labels >= 0).sum()
    return count


def correction_of(expected: int, tokens: Tensor) -> Tensor:
    """What the gradients in the buckets are to be multiplied with, by the count of all ranks."""
    return expected / tokens.clamp(min=1)


def scale_of(engine: Engine, found: Reduced) -> Tensor:
    """What an update multiplies the gradients in the buckets with: correction, and clipping."""
    clip = engine.config.optim.clip_grad
    if clip > 0:
        return found.correction * (clip / (found.norm + CLIP_EPS)).clamp(max=1.0)
    return found.correction


def update(engine: Engine, found: Reduced, *, lr: float) -> None:
    """Clip, and let the optimizer take its step."""
    engine.mesh.log.doing("optimizer")
    engine.optimizer.step(lr=lr, scale=scale_of(engine, found))


def train_step(engine: Engine, calls: Sequence[Call], *, lr: float, stop: bool = False) -> Reduced:
    """One optimizer step over one global batch."""
    found = forward_backward(engine, calls, stop=stop)
    update(engine, found, lr=lr)
    return found


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
