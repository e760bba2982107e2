"""What one rank of a layout has to hold: counted from the parameters' own Shards, on a fake mesh.

Nothing is allocated: each stage of the real model is built on torch's meta device and laid out in
its real buckets, so weights, gradients and optimizer state are exact. Activations are counted from
what one layer's backward keeps, times the microbatches the schedule holds at its fullest.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod

import torch

from megalite.core.config import Config, ModelConfig
from megalite.core.mesh import Mesh
from megalite.core.params import acc_dtype
from megalite.models.build import build_stages, split_layers
from megalite.optim.rules import Rules
from megalite.parallel.buckets import plan
from megalite.parallel.zero import LANES, units_of
from megalite.schedule.simulate import peak_live
from megalite.train.build import BUCKET_MB, mesh_factors, mesh_sizes, schedule_maker
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
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.grads + self.optimizer + self.activations + self.logits


def stage_memory(config: Config, world_size: int, pp_idx: int, dtype: torch.dtype) -> StageMemory:
    """What the ranks of pipeline place `pp_idx` hold; a config that `check` accepted for that
    world.
    """
    sizes = mesh_sizes(config, world_size)
    rank = pp_idx * prod(n for name, n in sizes.items() if name != "pp")
    kind = "fake" if world_size > 1 else "single"
    mesh = Mesh(sizes, rank=rank, kind=kind, factors=mesh_factors(config))
    schedule = schedule_maker(config)(config.num_microbatches(world_size))
    layout, model = config.layout, config.model
    with torch.device("meta"):
        stages = build_stages(
            model,
            mesh,
            placement=schedule.placement,
            layers=layout.pp_layers,
            sequence_parallel=layout.sequence_parallel,
            seed=config.train.seed,
            attention=attention_of(config),
        )
        for stage in stages.values():
            stage.to(dtype)
    megabytes = layout.bucket_mb or BUCKET_MB["cuda" if dtype != torch.float32 else "cpu"]
    rules = Rules(config.optim)
    planned = plan(
        stages,
        ways=mesh.axis("dp", "cp").size,
        bucket_bytes=megabytes * 2**20,
        unit_of=units_of(stages) if layout.zero >= 3 else lambda param: "",
        rule_of=rules.of,
    )
    size = sum(flat.size for flat, _ in planned)
    # What is whole for a while: two gradients of each bucket size; the unit that runs and the next.
    lanes = LANES * sum({flat.size for flat, _ in planned}) if layout.zero >= 2 else 0
    units: Counter[str] = Counter()
    for flat, _ in planned:
        units[flat.key.unit] += flat.size
    running = sum(sorted(units.values())[-2:]) if layout.zero >= 3 else 0
    wide = acc_dtype(dtype).itemsize
    masters = dtype.itemsize != wide
    states = sum(
        flat.size * (len(rules.named[flat.key.optimizer].state_names) + masters)
        for flat, _ in planned
    )
    ways = mesh.axis("dp", "cp").size
    cut = {stage: ways if layout.zero >= stage else 1 for stage in (1, 2, 3)}
    counts = layout.pp_layers or split_layers(model, schedule.num_stages)
    held = sum(counts[stage] for stage in stages)
    live = peak_live(schedule)[pp_idx] / len(stages)
    per_layer = layer_activations(model, config, dtype.itemsize)
    return StageMemory(
        pp=pp_idx,
        layers=held,
        parameters=sum(p.numel() for flat, params in planned for p in params),
        weights=(size // cut[3] + running) * dtype.itemsize,
        grads=(size // cut[2] + lanes) * wide,
        optimizer=states // cut[1] * wide,
        activations=int(live * held * per_layer),
        logits=_logits(model, config, dtype.itemsize) if schedule.num_stages - 1 in stages else 0,
    )


def layer_activations(model: ModelConfig, config: Config, itemsize: int) -> int:
    """Bytes that one layer keeps for the backward of one microbatch.

    Cut over tp: queries, keys, values, attention's output, and the MLP's inner rows before and
    after its nonlinearity. Of the residual's width, cut over tp only with sequence parallelism: the
    inputs and outputs of both norms. Keys and values are those of all context ranks where they are
    gathered.
    """
    layout = config.layout
    if layout.recompute == "full":
        rows = model.seq_len // layout.cp * config.train.micro_batch_size
        return rows * model.hidden_size * itemsize // (layout.tp if layout.sequence_parallel else 1)
    rows = model.seq_len // layout.cp * config.train.micro_batch_size
    q, kv = model.num_heads * model.head_dim, max(model.kv_heads, layout.tp) * model.head_dim
    inner = model.ffn * (4 if model.activation == "swiglu" else 2)
    key_ranks = layout.cp if layout.cp_form == "gather" else 1
    cut = (2 * q + 2 * kv * key_ranks + inner) / layout.tp
    residual = 4 * model.hidden_size / (layout.tp if layout.sequence_parallel else 1)
    return int(rows * itemsize * (cut + residual))


def _logits(model: ModelConfig, config: Config, itemsize: int) -> int:
    rows = model.seq_len // config.layout.cp * config.train.micro_batch_size
    return rows * -(-model.vocab_size // config.layout.tp) * itemsize
