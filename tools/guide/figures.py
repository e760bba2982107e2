"""The pictures of the guide, drawn from the reader's own runs.

Each is a function of a Reader, named as the chapters name it. What they show is computed by the
code that the chapters quote: tokens by the tokenizer, probabilities by what samples from them,
memory by the planner.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure

from megalite.core.config import LayoutConfig
from megalite.data.chat import Message, Template, read_conversations
from megalite.data.tokenizer import Tokenizer
from megalite.data.vocabulary import Vocabulary
from megalite.generate.cache import Part, Step
from megalite.generate.engine import Request, complete
from megalite.generate.sample import Sampling, probabilities
from megalite.generate.share import Share
from megalite.ops.softmax import attention_mask
from megalite.plan.memory import stage_memory
from megalite.train.metrics import read_metrics
from tools.guide import diagrams
from tools.guide.boxes import DEEP, GREY, PALE, PLAIN, TINTS, WARM, Box, boxes
from tools.guide.reader import SIGNS, Reader

LINE = "for name in sorted(names):\n    print(name, len(name))"
PROMPT = "def read_file(path):\n    with open(path"
QUESTION = "What is the capital of France?"
QUESTIONS = (QUESTION, "Please spell queen.", "What does len do?", "Who are you?")
LONGEST = 66
"""Characters of an answer that are shown."""
HELD_OUT_LETTERS = 40_000
"""Of the text on which vocabularies are compared."""
TURNS = 10
RANKS = 8
"""Data ranks of the picture of memory."""


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


def vocabulary(reader: Reader) -> Figure:
    """How many bytes a token has, by how many of the tokenizer's merges are used."""
    with (reader.run / "corpus" / "valid.jsonl").open(encoding="utf-8") as lines:
        text = "".join(json.loads(line)["text"] for line in lines)[:HELD_OUT_LETTERS]
    most = len(reader.tokenizer.vocabulary.merges)
    counts = [0, *(most * 2**k // 64 for k in range(7))]
    found = [len(text.encode()) / len(cut_down(reader, n).encode(text)) for n in counts]
    figure, axes = plt.subplots(figsize=(6, 2.2))
    axes.plot([256 + n for n in counts], found, "o-", color=PLAIN)
    axes.set(xlabel="tokens in the vocabulary", ylabel="bytes a token", ylim=(0, None))
    return figure


def cut_down(reader: Reader, merges: int) -> Tokenizer:
    """The run's tokenizer with its first merges alone."""
    whole = reader.tokenizer.vocabulary
    tokens = whole.tokens[: 256 + merges]
    special = {text: len(tokens) + k for k, text in enumerate(whole.special)}
    tokens = [*tokens, *(text.encode() for text in special)]
    return Tokenizer(Vocabulary(whole.pattern, tokens, whole.merges[:merges], special))


def neighbours(reader: Reader) -> Figure:
    """Tokens whose vectors point most nearly the same way."""
    table = reader.share.pipeline.stages[0].embedding.weight  # type: ignore[attr-defined]
    table = table[: reader.tokenizer.vocab_size].detach()
    unit = table / table.norm(dim=1, keepdim=True).clamp(min=1e-9)
    wanted = _known(reader, (" self", " return", "0", "(", " import", " if"))
    figure, grid = plt.subplots(2, 3, figsize=(6, 3.6))
    for axes, token in zip(grid.flat, wanted, strict=True):
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
    q, k, _ = module.heads(caught["call"], caught["fused"])
    k = k.repeat_interleave(module.num_heads // module.kv_heads, dim=2)
    q, k = (x[:, 0].transpose(0, 1) for x in (q, k))
    scores = q @ k.transpose(-1, -2) * module.scale
    at = torch.arange(len(ids))
    seen = attention_mask(at, at, module.window)
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
    colours = (DEEP, PLAIN, WARM, GREY, PALE)
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
    prompt, said = asked(reader, reader.chat_share, QUESTION)
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


def asked(reader: Reader, share: Share, question: str) -> tuple[list[int], list[int]]:
    """A question's prompt, and what the model most likely answers."""
    template = Template(reader.tokenizer)
    prompt, end = template.prompt([Message("user", question)]), frozenset([template.end])
    how = Sampling(temperature=0)
    (said,) = complete(share, [Request(tokens=prompt, how=how, max_tokens=24, stop=end)])
    return prompt, said


def before_after(reader: Reader) -> Figure:
    """What the same questions are answered before and after fine-tuning."""
    rows: list[list[Box]] = []
    for question in QUESTIONS:
        rows.append([Box(question, "white")])
        for share, name, tint in (
            (reader.share, "before", TINTS[0]),
            (reader.chat_share, "after", TINTS[1]),
        ):
            _, said = asked(reader, share, question)
            text = "".join(reader.piece(token) for token in said)
            text = text.replace(SIGNS[" "], " ") or "(nothing)"
            rows.append([Box(f"{name:>8}", "white"), Box(text[:LONGEST], tint)])
    return boxes(rows)


def cached(reader: Reader) -> Figure:
    """Milliseconds of the next token on this machine, with keys kept and without."""
    model = reader.saved.model
    text = reader.tokenizer.encode(LINE)
    ids = (text * (model.seq_len // len(text) + 1))[: model.seq_len]
    lengths = list(range(16, model.seq_len + 1, 40))
    reader.run_text(ids)  # all keys are there now
    kept = [Part(0, n - 1, (ids[n - 1],), 1) for n in lengths]
    anew = [Part(0, 0, tuple(ids[:n]), 1) for n in lengths]
    figure, axes = plt.subplots(figsize=(6, 2.2))
    for parts, colour, name in (
        (anew, WARM, "everything again"),
        (kept, DEEP, "keys and values kept"),
    ):
        axes.plot(lengths, milliseconds(reader, parts), "o-", color=colour, label=name)
    axes.set(xlabel="tokens so far", ylabel="ms for the next", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def milliseconds(reader: Reader, parts: list[Part]) -> list[float]:
    """Of each part, the shortest of a few turns, as other work on the machine only adds."""
    found = [math.inf] * len(parts)
    for _ in range(TURNS):
        for i, part in enumerate(parts):
            began = time.perf_counter()
            reader.share.run(Step((part,)))
            found[i] = min(found[i], 1000 * (time.perf_counter() - began))
    return found


FIGURES: dict[str, Callable[[Reader], Figure | Path]] = {
    made.__name__: made
    for made in (
        documents,
        tokens,
        vocabulary,
        neighbours,
        diagrams.turns,
        attention,
        residual,
        diagrams.parameters,
        logits,
        loss,
        diagrams.rates,
        diagrams.matrices,
        diagrams.ring,
        diagrams.orders,
        schedule,
        zero,
        learned,
        diagrams.packing,
        before_after,
        cached,
        answer,
    )
}
"""Picture by name."""
