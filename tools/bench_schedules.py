"""Runs every schedule with sleep for compute, and holds its makespan against the simulator's.

    python tools/bench_schedules.py --rounds 3 --json OUT --svg docs/schedules-measured.svg

The engine, its transfers and its reductions are the real ones, on 4 ranks (pp 4) and 8 (pp 4, dp
2); what an action would compute is a sleep of 20 to 60 ms, alike on all stages (even) or not
(uneven). Ranks that sleep need no core of their own. Then `megalite pretrain --trace-steps` with
real compute at pp 2: its trace says how long the pipeline took, and how long the simulator makes it
with the mean times of the same actions. Rounds are interleaved, and the median of them counts. Ends
with 1 if sleep is off by more than 3%, or compute by more than 10%.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

# Run from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from megalite.core import comm
from megalite.core.call import Call, make_call
from megalite.core.config import Config, LayoutConfig, ModelConfig, TrainConfig
from megalite.core.mesh import Mesh
from megalite.core.params import constant, grad_of, landed, new_param
from megalite.core.shard import whole
from megalite.core.unit import Unit, plainly
from megalite.core.world import World
from megalite.data.atomic import write_json
from megalite.parallel.pipeline import Pipeline
from megalite.parallel.zero import Zero
from megalite.schedule.action import Action, Op, Schedule
from megalite.schedule.generators import CHUNKED, SCHEDULES
from megalite.schedule.simulate import simulate
from megalite.train.pretrain import pretrain
from megalite.train.ranks import Ranks

PP, MICROBATCHES = 4, 8
BOUNDS = {"sleep": 0.03, "compute": 0.10}
EVEN = {Op.F: 0.06, Op.I: 0.06, Op.W: 0.06}


class Sleeper(nn.Module):
    """A stage that sleeps, and adds to the gradient of one small parameter."""

    def __init__(self, mesh: Mesh, seconds: dict[Op, float], *, last: bool):
        super().__init__()
        self.weight = new_param(whole(1024), mesh.axes, init=constant(0.0))
        self.seconds, self.last, self.run_unit = seconds, last, plainly
        self.hurry = 1.0

    def units(self) -> list[Unit]:
        """One, with everything."""
        return [Unit("sleep", self.work, (self.weight,))]

    def forward(self, x: Tensor | None, call: Call) -> Tensor:
        """As every stage: [1, 1, 8] -> [1, 1, 8], or a loss."""
        x = torch.zeros(self.boundary_shape(call), requires_grad=True) if x is None else x
        return self.run_unit(self.units()[0], x, call)

    def work(self, x: Tensor, call: Call) -> Tensor:
        """Sleep forward; backward sleeps I, and W then or later."""
        y = _Sleep.apply(x, self, call.later)
        return y.sum() if self.last else y

    def boundary_shape(self, call: Call) -> tuple[int, ...]:
        """Small: transfers are to cost nothing."""
        return (1, 1, 8)

    def sleep(self, op: Op) -> None:
        """What that half of the work takes."""
        time.sleep(self.seconds[op] / self.hurry)

    def weights(self) -> None:
        """W."""
        self.sleep(Op.W)
        grad_of(self.weight).add_(1.0)
        landed(self.weight)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stage, later):  # type: ignore[no-untyped-def]
        ctx.stage, ctx.later = stage, later
        stage.sleep(Op.F)
        return x.clone()

    @staticmethod
    def backward(ctx, dy):  # type: ignore[no-untyped-def]
        ctx.stage.sleep(Op.I)
        if ctx.later is None:
            with torch.no_grad():
                ctx.stage.weights()
        else:
            ctx.later.append(ctx.stage.weights)
        return dy.clone(), None, None


def made(name: str, num_microbatches: int, pp: int = PP) -> Schedule:
    """A schedule by name; those of chunks with two a rank."""
    return SCHEDULES[name](pp, num_microbatches, 2 if name in CHUNKED else 1)


def seconds_of(stage: int, uneven: bool) -> dict[Op, float]:
    """What the parts of a stage's work take."""
    if not uneven:
        return EVEN
    turn = (0, 2, 1, 3, 1, 0, 3, 2)[stage % 8]
    return {Op.F: 0.03 + 0.01 * turn, Op.I: 0.03 + 0.01 * turn, Op.W: 0.02 + 0.01 * turn}


def sleeping(rank: int, world: int, schedule: str, uneven: bool) -> list[float]:
    """On each rank: when it began and ended a step."""
    mesh = Mesh({"pp": PP, "dp": world // PP}, rank=rank, kind="real")
    placement = made(schedule, 1).placement
    stages = {
        stage: Sleeper(mesh, seconds_of(stage, uneven), last=stage == len(placement) - 1)
        for stage, home in enumerate(placement)
        if home == mesh.coords["pp"]
    }
    cpu = torch.device("cpu")
    zero = Zero(stages, mesh, stage=1, bucket_bytes=1e6, device=cpu)
    pipeline = Pipeline(
        lambda n: made(schedule, n),
        stages,
        mesh,
        dtype=torch.float32,
        device=cpu,
        enter=zero.enter,
        reduce=zero.reduce,
    )
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    calls = [make_call(tokens, tokens, tokens[0], seq_cut=None)] * MICROBATCHES
    for hurry in (50.0, 1.0):  # once for warmth
        for stage in stages.values():
            stage.hurry = hurry
        zero.begin(MICROBATCHES)
        comm.barrier(mesh.world)
        began = time.perf_counter()
        pipeline.run(calls, seed=torch.ones(()))
        zero.finish()
        ended = time.perf_counter()
    summed = MICROBATCHES * world // PP
    assert all(bool((bucket.grads == summed).all()) for bucket in zero.buckets)
    return [began, ended]


def sleep_row(ranks: Ranks, schedule: str, world: int, uneven: bool) -> dict[str, Any]:
    """One run on sleep."""
    kwargs = {"schedule": schedule, "uneven": uneven}
    answer = ranks.run("tools.bench_schedules:sleeping", world, kwargs=kwargs, timeout=120)
    measured = max(end for _, end in answer.results) - min(start for start, _ in answer.results)

    def cost(action: Action) -> float:
        seconds = seconds_of(action.stage, uneven)
        return {**seconds, Op.B: seconds[Op.I] + seconds[Op.W], Op.R: 0.0}[action.op]

    simulated = simulate(made(schedule, MICROBATCHES), cost).makespan
    return {
        "layout": f"pp{PP}dp{world // PP}+{schedule}",
        "workload": f"sleep {'uneven' if uneven else 'even'}",
        "world": world,
        "measured_s": measured,
        "simulated_s": simulated,
    }


def computing(rank: int, world: int, config: dict) -> None:
    """A traced run of `pretrain`."""
    here = World(rank=rank, size=world, local_rank=rank, local_size=world, launched=True)
    pretrain(Config.from_dict(config), here)


def compute_row(ranks: Ranks, schedule: str) -> dict[str, Any]:
    """One run of pretrain at pp 2; each traced step is held against the mean of all."""
    model = ModelConfig(num_layers=4, hidden_size=256, num_heads=4, seq_len=128, vocab_size=512)
    layout = LayoutConfig(pp=2, schedule=schedule, vpp=2 if schedule in CHUNKED else 1)
    with tempfile.TemporaryDirectory() as folder:
        train = TrainConfig(
            out=f"{folder}/run",
            device="cpu",
            micro_batch_size=2,
            global_batch_size=16,
            train_steps=6,
            eval_interval=0,
            trace_steps="2:6",
        )
        config = Config(model=model, layout=layout, train=train).to_dict()
        ranks.run("tools.bench_schedules:computing", 2, kwargs={"config": config}, timeout=300)
        facts = json.loads((Path(train.out) / "trace.json").read_text())["otherData"]
    return {
        "layout": f"pp2+{schedule}",
        "workload": "compute",
        "world": 2,
        "measured_s": statistics.mean(facts["measured_makespan"]),
        "simulated_s": facts["predicted_makespan"],
    }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over rounds, and how far they are from the simulator; printed."""
    found = []
    print(f"{'layout':<22}{'workload':<14}{'simulated ms':>14}{'measured ms':>13}{'off by':>9}")
    for layout, workload in dict.fromkeys((r["layout"], r["workload"]) for r in rows):
        mine = [r for r in rows if (r["layout"], r["workload"]) == (layout, workload)]
        ratios = [r["measured_s"] / r["simulated_s"] for r in mine]
        off = statistics.median(ratios) - 1
        simulated = statistics.median(r["simulated_s"] for r in mine)
        measured = statistics.median(r["measured_s"] for r in mine)
        within = abs(off) <= BOUNDS[workload.split()[0]]
        print(
            f"{layout:<22}{workload:<14}{1000 * simulated:>14.1f}{1000 * measured:>13.1f}"
            f"{100 * off:>8.2f}%{'' if within else '  out of bounds'}"
        )
        found.append({**mine[0], "simulated_s": simulated, "measured_s": measured})
        found[-1] |= {"off": off, "within": within}
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Simulated and measured makespans of the runs on sleep, side by side."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    asleep = [row for row in found if row["workload"].startswith("sleep")]
    groups = list(dict.fromkeys((row["world"], row["workload"]) for row in asleep))
    figure, axes = plt.subplots(1, len(groups), figsize=(3.2 * len(groups), 3), sharey=True)
    for plot, (world, workload) in zip(axes, groups, strict=True):
        rows = [r for r in asleep if (r["world"], r["workload"]) == (world, workload)]
        names = [r["layout"].split("+")[1] for r in rows]
        for offset, key, colour in (
            (-0.2, "simulated_s", "#4477aa"),
            (0.2, "measured_s", "#cc6677"),
        ):
            heights = [r[key] for r in rows]
            at = [i + offset for i in range(len(rows))]
            plot.bar(at, heights, 0.4, color=colour, label=key.removesuffix("_s"))
        plot.set_xticks(range(len(names)), names, rotation=45, ha="right")
        plot.set_title(f"{world} ranks, {workload}", fontsize=10)
        plot.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("one step (s)")
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    """Parse, run the rounds, print, write and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, interleaved")
    parser.add_argument("--schedules", default=",".join(SCHEDULES), help="comma separated")
    parser.add_argument("--json", metavar="OUT", type=Path, help="write every round's row")
    parser.add_argument("--svg", type=Path, help="draw the medians")
    args = parser.parse_args()
    rows = []
    names = args.schedules.split(",")
    with Ranks() as ranks:
        for number in range(args.rounds):
            for name in names:
                made_rows = [
                    sleep_row(ranks, name, world, uneven)
                    for world in (PP, 2 * PP)
                    for uneven in (False, True)
                ]
                made_rows.append(compute_row(ranks, name))
                rows += [{"system": "megalite", **row, "round": number} for row in made_rows]
    found = summary(rows)
    if args.json:
        write_json(args.json, rows)
    if args.svg:
        draw(found, args.svg)
    return 0 if all(row["within"] for row in found) else 1


if __name__ == "__main__":
    sys.exit(main())
