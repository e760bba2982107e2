"""Shards, boxes and flat ranges, against arrays that number every element."""

from collections import Counter
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.core.mesh import Axis, Mesh
from megalite.core.shard import (
    Block,
    Shard,
    aligned_rows,
    box_shape,
    box_spans,
    column,
    flat_boxes,
    overlap,
    row,
    sequence_positions,
    shift,
    slices,
    vocabulary,
    whole,
    without_dim,
)

shapes = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def numbered(shape):
    return np.arange(prod(shape)).reshape(shape)


def axes_of(tp, rank, kv=None):
    factors = {"tp": kv} if kv else {}
    return Mesh({"tp": tp}, rank=rank, kind="fake", factors=factors).axes


def test_flat_boxes_are_exact_and_few_on_random_ranges():
    rng = np.random.default_rng(1)
    for _ in range(5000):
        shape = tuple(rng.integers(1, 6, size=rng.integers(1, 6)).tolist())
        start, stop = sorted(rng.integers(0, prod(shape) + 1, size=2).tolist())
        boxes = flat_boxes(shape, start, stop)
        found = [numbered(shape)[slices(box)].ravel() for box in boxes]
        assert np.concatenate([*found, []]).tolist() == list(range(start, stop))
        assert len(boxes) <= 2 * len(shape) - 1


def test_flat_boxes_of_the_middle_of_a_cube_need_five():
    assert len(flat_boxes((4, 4, 4), 1, 63)) == 5


@given(shapes, st.data())
def test_box_spans_list_the_box_in_merged_ascending_ranges(shape, data):
    box = tuple(
        tuple(sorted((data.draw(st.integers(0, n - 1)), data.draw(st.integers(1, n)))))
        for n in shape
    )
    box = tuple((lo, max(hi, lo + 1)) for lo, hi in box)
    spans = box_spans(shape, box)
    listed = [i for lo, hi in spans for i in range(lo, hi)]
    assert listed == numbered(shape)[slices(box)].ravel().tolist()
    assert all(stop < start for (_, stop), (start, _) in zip(spans, spans[1:], strict=False))


@given(st.data())
def test_overlap_is_the_set_of_common_elements(data):
    shape = data.draw(shapes)
    spans = [
        tuple(sorted(data.draw(st.lists(st.integers(0, n), min_size=2, max_size=2, unique=True))))
        for n in shape
        for _ in "ab"
    ]
    a, b = tuple(spans[::2]), tuple(spans[1::2])
    common = set(numbered(shape)[slices(a)].ravel()) & set(numbered(shape)[slices(b)].ravel())
    both = overlap(a, b)
    assert common == (set() if both is None else set(numbered(shape)[slices(both)].ravel()))


def test_shift_moves_a_box_to_local_coordinates_and_back():
    inside, of, to = ((5, 6), (2, 4)), ((4, 8), (0, 4)), ((0, 4), (3, 7))
    moved = shift(inside, of, to)
    assert moved == ((1, 2), (5, 7)) and shift(moved, to, of) == inside


@st.composite
def cut_tensors(draw):
    """A Shard of random blocks, a tp size, and the outer factor of tp or None."""
    tp = draw(st.integers(1, 6))
    kv = draw(st.sampled_from([None, *(d for d in range(1, tp) if tp % d == 0)]))
    rest = draw(st.lists(st.integers(1, 7), max_size=2).map(tuple))
    blocks = []
    # Only one dimension of a matrix is cut: rows, by block, or the columns of all blocks alike.
    by_rows = draw(st.booleans()) or not rest
    for _ in range(draw(st.integers(1, 3))):
        names = [None, "tp", *(["tp.kv"] if kv else [])]
        if by_rows:
            cut = (draw(st.sampled_from(names)), *(None for _ in rest))
        else:
            cut = (None, "tp", *(None for _ in rest[1:]))
        aligned = by_rows and draw(st.booleans())
        rows = draw(st.integers(1, 900 if aligned else 9))
        blocks.append(Block(rows, cut, aligned=aligned))
    return Shard((sum(b.size for b in blocks), *rest), tuple(blocks)), tp, kv


@settings(max_examples=200, deadline=None)
@given(cut_tensors())
def test_pieces_cover_once_per_replica_and_owned_pieces_once(case):
    shard, tp, kv = case
    held, owned = Counter(), Counter()
    for rank in range(tp):
        axes = axes_of(tp, rank, kv)
        local = np.full(shard.local_shape(axes), -1)
        for piece in shard.pieces(axes):
            part = numbered(shard.shape)[slices(piece.whole)]
            assert (local[slices(piece.local)] == -1).all(), "two pieces lie on each other"
            assert box_shape(piece.whole) == box_shape(piece.local)
            local[slices(piece.local)] = part
        held.update(local[local >= 0].tolist())
        for piece in shard.owned(axes):
            owned.update(numbered(shard.shape)[slices(piece.whole)].ravel().tolist())
    assert owned == Counter(range(prod(shard.shape)))
    first = 0
    for block in shard.blocks:
        numbers = numbered(shard.shape)[first : first + block.size].ravel().tolist()
        copies = 1 if "tp" in block.cut else tp // kv if "tp.kv" in block.cut else tp
        assert [held[n] for n in numbers] == [copies] * len(numbers)
        first += block.size


def test_uneven_cut_pads_the_last_ranks():
    shard = column(5, 2)
    rows = [[p.whole[0] for p in shard.pieces(axes_of(4, rank))] for rank in range(4)]
    assert rows == [[(0, 2)], [(2, 4)], [(4, 5)], []]
    assert shard.local_shape(axes_of(4, 3)) == (2, 2)


def test_vocabulary_is_padded_to_what_gpus_multiply_well_and_never_by_much():
    assert [aligned_rows(n) for n in (0, 1, 61, 127, 501, 4096)] == [0, 1, 61, 128, 504, 4096]
    for n in range(1, 5000):
        assert n <= aligned_rows(n) <= n + n // 64
    for tp, rows in ((1, 50304), (2, 25152), (4, 12608)):
        shard = vocabulary(50257, 8)
        found = [list(shard.pieces(axes_of(tp, rank))) for rank in range(tp)]
        assert shard.local_shape(axes_of(tp, 0)) == (rows, 8)
        spans = [piece.whole[0] for pieces in found for piece in pieces]
        assert spans == [(rows * i, min(50257, rows * (i + 1))) for i in range(tp)]


def test_row_shard_cuts_columns_and_whole_cuts_nothing():
    assert row(3, 8).local_shape(axes_of(4, 0)) == (3, 2)
    assert whole(3, 8).local_shape(axes_of(4, 0)) == (3, 8)


def test_without_dim_gives_the_bias_of_a_fused_weight():
    blocks = (Block(8, ("tp", None)), Block(4, ("tp.kv", None), ("tp.rep",)))
    bias = without_dim(Shard((12, 5), blocks), 1)
    assert bias == Shard((12,), (Block(8, ("tp",)), Block(4, ("tp.kv",), ("tp.rep",))))


def test_shard_refuses_blocks_that_do_not_fill_it_or_disagree():
    with pytest.raises(AssertionError):
        Shard((4, 2), (Block(3, ("tp", None)),))
    with pytest.raises(AssertionError):
        Shard((4, 2), (Block(2, ("tp", None)), Block(2, (None, "tp"))))


@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_sequence_positions_cover_the_sequence_once(order):
    held = [
        list(span)
        for idx in range(4)
        for span in sequence_positions(16, Axis("cp", 4, idx), order=order)
    ]
    assert sorted(p for span in held for p in span) == list(range(16))


def test_zigzag_gives_every_rank_the_same_causal_work():
    work = [
        sum(
            p + 1
            for span in sequence_positions(24, Axis("cp", 3, idx), order="zigzag")
            for p in span
        )
        for idx in range(3)
    ]
    assert len(set(work)) == 1


def test_sequence_positions_refuse_an_uneven_cut():
    with pytest.raises(ValueError, match="6 tokens cannot be cut 4 ways"):
        sequence_positions(6, Axis("cp", 2), order="zigzag")
