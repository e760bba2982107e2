"""What a step sends is what the formulas say: op, axis, count and bytes, from the collective log.

A fake mesh runs the real engine of any rank in this process and logs each collective. s sequence, b
micro batch, h hidden, v vocabulary, m microbatches; FULL: s b h bytes, a whole residual stream.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from megalite.core.config import Config, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from megalite.core.mesh import Mesh
from megalite.data.loader import Synthetic
from megalite.models.build import mesh_factors
from megalite.train.build import build_engine, build_loader, mesh_sizes
from megalite.train.loop import train_step

MODEL = ModelConfig(
    num_layers=4, hidden_size=32, num_heads=4, vocab_size=64, seq_len=16, position="rope"
)
CPU = torch.device("cpu")
MICRO, M = 2, 3
FULL = MODEL.seq_len * MICRO * MODEL.hidden_size * 4
TOKENS = MODEL.seq_len * MICRO * 4
"""Bytes of one float32 number a token."""


def sent(
    rank: int = 0, model: ModelConfig = MODEL, optimizer: str = "adamw", **layout
) -> tuple[dict, object]:
    """(op, axis) -> (count, bytes) of one step on that rank, and its engine."""
    dp = layout.setdefault("dp", 1)
    train = TrainConfig(micro_batch_size=MICRO, global_batch_size=MICRO * M * dp)
    optim = OptimConfig(optimizer=optimizer)
    config = Config(model=model, layout=LayoutConfig(**layout), optim=optim, train=train)
    world = layout.get("tp", 1) * layout.get("pp", 1) * dp
    config.check(world)
    sizes, factors = mesh_sizes(config, world), mesh_factors(config.model, config.layout.tp)
    kind = "fake" if world > 1 else "single"
    mesh = Mesh(sizes, rank=rank, kind=kind, factors=factors)
    engine = build_engine(config, mesh, device=CPU, dtype=torch.float32)
    loader = build_loader(engine, Synthetic(model.vocab_size, model.seq_len, 1))
    begin = mesh.log.total
    train_step(engine, loader.step(0), lr=1e-3)
    count, size = Counter(), Counter()
    for entry in mesh.log.since(begin):
        assert entry.completed
        axis = entry.axis if not entry.axis.startswith("pp:") else "pp"
        count[entry.op, axis] += 1
        size[entry.op, axis] += entry.nbytes
    return {key: (count[key], size[key]) for key in count}, engine


def flat_bytes(engine) -> int:
    return sum(b.layout.size * 4 for b in engine.zero.buckets)


def test_one_process_sends_nothing():
    found, _ = sent()
    assert found == {}


def test_sequence_parallel_gathers_and_scatters_the_residual():
    found, engine = sent(tp=2)
    layers = MODEL.num_layers
    # forward: gather before, scatter after each half; backward: gather the input anew for the
    # weight gradient, scatter the input gradient, gather the output gradient. Embedding: scatter
    # and gather; head: gather, and gather and scatter in backward.
    gathers = M * (layers * (2 + 4) + 1 + 2)
    scatters = M * (layers * (2 + 2) + 1 + 1)
    assert found["all_gather", "tp"] == (gathers, gathers * FULL)
    assert found["reduce_scatter", "tp"] == (scatters, scatters * FULL)
    # The loss: a maximum, and two sums in one; the rows' norms and biases: once a step.
    (bucket,) = [b for b in engine.zero.buckets if not b.layout.key.decay]
    partial = bucket.layout.partial_spans(engine.mesh.axes)
    norms = sum(hi - lo for _, (lo, hi) in partial) * 4
    reduces, size = 2 * M + len(partial), M * 3 * TOKENS + norms
    assert found["all_reduce", "tp"] == (reduces, size)


def test_without_sequence_parallelism_there_are_all_reduces_alone():
    found, _ = sent(tp=2, sequence_parallel=False)
    layers = MODEL.num_layers
    # two in a layer's forward, two in its backward; the embedding's forward, the head's backward
    whole = M * (layers * 4 + 2)
    assert found == {
        ("all_reduce", "tp"): (whole + 2 * M, whole * FULL + M * 3 * TOKENS),
        ("all_reduce", "world"): (1, 40),
    }


def test_kv_heads_fewer_than_ranks_are_summed_once_a_step():
    model = replace(MODEL, num_kv_heads=2, norm="rmsnorm", bias=False)
    found, _ = sent(tp=4, model=model, sequence_parallel=False)
    head_dim, h = model.head_dim, model.hidden_size
    assert found["all_reduce", "tp.rep"] == (4, 4 * 2 * head_dim * h * 4)


@pytest.mark.parametrize("rank, sends", [(0, M), (1, 2 * M), (3, M)])
def test_stages_send_the_residual_down_and_its_gradient_up(rank, sends):
    found, _ = sent(rank, pp=4)
    assert found["send", "pp"] == found["recv", "pp"] == (sends, sends * FULL)


def test_a_tied_table_is_summed_between_its_stages_once_a_step():
    found, _ = sent(pp=2)
    assert found["all_reduce", "tie"] == (1, MODEL.vocab_size * MODEL.hidden_size * 4)
    untied, _ = sent(pp=2, model=replace(MODEL, tie_embeddings=False))
    assert ("all_reduce", "tie") not in untied


def test_zero_0_reduces_whole_gradients_once_a_step():
    found, engine = sent(dp=4, zero=0)
    buckets = len(engine.zero.buckets)
    assert found["all_reduce", "dp*cp"] == (buckets, flat_bytes(engine))
    assert set(found) == {("all_reduce", "dp*cp"), ("all_reduce", "world")}


def test_zero_1_scatters_gradients_and_gathers_parameters_once_a_step():
    found, engine = sent(dp=4, zero=1)
    once = (len(engine.zero.buckets), flat_bytes(engine))
    assert found["reduce_scatter", "dp*cp"] == found["all_gather", "dp*cp"] == once


def test_zero_2_scatters_once_a_microbatch():
    found, engine = sent(dp=4, zero=2)
    buckets, size = len(engine.zero.buckets), flat_bytes(engine)
    assert found["reduce_scatter", "dp*cp"] == (M * buckets, M * size)
    assert found["all_gather", "dp*cp"] == (buckets, size)


def test_zero_3_gathers_for_each_forward_and_backward():
    found, engine = sent(dp=4, zero=3, model=replace(MODEL, tie_embeddings=False))
    size, buckets = flat_bytes(engine), engine.zero.buckets
    entry = [b for b in buckets if b.layout.key.unit == "embedding"]
    assert found["reduce_scatter", "dp*cp"] == (M * len(buckets), M * size)
    # all of it for a forward; for a backward all but the embedding, which looks at no parameter
    count = M * (2 * len(buckets) - len(entry))
    nbytes = M * (2 * size - sum(b.layout.size * 4 for b in entry))
    assert found["all_gather", "dp*cp"] == (count, nbytes)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_gradients_that_are_sent_as_bf16_are_half_the_bytes_of_the_same_reductions(zero):
    layout = {"tp": 2, "dp": 4, "zero": zero}
    wide, _ = sent(**layout)
    narrow, _ = sent(**layout, grad_reduce_dtype="bf16")
    reduction = ("reduce_scatter" if zero else "all_reduce", "dp*cp")
    count, size = wide.pop(reduction)
    assert narrow.pop(reduction) == (count, size // 2)
    # What gathers parameters, sums over tp, and the norm are as they were.
    assert narrow == wide


def test_full_recomputation_repeats_the_forward_of_each_layer():
    plain, _ = sent(tp=2)
    again, _ = sent(tp=2, recompute="full")
    more = 2 * M * MODEL.num_layers
    for op in ("all_gather", "reduce_scatter"):
        count, size = plain[op, "tp"]
        assert again[op, "tp"] == (count + more, size + more * FULL)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_muon_gathers_the_matrices_of_each_owner_over_tp_once_a_step(zero):
    layout = {"tp": 2, "dp": 4, "zero": zero}
    plain, before = sent(**layout)
    found, engine = sent(**layout, optimizer="muon")
    ranges = [b.grads.numel() * 4 for b in engine.zero.buckets if b.layout.key.matrix]
    count, size = plain["all_gather", "tp"]
    # Of what this rank updates: a part of the buckets, from stage 1 on a dp-th of it.
    owned = [n for n, b in zip(ranges, matrix_buckets(engine), strict=True) if owns_any(engine, b)]
    assert 0 < len(owned) <= len(ranges)
    assert found["all_gather", "tp"] == (count + len(owned), size + 2 * sum(owned))
    # Over dp nothing is added but padding: less than a largest matrix a rank and bucket.
    matrices = [slot.stop - slot.start for b in matrix_buckets(engine) for slot in b.layout.slots]
    padding = flat_bytes(engine) - flat_bytes(before)
    assert padding <= 4 * len(ranges) * 4 * max(matrices)


def matrix_buckets(engine) -> list:
    return [b for b in engine.zero.buckets if b.layout.key.matrix]


def owns_any(engine, bucket) -> bool:
    lo, hi = bucket.updated
    return any(lo <= slot.start < hi for slot in bucket.layout.slots)
