"""Whole matrices for a rule that is not number by number, on ranks that hold pieces of them.

Buckets of such a rule give each rank of dp x cp whole local parameters (parallel/buckets.py): it
owns them. Cut over tp they are pieces still. The tp ranks of one owner put the pieces together,
each for itself, work on the whole alike, and keep their own piece of the result: nothing is sent
back, and copies of shared kv heads stay equal in every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from megalite.core import comm
from megalite.core.mesh import Axis
from megalite.core.shard import slices
from megalite.parallel.buckets import FlatLayout, Slot, Span

# n numbers of a flat range on this rank


class EachMatrix(Protocol):
    """What a rule with layout "matrix" is given in place of the matrices themselves."""

    def __call__(self, flat: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The numbers of `flat` [n] with `function` done to each whole matrix [rows, cols]."""
        ...


class WholeMatrices:
    """The EachMatrix of one range of a bucket; all ranks of `tp` call it together.

    Parts that are fused (q, k, v; gate, up) are matrices of their own. Sends one gather of the
    range over tp.
    """

    def __init__(self, layout: FlatLayout, within: Span, tp: Axis):
        self.base, self.tp = within[0], tp
        self.slots = [s for s in layout.slots if within[0] <= s.start < within[1]]
        assert all(s.stop <= within[1] for s in self.slots), "a matrix lies across two ranges"

    def __call__(self, flat: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The numbers of `flat` [n] with `function` done to each whole matrix [rows, cols]."""
        if not self.slots:
            return flat
        parts = comm.all_gather(flat[None], self.tp)  # [1, n] -> [tp, n]
        made = torch.zeros_like(flat)
        for slot in self.slots:
            whole = flat.new_zeros(slot.shard.shape)
            for idx, part in enumerate(parts):
                local = self._local(part, slot)
                for piece in slot.shard.pieces(self.tp.at(idx).named):
                    whole[slices(piece.whole)] = local[slices(piece.local)]
            rows = [block.size for block in slot.shard.blocks]
            whole = torch.cat([function(matrix) for matrix in whole.split(rows)])
            for piece in slot.shard.pieces(self.tp.named):
                self._local(made, slot)[slices(piece.local)] = whole[slices(piece.whole)]
        return made

    def _local(self, flat: Tensor, slot: Slot) -> Tensor:
        return flat[slot.start - self.base : slot.stop - self.base].view(slot.shape)
