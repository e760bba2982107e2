"""The cut of the layers into stages, and what a rank's stages hold."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch

from megalite.core.call import make_call
from megalite.core.config import ModelConfig
from megalite.core.mesh import Axis, Mesh
from megalite.core.params import traits_of
from megalite.models.build import (
    build_stages,
    head_flops,
    layer_flops,
    split_layers,
    stage_ranges,
)

CFG = ModelConfig(num_layers=4, hidden_size=12, num_heads=4, vocab_size=13, seq_len=8)


def slowest(cfg, layers):
    work = [n * layer_flops(cfg) for n in layers]
    work[0] += 0.1 * layer_flops(cfg)
    work[-1] += head_flops(cfg)
    return max(work)


@pytest.mark.parametrize("vocab", [16, 500, 5000, 50000])
@pytest.mark.parametrize(("layers", "stages"), [(4, 4), (7, 3), (9, 4), (8, 2), (6, 1)])
def test_split_is_the_best_of_all_with_a_layer_each(vocab, layers, stages):
    cfg = replace(CFG, num_layers=layers, vocab_size=vocab)
    found = split_layers(cfg, stages)
    assert sum(found) == layers and min(found) >= 1
    every = (
        tuple(b - a for a, b in zip((0, *cuts), (*cuts, layers), strict=True))
        for cuts in combinations(range(1, layers), stages - 1)
    )
    assert slowest(cfg, found) == min(slowest(cfg, other) for other in every)


def test_split_refuses_more_stages_than_layers():
    with pytest.raises(ValueError, match="4 layers cannot fill 5 stages"):
        split_layers(CFG, 5)


def test_stage_ranges_follow_each_other():
    assert stage_ranges((3, 1, 2)) == [range(0, 3), range(3, 4), range(4, 6)]


def stages_of(pp, rank, placement, cfg=CFG, **kwargs):
    mesh = Mesh({"pp": pp}, rank=rank, kind="fake") if pp > 1 else Mesh({})
    asked = {"layers": None, "sequence_parallel": True, "seed": 1, **kwargs}
    return build_stages(cfg, mesh, placement=placement, **asked)


@pytest.mark.parametrize("tied", [True, False])
def test_names_of_all_stages_are_those_of_one_process(tied):
    cfg = replace(CFG, tie_embeddings=tied)
    one = [n for n, _ in stages_of(1, 0, (0,), cfg)[0].named_parameters()]
    cut = [
        name
        for rank in range(2)
        for stage in stages_of(2, rank, (0, 1, 0, 1), cfg).values()
        for name, _ in stage.named_parameters()
    ]
    assert sorted(cut) == sorted(one + ["embedding.weight"] * tied)


def test_tied_table_of_two_ranks_names_both_stages():
    for rank, stage in ((0, 0), (1, 3)):
        table = stages_of(2, rank, (0, 1, 0, 1))[stage].embedding.weight
        assert traits_of(table).shard.tied == (0, 3) and traits_of(table).uses == 1


def test_tied_table_with_both_stages_on_one_rank_is_one_parameter_used_twice():
    stages = stages_of(2, 0, (0, 1, 1, 0))
    table = stages[0].embedding.weight
    assert stages[3].embedding.weight is table
    assert traits_of(table).shard.tied is None and traits_of(table).uses == 2


def test_model_refuses_rows_that_are_not_cut_as_its_norms_expect():
    mesh = Mesh({"tp": 2}, kind="fake")
    stages = build_stages(CFG, mesh, placement=(0,), layers=None, sequence_parallel=True, seed=1)
    tokens = torch.zeros(8, 1, dtype=torch.int64)
    whole = make_call(tokens, tokens, torch.arange(1), seq_cut=None)
    with pytest.raises(AssertionError):
        stages[0](None, whole)
    with torch.no_grad():  # decoding runs uncut
        stages[0](None, whole)


def test_rows_of_a_cut_call_stand_at_the_ranks_place():
    tokens = torch.zeros(8, 3, dtype=torch.int64)
    call = make_call(tokens, None, torch.arange(3), seq_cut=Axis("tp", 4, 2))
    assert call.row_positions.tolist() == [4, 5]
    assert stages_of(1, 0, (0,))[0].boundary_shape(call) == (2, 3, 12)
