"""Times a training step of any layout on a seeded Markov chain: wall, CPU seconds, memory.

    python tools/bench_train.py --workload gpt-10m --layouts one,tp2pp2dp2 --rounds 3 --json OUT
    python tools/bench_train.py --workload gpt3-1.3b --layouts one --device cuda --steps 50

A layout is `one` or axes with sizes (tp2, pp2dp2, tp2pp2dp2); a schedule, `zero0` or `nosp` (no
sequence parallelism) may follow: tp2pp2+zb-h1+zero0. Rounds are interleaved, so that a drift of the
machine hits all layouts alike. CPU seconds are those of all ranks together: waiting for a core does
not count.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from megalite.core import comm
from megalite.core.config import Config, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from megalite.core.mesh import disconnect
from megalite.core.world import World
from megalite.data.loader import Synthetic
from megalite.models.presets import PRESETS, num_parameters
from megalite.schedule.generators import SCHEDULES
from megalite.train.build import build_engine, build_loader, build_mesh, pick_device, pick_dtype
from megalite.train.deterministic import be_deterministic
from megalite.train.flops import peak_of, rates
from megalite.train.loop import train_step
from megalite.train.metrics import peak_memory_gb

ROOT = Path(__file__).resolve().parent.parent

WORKLOADS = {
    "gpt-10m": {"num_layers": 6, "hidden_size": 384, "num_heads": 6, "seq_len": 256,
                "vocab_size": 4096, "micro_batch_size": 4, "global_batch_size": 16},
    "gpt-30m": {"num_layers": 8, "hidden_size": 512, "num_heads": 8, "seq_len": 512,
                "vocab_size": 16384, "micro_batch_size": 2, "global_batch_size": 8},
    "tiny": {"num_layers": 4, "hidden_size": 64, "num_heads": 4, "seq_len": 64, "vocab_size": 512,
             "micro_batch_size": 2, "global_batch_size": 8},
    # For one GPU of 141 GB. Each microbatch reads and writes every gradient, so there are as few as
    # `plan` finds room for (74 and 102 GiB), but that of gpt2-124m has fewer than 2^31 logits.
    "gpt2-124m": PRESETS["gpt2-124m"] | {"micro_batch_size": 32, "global_batch_size": 64},
    "gpt3-1.3b": PRESETS["gpt3-1.3b"] | {"micro_batch_size": 16, "global_batch_size": 16},
    # The width of llama-7b at half its depth, which leaves room for the optimizer's states.
    "llama-7b-wide": PRESETS["llama-7b"] | {"num_layers": 16, "seq_len": 4096,
                                            "micro_batch_size": 4, "global_batch_size": 4},
}  # fmt: skip
FIELDS = ("cpu_s_per_step", "step_ms", "tokens_per_s", "tflops_per_rank", "peak_mb")


def parse_layout(name: str) -> dict[str, object]:
    """`tp2pp2dp2-gpipe` to LayoutConfig values."""
    axes, *settings = name.split("+")
    layout: dict[str, object] = {"dp": 1}
    if axes != "one":
        found = re.findall(r"(vpp|tp|pp|dp)(\d+)", axes)
        if "".join(a + n for a, n in found) != axes:
            sys.exit(f"bench_train: --layouts {name}: expected `one` or axes such as tp2pp2dp2")
        layout |= {axis: int(n) for axis, n in found}
    for setting in settings:
        if setting in SCHEDULES:
            layout["schedule"] = setting
        elif setting in ("zero0", "zero1"):
            layout["zero"] = int(setting[-1])
        elif setting == "nosp":
            layout["sequence_parallel"] = False
        else:
            sys.exit(f"bench_train: --layouts {name}: unknown setting {setting!r}")
    return layout


def ranks_of(layout: dict[str, object]) -> int:
    """World size of a layout."""
    return int(layout.get("tp", 1)) * int(layout.get("pp", 1)) * int(layout["dp"])  # type: ignore[call-overload]


def worker(args: argparse.Namespace) -> None:
    """One rank of one run; rank 0 prints the row."""
    torch.set_num_threads(args.threads)
    values = dict(WORKLOADS[args.workload])
    batch = {k: values.pop(k) for k in ("micro_batch_size", "global_batch_size")}
    config = Config(
        model=ModelConfig(**values),
        layout=LayoutConfig(**parse_layout(args.worker)),
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
        seconds = statistics.median(walls[args.warmup :])
        tokens = config.train.global_batch_size * config.model.seq_len
        row = {
            "system": "megalite",
            "layout": args.worker,
            "workload": args.workload,
            "world": world.size,
            "ops_backend": args.ops_backend,
            "params": num_parameters(config.model),
            "tokens_per_step": tokens,
            "cpu_s_per_step": statistics.median(spent.tolist()[args.warmup :]),
            "step_ms": 1000 * seconds,
            "tokens_per_s": tokens / seconds,
            "deterministic": args.deterministic,
            **rates(config.model, tokens / seconds / world.size, peak_of(device, engine.dtype)),
            "peak_mb": peak.item(),
            "loss_first": losses[0],
            "loss_last": losses[-1],
        }
        print(json.dumps(row), flush=True)
    disconnect()


def run_once(layout: str, args: argparse.Namespace) -> dict:
    """One run of one layout in processes of its own."""
    world = ranks_of(parse_layout(layout))
    own = ["--worker", layout, "--workload", args.workload, "--steps", str(args.steps)]
    own += ["--warmup", str(args.warmup), "--threads", str(args.threads), "--device", args.device]
    own += ["--ops-backend", args.ops_backend]
    own += ["--deterministic"] if args.deterministic else []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": path}
    env["OMP_WAIT_POLICY"] = "passive"  # idle threads that spin would count as CPU seconds
    env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [
        *launcher,
        "--local-addr",
        "localhost",
        "--nproc-per-node",
        str(world),
        __file__,
        *own,
    ]
    if world == 1:
        command = [sys.executable, __file__, *own]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not rows:
        sys.exit(f"bench_train: {layout} failed:\n{done.stderr[-3000:]}")
    return json.loads(rows[-1])


def summary(rows: list[dict], layouts: list[str]) -> None:
    """Print medians over rounds, and CPU seconds as a ratio to the first layout, pair by pair."""
    base = [r["cpu_s_per_step"] for r in rows if r["layout"] == layouts[0]]
    print(
        f"{'layout':<22}{'world':>6}{'cpu s/step':>12}{'step ms':>10}{'tok/s':>9}"
        f"{'TFLOP/s':>9}{'peak MB':>9}  cpu ratio to {layouts[0]}"
    )
    for layout in layouts:
        mine = [r for r in rows if r["layout"] == layout]
        middle = {f: statistics.median(r[f] for r in mine) for f in FIELDS}
        ratios = sorted(r["cpu_s_per_step"] / b for r, b in zip(mine, base, strict=True))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(
            f"{layout:<22}{mine[0]['world']:>6}{middle['cpu_s_per_step']:>12.2f}{middle['step_ms']:>10.0f}"
            f"{middle['tokens_per_s']:>9.0f}{middle['tflops_per_rank']:>9.2f}"
            f"{middle['peak_mb']:>9.0f}  {spread}"
        )


def main() -> None:
    """Parse, run the rounds, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=sorted(WORKLOADS), default="gpt-10m")
    parser.add_argument(
        "--layouts", default="one,tp2pp2dp2", help="comma separated; ratios are to the first"
    )
    parser.add_argument("--steps", type=int, default=5, help="measured steps of a run")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each layout, interleaved")
    parser.add_argument("--threads", type=int, default=1, help="threads of each rank")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda", "auto"))
    parser.add_argument("--ops-backend", default="auto", choices=("auto", "fused", "torch", "apex"))
    parser.add_argument("--deterministic", action="store_true", help="as pretrain's")
    parser.add_argument("--json", metavar="OUT", help="write every round's row")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        sys.stdout.flush()
        os._exit(0)  # gloo's threads can abort an interpreter that shuts down around them
    layouts = args.layouts.split(",")
    for layout in layouts:
        parse_layout(layout)
    rows = []
    for number in range(args.rounds):
        for layout in layouts:
            rows.append({**run_once(layout, args), "round": number})
    summary(rows, layouts)
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
