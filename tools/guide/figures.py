"""The pictures of the guide, drawn from the reader's own runs.

Each is a function of a Reader, named as the chapters name it. What they show is computed by the
code that the chapters quote: tokens by the tokenizer, probabilities by what samples from them,
memory by the planner.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from megalite.core.config import LayoutConfig
from megalite.data.chat import Message, Template, read_conversations
from megalite.data.tokenizer import Tokenizer
from megalite.generate.cache import Part, Step
from megalite.generate.engine import Request, complete
from megalite.generate.load import Place, Saved, load_share, open_checkpoint
from megalite.generate.sample import Sampling, probabilities
from megalite.generate.share import Share
from megalite.plan.memory import stage_memory
from megalite.train.metrics import read_metrics

PLAIN, DEEP, WARM = "#5b8db8", "#1f4e79", "#d9822b"
TINTS = ("#dce9f5", "#f7e3cf")
LINE = "for name in sorted(names):\n    print(name, len(name))"
PROMPT = "def read_file(path):\n    with open(path"
QUESTION = "What is the capital of France?"
WIDTH = 6.0
"""Inches."""
SIGNS = {" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5"}
"""How white space is shown."""
RANKS = 8
"""Data ranks of the picture of memory."""


class Reader:
    """The two runs of `make demo`, opened as they are needed."""

    def __init__(self, run: Path, chat: Path):
        self.run, self.chat = run, chat

    @cached_property
    def saved(self) -> Saved:
        return open_checkpoint(self.run)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.saved.tokenizer()

    @cached_property
    def share(self) -> Share:
        return share_of(self.saved)

    @cached_property
    def chat_share(self) -> Share:
        return share_of(open_checkpoint(self.chat))

    @property
    def layers(self) -> list[Any]:
        return list(self.share.pipeline.stages[0].layers.values())  # type: ignore[attr-defined]

    def piece(self, token: int) -> str:
        """A token as it is shown: spaces and line ends have signs."""
        text = self.tokenizer.decode([token])
        return "".join(SIGNS.get(c, c if c.isprintable() else f"x{ord(c):02x}") for c in text)

    def run_text(self, ids: list[int], share: Share | None = None) -> Tensor:
        """Logits [s, v] after each token of a text."""
        step = Step((Part(0, 0, tuple(ids), len(ids)),))
        return (share or self.share).run(step)


def share_of(saved: Saved) -> Share:
    place = Place(slots=1, dtype=torch.float32, device=torch.device("cpu"))
    return load_share(saved, place)


def draw_all(reader: Reader, names: Iterable[str], out: Path) -> None:
    """Write NAME.svg for each name into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    settings = {
        "svg.fonttype": "path",
        "svg.hashsalt": "megalite",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9,
        "figure.constrained_layout.use": True,
    }
    with plt.rc_context(settings), torch.no_grad():
        for name in names:
            made = FIGURES[name](reader)
            if isinstance(made, Path):
                shutil.copyfile(made, out / f"{name}.svg")
                continue
            made.savefig(out / f"{name}.svg", metadata={"Date": None})
            plt.close(made)


# -- text and tokens ---------------------------------------------------------------------------


def documents(reader: Reader) -> Figure:
    """How long the documents of the corpus are."""
    path = reader.run / "corpus" / "train.jsonl"
    with path.open(encoding="utf-8") as lines:
        sizes = [len(json.loads(line)["text"].encode()) / 1024 for line in lines]
    figure, axes = plt.subplots(figsize=(6, 2.4))
    axes.hist(sizes, bins=np.geomspace(0.05, max(sizes), 40).tolist(), color=PLAIN)
    axes.set(xscale="log", xlabel="KiB of a document", ylabel="documents")
    axes.set_title(f"{len(sizes)} documents, {sum(sizes) / 1024:.1f} MiB", loc="left")
    return figure


def tokens(reader: Reader) -> Figure:
    """Where a tokenizer cuts a line of code, and the number of each token."""
    rows: list[list[Box]] = [[]]
    for place, token in enumerate(reader.tokenizer.encode(LINE)):
        rows[-1].append(Box(reader.piece(token), TINTS[place % 2], str(token)))
        if "\n" in reader.tokenizer.decode([token]):
            rows.append([])
    return boxes(rows)


def neighbours(reader: Reader) -> Figure:
    """Tokens whose vectors point most nearly the same way."""
    table = reader.share.pipeline.stages[0].embedding.weight  # type: ignore[attr-defined]
    table = table[: reader.tokenizer.vocab_size].detach()
    unit = table / table.norm(dim=1, keepdim=True).clamp(min=1e-9)
    asked = _known(reader, (" self", " return", "0", "(", " import", " if"))
    figure, grid = plt.subplots(2, 3, figsize=(6, 3.6))
    for axes, token in zip(grid.flat, asked, strict=True):
        near, ids = (unit @ unit[token]).topk(6)
        names = [reader.piece(i) for i in ids.tolist()[1:]]
        axes.barh(range(5), near.tolist()[1:], color=PLAIN)
        axes.set_yticks(range(5), names, fontfamily="monospace")
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.set_title(f"near {reader.piece(token)}", fontfamily="monospace", loc="left")
    return figure


def _known(reader: Reader, wanted: tuple[str, ...]) -> list[int]:
    """Tokens of these texts, or, where there is none, others that are no single byte."""
    cut = [reader.tokenizer.encode(text) for text in wanted]
    spare = iter(range(260, reader.tokenizer.vocab_size))
    return [ids[0] if len(ids) == 1 else next(spare) for ids in cut]


# -- inside the model --------------------------------------------------------------------------


def attention(reader: Reader) -> Figure:
    """What each head of one layer looks at."""
    layer = reader.layers[len(reader.layers) // 2]
    ids = reader.tokenizer.encode("x = [1, 2]\ny = [3, 4]\nz = [")
    weights = attention_weights(reader, layer.attention, ids)
    names = [reader.piece(token) for token in ids]
    heads = len(weights)
    columns = min(heads, 2)
    rows = -(-heads // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(6, 0.3 + 2.9 * rows), squeeze=False)
    for head, axes in enumerate(grid.flat):
        axes.set_visible(head < heads)
        if head >= heads:
            continue
        axes.imshow(weights[head], cmap="Blues", vmin=0, vmax=1)
        axes.set_title(f"head {head}", loc="left")
        axes.set_xticks(range(len(ids)), names, fontfamily="monospace", fontsize=6)
        shown = names if head % columns == 0 else []
        axes.set_yticks(range(len(shown)), shown, fontfamily="monospace", fontsize=6)
        axes.tick_params(length=0)
    return figure


def attention_weights(reader: Reader, module: Any, ids: list[int]) -> np.ndarray:
    """[n, s, s]: what share of its attention a query (row) gives each key, head by head.

    From the layer's own queries and keys, caught on their way.
    """
    caught: dict[str, Any] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, given: caught.update(call=given[1])),
        module.qkv.register_forward_hook(lambda _, __, made: caught.update(fused=made)),
    ]
    reader.run_text(ids)
    for hook in hooks:
        hook.remove()
    n, m, d = module.num_heads, module.kv_heads, module.head_dim
    q, k, _ = caught["fused"].unflatten(-1, (n + 2 * m, d)).split((n, m, m), dim=2)
    if module.q_norm is not None:
        q, k = module.q_norm(q), module.k_norm(k)
    if module.rope is not None:
        q, k = module.rope(q, caught["call"]), module.rope(k, caught["call"])
    q, k = (x[:, 0].transpose(0, 1) for x in (q, k.repeat_interleave(n // m, dim=2)))
    scores = q @ k.transpose(-1, -2) * module.scale
    seen = torch.ones(scores.shape[-2:]).tril().bool()
    weights: np.ndarray = scores.masked_fill(~seen, -torch.inf).softmax(-1).numpy()
    return weights


def residual(reader: Reader) -> Figure:
    """What attention and MLP of each layer add to the residual stream."""
    sizes: dict[str, list[float]] = {"attention": [], "MLP": []}
    stream: list[float] = []

    def watch(name: str) -> Callable[..., None]:
        return lambda _, __, made: sizes[name].append(float(made.norm(dim=-1).mean()))

    hooks = []
    for layer in reader.layers:
        hooks.append(layer.attention.register_forward_hook(watch("attention")))
        hooks.append(layer.mlp.register_forward_hook(watch("MLP")))
        hooks.append(
            layer.register_forward_pre_hook(
                lambda _, given: stream.append(float(given[0].norm(dim=-1).mean()))
            )
        )
    reader.run_text(reader.tokenizer.encode(PROMPT))
    for hook in hooks:
        hook.remove()
    figure, axes = plt.subplots(figsize=(6, 2.4))
    at = np.arange(len(stream))
    for shift, (name, colour) in (
        (-0.2, ("attention", PLAIN)),
        (0.2, ("MLP", WARM)),
    ):
        axes.bar(at + shift, sizes[name], 0.36, color=colour, label=f"what {name} adds")
    axes.plot(at, stream, "o-", color=DEEP, label="what comes in")
    axes.set(ylabel="length of the vector", xlabel="layer")
    axes.set_xticks(at)
    axes.legend(frameon=False)
    return figure


def logits(reader: Reader) -> Figure:
    """What temperature, top-k and top-p make of one distribution."""
    row = reader.run_text(reader.tokenizer.encode(PROMPT))[-1]
    ways = {
        "T = 1": Sampling(temperature=1),
        "T = 0.5": Sampling(temperature=0.5),
        "top-k 5": Sampling(temperature=1, top_k=5),
        "top-p 0.5": Sampling(temperature=1, top_p=0.5),
    }
    best = row.topk(10).indices.tolist()
    names = [reader.piece(token)[:12] for token in best]
    figure, grid = plt.subplots(1, 4, figsize=(6, 2.6), sharey=True)
    for axes, (name, how) in zip(grid, ways.items(), strict=True):
        axes.barh(range(10), probabilities(row, how)[best].tolist(), color=PLAIN)
        axes.set_title(name, loc="left")
        axes.set_yticks(range(10), names, fontfamily="monospace")
    grid[0].invert_yaxis()
    figure.supxlabel("probability of what comes next", fontsize=9)
    return figure


# -- training ----------------------------------------------------------------------------------


def loss(reader: Reader) -> Figure:
    """The run's own loss, and the learning rate it was trained with."""
    lines = read_metrics(reader.run)
    figure, (axes, below) = plt.subplots(2, 1, figsize=(6, 3.4), sharex=True, height_ratios=(3, 1))
    for key, kind, colour, name in (
        ("loss", "-", PLAIN, "of each step"),
        ("val_loss", "o", WARM, "held out"),
    ):
        found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        axes.plot(*zip(*found, strict=True), kind, color=colour, label=name)
    axes.set(ylabel="loss")
    axes.legend(frameon=False)
    rates = [(line["step"], line["lr"]) for line in lines if line.get("lr") is not None]
    below.plot(*zip(*rates, strict=True), color=DEEP)
    below.set(ylabel="learning rate", xlabel="step")
    return figure


def schedule(reader: Reader) -> Path:
    """The order of the run's own pipeline, as the run has drawn it."""
    return reader.run / "schedule.svg"


def zero(reader: Reader) -> Figure:
    """What a rank holds at each ZeRO stage, by the planner's formula."""
    config = reader.saved.config
    train = replace(config.train, micro_batch_size=1, global_batch_size=RANKS)
    config = replace(config, train=train)
    parts = ("weights", "grads", "optimizer", "activations", "working")
    colours = (DEEP, PLAIN, WARM, "#b9c2cb", "#dfe4e8")
    bars: dict[str, list[float]] = {part: [] for part in parts}
    for stage in range(4):
        # Buckets that are small beside the model, as they are on a cluster.
        here = replace(config, layout=LayoutConfig(dp=RANKS, zero=stage, bucket_mb=0.25))
        here.check(RANKS)
        found = stage_memory(here, RANKS, 0, torch.float32)
        for part in parts:
            bars[part].append(getattr(found, part) / 2**20)
    figure, axes = plt.subplots(figsize=(6, 2.5))
    left = np.zeros(4)
    for part, colour in zip(parts, colours, strict=True):
        axes.barh(range(4), bars[part], left=left, color=colour, label=part)
        left += bars[part]
    axes.set_yticks(range(4), [f"ZeRO-{stage}" for stage in range(4)])
    axes.invert_yaxis()
    axes.set(xlabel=f"MB of a rank, {RANKS} data ranks")
    axes.legend(frameon=False, ncols=len(parts), loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


# -- conversations -----------------------------------------------------------------------------


def learned(reader: Reader) -> Figure:
    """Which tokens of a conversation are learned."""
    said = read_conversations(reader.run / "conversations" / "valid.jsonl")[0]
    ids, is_learned = Template(reader.tokenizer).render(said)
    rows: list[list[Box]] = [[]]
    for token, counts in zip(ids, is_learned, strict=True):
        rows[-1].append(Box(reader.piece(token), TINTS[counts]))
        if "\n" in reader.tokenizer.decode([token]):
            rows.append([])
    return boxes(rows)


def answer(reader: Reader) -> Figure:
    """An answer of the fine-tuned model, each token darker the surer the model was of it."""
    template = Template(reader.tokenizer)
    prompt = template.prompt([Message("user", QUESTION)])
    how = Sampling(temperature=0)
    asked = Request(tokens=prompt, how=how, max_tokens=24, stop=frozenset([template.end]))
    (said,) = complete(reader.chat_share, [asked])
    ids = [*prompt, *said]
    chances = reader.run_text(ids, reader.chat_share).softmax(-1)
    start = len(prompt)
    sure = [float(chances[start - 1 + i, token]) for i, token in enumerate(said)]
    blues = plt.get_cmap("Blues")
    row = [
        Box(reader.piece(token), blues(0.6 * chance), f"{chance:.2f}")
        for token, chance in zip(said, sure, strict=True)
    ]
    return boxes([row], title=QUESTION)


# -- boxes of text -----------------------------------------------------------------------------


class Box(NamedTuple):
    """A piece of text on a ground, with a small one below it."""

    text: str
    colour: Any
    below: str = ""

    @property
    def width(self) -> float:
        """In inches, at the sizes of `boxes`."""
        return max(0.069 * len(self.text), 0.05 * len(self.below)) + 0.09


def boxes(rows: list[list[Box]], title: str = "") -> Figure:
    """Rows of boxes, one beside the other; a row that is too long goes on in the next line."""
    lines: list[list[tuple[float, Box]]] = []
    for row in rows:
        at = math.inf
        for box in row:
            if at + box.width > WIDTH:
                lines.append([])
                at = 0.0
            lines[-1].append((at, box))
            at += box.width + 0.035
    step = 0.42 if any(box.below for row in rows for box in row) else 0.3
    height = step * len(lines) + (0.35 if title else 0.05)
    figure = plt.figure(figsize=(WIDTH, height), layout="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.text(0, height - 0.16, title, va="center", style="italic")
    for number, line in enumerate(lines, start=1):
        low = step * (len(lines) - number) + (step - 0.27)
        for at, box in line:
            axes.add_patch(Rectangle((at, low), box.width, 0.24, color=box.colour, lw=0))
            middle = {"x": at + box.width / 2, "ha": "center", "va": "center"}
            axes.text(y=low + 0.115, s=box.text, family="monospace", fontsize=8, **middle)
            axes.text(y=low - 0.07, s=box.below, fontsize=6, color="#68717a", **middle)
    return figure


FIGURES: dict[str, Callable[[Reader], Figure | Path]] = {
    made.__name__: made
    for made in (
        documents,
        tokens,
        neighbours,
        attention,
        residual,
        logits,
        loss,
        schedule,
        zero,
        learned,
        answer,
    )
}
"""Picture by name."""
