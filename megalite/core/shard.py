"""How one parameter is cut: the one statement that init, gradient sync, ZeRO and checkpoint ask.

A Shard names the whole tensor and, for each block fused along dim 0 (q, k, v; gate, up), the mesh
axes that cut it. A Box is a range per dimension, a Piece is one block's part on this rank: where it
stands in the whole tensor and where in the local one. A dimension that does not divide is cut by
ceiling: the last ranks hold fewer rows, and the rows of their local tensor beyond those are
padding, which belongs to no piece. Next: params.py, which makes a tensor of a Shard.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import lcm, prod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # core/check.py asks about cuts before torch is imported
    from megalite.core.mesh import Axis

Box = tuple[tuple[int, int], ...]
"""(start, stop) for each dimension."""


class Piece(NamedTuple):
    """One block's part on one rank."""

    block: int
    whole: Box
    local: Box


@dataclass(frozen=True)
class Block:
    """A run of rows of the whole tensor that is cut by itself."""

    size: int
    """Rows along dim 0."""
    cut: tuple[str | None, ...]
    """For each dimension, the axis that cuts it (None: whole on every rank)."""
    grad_sum: tuple[str, ...] = ()
    """Axes over which a backward pass leaves this block's gradient partial."""
    aligned: bool = False
    """Each rank's rows along dim 0 are padded to `aligned_rows`."""


@dataclass(frozen=True)
class Shard:
    """The whole tensor's shape and the blocks it is made of, in order along dim 0."""

    shape: tuple[int, ...]
    blocks: tuple[Block, ...]
    tied: tuple[int, int] | None = None
    """Stages that both hold this parameter; the first owns it."""

    def __post_init__(self) -> None:
        assert sum(b.size for b in self.blocks) == self.shape[0], (self.shape, self.blocks)
        assert all(len(b.cut) == len(self.shape) for b in self.blocks)
        # Blocks stand one below the other in the local tensor, so their other dimensions agree.
        assert len({b.cut[1:] for b in self.blocks}) == 1, self.blocks

    def local_shape(self, axes: Mapping[str, Axis]) -> tuple[int, ...]:
        """Shape of every rank's tensor, padding included."""
        rows = sum(_rows(b, axes) for b in self.blocks)
        rest = tuple(_width(n, self.blocks[0].cut[d], axes) for d, n in enumerate(self.shape) if d)
        return (rows, *rest)

    def pieces(self, axes: Mapping[str, Axis]) -> Iterator[Piece]:
        """This rank's part of each block; none of a block of which it holds only padding."""
        whole_row = local_row = 0
        for number, block in enumerate(self.blocks):
            sizes = (block.size, *self.shape[1:])
            cuts = zip(sizes[1:], block.cut[1:], strict=True)
            spans = [_span(block.size, block.cut[0], axes, _rows(block, axes))]
            spans += [_span(n, axis, axes, _width(n, axis, axes)) for n, axis in cuts]
            starts = [whole_row] + [0] * (len(sizes) - 1)
            whole = tuple((s + lo, s + hi) for s, (lo, hi) in zip(starts, spans, strict=True))
            starts[0] = local_row
            local = tuple((s, s + hi - lo) for s, (lo, hi) in zip(starts, spans, strict=True))
            if all(hi > lo for lo, hi in whole):
                yield Piece(number, whole, local)
            whole_row += block.size
            local_row += _rows(block, axes)

    def owned(self, axes: Mapping[str, Axis]) -> Iterator[Piece]:
        """The pieces that this rank, of all that hold the same numbers, saves and counts in norms.

        Replicas over tp (and over its inner factor) are told apart here; those over dp and cp by
        the flat range that each of them looks after, and a tied copy by its stage.
        """
        for piece in self.pieces(axes):
            cut = set(self.blocks[piece.block].cut)
            if "tp.kv" in cut:
                owner = axes["tp.rep"].idx == 0
            else:
                owner = "tp" in cut or axes["tp"].idx == 0
            if owner:
                yield piece


def _width(n: int, axis: str | None, axes: Mapping[str, Axis]) -> int:
    return n if axis is None else -(-n // axes[axis].size)


def _rows(block: Block, axes: Mapping[str, Axis]) -> int:
    rows = _width(block.size, block.cut[0], axes)
    return aligned_rows(rows) if block.aligned else rows


def aligned_rows(rows: int) -> int:
    """`rows`, and so many more that GPUs multiply and move them at full speed.

    A multiple of 64, or of the largest power of two that adds no more than one row in 64: matrices
    whose rows start at odd places take kernels of half the speed.
    """
    multiple = 64
    while -rows % multiple > rows // 64:
        multiple //= 2
    return rows + -rows % multiple


def _span(n: int, axis: str | None, axes: Mapping[str, Axis], width: int) -> tuple[int, int]:
    if axis is None:
        return 0, n
    start = min(n, axes[axis].idx * width)
    return start, min(n, start + width)


def column(d_out: int, d_in: int, *, axis: str = "tp") -> Shard:
    """A [d_out, d_in] weight whose output rows are cut."""
    return Shard((d_out, d_in), (Block(d_out, (axis, None)),))


def vocabulary(v: int, h: int, *, tied: tuple[int, int] | None = None) -> Shard:
    """A [v, h] table of tokens, or head, whose rows are cut."""
    return Shard((v, h), (Block(v, ("tp", None), aligned=True),), tied)


def row(d_out: int, d_in: int, *, axis: str = "tp") -> Shard:
    """A [d_out, d_in] weight whose input columns are cut."""
    return Shard((d_out, d_in), (Block(d_out, (None, axis)),))


def whole(*shape: int, grad_sum: tuple[str, ...] = ()) -> Shard:
    """A tensor that every rank holds whole."""
    return Shard(shape, (Block(shape[0], (None,) * len(shape), grad_sum),))


def without_dim(shard: Shard, dim: int) -> Shard:
    """The Shard of a bias beside that weight: the same blocks with one dimension left out."""
    shape = shard.shape[:dim] + shard.shape[dim + 1 :]
    blocks = tuple(replace(b, cut=b.cut[:dim] + b.cut[dim + 1 :]) for b in shard.blocks)
    return Shard(shape, blocks)


def in_words(shard: Shard) -> str:
    """The Shard as an error shows it: `[48, 16] rows 0:48 cut over (tp, -)`."""
    words, start = [], 0
    for block in shard.blocks:
        cut = ", ".join(axis or "-" for axis in block.cut)
        text = f"rows {start}:{start + block.size} "
        text += f"cut over ({cut})" if any(block.cut) else "whole on every rank"
        text += f", gradient summed over {' and '.join(block.grad_sum)}" if block.grad_sum else ""
        words.append(text)
        start += block.size
    tied = f"; tied on stages {shard.tied[0]} and {shard.tied[1]}" if shard.tied else ""
    return f"{list(shard.shape)} {'; '.join(words)}{tied}"


def overlap(a: Box, b: Box) -> Box | None:
    """The box in both, or None."""
    both = tuple((max(s, t), min(e, f)) for (s, e), (t, f) in zip(a, b, strict=True))
    return both if all(lo < hi for lo, hi in both) else None


def shift(box: Box, of: Box, to: Box) -> Box:
    """`box`, which lies in `of`, as it lies in `to`: from whole to local coordinates, or back."""
    moves = [t - o for (o, _), (t, _) in zip(of, to, strict=True)]
    return tuple((lo + m, hi + m) for (lo, hi), m in zip(box, moves, strict=True))


def slices(box: Box) -> tuple[slice, ...]:
    """The box as an index."""
    return tuple(slice(lo, hi) for lo, hi in box)


def box_shape(box: Box) -> tuple[int, ...]:
    """Lengths of the box."""
    return tuple(hi - lo for lo, hi in box)


def flat_boxes(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """The flat range [start, stop) of a row-major tensor as at most 2 ndim - 1 boxes, in order."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start, stop),)]
    row_size = prod(shape[1:])
    boxes: list[Box] = []

    def part_of_row(row: int, lo: int, hi: int) -> None:
        boxes.extend(((row, row + 1), *box) for box in flat_boxes(shape[1:], lo, hi))

    first, last = start // row_size, stop // row_size
    if first == last:
        part_of_row(first, start - first * row_size, stop - first * row_size)
        return boxes
    if start % row_size:
        part_of_row(first, start - first * row_size, row_size)
        first += 1
    if first < last:
        boxes.append(((first, last), *((0, n) for n in shape[1:])))
    if stop % row_size:
        part_of_row(last, 0, stop - last * row_size)
    return boxes


def box_spans(shape: tuple[int, ...], box: Box) -> list[tuple[int, int]]:
    """The box of a row-major tensor as flat ranges, adjacent ones merged."""
    spans = [(0, 1)]
    for n, (lo, hi) in zip(shape, box, strict=True):
        if (lo, hi) == (0, n):
            spans = [(s * n, e * n) for s, e in spans]
        else:
            spans = [(i * n + lo, i * n + hi) for s, e in spans for i in range(s, e)]
    merged: list[tuple[int, int]] = []
    for lo, hi in spans:
        if merged and merged[-1][1] == lo:
            merged[-1] = (merged[-1][0], hi)
        else:
            merged.append((lo, hi))
    return merged


CONTEXT_ORDER = {"ring": "zigzag", "gather": "zigzag", "ulysses": "contiguous"}
"""In which order each form of context parallel attention has its rows. Ulysses puts the sequence
together again, so its rows had best come in order.
"""


def sequence_multiple(cp: int, order: str, *, rows: int = 1) -> int:
    """What a length must be a multiple of if each rank's part is cut over `rows` ranks more."""
    return cp * lcm(1 if order == "contiguous" else 2, rows)


def sequence_positions(s: int, cp: Axis, *, order: str = "contiguous") -> list[range]:
    """The positions of `s` tokens that this context rank holds, as ranges in local order.

    The only statement of the context cut: loader, labels, RoPE, masks and KV cache ask it. `zigzag`
    gives rank i the i-th block from the front and the i-th from the back, so that causal work is
    even. Raises ValueError if the cut is not even.
    """
    ways = sequence_multiple(cp.size, order)
    if s % ways:
        raise ValueError(
            f"a sequence of {s} tokens cannot be cut {ways} ways over cp ({order} order)"
        )
    width = s // ways
    if order == "contiguous":
        return [range(cp.idx * width, (cp.idx + 1) * width)]
    back = 2 * cp.size - 1 - cp.idx
    return [range(cp.idx * width, (cp.idx + 1) * width), range(back * width, (back + 1) * width)]
