"""Times a training step of any layout on a seeded Markov chain: wall, CPU seconds, memory.

    python tools/bench_train.py --workload gpt-10m --layouts one,tp2pp2dp2 --rounds 3 --json OUT
    python tools/bench_train.py --workload gpt3-1.3b --layouts one --device cuda --steps 50

A layout is `one` or axes with sizes (tp2, pp2dp2, tp2pp2dp2); a schedule, `zero0` or `nosp` (no
sequence parallelism) may follow: tp2pp2+zb-h1+zero0. Rounds are interleaved, so that a drift of the
machine hits all layouts alike. CPU seconds are those of all ranks together: waiting for a core does
not count. What a rank does: train_worker.py. This starts ranks and imports no torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

# Run from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalite.data.atomic import write_json
from megalite.models.presets import PRESETS
from megalite.schedule.generators import SCHEDULES

ROOT = Path(__file__).resolve().parent.parent
WORKER = str(ROOT / "tools" / "train_worker.py")

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


def run_once(layout: str, args: argparse.Namespace) -> dict:
    """One run of one layout in processes of its own."""
    world = ranks_of(parse_layout(layout))
    kept = ("workload", "steps", "warmup", "threads", "device", "ops_backend", "deterministic")
    own = json.dumps({"layout": layout, **{name: getattr(args, name) for name in kept}})
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
        WORKER,
        own,
    ]
    if world == 1:
        command = [sys.executable, WORKER, own]
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
    args = parser.parse_args()
    layouts = args.layouts.split(",")
    for layout in layouts:
        parse_layout(layout)
    rows = []
    for number in range(args.rounds):
        for layout in layouts:
            rows.append({**run_once(layout, args), "round": number})
    summary(rows, layouts)
    if args.json:
        write_json(args.json, rows)


if __name__ == "__main__":
    main()
