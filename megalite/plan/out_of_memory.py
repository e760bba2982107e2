"""What a rank that ran out of memory says: what it had planned, and which flag would free most.

Numbers are memory.py's, for this rank's stages: as the run is, and as it would be with each flag.
Told by train/failure.py, which the front door gives `explain` to.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args, get_type_hints

import torch

from megalite.core.config import Config, LayoutConfig
from megalite.core.errors import UserError
from megalite.core.world import World
from megalite.plan.memory import stage_memory
from megalite.train.build import pick_device, pick_dtype
from megalite.train.metrics import peak_memory_gb

RECOMPUTE = get_args(get_type_hints(LayoutConfig)["recompute"])
UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "PiB": 2**50}


def explain(error: Exception, config: Config, world: World) -> str:
    """What `error`, which says that memory is short, means for this rank: one line."""
    device = pick_device(config, world)
    found = re.search(rf"allocate ([\d.]+) ({'|'.join(UNITS)})", str(error))
    asked = f"asked for {_size(float(found[1]) * UNITS[found[2]])}, " if found else ""
    if device.type == "cuda" and not isinstance(error, torch.OutOfMemoryError):
        # The plan is of the GPU's memory.
        return (
            f"out of memory of the host: {asked or 'asked for more than there is, '}as of {error}"
        )
    dtype = pick_dtype(config, device)
    pp = world.rank // (world.size // config.layout.pp)
    now = stage_memory(config, world.size, pp, dtype)
    parts = {
        "weights": now.weights,
        "gradients": now.grads,
        "optimizer states": now.optimizer,
        "activations": now.activations,
        "working": now.working,
    }
    planned = ", ".join(f"{name} {_size(count)}" for name, count in parts.items())
    frees = {
        flag: now.total - stage_memory(other, world.size, pp, dtype).total
        for flag, other in alternatives(config, world.size)
    }
    best = max(frees, key=lambda flag: frees[flag], default="")
    if best and frees[best] > 0:
        remedy = f"{best} frees most of it, {_size(frees[best])}"
    else:
        remedy = "no other ZeRO stage, recomputation or micro-batch frees any: raise --tp or --pp"
    return (
        f"out of memory: {asked}held {_size(peak_memory_gb(device) * 2**30)} at most; the plan of "
        f"pp{pp} is {planned}, in all {_size(now.total)}; {remedy}"
    )


def alternatives(config: Config, world_size: int) -> Iterator[tuple[str, Config]]:
    """The same training with less memory, by one flag each; those alone that could run."""
    layout, train = config.layout, config.train
    others = [
        (f"--zero {stage}", replace(config, layout=replace(layout, zero=stage)))
        for stage in range(layout.zero + 1, 4)
    ]
    for how in RECOMPUTE[RECOMPUTE.index(layout.recompute) + 1 :]:
        others.append(
            (f"--recompute {how}", replace(config, layout=replace(layout, recompute=how)))
        )
    micro = train.micro_batch_size
    for size in [n for n in range(1, micro) if micro % n == 0][-1:]:
        smaller = replace(config, train=replace(train, micro_batch_size=size))
        others.append((f"--micro-batch-size {size}", smaller))
    for flag, other in others:
        try:
            other.check(world_size)
        except UserError:
            continue  # not with the other flags of this run
        yield flag, other


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.2f} MiB"
