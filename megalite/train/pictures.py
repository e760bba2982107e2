"""The two pictures a run leaves: its loss curve and its schedule, in true proportions."""

from __future__ import annotations

from pathlib import Path

from megalite.core.config import Config
from megalite.models.build import head_flops, layer_flops, split_layers
from megalite.schedule.action import Action, Op, Schedule
from megalite.schedule.draw import schedule_svg
from megalite.schedule.simulate import Timeline, simulate
from megalite.train.metrics import read_metrics


def timeline(config: Config, schedule: Schedule) -> Timeline:
    """The schedule with each stage's flops as its time: backward costs twice a forward."""
    model = config.model
    layers = config.layout.pp_layers or split_layers(model, schedule.num_stages)
    work = [n * layer_flops(model) for n in layers]
    work[-1] += head_flops(model)
    scale = len(work) / sum(work)
    factor = {Op.F: 1.0, Op.B: 2.0, Op.I: 1.0, Op.W: 1.0, Op.R: 0.0}

    def cost(action: Action) -> float:
        return work[action.stage] * scale * factor[action.op]

    return simulate(schedule, cost)


def draw_schedule(path: Path, config: Config, schedule: Schedule) -> None:
    """Write the schedule of one step as SVG."""
    title = f"{schedule.name}, {schedule.num_ranks} ranks, {schedule.num_microbatches} microbatches"
    path.write_text(schedule_svg(timeline(config, schedule), title), encoding="utf-8")


def draw_loss(out: Path, picture: Path) -> None:
    """Draw the metrics of run `out` into `picture`; its ending says in which format."""
    import matplotlib  # takes a second to import, and only rank 0 draws

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = read_metrics(out)
    train = [(x["step"], x["loss"]) for x in lines if "loss" in x]
    val = [(x["step"], x["val_loss"]) for x in lines if "val_loss" in x]
    figure, axes = plt.subplots(figsize=(7, 4), dpi=120)
    axes.plot(*zip(*train, strict=True), color="#4477aa", linewidth=1, label="training")
    if val:
        axes.plot(*zip(*val, strict=True), "o-", color="#cc6677", markersize=4, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(picture)
    plt.close(figure)
