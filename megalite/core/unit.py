"""A part of a stage that runs as one: what is gathered, recomputed and dropped together.

A stage (models/gpt.py) lists its units and runs each through its `run_unit`, which is the one place
where something can be put around them: ZeRO-3's gathering does (parallel/gather.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

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


RunUnit = Callable[[Unit, "Tensor | None", Call], Tensor]


class HasUnits(Protocol):
    """A stage, to what goes around its units."""

    run_unit: RunUnit

    def units(self) -> list[Unit]:
        """The units in the order in which a forward runs them."""


def plainly(unit: Unit, x: Tensor | None, call: Call) -> Tensor:
    """Run a unit with nothing around it."""
    return unit.run(x, call)
