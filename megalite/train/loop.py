"""One train step, for every layout, and the loop around it.

The loss is summed over its terms, which are unmasked tokens (of preference tuning, pairs), and
divided by their number in the whole global batch.
Backward starts from a constant, 1 / (samples x tokens of a step); the true count travels with the
gradient norm, and the correction joins the clip factor. So nothing depends on micro-batch size, dp,
or where padding falls. In float16 it starts from that constant times the loss scale, which the same
factor takes out again.
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
    """What one forward and backward over the global batch found: scalars, alike on every rank.

    Who reads one waits for the sum over all ranks that it is made of.
    """

    expected: int
    """Tokens of the step, masked or not: about as many as terms, or more."""
    sums: comm.Pending
    """Of squares, losses, ranks that were asked to stop, terms and unmasked tokens; in preference
    tuning also of pairs whose preferred answer has gained on the other, and of all gains."""
    counted: comm.Pending | None = None
    """Of terms and unmasked tokens, where those sums do not wait for the others."""
    loss_scale: float = 1.0
    """What the loss was multiplied with before backward."""

    @property
    def terms(self) -> Tensor:
        """What the loss is a mean over: unmasked tokens, or pairs."""
        return self._counts[0]

    @property
    def tokens(self) -> Tensor:
        """Unmasked tokens."""
        return self._counts[1]

    @property
    def _counts(self) -> Tensor:
        return self.sums.wait()[3:5] if self.counted is None else self.counted.wait()

    @property
    def loss(self) -> Tensor:
        """Mean over its terms."""
        return self.sums.wait()[1] / self.terms.clamp(min=1)

    @property
    def preferred(self) -> Tensor:
        """Share of pairs whose preferred answer has gained on the other: of preference tuning."""
        return self.sums.wait()[5] / self.terms.clamp(min=1)

    @property
    def margin(self) -> Tensor:
        """By how much, the mean over pairs: of preference tuning."""
        return self.sums.wait()[6] / self.terms.clamp(min=1)

    @property
    def norm(self) -> Tensor:
        """Of the gradient of that mean."""
        return self.correction * self.sums.wait()[0].sqrt()

    @property
    def correction(self) -> Tensor:
        """What the gradients in the buckets are to be multiplied with to be those of the mean."""
        return self.expected / (self.terms.clamp(min=1) * self.loss_scale)

    @property
    def overflow(self) -> bool:
        """Whether some number of the gradient, on any rank, is infinite or no number."""
        return not self.norm.isfinite().item()

    @property
    def stop(self) -> Tensor:
        """Above 0 where some rank was asked to stop."""
        return self.sums.wait()[2]

    def scale(self, clip: float) -> Tensor:
        """The correction, and what clips the norm to `clip` (0: nothing does)."""
        if clip > 0:
            return self.correction * (clip / (self.norm + CLIP_EPS)).clamp(max=1.0)
        return self.correction


def forward_backward(
    engine: Engine,
    calls: Sequence[Call],
    *,
    stop: bool = False,
    stands: Callable[[], bool] | None = None,
) -> Reduced:
    """Run one step's microbatches: reduced gradients are then in the buckets. All ranks call it.

    `stands`, if given, is for `Pipeline.run`, and clears the gradients.
    """
    train, dp, scaler = engine.config.train, engine.mesh.axis("dp"), engine.optimizer.scaler
    expected = len(calls) * train.micro_batch_size * dp.size * engine.config.model.seq_len
    loss_scale = 1.0 if scaler is None else scaler.scale
    # Filled in, not copied there: a copy from the host would wait for the GPU.
    first = loss_scale / expected
    seed = torch.full((), first, dtype=_wide(engine.dtype), device=engine.device)
    log = engine.mesh.log
    counts = torch.zeros(2, dtype=torch.float64, device=engine.device)
    if engine.counts_loss:
        counts += torch.stack([torch.stack((c.terms, c.tokens_learned)) for c in calls]).sum(0)
    early = None
    if stands is None:
        log.doing("clear gradients")
        engine.zero.begin(len(calls))
    else:
        early = comm.all_reduce_start(counts.clone(), engine.mesh.world)
    loss = engine.pipeline.run(calls, seed=seed, stands=stands)
    log.doing("finish reductions")
    engine.zero.finish()
    log.doing("gradient norm")
    squares = engine.optimizer.sum_of_squares()
    asked = torch.full_like(squares, float(stop))
    found = torch.stack((squares, loss.double() * engine.counts_loss, asked))
    gained = [_gained(engine, calls)] if engine.config.data.prefers else []
    mine = torch.cat((found, counts, *gained))
    return Reduced(expected, comm.all_reduce_start(mine, engine.mesh.world), early, loss_scale)


def _gained(engine: Engine, calls: Sequence[Call]) -> Tensor:
    """What this rank counts of pairs: how many have gained, and the sum of all gains."""
    total = torch.zeros(2, dtype=torch.float64, device=engine.device)
    if engine.counts_loss:
        for pairs in (c.preference for c in calls if c.preference and c.is_first_part):
            for gains in pairs.gains:
                counted = gains.double() * pairs.counts
                total += torch.stack(((counted > 0).sum(), counted.sum()))
    return total


def update(engine: Engine, found: Reduced, *, lr: float) -> None:
    """Clip, and let the optimizer take its step; in float16 not where gradients overflowed."""
    scale = found.scale(engine.config.optim.clip_grad)
    engine.mesh.log.doing("optimizer")
    scaler = engine.optimizer.scaler
    if scaler is not None:
        # The host waits for the norm here, in float16 alone, so a GPU is idle until it has the
        # optimizer's launches. All ranks have the same sum, and so decide alike.
        overflow = found.overflow
        scaler.follow(overflow=overflow)
        if overflow:
            return
    engine.optimizer.step(lr=lr, scale=scale)


def train_step(engine: Engine, calls: Sequence[Call], *, lr: float, stop: bool = False) -> Reduced:
    """One optimizer step over one global batch."""
    found = forward_backward(engine, calls, stop=stop)
    update(engine, found, lr=lr)
    return found


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
