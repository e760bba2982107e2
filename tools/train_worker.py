"""One rank of bench_train.py: trains steps of one layout, and rank 0 prints their row as JSON.

python tools/train_worker.py '{"layout": "one", "workload": "tiny", "steps": 5, ...}'
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path

# Run from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_train import WORKLOADS, parse_layout

from megalite.core import comm
from megalite.core.config import Config, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from megalite.core.mesh import disconnect
from megalite.core.world import World
from megalite.data.loader import Synthetic
from megalite.models.presets import num_parameters
from megalite.train.build import build_engine, build_loader, build_mesh, pick_device, pick_dtype
from megalite.train.deterministic import be_deterministic
from megalite.train.flops import peak_of, rates
from megalite.train.loop import train_step
from megalite.train.metrics import peak_memory_gb


def main() -> None:
    """Train, measure and print."""
    args = Namespace(**json.loads(sys.argv[1]))
    torch.set_num_threads(args.threads)
    values = dict(WORKLOADS[args.workload])
    batch = {k: values.pop(k) for k in ("micro_batch_size", "global_batch_size")}
    config = Config(
        model=ModelConfig(**values),
        layout=LayoutConfig(**parse_layout(args.layout)),
        optim=OptimConfig(lr=3e-4, warmup_steps=4),
        train=TrainConfig(
            **batch,
            device=args.device,
            ops_backend=args.ops_backend,
            deterministic=args.deterministic,
        ),
    )
    world = World.from_environment(os.environ)
    config.check(world.size)
    device = pick_device(config, world)
    if args.deterministic:
        be_deterministic(device)
    mesh = build_mesh(config, world, device)
    engine = build_engine(config, mesh, device=device, dtype=pick_dtype(config, device))
    loader = build_loader(engine, Synthetic(config.model.vocab_size, config.model.seq_len, 1234))
    losses, walls, cpus = [], [], []
    for step in range(args.warmup + args.steps):
        calls = loader.step(step * config.train.global_batch_size)
        comm.barrier(mesh.world)
        wall, cpu = time.perf_counter(), time.process_time()
        found = train_step(engine, calls, lr=3e-4 * min(1.0, (step + 1) / 4))
        losses.append(found.loss.item())
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
    spent = comm.all_reduce(torch.tensor(cpus, dtype=torch.float64, device=device), mesh.world)
    held = torch.tensor([1024 * peak_memory_gb(device)], dtype=torch.float64, device=device)
    peak = comm.all_reduce(held, mesh.world, op="max")
    if mesh.rank == 0:
        walls = walls[args.warmup :]
        seconds = statistics.median(walls)
        tokens = config.train.global_batch_size * config.model.seq_len
        row = {
            "system": "megalite",
            "layout": args.layout,
            "workload": args.workload,
            "world": world.size,
            "ops_backend": args.ops_backend,
            "deterministic": args.deterministic,
            "dtype": str(engine.dtype).removeprefix("torch."),
            "params": num_parameters(config.model),
            "seq_len": config.model.seq_len,
            **batch,
            "tokens_per_step": tokens,
            "steps": len(walls),
            "cpu_s_per_step": statistics.median(spent.tolist()[args.warmup :]),
            "step_ms": 1000 * seconds,
            "step_ms_least": 1000 * min(walls),
            "step_ms_most": 1000 * max(walls),
            "tokens_per_s": tokens / seconds,
            **rates(config.model, tokens / seconds / world.size, peak_of(device, engine.dtype)),
            "peak_mb": peak.item(),
            "losses": losses,
        }
        print(json.dumps(row), flush=True)
    disconnect()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads can abort an interpreter that shuts down around them


if __name__ == "__main__":
    main()
