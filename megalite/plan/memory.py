"""What one rank of a layout has to hold: counted from the parameters' own Shards, on a fake mesh.

Nothing is allocated: each stage of the real model is built on torch's meta device and laid out in
its real buckets, so weights, gradients and optimizer state are exact. Activations are counted from
what one layer's backward keeps (activations.py), times the microbatches the schedule holds at its
fullest. The peak is that of counted tensors: an allocator, its caches and libraries add their own.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from megalite.core.config import Config
from megalite.core.mesh import Mesh
from megalite.core.params import acc_dtype
from megalite.models.build import build_stages, mesh_factors, split_layers
from megalite.optim.rules import Rules
from megalite.parallel.buckets import FlatLayout, plan
from megalite.parallel.p2p import AHEAD
from megalite.parallel.zero import LANES, units_of
from megalite.plan.activations import LOOKUP_BYTES, TOKEN_BYTES, LayerBytes, stage_activations
from megalite.schedule.action import Schedule, at_first_backward, edge_order
from megalite.schedule.simulate import peak_live
from megalite.train.build import BUCKET_MB, mesh_sizes, schedule_maker
from megalite.train.own_files import attention_of


@dataclass(frozen=True)
class StageMemory:
    """Bytes that one pipeline rank holds."""

    pp: int
    layers: int
    parameters: int
    """Numbers in its weights, padding left out."""
    weights: int
    grads: int
    optimizer: int
    activations: int
    """What the microbatches under way keep for their backward."""
    working: int
    """The most that is held beside it: the head with its logits or a layer's backward, and what
    comes from other stages; or, if that is more, a reduction's second copy, or the copy of what
    --post-validation may have to undo."""

    @property
    def total(self) -> int:
        return self.weights + self.grads + self.optimizer + self.activations + self.working


def stage_memory(config: Config, world_size: int, pp_idx: int, dtype: torch.dtype) -> StageMemory:
    """What the ranks of pipeline place `pp_idx` hold; a config that `check` accepted for that
    world.
    """
    schedule = schedule_maker(config)(config.num_microbatches(world_size))
    counts = config.layout.pp_layers or split_layers(config.model, schedule.num_stages)
    mine = {s: counts[s] for s, place in enumerate(schedule.placement) if place == pp_idx}
    buckets, ways = _buckets(config, world_size, schedule, pp_idx, dtype)
    learned = [flat for flat, _ in buckets if not flat.key.frozen]
    sizes = Counter(flat.size for flat in learned)
    zero, wide = config.layout.zero, acc_dtype(dtype).itemsize
    # Whole for a while: of each size two gradients, if so many are ever made; the unit that runs
    # and the next.
    n = schedule.num_microbatches
    lanes = sum(size * min(LANES, count * n) for size, count in sizes.items()) if zero >= 2 else 0
    units: Counter[str] = Counter()
    for flat, _ in buckets:
        units[flat.key.unit] += flat.size
    running = sum(sorted(units.values())[-2:]) if zero >= 3 else 0
    size, moved = sum(units.values()), sum(flat.size for flat in learned)
    cut = {stage: ways if zero >= stage else 1 for stage in (1, 2, 3)}
    rules, masters = Rules(config.optim).named, dtype.itemsize != wide
    states = sum(
        flat.size * (len(rules[flat.key.optimizer].state_names) + masters) for flat in learned
    )
    activations, working = _moving(config, schedule, pp_idx, mine, dtype)
    narrow = config.layout.grad_reduce_dtype == "bf16"
    if ways > 1 and (narrow or (zero >= 1 and _on_cpu(config, dtype))):
        layer = LayerBytes(config, dtype).kept(config.layout.recompute)
        working = _with_copies(learned, zero, working, activations, layer)
    if config.layout.post_validation:
        # Weights, states and gradients as they were, until the first forwards of a step are done.
        copy = (states + (1 if masters else 2) * moved) // cut[1] * wide
        first = len(at_first_backward(schedule)[0].actions[pp_idx]) / peak_live(schedule)[pp_idx]
        working = max(working, copy - (1 - first) * activations)
    return StageMemory(
        pp=pp_idx,
        layers=sum(mine.values()),
        parameters=sum(p.numel() for _, params in buckets for p in params),
        weights=(size // cut[3] + running) * dtype.itemsize,
        grads=(moved // cut[2] + lanes) * wide,
        optimizer=states // cut[1] * wide,
        activations=int(activations),
        working=int(working),
    )


def _buckets(
    config: Config, world_size: int, schedule: Schedule, pp_idx: int, dtype: torch.dtype
) -> tuple[list[tuple[FlatLayout, list[nn.Parameter]]], int]:
    """The rank's real buckets, without memory, and over how many ranks they are cut."""
    sizes, layout = mesh_sizes(config, world_size), config.layout
    rank = pp_idx * prod(n for name, n in sizes.items() if name != "pp")
    kind = "fake" if world_size > 1 else "single"
    mesh = Mesh(sizes, rank=rank, kind=kind, factors=mesh_factors(config.model, config.layout.tp))
    with torch.device("meta"):
        stages = build_stages(
            config.model,
            mesh,
            placement=schedule.placement,
            layers=layout.pp_layers,
            sequence_parallel=layout.sequence_parallel,
            seed=config.train.seed,
            attention=attention_of(config),
        )
        for stage in stages.values():
            stage.to(dtype)
    megabytes = layout.bucket_mb or BUCKET_MB["cpu" if _on_cpu(config, dtype) else "cuda"]
    ways = mesh.axis("dp", "cp").size
    planned = plan(
        stages,
        ways=ways,
        bucket_bytes=megabytes * 2**20,
        unit_of=units_of(stages) if layout.zero >= 3 else lambda param: "",
        rule_of=Rules(config.optim).of,
    )
    return planned, ways


def _on_cpu(config: Config, dtype: torch.dtype) -> bool:
    asked = config.train.device
    return asked == "cpu" or (asked == "auto" and dtype in (torch.float32, torch.float64))


def _moving(
    config: Config, schedule: Schedule, pp_idx: int, mine: dict[int, int], dtype: torch.dtype
) -> tuple[float, float]:
    """What the microbatches under way keep, and the most that is held beside it."""
    layer = LayerBytes(config, dtype)
    last = schedule.num_stages - 1
    split = schedule.splits_backward
    stages = [
        stage_activations(layer, layers=n, last=s == last, split=split) for s, n in mine.items()
    ]
    live = peak_live(schedule)[pp_idx] / len(mine)
    kept = live * sum(kept for kept, _ in stages)
    kept += layer.rows * TOKEN_BYTES * schedule.num_microbatches
    kept += layer.rows * LOOKUP_BYTES * live if 0 in mine else 0
    working = max(working for _, working in stages)
    # Received ahead of the one that is used, on each edge that ends here.
    edges = edge_order(schedule).items()
    coming = [len(messages) for (_, to), messages in edges if to == pp_idx]
    return kept, working + layer.stream * sum(min(AHEAD + 1, n - 1) for n in coming)


def _with_copies(
    buckets: list[FlatLayout], zero: int, working: float, kept: float, layer: float
) -> float:
    """`working` with the second copies that reduce-scatters over gloo hold, LANES of them at most.
    Of gradients that are sent as bf16 there are such copies too, of half the size and on gloo two.

    From stage 2 on they are there in the next microbatch's backward; of one size LANES - 1, as the
    gradient that is being made has the last lane. Before, in the last one's backward alone: of a
    layer's gradients when that layer is gone, of the table's when all are.
    """
    flats = sorted(
        (b.size * acc_dtype(b.key.dtype).itemsize, any("embedding" in s.name for s in b.slots))
        for b in buckets
    )
    if zero >= 2:
        sizes = Counter(nbytes for nbytes, _ in flats)
        reduced = [nbytes for nbytes in sorted(sizes) for _ in range(min(sizes[nbytes], LANES - 1))]
        return working + sum(reduced[-LANES:])
    every = sum(nbytes for nbytes, _ in flats[-LANES:])
    inner = sum([nbytes for nbytes, table in flats if not table][-LANES:])
    return max(working + max(0.0, inner - LANES * layer), every - kept)
