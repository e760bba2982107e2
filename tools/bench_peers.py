"""Compares megalite's training step with other systems': CPU seconds, wall time, memory, losses.

    python tools/bench_peers.py --workload gpt-10m --layout tp2 --rounds 9 --json OUT \\
        --peer megatron-core=VENV/bin/python --peer picotron=CHECKOUT

torch's own forms are built in; other peers need an interpreter that has them (deepspeed, fairscale,
megatron-core) or a checkout (nanogpt, picotron), and are listed as not run without. Both systems
start from the same weights and see the same tokens, so their losses must agree at each step. They
are started once and take turns, ours-peer-peer-ours, so that a drift of the machine hits both
alike; the one that waits sleeps. CPU seconds are those of all ranks: waiting for a core does not
count.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from megalite.core.config import Config
from megalite.core.mesh import Mesh
from megalite.core.params import named_parameters
from megalite.data.loader import Synthetic
from megalite.train.build import build_engine

HERE = Path(__file__).resolve().parent / "peers"
sys.path.insert(0, str(HERE))
from harness import WORKLOADS, Workload, write_case  # noqa: E402
from run_megalite import model_config  # noqa: E402
from team import Team  # noqa: E402

from megalite.data.atomic import write_json  # noqa: E402

LOSS_TOLERANCE = 1e-4
NOISE = 0.08
"""By how much the 5th percentile may be under a figure above 1.08; under that one, it is 1.03."""


@dataclass(frozen=True)
class Rival:
    """A system to compare a layout of ours with."""

    name: str
    script: str
    layout: str
    figure: float
    """How many times our CPU seconds it should need."""
    needs: str = ""
    """What --peer gives: an interpreter or a checkout; nothing for torch."""
    llama: bool = False


DDP = Rival("torch-ddp", "run_torch.py", "ddp", 1.08)
OSS = Rival("fairscale", "run_fairscale.py", "oss", 1.08, needs="interpreter")
TENSOR = (
    Rival("torch-dtensor", "run_torch.py", "dtensor-tp", 1.5),
    Rival("torch-dtensor-fused", "run_torch.py", "dtensor-tp-fused", 1.5),
    Rival("picotron", "run_picotron.py", "tp", 1.5, needs="checkout", llama=True),
    Rival("megatron-core", "run_megatron_core.py", "tp", 1.2, needs="interpreter"),
)
PIPELINE = (Rival("torch-pipelining", "run_torch.py", "pipelining", 1.2),)
RIVALS = {
    "one": (
        Rival("torch", "run_torch.py", "one", 1.0),
        Rival("nanogpt", "run_nanogpt.py", "one", 1.08, needs="checkout"),
    ),
    "dp2": (DDP, OSS),
    "dp2-zero1": (DDP, OSS),
    "dp2-zero3": (
        Rival("torch-fsdp2", "run_torch.py", "fsdp2", 1.25),
        Rival("deepspeed", "run_deepspeed.py", "zero3", 1.25, needs="interpreter"),
    ),
    "tp2": TENSOR,
    "tp2-nosp": TENSOR,
    "pp2": PIPELINE,
    "pp2-zb-h2": PIPELINE,
}


def make_case(path: Path, workload: Workload, steps: int, *, llama: bool) -> None:
    """Our initial weights of the whole model, and tokens for all steps."""
    config = Config(model=model_config(workload, llama=llama))
    cpu = torch.device("cpu")
    mesh = Mesh({"pp": 1, "dp": 1, "cp": 1, "tp": 1}, rank=0, kind="single")
    engine = build_engine(config, mesh, device=cpu, dtype=torch.float32)
    weights = {name: p.detach().clone() for name, p in named_parameters(engine.stages[0])}
    source = Synthetic(workload.vocab_size, workload.seq_len, seed=1234)
    count = steps * workload.global_batch_size
    rows = np.stack([source.window(i) for i in range(count)]).astype(np.int64)
    write_case(path, rows.reshape(steps, workload.global_batch_size, -1), weights)


def world_of(layout: str) -> int:
    """Ranks of a layout."""
    return 1 if layout == "one" else 2


def compare(rival: Rival, given: str, args: argparse.Namespace) -> dict:
    """Turns of ours and the rival's, as rows and what they say together."""
    python = given if rival.needs == "interpreter" else sys.executable
    steps = args.warmup + 2 * args.rounds * args.steps
    shared = {"threads": args.threads}
    with tempfile.TemporaryDirectory() as folder:
        case = Path(folder) / "case.npz"
        make_case(case, WORKLOADS[args.workload], steps, llama=rival.llama)
        options = ["--file", str(case), "--workload", args.workload]
        options += ["--llama"] * rival.llama + ["--fused"] * args.fused_peers
        mine = [*options, "--layout", args.layout]
        theirs = [*options, "--layout", rival.layout]
        if rival.needs == "checkout":
            theirs += ["--source", str(Path(given).resolve())]
        world = world_of(args.layout)
        teams = {
            "megalite": Team("run_megalite.py", mine, world, python=sys.executable, **shared),
            rival.name: Team(rival.script, theirs, world, python=python, **shared),
        }
        try:
            for team in teams.values():
                team.turn(args.warmup)
            rounds = [take_round(teams, args.steps) for _ in range(args.rounds)]
        finally:
            for team in teams.values():
                team.stop()
    return verdict(rival, rounds, [team.losses for team in teams.values()], args)


def take_round(teams: dict[str, Team], steps: int) -> dict[str, dict]:
    """A turn each, forth and back: means of both turns by system."""
    order = [*teams, *reversed(teams)]
    turns = [(name, teams[name].turn(steps)) for name in order]
    return {
        name: {
            what: statistics.mean(turn[what] for who, turn in turns if who == name)
            for what in ("cpu", "wall", "rss")
        }
        for name in teams
    }


def fifth_percentile(values: list[float]) -> float:
    """Of the median, over bootstrap samples of the rounds."""
    made = random.Random(0)
    medians = [statistics.median(made.choices(values, k=len(values))) for _ in range(4000)]
    return sorted(medians)[len(medians) // 20]


def verdict(
    rival: Rival, rounds: list[dict], losses: list[list[float]], args: argparse.Namespace
) -> dict:
    """The rows of both systems, and the ratio of their CPU seconds against the figure."""
    names = ["megalite", rival.name]
    ratios = {
        what: [r[rival.name][what] / r["megalite"][what] for r in rounds]
        for what in ("cpu", "wall")
    }
    cpu = statistics.median(ratios["cpu"])
    fifth = fifth_percentile(ratios["cpu"])
    bound = 1.03 if rival.figure == 1.08 else rival.figure - NOISE
    return {
        "rows": [
            row(name, args, [r[name] for r in rounds], found)
            for name, found in zip(names, losses, strict=True)
        ],
        "peer": rival.name,
        "llama_form": rival.llama,
        "figure": rival.figure,
        "cpu_ratio": cpu,
        "cpu_ratio_fifth_percentile": fifth,
        "wall_ratio": statistics.median(ratios["wall"]),
        "met": cpu >= rival.figure and fifth > bound,
        "worst_loss_difference": max(abs(a - b) for a, b in zip(*losses, strict=True)),
        "rounds": rounds,
        "losses": dict(zip(names, losses, strict=True)),
    }


def row(name: str, args: argparse.Namespace, turns: list[dict], losses: list[float]) -> dict:
    """One system's figures."""
    workload = WORKLOADS[args.workload]
    seconds = statistics.median(t["wall"] for t in turns)
    return {
        "system": name,
        "layout": args.layout,
        "workload": args.workload,
        "world": world_of(args.layout),
        "cpu_s_per_step": statistics.median(t["cpu"] for t in turns),
        "step_ms": 1000 * seconds,
        "tokens_per_s": workload.global_batch_size * workload.seq_len / seconds,
        "peak_rss_mb": max(t["rss"] for t in turns),
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }


def report(found: dict) -> None:
    """Print both rows and the verdict."""
    for each in found["rows"]:
        print(
            f"{each['system']:<20}{each['layout']:<11}{each['workload']:<9}{each['world']:>5}"
            f"{each['cpu_s_per_step']:>12.3f}{each['step_ms']:>9.0f}{each['tokens_per_s']:>8.0f}"
            f"{each['peak_rss_mb']:>8.0f}{each['loss_first']:>9.4f}{each['loss_last']:>9.4f}"
        )
    ratios = sorted(r[found["peer"]]["cpu"] / r["megalite"]["cpu"] for r in found["rounds"])
    print(
        f"  {found['peer']} / megalite, CPU: {found['cpu_ratio']:.3f} (5th percentile "
        f"{found['cpu_ratio_fifth_percentile']:.3f}, rounds {ratios[0]:.3f} to {ratios[-1]:.3f}; "
        f"figure {found['figure']}: {'met' if found['met'] else 'missed'}), "
        f"wall: {found['wall_ratio']:.3f}, "
        f"losses differ by {found['worst_loss_difference']:.1e} at most",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workload", choices=WORKLOADS, default="gpt-10m")
    parser.add_argument("--layout", choices=RIVALS, default="tp2")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=PATH", help="where a peer is"
    )
    parser.add_argument("--only", metavar="NAME", help="one peer of the layout")
    parser.add_argument("--rounds", type=int, default=9, help="of ours-peer-peer-ours")
    parser.add_argument("--steps", type=int, default=2, help="of one turn")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each before the rounds")
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--fused-peers", action="store_true", help="peers on torch's fused AdamW")
    parser.add_argument("--json", metavar="OUT", help="write rows, rounds and losses")
    args = parser.parse_args()
    args.given = dict(text.partition("=")[::2] for text in args.peer)
    wanted = {rival.name for rivals in RIVALS.values() for rival in rivals if rival.needs}
    for name, path in args.given.items():
        if name not in wanted:
            sys.exit(f"bench_peers: --peer {name}: expected one of {', '.join(sorted(wanted))}")
        if not Path(path).exists():
            sys.exit(f"bench_peers: --peer {name}={path}: no such path")
    return args


def main() -> None:
    """Compare with each rival that is there, print, write."""
    args = parse()
    rivals = [r for r in RIVALS[args.layout] if args.only in (None, r.name)]
    if not rivals:
        sys.exit(f"bench_peers: --only {args.only}: not a peer of {args.layout}")
    print(
        f"{'system':<20}{'layout':<11}{'workload':<9}{'world':>5}{'cpu s/step':>12}{'step ms':>9}"
        f"{'tok/s':>8}{'rss MB':>8}{'loss 1':>9}{'loss n':>9}"
    )
    results = []
    for rival in rivals:
        start = {"system": rival.name, "layout": args.layout, "workload": args.workload}
        if rival.needs and rival.name not in args.given:
            reason = f"give its {rival.needs}: --peer {rival.name}=PATH"
            print(f"{rival.name:<20}{args.layout:<11}{args.workload:<9}  not run ({reason})")
            missing = start | {"world": world_of(args.layout), "not_run": reason}
            results.append({"rows": [missing], "peer": rival.name})
            continue
        results.append(compare(rival, args.given.get(rival.name, ""), args))
        report(results[-1])
    if args.json:
        write_json(args.json, results)
    apart = [r["peer"] for r in results if r.get("worst_loss_difference", 0.0) > LOSS_TOLERANCE]
    if apart:
        sys.exit(f"bench_peers: losses differ by more than {LOSS_TOLERANCE}: {', '.join(apart)}")


if __name__ == "__main__":
    main()
