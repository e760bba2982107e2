"""A part of a stage that runs as one: what is gathered, recomputed and dropped together.

A stage (models/gpt.py) lists its units and runs each through its `run_unit`, which is the one place
where something can be put around them: recomputation, and ZeRO-3's gathering around that
(parallel/gather.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megalite.core.call import Call


@dataclass(frozen=True, eq=False)
class Unit:
    """An embedding, a layer or a head."""

    name: str
    """Alike on every rank that holds it, and different within a stage."""
    run: Callable[..., Tensor]
    """(input or None, Call) -> output."""
    params: tuple[nn.Parameter, ...]
    """Everything that `run` reads."""
    is_layer: bool = True
    """One of many alike, which is worth being run twice to save its memory."""


RunUnit = Callable[[Unit, "Tensor | None", Call], Tensor]


class HasUnits(Protocol):
    """A stage, to what goes around its units."""

    run_unit: RunUnit

    def units(self) -> list[Unit]:
        """The units in the order in which a forward runs them."""


def plainly(unit: Unit, x: Tensor | None, call: Call) -> Tensor:
    """Run a unit with nothing around it."""
    return unit.run(x, call)


def recomputed(unit: Unit, x: Tensor | None, call: Call) -> Tensor:
    """Run a layer and keep nothing of it but its input; backward runs it again first.

    Dropout masks have names, so there is no generator state to put back. Chen et al. 2016 (arXiv
    1604.06174).
    """
    if x is None or not unit.is_layer or not torch.is_grad_enabled():
        return unit.run(x, call)
    return checkpoint(unit.run, x, call, use_reentrant=False, preserve_rng_state=False)


RECOMPUTE: dict[str, RunUnit] = {"none": plainly, "full": recomputed}
"""How units are run, by the name of --recompute."""
