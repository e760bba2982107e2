"""What the ranks of test_host_group.py do: others' jobs, with every transfer by way of copies."""

from __future__ import annotations

import importlib
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megalite.core import host_group, mesh


def by_copies(
    rank: int, world: int, job: str, store: str, kwargs: dict | None = None
) -> dict[str, Any]:
    """Run a job as if its tensors were not on the host; gives its result and the copies made."""
    mesh.disconnect(together=True)
    copies = 0

    def copied(x: torch.Tensor) -> torch.Tensor:
        nonlocal copies
        copies += 1
        return x.clone()

    host_group.on_host = copied
    mesh.connect(
        rank=rank,
        world_size=world,
        backend=host_group.BACKEND,
        timeout=timedelta(seconds=60),
        device=torch.device("cpu"),
        meet_at=Path(store),
    )
    assert dist.get_backend() == host_group.BACKEND
    module, _, name = job.partition(":")
    result = getattr(importlib.import_module(module), name)(rank, world, **(kwargs or {}))
    return {"result": result, "copies": copies}
