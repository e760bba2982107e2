"""Delays communication and says how much of the delay a training step does not hide.

    python tools/bench_overlap.py --rounds 5 --json OUT

Each row delays one kind of communication, by delays that sum to half a step, in three runs of the
same training: without delay, with it, and with it while whatever is delayed is waited for where it
starts (no overlap). A delay is a sleep that takes no CPU (core/log.py: Hold). So is computation:
the model is a small real one, whose matmuls also sleep in proportion to their flops, so neither a
busy machine nor a small one blurs what is measured. `grows by` is the growth of the step as a share
of the delay injected; the losses of the three runs must be the same bits. The bounds are 20% with
overlap (tensor parallelism: 60%), and at least 90% without.

A pipeline hides a transfer only where no rank has to wait for it: gpipe and interleaved 1F1B have
other microbatches at hand in steady state. Plain 1F1B has none, so that each way down and up again
costs two delays; its row has no bound.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Run from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.core import comm
from megalite.core.config import Config, LayoutConfig, ModelConfig, TrainConfig
from megalite.core.log import Collective, Hold
from megalite.data.atomic import write_json
from megalite.train.build import Engine
from megalite.train.loop import train_step
from megalite.train.ranks import Ranks
from megalite.train.verify import calls_of, engine_of

MODEL = ModelConfig(num_layers=4, hidden_size=48, num_heads=4, seq_len=16, vocab_size=96)
STEP_SECONDS = 3.0
"""What a rank's matmuls sleep in a step."""
RUNS = ("undelayed", "overlapped", "at once")
MATMULS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.bmm)


@dataclass(frozen=True)
class Row:
    """One kind of communication, in a layout where it matters."""

    name: str
    layout: dict[str, Any]
    delayed: Callable[[Collective], bool]
    bound: float
    microbatches: int = 1

    @property
    def config(self) -> Config:
        data = self.layout.get("dp", 1)
        sizes = {"micro_batch_size": 1, "global_batch_size": self.microbatches * data}
        layout = LayoutConfig(**{"dp": 1, "zero": 0, **self.layout})
        return Config(model=MODEL, layout=layout, train=TrainConfig(**sizes))

    @property
    def world(self) -> int:
        return math.prod(self.layout.get(axis, 1) for axis in ("tp", "pp", "dp"))


def _over(op: str, axis: str) -> Callable[[Collective], bool]:
    return lambda entry: entry.op in (op, op or entry.op) and entry.axis == axis


SMALL = {"dp": 2, "bucket_mb": 0.02}
ROWS = [
    Row("dp reduction", SMALL, _over("all_reduce", "dp*cp"), 0.2),
    Row("dp reduction", {**SMALL, "zero": 1}, _over("reduce_scatter", "dp*cp"), 0.2),
    Row("ZeRO-1 gather", {**SMALL, "zero": 1}, _over("all_gather", "dp*cp"), 0.2),
    Row("ZeRO-3 prefetch", {"dp": 2, "zero": 3}, _over("all_gather", "dp*cp"), 0.2),
    Row("p2p", {"pp": 2, "vpp": 2, "schedule": "interleaved"}, lambda e: e.op == "send", 0.2, 16),
    Row("p2p", {"pp": 2, "schedule": "gpipe"}, lambda e: e.op == "send", 0.2, 16),
    Row("p2p", {"pp": 2, "schedule": "1f1b"}, lambda e: e.op == "send", math.inf, 16),
    Row("tp", {"tp": 2}, _over("", "tp"), 0.6),
    Row("tp", {"tp": 2, "sequence_parallel": False}, _over("", "tp"), 0.6),
]


class SlowMatmuls(TorchDispatchMode):
    """Every matmul sleeps `seconds_per_flop` for each of its flops, which it counts."""

    def __init__(self) -> None:
        super().__init__()
        self.flops, self.seconds_per_flop = 0.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in MATMULS:
            a, b = args[-2:]
            flops = 2.0 * a.numel() * b.shape[-1]
            self.flops += flops
            time.sleep(flops * self.seconds_per_flop)
        return func(*args, **(kwargs or {}))


def measure(rank: int, world: int, row: int, rounds: int) -> dict[str, Any]:
    """On each rank: seconds of a step and losses of each run, and the delay of a step."""
    case = ROWS[row]
    engines = {name: engine_of(case.config, rank, world, "fp32") for name in RUNS}
    logs = {name: engine.mesh.log for name, engine in engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    losses: dict[str, list[float]] = {name: [] for name in RUNS}
    with SlowMatmuls() as slow:
        axis = engines["undelayed"].mesh.world
        for engine in engines.values():
            slow.flops = 0.0
            _visit(engine, 0)  # once for warmth, and to count
        flops = comm.all_reduce(torch.tensor(slow.flops / 3, dtype=torch.float64), axis, op="max")
        slow.seconds_per_flop = STEP_SECONDS / flops.item()
        undelayed = max(_visit(engine, 3)[0] for engine in engines.values())
        log = logs["undelayed"]
        count = sum(map(case.delayed, log.entries)) // 6  # of the six steps so far
        facts = torch.tensor([undelayed, count], dtype=torch.float64)
        undelayed, count = comm.all_reduce(facts, axis, op="max").tolist()
        delay = undelayed / 2 / count

        def held(entry: Collective) -> float:
            return delay if case.delayed(entry) else 0.0

        logs["overlapped"].hold = Hold(held)
        logs["at once"].hold = Hold(held, overlap=False)
        for number in range(rounds):
            for name, engine in engines.items():
                took, found = _visit(engine, 6 + 3 * number)
                seconds[name].append(took)
                losses[name] += found
    return {"seconds": seconds, "losses": losses, "delay": delay, "count": count}


def _visit(engine: Engine, first: int) -> tuple[float, list[float]]:
    """Three steps in a row, and seconds of one of the last two: a step leaves work to the next."""
    losses = []
    began = 0.0
    for step in range(first, first + 3):
        found = train_step(engine, calls_of(engine, step, False), lr=1e-3)
        losses.append(found.loss.item())
        began = began or time.perf_counter()
    took = (time.perf_counter() - began) / 2
    engine.zero.settle()
    comm.barrier(engine.mesh.world)
    return took, losses


def run(ranks: Ranks, number: int, rounds: int) -> dict[str, Any]:
    """The row `number`: medians over rounds, of the slowest rank each time."""
    case = ROWS[number]
    kwargs = {"row": number, "rounds": rounds}
    found = ranks.run("tools.bench_overlap:measure", case.world, kwargs=kwargs, timeout=590).results
    slowest: dict[str, list[float]] = {}
    for name in RUNS:
        by_rank = [each["seconds"][name] for each in found]
        slowest[name] = [max(times) for times in zip(*by_rank, strict=True)]
    injected = found[0]["delay"] * found[0]["count"]

    def growth(name: str) -> float:
        pairs = zip(
            slowest[name], slowest["undelayed"], strict=True
        )  # of one round: a drift cancels
        return statistics.median((ours - base) / injected for ours, base in pairs)

    overlapped, at_once = growth("overlapped"), growth("at once")
    same = all(r["losses"][name] == r["losses"][RUNS[0]] for r in found for name in RUNS[1:])
    layout = " ".join(f"{k}={v}" for k, v in case.layout.items() if k != "bucket_mb")
    return {
        "system": "megalite",
        "layout": layout,
        "workload": f"{case.name} delayed",
        "world": case.world,
        "step_s": {name: statistics.median(times) for name, times in slowest.items()},
        "delays_a_step": found[0]["count"],
        "delay_ms": 1000 * found[0]["delay"],
        "grows_by": overlapped,
        "grows_by_without_overlap": at_once,
        "bound": case.bound if math.isfinite(case.bound) else None,
        "same_losses": same,
        "within": same and (math.isinf(case.bound) or overlapped <= case.bound and at_once >= 0.9),
    }


def main() -> int:
    """Parse, run the rows, print and write; 1 if one is out of its bounds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="visits to each run, interleaved")
    parser.add_argument("--only", default="", help="rows whose name and layout hold this text")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write the rows")
    args = parser.parse_args()
    rows = []
    print(
        f"{'delayed':<17}{'layout':<40}{'step ms':>8}{'delays':>8}{'ms each':>9}{'grows by':>10}"
        f"{'bound':>7}{'at once':>9}  losses"
    )
    with Ranks() as ranks:
        for number, case in enumerate(ROWS):
            if args.only not in f"{case.name} {case.layout}":
                continue
            row = run(ranks, number, args.rounds)
            rows.append(row)
            bound = "-" if row["bound"] is None else f"{100 * row['bound']:.0f}%"
            print(
                f"{case.name:<17}{row['layout']:<40}{1000 * row['step_s']['undelayed']:>8.0f}"
                f"{row['delays_a_step']:>8.0f}{row['delay_ms']:>9.1f}"
                f"{100 * row['grows_by']:>9.1f}%{bound:>7}"
                f"{100 * row['grows_by_without_overlap']:>8.0f}%"
                f"  {'same' if row['same_losses'] else 'DIFFER'}"
                f"{'' if row['within'] else '  out of bounds'}",
                flush=True,
            )
    if args.json:
        write_json(args.json, rows)
    return 0 if all(row["within"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
