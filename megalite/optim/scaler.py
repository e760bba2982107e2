"""The loss scale of float16, which has no number below 6e-8 for a gradient and none above 65504.

Backward starts from the loss times the scale; the factor that normalises and clips gradients takes
it out again. A scale that was too large shows as a norm that is not finite, alike on every rank,
and the step is skipped. The rule is that of Micikevicius et al. 2018 (arXiv 1710.03740), section
3.2, with Megatron-LM's hysteresis. Next: train/loop.py, which asks.
"""

from __future__ import annotations

from collections.abc import Mapping

from megalite.core.config import OptimConfig


class LossScaler:
    """A scale that stays, or that falls at overflows and rises again after good steps."""

    def __init__(self, cfg: OptimConfig):
        self.cfg = cfg
        self.scale = cfg.loss_scale or cfg.initial_loss_scale
        self.good_steps = 0
        """In a row, since the scale last changed."""
        self.tolerance = cfg.hysteresis
        """Overflows until the scale falls."""

    def follow(self, *, overflow: bool) -> None:
        """Set the scale of the next step by what came of this one."""
        cfg = self.cfg
        if cfg.loss_scale:
            return
        if overflow:
            self.good_steps = 0
            self.tolerance -= 1
            if self.tolerance <= 0:
                self.scale = max(self.scale / 2, cfg.min_loss_scale)
            return
        self.good_steps += 1
        if self.good_steps == cfg.loss_scale_window:
            self.good_steps, self.tolerance = 0, cfg.hysteresis
            self.scale *= 2

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps of it; nothing of a scale that stays."""
        if self.cfg.loss_scale:
            return {}
        return {
            "scale": self.scale,
            "good_steps": self.good_steps,
            "tolerance": self.tolerance,
        }

    def load(self, state: Mapping[str, float]) -> None:
        """Go on from a `state`, if it has one and the scale is to move."""
        if state and not self.cfg.loss_scale:
            self.scale = state["scale"]
            self.good_steps, self.tolerance = int(state["good_steps"]), int(state["tolerance"])
