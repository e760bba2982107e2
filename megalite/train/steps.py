"""A run's steps, one after the other: with --post-validation past the barrier of the norm.

The sum of squares over all ranks is a barrier at the end of each step: with it the ranks of a
pipeline cannot run into the next step one after the other, as zb-h2 has them do. Post-validation
updates at once, on the guess that nothing is clipped. The norm is looked at in the next step,
before the first backward. If the guess was wrong, all ranks put back what they had, update again as
the norm says, and run the forwards again that had used the wrong numbers: bit for bit what loop.py
does. Qi et al. 2023 (arXiv 2401.10241), section 4; they undo an update by its inverse, which
rounds, where a copy is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megalite.core.call import Call
from megalite.train.build import Engine
from megalite.train.loop import Reduced, forward_backward, update


class Steps:
    """Takes an engine's steps; all ranks call each method together.

    After a guess, what the optimizer holds is right only from `settle` on: call it before anything
    but a step reads or writes parameters. Between the two there is a copy of the updated range's
    numbers and of its gradients: with AdamW in float32 16 bytes for each number that this rank
    updates.
    """

    def __init__(self, engine: Engine):
        self.engine, self.late = engine, engine.config.layout.post_validation
        self.undo: Callable[[], None] | None = None
        """Takes the last update back, while nobody knows whether it was right."""
        self.guesses = self.late
        """Whether the next update is guessed: where the last step known was not clipped."""
        self.undone = 0
        """Updates that were taken back."""

    def forward_backward(self, calls: Sequence[Call], *, stop: bool = False) -> Reduced:
        """As loop.py's; an update that was guessed is settled before the first backward."""

        def stands() -> bool:
            right = self.settle()
            self.engine.zero.begin(len(calls))
            return right

        return forward_backward(self.engine, calls, stop=stop, stands=stands if self.late else None)

    def update(self, found: Reduced, *, lr: float) -> None:
        """As loop.py's, or as it would be if the norm were small."""
        if self.guesses:
            self.engine.mesh.log.doing("optimizer")
            self.found, self.lr, self.undo = found, lr, self.engine.optimizer.snapshot()
            self.engine.optimizer.step(lr=lr, scale=found.correction)
        else:
            update(self.engine, found, lr=lr)
            self.guesses = self.late and self._is_unclipped(found)

    def take(self, calls: Sequence[Call], *, lr: float, stop: bool = False) -> Reduced:
        """One whole step."""
        found = self.forward_backward(calls, stop=stop)
        self.update(found, lr=lr)
        return found

    def settle(self) -> bool:
        """Wait for the norm of a guessed step, and take it as that says; False if it was not."""
        if self.undo is None:
            return True
        self.engine.mesh.log.doing("validate")
        undo, self.undo, self.guesses = self.undo, None, self._is_unclipped(self.found)
        if not self.guesses:
            self.undone += 1
            undo()
            update(self.engine, self.found, lr=self.lr)
        return self.guesses

    def _is_unclipped(self, found: Reduced) -> bool:
        # A NaN is equal to nothing: it counts as clipped, and the update spreads it as any would.
        scale = found.scale(self.engine.config.optim.clip_grad)
        return torch.equal(scale, found.correction)
