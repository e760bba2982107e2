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

import torch

from megalite.core.call import Call
from megalite.train.build import Engine
from megalite.train.loop import Reduced, forward_backward, update


class PostValidation:
    """Takes an engine's steps; all ranks call each method together.

    What the optimizer holds is right only after `settle`: call it before anything but a step reads
    or writes parameters. Between the two there is a copy of the updated range's numbers and of its
    gradients: with AdamW in float32 16 bytes for each number that this rank updates.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self.undo: Callable[[], None] | None = None
        """Takes the last update back, while nobody knows whether it was right."""
        self.guesses = True
        """Whether the next update is guessed: where the last step known was not clipped."""
        self.undone = 0
        """Updates that were taken back."""

    def step(self, calls: Sequence[Call], *, lr: float, stop: bool = False) -> Reduced:
        """As loop.py's `train_step`."""
        engine = self.engine

        def stands() -> bool:
            right = self.settle()
            engine.zero.begin(len(calls))
            return right

        self.found, self.lr = forward_backward(engine, calls, stop=stop, stands=stands), lr
        if self.guesses:
            engine.mesh.log.doing("optimizer")
            self.undo = engine.optimizer.snapshot()
            engine.optimizer.step(lr=lr, scale=self.found.correction)
        else:
            update(engine, self.found, lr=lr)
            self.guesses = self._is_unclipped()
        return self.found

    def settle(self) -> bool:
        """Wait for the last step's norm, and take the step as that says; False if it was not."""
        if self.undo is None:
            return True
        self.engine.mesh.log.doing("validate")
        undo, self.undo, self.guesses = self.undo, None, self._is_unclipped()
        if not self.guesses:
            self.undone += 1
            undo()
            update(self.engine, self.found, lr=self.lr)
        return self.guesses

    def _is_unclipped(self) -> bool:
        # A NaN is equal to nothing: it counts as clipped, and the update spreads it as any would.
        scale = self.found.scale(self.engine.config.optim.clip_grad)
        return torch.equal(scale, self.found.correction)
