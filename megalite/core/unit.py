"""A part of a stage that runs as one: what is gathered, recomputed and dropped together.

A stage (models/gpt.py) lists its units and runs each through its `run_unit`, which is the one place
where something can be put around them: recomputation (recompute.py), and ZeRO-3's gathering around
that (parallel/gather.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from megalite.core.call import Call
from megalite.core.check import PARTS
from megalite.core.recompute import Parts, again


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


def recomputed(unit: Unit, x: Tensor, call: Call) -> Tensor:
    """Run a unit and keep nothing of it but its input; backward runs it again first."""
    return again(lambda x: unit.run(x, call), x)


def partly(names: Sequence[str]) -> Callable[[Unit, Tensor, Call], Tensor]:
    """Runs a unit and keeps all but what its parts of these names make."""

    def run(unit: Unit, x: Tensor, call: Call) -> Tensor:
        with Parts(names) as parts:
            return unit.run(x, call.recomputing(parts))

    return run


def recomputing(
    stage: HasUnits, how: str, *, modules: Sequence[str] | None, layers: int | None
) -> RunUnit:
    """What runs the units of a stage, by the name of --recompute.

    Its first `layers` layers (None: all) are run again in backward, whole or, by `modules`, in
    part. The first, because they are the last to go back: their second runs then find the memory
    that the others have freed.
    """
    if how == "none":
        return plainly
    around = recomputed if how == "full" else partly(PARTS if modules is None else modules)
    names = [unit.name for unit in stage.units() if unit.is_layer][:layers]

    def run(unit: Unit, x: Tensor | None, call: Call) -> Tensor:
        if x is None or unit.name not in names or not torch.is_grad_enabled():
            return unit.run(x, call)
        return around(unit, x, call)

    return run
