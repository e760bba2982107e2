"""One microbatch on its way through the layers: its tokens, and how this pass is run.

Every stage gets the same record, so shapes, positions and dropout masks are known everywhere before
a step starts and never travel. Sequence parallelism is a property of the call, not of a layer:
`seq_cut` is None when decoding or where tp is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megalite.core.mesh import Axis

# s sequence on this context rank, b micro batch

IGNORE = -1
"""A label that takes no part in the loss."""


@dataclass(frozen=True, eq=False)
class Call:
    """One microbatch and one way to run it."""

    tokens: Tensor
    """[s, b] int64."""
    labels: Tensor | None
    """[s, b] int64, IGNORE where masked; None when no loss is wanted."""
    positions: Tensor
    """[s] int64: place of each row in its sequence."""
    samples: Tensor
    """[b] int64: number of each sample in the whole run; names its random numbers."""
    seq_cut: Axis | None = None
    """The axis that cuts the residual stream along s, or None."""
    later: list[Callable[[], None]] | None = None
    """Where weight-gradient jobs wait for W; None runs them at once."""
    training: bool = True
    """Dropout is on."""

    @property
    def seq_len(self) -> int:
        return self.tokens.shape[0]

    @property
    def batch(self) -> int:
        return self.tokens.shape[1]

    @property
    def rows(self) -> int:
        """Rows of the residual stream on this rank: s, or s/tp when cut."""
        return self.seq_len // self.seq_cut.size if self.seq_cut else self.seq_len

    @property
    def row_positions(self) -> Tensor:
        """Positions of those rows."""
        if self.seq_cut is None:
            return self.positions
        return self.positions.narrow(0, self.seq_cut.idx * self.rows, self.rows)

    def deferring(self, later: list[Callable[[], None]]) -> Call:
        """The same call with its weight gradients left in `later`."""
        return replace(self, later=later)


def make_call(
    tokens: Tensor, labels: Tensor | None, samples: Tensor, *, seq_cut: Axis | None
) -> Call:
    """A training call over whole sequences [s, b]."""
    positions = torch.arange(tokens.shape[0], device=tokens.device)
    cut = seq_cut if seq_cut is not None and seq_cut.size > 1 else None
    assert cut is None or tokens.shape[0] % cut.size == 0, (tuple(tokens.shape), cut)
    return Call(tokens, labels, positions, samples, cut)
