"""Measures the memory of a rank under ZeRO 0 to 3, beside what the formulas say.

    python tools/bench_memory.py --rounds 1 --json OUT

A GPT of 100M parameters on data parallel gloo ranks, one thread each, sequences short so that it is
parameters that fill the memory. `rss` is the most that the largest rank ever held, less what it
held before the engine was built (Python and torch); `formula` is plan/memory.py's, of tensors
alone. Rounds are interleaved.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from megalite.core import comm
from megalite.core.config import Config, LayoutConfig, ModelConfig, TrainConfig
from megalite.core.mesh import disconnect
from megalite.core.world import World
from megalite.data.atomic import write_json
from megalite.data.loader import Synthetic
from megalite.models.presets import num_parameters
from megalite.plan.memory import stage_memory
from megalite.train.build import build_engine, build_loader, build_mesh
from megalite.train.loop import train_step

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
WORKLOADS = {
    "gpt-100m": ModelConfig(
        num_layers=13, hidden_size=768, num_heads=12, vocab_size=8192, seq_len=32
    ),
    "tiny": ModelConfig(num_layers=4, hidden_size=64, num_heads=4, vocab_size=512, seq_len=16),
}
MICROBATCHES = 2


def config_of(workload: str, zero: int, dp: int) -> Config:
    """One sample at once and two microbatches a rank."""
    return Config(
        model=WORKLOADS[workload],
        layout=LayoutConfig(dp=dp, zero=zero),
        train=TrainConfig(
            micro_batch_size=1, global_batch_size=MICROBATCHES * dp, device="cpu", precision="fp32"
        ),
    )


def most_rss() -> int:
    """Bytes this process ever held."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def worker(args: argparse.Namespace) -> None:
    """One rank of one run; rank 0 prints the row."""
    torch.set_num_threads(1)
    config = config_of(args.workload, args.worker, args.dp)
    world = World.from_environment(os.environ)
    config.check(world.size)
    mesh = build_mesh(config, world, CPU)
    before = most_rss()
    engine = build_engine(config, mesh, device=CPU, dtype=torch.float32)
    loader = build_loader(engine, Synthetic(config.model.vocab_size, config.model.seq_len, 1234))
    for step in range(args.steps):
        found = train_step(engine, loader.step(step * MICROBATCHES * args.dp), lr=1e-4)
    held = torch.tensor([float(most_rss() - before)], dtype=torch.float64)
    most = comm.all_reduce(held, mesh.world, op="max").item()
    if mesh.rank == 0:
        said = stage_memory(config, world.size, 0, torch.float32)
        row = {
            "system": "megalite",
            "layout": f"dp{args.dp}+zero{args.worker}",
            "workload": args.workload,
            "world": world.size,
            "parameters": num_parameters(config.model),
            "rss_mb": most / 2**20,
            "formula_mb": said.total / 2**20,
            "loss": found.loss.item(),
        }
        print(json.dumps(row), flush=True)
    disconnect()


def run_once(zero: int, args: argparse.Namespace) -> dict:
    """One run of one stage in processes of its own."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Freed memory goes back to the system at once, so that what is held is what is in use.
    env["MALLOC_MMAP_THRESHOLD_"] = env["MALLOC_TRIM_THRESHOLD_"] = "65536"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "localhost", "--nproc-per-node", str(args.dp), __file__]
    command += ["--worker", str(zero), "--workload", args.workload]
    command += ["--dp", str(args.dp), "--steps", str(args.steps)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not rows:
        sys.exit(f"bench_memory: zero {zero} failed:\n{done.stderr[-3000:]}")
    return json.loads(rows[-1])


def summary(rows: list[dict]) -> bool:
    """Print medians over rounds, and whether they fall in order; that is what it gives."""
    print(f"{'layout':<12}{'world':>6}{'rss MB':>9}{'formula MB':>12}{'rss/formula':>13}")
    medians = []
    for layout in dict.fromkeys(row["layout"] for row in rows):
        mine = [row for row in rows if row["layout"] == layout]
        rss, formula = statistics.median(row["rss_mb"] for row in mine), mine[0]["formula_mb"]
        medians.append(rss)
        print(f"{layout:<12}{mine[0]['world']:>6}{rss:>9.0f}{formula:>12.0f}{rss / formula:>13.2f}")
    falls = all(a > b for a, b in zip(medians, medians[1:], strict=False))
    size = f"{rows[0]['parameters'] / 1e6:.0f}M parameters"
    print(f"{size}: RSS {'falls' if falls else 'does NOT fall'} from stage to stage")
    return falls


def main() -> int:
    """Parse, run the rounds, print and write; 1 if a stage does not take less than that before."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="gpt-100m")
    parser.add_argument("--dp", type=int, default=4, help="data parallel ranks")
    parser.add_argument("--steps", type=int, default=2, help="steps of a run")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each stage, interleaved")
    parser.add_argument("--json", metavar="OUT", help="write every round's row")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is not None:
        worker(args)
        sys.stdout.flush()
        os._exit(0)  # gloo's threads can abort an interpreter that shuts down around them
    rows = []
    for number in range(args.rounds):
        for zero in range(4):
            rows.append({**run_once(zero, args), "round": number})
    falls = summary(rows)
    if args.json:
        write_json(args.json, rows)
    return 0 if falls else 1


if __name__ == "__main__":
    sys.exit(main())
