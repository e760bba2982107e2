"""The pictures of the guide that show an idea: what is cut, who waits, who sees whom.

They too are computed by the code that the chapters quote: cuts by core/shard.py, orders by the
schedules and their simulator, masks by the mask of attention. Those that show what a run learned:
figures.py.
"""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from megalite.core.config import ModelConfig, OptimConfig
from megalite.core.mesh import Axis, Mesh
from megalite.core.params import named_parameters, traits_of
from megalite.core.shard import sequence_positions
from megalite.data.chat import Message, Template
from megalite.data.packing import Conversations
from megalite.models.build import build_stages
from megalite.models.presets import PRESETS
from megalite.ops.rope import rope_angles
from megalite.ops.softmax import attention_mask
from megalite.optim.lr import learning_rate
from megalite.schedule.action import Op
from megalite.schedule.draw import COLOURS, NAMES
from megalite.schedule.generators import SCHEDULES
from megalite.schedule.simulate import Timeline, bubble, peak_live, simulate
from megalite.train.console import count
from tools.guide.boxes import DEEP, FAINT, FOUR, GREY, PALE, PLAIN, WARM
from tools.guide.reader import Reader

TALKS = (("Spell it.", "i t"), ("Who are you?", "I am a model."))
"""Two conversations that fit into one small picture."""


def turns(reader: Reader) -> Figure:
    """How fast the pairs of a rotary head turn."""
    model = reader.saved.model
    places = torch.arange(model.seq_len)[:, None]
    cos, _ = rope_angles(places, model.head_dim, model.rope_theta, torch.float64)
    pairs = model.head_dim // 2
    figure, axes = plt.subplots(figsize=(6, 2.2))
    chosen = sorted({0, pairs // 4, pairs // 2, pairs - 1})
    for pair, colour in zip(chosen, (PALE, GREY, PLAIN, DEEP)[-len(chosen) :], strict=True):
        axes.plot(cos[:, 0, 0, pair], color=colour, label=f"pair {pair}")
    axes.set(xlabel="position", ylabel="cosine of its angle")
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def parameters(reader: Reader) -> Figure:
    """Where the parameters of some models are."""
    models = {"demo": reader.saved.model}
    models |= {name: ModelConfig(**PRESETS[name]) for name in ("gpt2-124m", "llama3-8b")}
    parts = {"tables": DEEP, "attention": PLAIN, "MLP": WARM, "norms": GREY}
    figure, axes = plt.subplots(figsize=(6, 1.9))
    for row, model in enumerate(models.values()):
        counts = _counts(model)
        whole, left = sum(counts.values()), 0.0
        for part, colour in parts.items():
            share = 100 * counts[part] / whole
            axes.barh(row, share, left=left, color=colour, label=part if row == 0 else None)
            left += share
        axes.text(101, row, count(whole), va="center")
    axes.set_yticks(range(len(models)), models)
    axes.invert_yaxis()
    axes.set(xlabel="% of the parameters", xlim=(0, 112))
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def _counts(model: ModelConfig) -> dict[str, int]:
    """Parameters by part of the model, padding left out."""
    with torch.device("meta"):
        mesh = Mesh({})
        stages = build_stages(
            model, mesh, placement=(0,), layers=None, sequence_parallel=False, seed=0
        )
    counts = dict.fromkeys(("tables", "attention", "MLP", "norms"), 0)
    for name, param in named_parameters(stages[0]):
        part = "tables"
        if "norm" in name:
            part = "norms"
        elif name.startswith("layers."):
            part = "attention" if ".attention." in name else "MLP"
        counts[part] += int(np.prod(traits_of(param).shard.shape))
    return counts


def rates(reader: Reader) -> Figure:
    """The learning rate by the ways in which it may fall."""
    figure, axes = plt.subplots(figsize=(6, 2.2))
    ways = {"cosine": DEEP, "linear": PLAIN, "wsd": WARM, "inverse-square-root": GREY}
    begun = OptimConfig(lr=1.0, min_lr_ratio=0.1)
    for name, colour in ways.items():
        optim = replace(begun, lr_decay=name)  # type: ignore[arg-type]
        found = [learning_rate(optim, done=n, warmup=20, total=400) for n in range(1, 401)]
        axes.plot(range(1, 401), found, color=colour, label=name)
    axes.set(xlabel="step", ylabel="share of --lr", ylim=(0, 1.05))
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


# -- layouts -----------------------------------------------------------------------------------


def matrices(reader: Reader) -> Figure:
    """The MLP's two matrices over four tensor ranks: columns of the first, rows of the second."""
    figure, axes = plt.subplots(figsize=(6, 2.35))
    axes.set_axis_off()
    axes.set(xlim=(0, 12), ylim=(0, 4.7), aspect="equal")
    _slab(axes, (0.1, 1.9, 1.2, 1.2), [GREY], "x", "on all")
    _slab(axes, (2.1, 1.9, 2.4, 1.2), FOUR, "up", "cut by columns")
    _slab(axes, (5.1, 1.9, 2.4, 1.2), FOUR, "GELU(x up)", "a part on each")
    _slab(axes, (8.1, 1.3, 1.2, 2.4), FOUR, "down", "cut by rows", down=True)
    _slab(axes, (10.7, 1.9, 1.2, 1.2), [GREY], "y", "the sum")
    for x, sign in ((1.7, "\u00d7"), (4.8, "="), (7.8, "\u00d7")):
        axes.text(x, 2.5, sign, ha="center", va="center", fontsize=12)
    axes.annotate("", (10.6, 2.5), (9.4, 2.5), arrowprops={"arrowstyle": "->", "color": DEEP})
    axes.text(10.0, 2.75, "add up\nover ranks", ha="center", va="bottom", fontsize=7, color=DEEP)
    how = {"frameon": False, "ncols": 4, "loc": "lower center", "bbox_to_anchor": (0.5, -0.02)}
    axes.legend(handles=_ranks(), **how)
    return figure


def _slab(
    axes: Axes,
    at: tuple[float, float, float, float],
    colours: list[str] | tuple[str, ...],
    name: str,
    below: str,
    *,
    down: bool = False,
) -> None:
    """A matrix at x, y, width, height, cut into as many parts as there are colours."""
    x, y, width, height = at
    for i, colour in enumerate(colours):
        w, h = (width, height / len(colours)) if down else (width / len(colours), height)
        corner = (x, y + height - (i + 1) * h) if down else (x + i * w, y)
        axes.add_patch(Rectangle(corner, w, h, facecolor=colour, edgecolor="white"))
    axes.text(x + width / 2, y + height + 0.15, name, ha="center", va="bottom", fontsize=8)
    axes.text(x + width / 2, y - 0.15, below, ha="center", va="top", fontsize=7, color=FAINT)


def _ranks() -> list[Patch]:
    """What a legend says of the colours."""
    return [Patch(color=colour, label=f"rank {i}") for i, colour in enumerate(FOUR)]


def ring(reader: Reader) -> Figure:
    """Who computes which part of the causal mask, in two orders of the sequence."""
    figure, pair = plt.subplots(1, 2, figsize=(6, 3.3))
    for axes, order in zip(pair, ("contiguous", "zigzag"), strict=True):
        work = _draw_owners(axes, order, blocks=8)
        shares = ", ".join(f"{100 * w / sum(work):.0f}" for w in work)
        axes.set_title(f"{order}: {shares} % of the work", loc="left")
    figure.legend(handles=_ranks(), frameon=False, ncols=4, loc="outside lower center")
    return figure


def _draw_owners(axes: Axes, order: str, *, blocks: int) -> list[int]:
    """Colour each visible pair of a query and a key by the query's rank; pairs of each rank."""
    wide = 8  # positions of a block
    length, work = blocks * wide, []
    for idx, colour in enumerate(FOUR):
        spans = sequence_positions(length, Axis("cp", size=len(FOUR), idx=idx), order=order)
        for span in spans:
            corners = [(0, span.start), (span.start, span.start), (span.stop, span.stop)]
            axes.add_patch(plt.Polygon([*corners, (0, span.stop)], color=colour, lw=0))
        work.append(sum(query + 1 for span in spans for query in span))
    axes.set(xlim=(0, length), ylim=(length, 0), aspect="equal", xlabel="key", ylabel="query")
    ticks = range(0, length + 1, 2 * wide)
    axes.set_xticks(ticks, [f"{t // wide}/8" for t in ticks])
    axes.set_yticks(ticks, [f"{t // wide}/8" for t in ticks])
    return work


def orders(reader: Reader) -> Figure:
    """Four schedules of four ranks and eight microbatches, by the simulator."""
    names = ("gpipe", "1f1b", "zb-h1", "zb-h2")
    drawn = [simulate(SCHEDULES[name](4, 8, 1)) for name in names]
    figure, rows = plt.subplots(len(names), 1, figsize=(6, 5.2), sharex=True)
    for axes, name, timeline in zip(rows, names, drawn, strict=True):
        _draw_timeline(axes, timeline)
        axes.set_xlim(0, max(one.makespan for one in drawn))
        held = max(peak_live(timeline.schedule))
        lost = 100 * bubble(timeline)
        title = f"{name}: bubble {lost:.0f} %, a rank holds up to {held} microbatches"
        axes.set_title(title, loc="left")
    shown = [op for op in NAMES if op is not Op.R]  # which takes no time here
    patches = [Patch(color=COLOURS[op], label=NAMES[op]) for op in shown]
    figure.legend(handles=patches, frameon=False, ncols=4, loc="outside lower center")
    return figure


def _draw_timeline(axes: Axes, timeline: Timeline) -> None:
    for rank in range(timeline.schedule.num_ranks):
        for action, start, end in timeline.of_rank(rank):
            if end > start:
                bar = Rectangle(
                    (start, rank + 0.08), end - start, 0.84, fc=COLOURS[action.op], ec="white"
                )
                axes.add_patch(bar)
                middle = {"ha": "center", "va": "center", "fontsize": 6}
                axes.text((start + end) / 2, rank + 0.52, str(action.microbatch), **middle)  # type: ignore[arg-type]
    ranks = range(timeline.schedule.num_ranks)
    axes.set_ylim(len(ranks), 0)
    axes.set_yticks([rank + 0.5 for rank in ranks], [f"rank {rank}" for rank in ranks], fontsize=7)
    axes.tick_params(left=False)


# -- conversations -----------------------------------------------------------------------------


def packing(reader: Reader) -> Figure:
    """Which token of a packed sample sees which."""
    template = Template(reader.tokenizer)
    rendered = [
        template.render((Message("user", asked), Message("assistant", said)))
        for asked, said in TALKS
    ]
    size = sum(len(one.ids) for one in rendered)
    packed = Conversations(rendered, size - 1, pack=True)
    ids, learned = packed.window(0)[:-1], packed.learned(0)
    at = torch.arange(len(ids))
    starts = torch.from_numpy(packed.starts(0)).to(torch.int64)[:, None]
    sees = attention_mask(at, at, None, starts)[0, 0].numpy()
    colours = np.where(sees, np.where(learned, 2, 1)[:, None], 0)
    shades = np.array([[255, 255, 255], [185, 194, 203], [217, 130, 43]], dtype=np.uint8)
    figure, axes = plt.subplots(figsize=(6, 5.2))
    axes.imshow(shades[colours])
    names = [reader.piece(int(token)) for token in ids]
    axes.set_yticks(range(len(names)), names, fontfamily="monospace", fontsize=6)
    axes.set_xticks(range(len(names)), names, fontfamily="monospace", fontsize=6, rotation=90)
    axes.tick_params(length=0)
    axes.set(ylabel="asks", xlabel="is asked")
    patches = [
        Patch(color=GREY, label="sees"),
        Patch(color=WARM, label="sees, and learns"),
    ]
    axes.legend(handles=patches, frameon=False, loc="upper right")
    return figure
