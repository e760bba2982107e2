"""`--dry-run` of what trains: the layout picture and the memory of a rank, on any laptop; starts
nothing.
"""

from __future__ import annotations

import torch

from megalite.core.config import Config
from megalite.core.precision import dtype_of
from megalite.plan.memory import StageMemory, stage_memory
from megalite.schedule.simulate import bubble
from megalite.train.build import schedule_maker
from megalite.train.console import count, layout_picture, size
from megalite.train.own_files import check_own_code
from megalite.train.pictures import timeline


def dry_run(config: Config, world_size: int) -> None:
    """Print what `world_size` ranks would hold and do. Raises UserError where the schedule cannot
    run.
    """
    check_own_code(config)
    layout = config.layout
    dtype = _dtype(config)
    schedule = schedule_maker(config)(config.num_microbatches(world_size))
    share = 100 * bubble(timeline(config, schedule))
    dp = config.data_ranks(world_size)
    ranks = f"{world_size} ranks as TP{layout.tp} x PP{layout.pp} x DP{dp}"
    print(f"megalite {config.verb}, dry run | {ranks}")
    for line in layout_picture(config, world_size):
        print(f"  {line}")
    tokens = config.train.global_batch_size * config.model.seq_len
    assumed = " (as on a GPU; --device cpu for float32)" if config.train.precision == "auto" else ""
    kind = f"{str(dtype)[6:]}{assumed if dtype != torch.float32 else ''}"
    print(f"  model  {size(config.model)}, {kind}")
    ramp = f" (from {config.batch_sizes()[0]})" if config.train.rampup_batch_size else ""
    print(
        f"  batch  {config.train.global_batch_size} samples{ramp} = {count(tokens)} tokens, "
        f"{schedule.num_microbatches} microbatches a rank"
    )
    print(f"  order  {schedule.name}, bubble {share:.1f}% by simulation; ZeRO-{layout.zero}")
    stages = [stage_memory(config, world_size, pp, dtype) for pp in range(layout.pp)]
    print("  memory of a rank, MB of tensors; the allocator adds its own")
    print(
        "    stage  layers  parameters  weights    grads  optimizer  activations  working    total"
    )
    for stage in _shown(stages):
        print(_row(stage) if stage is not None else "      ..")
    worst = max(stages, key=lambda stage: stage.total)
    print(f"  most: {worst.total / 2**30:.2f} GiB, on pp{worst.pp}; nothing was started")


def _dtype(config: Config) -> torch.dtype:
    """The asked precision; `auto` is taken for what a GPU would use, unless the run is for CPU."""
    device = torch.device("cpu" if config.train.device == "cpu" else "cuda")
    return dtype_of(config.train.precision, device)


def _shown(stages: list[StageMemory]) -> list[StageMemory | None]:
    """All stages, or the first and last few of many."""
    return list(stages) if len(stages) <= 12 else [*stages[:4], None, *stages[-3:]]


def _row(stage: StageMemory) -> str:
    parts = (
        stage.weights,
        stage.grads,
        stage.optimizer,
        stage.activations,
        stage.working,
        stage.total,
    )
    numbers = [f"{part / 2**20:,.1f}" for part in parts]
    widths = (9, 9, 11, 13, 9, 9)
    cells = "".join(f"{n:>{w}}" for n, w in zip(numbers, widths, strict=True))
    return f"    {f'pp{stage.pp}':<5}{stage.layers:>8}{count(stage.parameters):>12}{cells}"
