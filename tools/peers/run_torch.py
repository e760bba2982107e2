"""torch's own parallelism on the plain GPT: one process, DDP, FSDP2, DTensor and pipelining."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from gpt import SeparateAttention, cross_entropy, stage_gpt, whole_gpt
from harness import Case, adamw, microbatches, open_case, serve
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

Step = Callable[[int], float | None]


def accumulated(
    case: Case,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    dp: int = 1,
    syncing: Callable[[bool], AbstractContextManager] = lambda is_last: nullcontext(),
) -> Step:
    """The plain step: a backward for each microbatch, of which the last one's syncs, one update."""

    def step(number: int) -> float:
        total = 0.0
        batches = microbatches(case, number, case.rank if dp > 1 else 0, dp)
        for i, (x, y) in enumerate(batches):
            with syncing(i == len(batches) - 1):
                loss = cross_entropy(model(x), y) / len(batches)
                loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def one(case: Case) -> Step:
    model = whole_gpt(case)
    return accumulated(case, model, adamw(model.parameters(), case))


def ddp(case: Case) -> Step:
    model = whole_gpt(case)
    wrapped = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return accumulated(
        case,
        wrapped,
        adamw(model.parameters(), case),
        dp=case.world,
        syncing=lambda is_last: nullcontext() if is_last else wrapped.no_sync(),
    )


def fsdp2(case: Case) -> Step:
    mesh = init_device_mesh("cpu", (case.world,), mesh_dim_names=("dp",))
    model = whole_gpt(case)
    for block in model.layers.values():
        fully_shard(block, mesh=mesh)
    sharded = fully_shard(model, mesh=mesh)

    def syncing(is_last: bool) -> AbstractContextManager:
        sharded.set_requires_gradient_sync(is_last)
        sharded.set_is_last_backward(is_last)
        return nullcontext()

    optimizer = adamw(model.parameters(), case)
    return accumulated(case, model, optimizer, dp=case.world, syncing=syncing)


def dtensor_tp(case: Case) -> Step:
    """As torch's tutorial has it, or with one projection for q, k and v."""
    mesh = init_device_mesh("cpu", (case.world,), mesh_dim_names=("tp",))
    fused = case.layout.endswith("-fused")
    model = whole_gpt(case) if fused else whole_gpt(case, SeparateAttention)
    plan: dict[str, ParallelStyle] = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "layers.*.attention.out": RowwiseParallel(),
        "layers.*.up": ColwiseParallel(),
        "layers.*.down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
    }
    for name in ("qkv",) if fused else ("q", "k", "v"):
        plan[f"layers.*.attention.{name}"] = ColwiseParallel()
    parallelize_module(model, mesh, plan)
    model.head.weight = model.embedding.weight  # parallelize_module has untied them
    optimizer = adamw(model.parameters(), case)

    def step(number: int) -> float:
        total = 0.0
        batches = microbatches(case, number)
        for x, y in batches:
            with loss_parallel():
                loss = cross_entropy(model(x), y) / len(batches)
                loss.backward()
            total += loss.full_tensor().item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def pipelining(case: Case) -> Step:
    """1F1B over equal halves of the layers. It knows no tied table: each end has a copy, and their
    gradients are summed by hand before the update.
    """
    w = case.workload
    first, last = case.rank == 0, case.rank == case.world - 1
    half = w.num_layers // 2
    layers = range(half) if first else range(half, w.num_layers)
    model = stage_gpt(case, layers, first=first, last=last)
    table = model.embedding.weight if first else model.head.weight
    optimizer = adamw(model.parameters(), case)
    stage = PipelineStage(model, case.rank, case.world, torch.device("cpu"))
    count = w.global_batch_size // w.micro_batch_size
    schedule = Schedule1F1B(stage, count, loss_fn=cross_entropy)

    def step(number: int) -> float | None:
        tokens = case.tokens[number]
        losses: list[torch.Tensor] = []
        if first:
            schedule.step(tokens[:, :-1].contiguous())
        else:
            schedule.step(target=tokens[:, 1:].contiguous(), losses=losses)
        dist.all_reduce(table.grad)
        optimizer.step()
        optimizer.zero_grad()
        return torch.stack(losses).mean().item() if last else None

    return step


LAYOUTS: dict[str, Callable[[Case], Step]] = {
    "one": one,
    "ddp": ddp,
    "fsdp2": fsdp2,
    "dtensor-tp": dtensor_tp,
    "dtensor-tp-fused": dtensor_tp,
    "pipelining": pipelining,
}

if __name__ == "__main__":
    case = open_case()
    if case.world > 1:
        dist.init_process_group("gloo")
    serve(LAYOUTS[case.layout](case))
