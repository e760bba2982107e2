"""Parameters and gradients of a rank as a few flat buckets, each reduced by one collective.

A bucket holds parameters of one stage that are treated alike (dtype, decay, learning rate, tie,
optimizer).
Its FlatLayout says which range of the flat tensors is which parameter: optimizer, checkpoint and
planner read it. Parameters and gradients become views of the flat tensors; nothing is ever copied
to be reduced. What part of this lives sharded is zero.py's policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from megalite.core.comm import Pending
from megalite.core.mesh import Axis
from megalite.core.params import acc_dtype, named_parameters, traits_of
from megalite.core.shard import (
    Box,
    Piece,
    Shard,
    box_shape,
    box_spans,
    flat_boxes,
    overlap,
    shift,
    slices,
)

# flat tensors are [size]; a parameter's slot is its local tensor in row-major order

ALIGN = 64
"""Parameters and shards start at multiples of this many elements: 128 bytes in 2-byte types."""

Span = tuple[int, int]
"""A flat range [start, stop)."""

FROZEN = "frozen"
"""The update rule of parameters that need no gradient: none."""


@dataclass(frozen=True)
class Key:
    """What the parameters of one bucket have in common."""

    stage: int
    dtype: torch.dtype
    decay: bool
    lr_mult: float
    tied: bool
    unit: str = ""
    """The unit whose parameters these are, where each unit has buckets of its own."""
    optimizer: str = "adamw"
    """The update rule of these parameters, by name."""
    matrix: bool = False
    """Whether each rank's range holds whole parameters, as that rule asks."""

    @property
    def frozen(self) -> bool:
        """Whether they stay as they are: no gradient is made, reduced or kept, and no state."""
        return self.optimizer == FROZEN


@dataclass(frozen=True)
class Slot:
    """Where one parameter stands in its bucket."""

    name: str
    shape: tuple[int, ...]
    """Of the local tensor, padding rows included."""
    start: int
    shard: Shard
    owned: tuple[Piece, ...]
    """The pieces this rank saves and counts; none in the second copy of a tied table."""

    @property
    def stop(self) -> int:
        return self.start + prod(self.shape)


class FlatBox(NamedTuple):
    """A box of a whole tensor, and where its numbers are in a bucket's flat tensors."""

    slot: Slot
    whole: Box
    span: Span
    """The flat range of the run of whole rows of the local tensor that the box lies in."""
    shape: tuple[int, ...]
    """Shape of that run."""
    inside: Box
    """Where the box is in it."""

    def of(self, flat: Tensor, base: int) -> Tensor:
        """The box's numbers as a view of `flat`, which begins at element `base` of the bucket."""
        run = flat[self.span[0] - base : self.span[1] - base].view(self.shape)
        return run[slices(self.inside)]


@dataclass(frozen=True)
class FlatLayout:
    """A bucket's flat tensors: `size` elements, an equal range for each of `ways` ranks."""

    key: Key
    slots: tuple[Slot, ...]
    size: int
    ways: int

    def range_of(self, idx: int) -> Span:
        """The range that rank `idx` of the reducing axis looks after."""
        width = self.size // self.ways
        return idx * width, (idx + 1) * width

    def owned_spans(self, within: Span) -> list[Span]:
        """Flat ranges inside `within` that this rank counts: over all ranks, each number once."""
        spans = []
        for slot in self.slots:
            for piece in slot.owned:
                for lo, hi in box_spans(slot.shape, piece.local):
                    lo, hi = max(within[0], slot.start + lo), min(within[1], slot.start + hi)
                    if lo < hi:
                        spans.append((lo, hi))
        return spans

    def boxes(
        self, within: Span, pieces_of: Callable[[Slot], Iterable[Piece]]
    ) -> Iterator[FlatBox]:
        """The numbers in `within` as boxes of whole tensors, for the pieces asked of each slot."""
        for slot in self.slots:
            lo, hi = max(within[0], slot.start), min(within[1], slot.stop)
            at = lo
            for run in flat_boxes(slot.shape, lo - slot.start, hi - slot.start):
                shape = box_shape(run)
                end = at + prod(shape)
                for piece in pieces_of(slot):
                    both = overlap(run, piece.local)
                    if both is not None:
                        inside = shift(both, run, tuple((0, n) for n in shape))
                        yield FlatBox(
                            slot, shift(both, piece.local, piece.whole), (at, end), shape, inside
                        )
                at = end

    def partial_spans(self, axes: Mapping[str, Axis]) -> list[tuple[str, Span]]:
        """Ranges whose gradient a backward leaves partial over an axis, adjacent ones merged."""
        found: list[tuple[str, Span]] = []
        for slot in self.slots:
            for piece in slot.shard.pieces(axes):
                for axis in slot.shard.blocks[piece.block].grad_sum:
                    for start, stop in box_spans(slot.shape, piece.local):
                        lo, hi = slot.start + start, slot.start + stop
                        # The zeros up to the next slot come along, so that slots are adjacent.
                        hi = _aligned(hi) if hi == slot.stop else hi
                        if found and found[-1] == (axis, (found[-1][1][0], lo)):
                            lo = found.pop()[1][0]
                        found.append((axis, (lo, hi)))
        return found


class Bucket:
    """The flat tensors of one layout; parameters and their gradients have become views of them."""

    def __init__(
        self,
        layout: FlatLayout,
        params: list[nn.Parameter],
        device: torch.device,
        *,
        whole_grads: bool,
        updated: Span,
        whole_params: bool = True,
    ):
        self.layout, self.updated = layout, updated
        dtype = layout.key.dtype
        self.grad_dtype = acc_dtype(dtype)
        self.params = torch.zeros(layout.size, dtype=dtype, device=device)
        lo, hi = updated
        self.weights = self.params[lo:hi] if whole_params else self.params[lo:hi].clone()
        """The parameters of the updated range: a part of `params`, or what alone is kept of it."""
        frozen = layout.key.frozen
        whole_grads = whole_grads and not frozen
        size = layout.size if whole_grads else 0 if frozen else hi - lo
        held = torch.zeros(size, dtype=self.grad_dtype, device=device)
        self.whole_grads = held if whole_grads else None
        """Where the backward adds, all step long; None where that is a lane for each microbatch."""
        self.grads = held[lo:hi] if whole_grads else held
        """The reduced gradients of the updated range."""
        self.is_whole = True
        """Whether `params` has every rank's range, or will once `gathering` has ended."""
        self.gathering: Pending | None = None
        """The gather of `params` that is under way (gather.py)."""
        self.uses = 0
        for slot, param in zip(layout.slots, params, strict=True):
            param.data = self.params[slot.start : slot.stop].view(slot.shape)
            if frozen:
                continue
            param.grad_dtype = self.grad_dtype
            if whole_grads:
                param.grad = held[slot.start : slot.stop].view(slot.shape)
            self.uses += traits_of(param).uses


RuleOf = Callable[[str, Shard], tuple[str, bool]]
"""A parameter's name and Shard -> its update rule's name, and whether that wants it whole."""


def one_rule(name: str, shard: Shard) -> tuple[str, bool]:
    """The RuleOf of a run whose parameters are all updated alike, number by number."""
    return Key.optimizer, Key.matrix


def plan(
    stages: Mapping[int, nn.Module],
    *,
    ways: int,
    bucket_bytes: float,
    unit_of: Callable[[nn.Parameter], str] = lambda param: "",
    rule_of: RuleOf = one_rule,
) -> list[tuple[FlatLayout, list[nn.Parameter]]]:
    """Sort the parameters of this rank's stages into buckets of about `bucket_bytes` of gradients.

    Last layers come first: their gradients are complete first. The order is the same on every rank
    that holds these stages. Parameters with different `unit_of` or `rule_of` never share a bucket.
    A bucket whose ranges hold whole parameters is larger where `ways` asks for it: see `_cut`.
    """
    seen: set[int] = set()
    groups: dict[Key, list[tuple[str, nn.Parameter]]] = {}
    for _, stage in sorted(stages.items(), reverse=True):
        for name, param in reversed(list(named_parameters(stage))):
            if id(param) in seen:
                continue
            seen.add(id(param))
            traits = traits_of(param)
            tied = traits.shard.tied is not None
            # A table that two stages of this rank share belongs to the first of them.
            home = min(n for n, s in stages.items() if any(p is param for p in s.parameters()))
            unit = unit_of(param)
            rule = rule_of(name, traits.shard) if param.requires_grad else (FROZEN, False)
            key = Key(home, param.dtype, traits.decay, traits.lr_mult, tied, unit, *rule)
            groups.setdefault(key, []).append((name, param))
    planned = []
    for key, members in groups.items():
        members.sort(key=lambda member: traits_of(member[1]).shard.blocks[0].grad_sum)
        # Of whole parameters that many for each rank that the fullest range is at most half as
        # wide again as the mean: what is beyond a range's own parameters is sent and kept for
        # nothing.
        least = 2 * ways * max(map(_nbytes, members)) if key.matrix else 0
        for part in _cut(members, max(bucket_bytes, least), join_last=key.matrix):
            planned.append(_lay_out(key, part, ways))
    return planned


Member = tuple[str, nn.Parameter]


def _nbytes(member: Member) -> int:
    return member[1].numel() * acc_dtype(member[1].dtype).itemsize


def _cut(members: list[Member], bucket_bytes: float, *, join_last: bool) -> list[list[Member]]:
    """Runs of about that size; `join_last`: none is smaller, except where it is the only one."""
    parts: list[list[Member]] = [[]]
    size = 0.0
    for member in members:
        if parts[-1] and size + _nbytes(member) > bucket_bytes:
            parts.append([])
            size = 0.0
        parts[-1].append(member)
        size += _nbytes(member)
    if join_last and len(parts) > 1:
        last = parts.pop()
        parts[-1] += last
    return parts


def _aligned(n: int) -> int:
    return -(-n // ALIGN) * ALIGN


def _lay_out(key: Key, members: list[Member], ways: int) -> tuple[FlatLayout, list[nn.Parameter]]:
    """One run of slots that ranges cut anywhere, or for each range a run of its own."""
    runs = _packed(members, ways) if key.matrix else [members]
    multiple = ALIGN * ways // len(runs)
    longest = max(sum(_aligned(param.numel()) for _, param in run) for run in runs)
    width = -(-longest // multiple) * multiple
    slots, params = [], []
    for number, run in enumerate(runs):
        end = number * width
        for name, param in run:
            traits = traits_of(param)
            first_copy = traits.shard.tied is None or traits.shard.tied[0] == key.stage
            owned = tuple(traits.shard.owned(traits.axes)) if first_copy else ()
            slots.append(Slot(name, tuple(param.shape), end, traits.shard, owned))
            params.append(param)
            end += _aligned(param.numel())
    return FlatLayout(key, tuple(slots), width * len(runs), ways), params


def _packed(members: list[Member], ways: int) -> list[list[Member]]:
    """The members dealt out to `ways` runs of nearly one size: the largest first, each to the
    shortest run (Graham 1969). Some are empty where there are more ranks than members.
    """
    runs: list[list[Member]] = [[] for _ in range(ways)]
    sizes = [0] * ways
    for member in sorted(members, key=_nbytes, reverse=True):
        shortest = sizes.index(min(sizes))
        runs[shortest].append(member)
        sizes[shortest] += member[1].numel()
    return runs
