"""Flat layouts on fake meshes: alignment, ownership and coverage over every rank of a world."""

from collections import Counter
from math import prod

import numpy as np
import pytest
import torch
from torch import nn

from megalite.core.config import ModelConfig
from megalite.core.mesh import Mesh
from megalite.core.params import constant, new_param, traits_of
from megalite.core.shard import Block, Shard, slices, whole
from megalite.models.build import build_stages
from megalite.models.presets import num_parameters
from megalite.parallel.buckets import ALIGN, Bucket, one_rule, plan

CFG = ModelConfig(
    num_layers=2,
    hidden_size=24,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=13,
    seq_len=8,
    qk_norm=True,
)
CPU = torch.device("cpu")
WORLDS = [
    {"dp": 3},
    {"tp": 2, "dp": 2},
    {"tp": 4, "dp": 3},
    {"tp": 4, "pp": 2, "dp": 2},
]


def mesh_of(sizes, rank):
    factors = {"tp": 2} if sizes.get("tp", 1) > 2 else {}
    return Mesh(sizes, rank=rank, kind="fake", factors=factors)


def matrices_whole(name, shard):
    whole = name.startswith("layers.") and len(shard.shape) == 2
    return ("m", True) if whole else ("adamw", False)


def planned(sizes, rank, bucket_bytes=3000.0, cfg=CFG, rule_of=one_rule):
    mesh = mesh_of(sizes, rank)
    placement = tuple(range(sizes.get("pp", 1)))
    stages = build_stages(
        cfg, mesh, placement=placement, layers=None, sequence_parallel=True, seed=1
    )
    ways = mesh.axis("dp", "cp").size
    return mesh, plan(stages, ways=ways, bucket_bytes=bucket_bytes, rule_of=rule_of)


def module_of(**shards):
    module, axes = nn.Module(), Mesh({"tp": 2}, kind="fake").axes
    for name, shard in shards.items():
        setattr(module, name, new_param(shard, axes, init=constant(0.0)))
    return module, axes


@pytest.mark.parametrize("sizes", WORLDS, ids=str)
def test_slots_are_disjoint_aligned_and_inside(sizes):
    _, buckets = planned(sizes, 1)
    for layout, params in buckets:
        starts = [slot.start for slot in layout.slots]
        assert all(start % ALIGN == 0 for start in starts) and starts == sorted(starts)
        for slot, after in zip(layout.slots, [*starts[1:], layout.size], strict=True):
            assert slot.stop <= after
        assert [slot.shape for slot in layout.slots] == [tuple(p.shape) for p in params]


@pytest.mark.parametrize("sizes", WORLDS, ids=str)
def test_ranges_of_the_data_ranks_are_equal_aligned_and_cover_the_bucket(sizes):
    _, buckets = planned(sizes, 0)
    for layout, _ in buckets:
        ranges = [layout.range_of(idx) for idx in range(layout.ways)]
        assert all(lo % ALIGN == 0 for lo, _ in ranges)
        assert [0, *(hi for _, hi in ranges)] == [*(lo for lo, _ in ranges), layout.size]
        assert len({hi - lo for lo, hi in ranges}) == 1


@pytest.mark.parametrize("sizes", WORLDS, ids=str)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rule_of", [one_rule, matrices_whole])
def test_owned_numbers_of_all_ranks_are_the_model_once(sizes, tied, rule_of):
    cfg = ModelConfig(**{**CFG.__dict__, "tie_embeddings": tied})
    by_spans, boxes = 0, Counter()
    for rank in range(prod(sizes.values())):
        mesh, buckets = planned(sizes, rank, cfg=cfg, rule_of=rule_of)
        for layout, _ in buckets:
            within = layout.range_of(mesh.axis("dp", "cp").idx)
            by_spans += sum(hi - lo for lo, hi in layout.owned_spans(within))
            for part in layout.boxes(within, lambda slot: slot.owned):
                shape = part.slot.shard.shape
                numbers = np.arange(prod(shape)).reshape(shape)[slices(part.whole)]
                boxes.update((part.slot.name, n) for n in numbers.ravel().tolist())
    assert by_spans == len(boxes) == num_parameters(cfg)
    assert set(boxes.values()) == {1}


@pytest.mark.parametrize("sizes", WORLDS, ids=str)
def test_boxes_find_every_number_in_the_flat_tensor(sizes):
    mesh, buckets = planned(sizes, prod(sizes.values()) - 1)
    for layout, params in buckets:
        bucket = Bucket(layout, params, CPU, whole_grads=True, updated=(0, layout.size))
        for param in params:  # each number names its place in the whole tensor; padding is -1
            traits = traits_of(param)
            every = torch.arange(prod(traits.shard.shape)).view(traits.shard.shape)
            param.data.fill_(-1)
            for piece in traits.shard.pieces(traits.axes):
                param.data[slices(piece.local)] = every[slices(piece.whole)].float()
        for idx in range(layout.ways):
            base, end = layout.range_of(idx)
            seen = 0
            for part in layout.boxes((base, end), lambda s: s.shard.pieces(mesh.axes)):
                shape = part.slot.shard.shape
                every = torch.arange(prod(shape)).view(shape)[slices(part.whole)].float()
                assert torch.equal(part.of(bucket.params[base:end], base), every)
                seen += every.numel()
            real = sum(
                int((bucket.params[max(base, s.start) : min(end, s.stop)] >= 0).sum())
                for s in layout.slots
                if max(base, s.start) < min(end, s.stop)
            )
            assert seen == real


def test_every_rank_of_a_stage_plans_the_same_buckets():
    def names(rank):
        return [
            (b.key, b.size, [(s.name, s.start) for s in b.slots])
            for b, _ in planned({"tp": 4, "pp": 2, "dp": 2}, rank)[1]
        ]

    first, second = (names(rank) for rank in (0, 8))
    assert all(names(rank) == (first if rank < 8 else second) for rank in range(16))
    assert first != second


def test_buckets_are_cut_by_size_and_none_is_empty():
    module, _ = module_of(a=whole(100), b=whole(100), c=whole(300), d=whole(50))
    cut = [
        [slot.name for slot in layout.slots]
        for layout, _ in plan({0: module}, ways=1, bucket_bytes=1000)
    ]
    # last parameters first; c alone is over the size
    assert cut == [["d"], ["c"], ["b", "a"]]


def test_parameters_treated_unlike_never_share_a_bucket():
    module, axes = module_of(matrix=whole(4, 4), vector=whole(4))
    module.fast = new_param(whole(4), axes, init=constant(0.0), lr_mult=2.0)
    module.narrow = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    module.narrow.traits = traits_of(module.vector)
    keys = [layout.key for layout, _ in plan({0: module}, ways=1, bucket_bytes=1e9)]
    assert len(keys) == len(set(keys)) == 4


def test_gradients_of_narrow_parameters_are_kept_in_float32():
    module, _ = module_of(a=whole(4))
    module.a.data = module.a.data.to(torch.bfloat16)
    ((layout, params),) = plan({0: module}, ways=1, bucket_bytes=1e9)
    bucket = Bucket(layout, params, CPU, whole_grads=True, updated=(0, layout.size))
    (module.a * torch.full((4,), 1 / 3)).sum().backward()
    assert bucket.params.dtype == torch.bfloat16 and bucket.grads.dtype == torch.float32
    assert module.a.grad.data_ptr() == bucket.grads.data_ptr()
    torch.testing.assert_close(bucket.grads[:4], torch.full((4,), 1 / 3))


def partial_numbers(shards):
    """The partial ranges of a bucket of such parameters, and slot starts by name."""
    module, axes = module_of(**shards)
    ((layout, _),) = plan({0: module}, ways=1, bucket_bytes=1e9)
    return layout.partial_spans(axes), {slot.name: slot for slot in layout.slots}


def test_partial_ranges_of_neighbours_are_one_range_across_padding():
    spans, slots = partial_numbers(
        {"a": whole(10, grad_sum=("tp",)), "b": whole(70, grad_sum=("tp",)), "c": whole(3)}
    )
    assert spans == [("tp", (slots["b"].start, slots["b"].start + 3 * ALIGN))]


def test_partial_ranges_leave_out_a_whole_block_between_two_partial_ones():
    part, full = Block(3, (None,), ("tp",)), Block(3, (None,))
    spans, slots = partial_numbers({"fused": Shard((9,), (part, full, part))})
    assert spans == [("tp", (0, 3)), ("tp", (6, ALIGN))]


def test_partial_ranges_are_the_blocks_that_say_so():
    sizes = {"tp": 4, "dp": 1}
    mesh, buckets = planned(sizes, 3, bucket_bytes=1e9)
    for layout, _ in buckets:
        marked = np.zeros(layout.size, dtype=int)
        for _, (lo, hi) in layout.partial_spans(mesh.axes):
            marked[lo:hi] += 1
        assert marked.max() <= 1
        for slot in layout.slots:
            for piece in slot.shard.pieces(mesh.axes):
                local = np.arange(prod(slot.shape)).reshape(slot.shape)[slices(piece.local)]
                expected = bool(slot.shard.blocks[piece.block].grad_sum)
                assert (marked[slot.start + local.ravel()] == expected).all(), slot.name


@pytest.mark.parametrize("sizes", [*WORLDS, {"dp": 16}], ids=str)
def test_whole_matrices_lie_in_one_range_each_and_little_is_padding(sizes):
    cfg = ModelConfig(**{**CFG.__dict__, "num_layers": 12})
    _, buckets = planned(sizes, 0, bucket_bytes=1e5, cfg=cfg, rule_of=matrices_whole)
    found = [layout for layout, _ in buckets if layout.key.matrix]
    assert 1 <= len(found) < len(buckets)
    for layout in found:
        ranges = [layout.range_of(idx) for idx in range(layout.ways)]
        for slot in layout.slots:
            assert sum(lo <= slot.start and slot.stop <= hi for lo, hi in ranges) == 1
        sizes_of = [slot.stop - slot.start for slot in layout.slots]
        # Each range is as long as the fullest: at most half as long again as the mean.
        assert sum(sizes_of) > (2 * layout.ways - 1) * max(sizes_of)
        assert layout.size <= 1.5 * sum(sizes_of) + ALIGN * layout.ways


def test_more_ranks_than_matrices_leave_ranges_empty():
    module, _ = module_of(a=whole(64, 4), b=whole(64, 2), c=whole(64, 1))
    ((layout, params),) = plan(
        {0: module}, ways=5, bucket_bytes=1.0, rule_of=lambda name, shard: ("m", True)
    )
    assert [(slot.name, slot.start) for slot in layout.slots] == [("a", 0), ("b", 256), ("c", 512)]
    assert layout.size == 5 * 256 and params == [module.a, module.b, module.c]
