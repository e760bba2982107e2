"""Steps that do not wait for the norm of their gradient, bit for bit those of loop.py.

The sum of squares over all ranks is a barrier at the end of each step: with it the ranks of a
pipeline cannot run into the next step one after the other, as zb-h2 has them do. Here each updates
at once, on the guess that nothing is clipped. The norm is looked at in the next step, before the
first backward. If the guess was wrong, all ranks put back what they had, update again as the norm
says, and run the forwards again that had used the wrong numbers. Qi et al. 2023 (arXiv 2401.10241),
section 4; they undo an update by its inverse, which rounds, where a copy is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.core import comm
from megalite.core.call import Call
from megalite.train.build import Engine
from megalite.train.loop import (
    Reduced,
    Reducing,
    begin_reduced,
    correction_of,
    count_of,
    scale_of,
    update,
)


@dataclass(frozen=True)
class _Guess:
    """An update that was made with a scale which may be wrong."""

    found: Reducing
    scale: Tensor
    lr: float
    restore: Callable[[], None]


class PostValidation:
    """Takes an engine's steps; all ranks call each method together.

    What the optimizer holds is right only after `settle`: call it before anything but a step reads
    or writes parameters. Between the two there is a copy of the updated range's numbers and of its
    gradients: with AdamW in float32 16 bytes for each number that this rank updates.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.open: _Guess | None = None
        self.guesses = True
        """Whether the next update is guessed: where the last step known was not clipped."""
        self.undone = 0
        """Updates that were taken back."""

    def step(
        self, calls: Sequence[Call], *, lr: float, stop: bool = False
    ) -> tuple[Callable[[], Reduced], Tensor]:
        """As loop.py's `train_step`; gives what waits for the Reduced, and the unmasked tokens."""
        engine = self.engine
        counted = comm.all_reduce_start(count_of(engine, calls), engine.mesh.world)

        def stands() -> bool:
            right = self.settle()
            engine.zero.begin(len(calls))
            return right

        found = begin_reduced(engine, calls, stop=stop, stands=stands)
        tokens = counted.wait()
        if self.guesses:
            scale = correction_of(found.expected, tokens)
            engine.mesh.log.doing("optimizer")
            self.open = _Guess(found, scale, lr, engine.optimizer.snapshot())
            engine.optimizer.step(lr=lr, scale=scale)
        else:
            reduced = found.finish()
            update(engine, reduced, lr=lr)
            self.guesses = torch.equal(scale_of(engine, reduced), reduced.correction)
        return found.finish, tokens

    def settle(self) -> bool:
        """Wait for the last step's norm, and take the step as that says; False if it was not."""
        if self.open is None:
            return True
        guess, self.open = self.open, None
        self.engine.mesh.log.doing("validate")
        scale = scale_of(self.engine, guess.found.finish())
        self.guesses = torch.equal(scale, guess.scale)
        if not self.guesses:
            self.undone += 1
            guess.restore()
            self.engine.optimizer.step(lr=guess.lr, scale=scale)
        return self.guesses
