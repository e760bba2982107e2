"""What a run says on the screen: the layout first, one line a log interval, and what to do next at
the end.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path

import torch

from megalite.core.config import Config, ModelConfig
from megalite.models.presets import num_adapter_parameters, num_parameters
from megalite.train.flops import token_flops

WIDTH = 110
LONGEST = 16
"""Rows of a layout picture."""


def count(n: float) -> str:
    """1.6M, 43k, 512."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if n >= size:
            return f"{n / size:.1f}{letter}" if n < 100 * size else f"{n / size:.0f}{letter}"
    return f"{n:.0f}"


def size(model: ModelConfig) -> str:
    """How many parameters there are, and what is trained if that is not all of them."""
    text = f"{count(num_parameters(model))} parameters"
    if not model.lora_rank:
        return text
    trained = count(num_adapter_parameters(model))
    return f"{text}, {trained} trained (rank {model.lora_rank} on {' '.join(model.adapted)})"


def duration(seconds: float) -> str:
    """4m48s, 1h02m, 12s."""
    seconds = int(round(seconds))
    if seconds >= 3600:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 60}m{seconds % 60:02d}s" if seconds >= 60 else f"{seconds}s"


def layout_picture(config: Config, world_size: int) -> list[str]:
    """The ranks as rows of pipeline places and columns of data replicas, tp groups in brackets."""
    layout, dp = config.layout, config.data_ranks(world_size)
    inner = layout.cp * layout.tp

    def group(p: int, d: int) -> str:
        first = (p * dp + d) * inner
        names = [f"r{first + i}" for i in range(inner)]
        return "[" + (" ".join(names) if inner <= 4 else f"{names[0]}..{names[-1]}") + "]"

    cell = len(group(layout.pp - 1, dp - 1)) + 2
    columns = min(dp, (WIDTH - 12) // cell)
    more = " .." if columns < dp else ""
    lines = ["     " + "".join(f"{f'dp{d}':<{cell}}" for d in range(columns)).rstrip() + more]
    for p in range(min(layout.pp, LONGEST)):
        cells = "".join(f"{group(p, d):<{cell}}" for d in range(columns))
        lines.append(f"{f'pp{p}':<5}{cells.rstrip()}{more}")
    if layout.pp > LONGEST:
        lines.append(f"..   and {layout.pp - LONGEST} more places")
    return lines


def header(
    config: Config, world_size: int, *, device: torch.device, data: str, bubble: float
) -> list[str]:
    """The lines a run starts with."""
    layout, model, train = config.layout, config.model, config.train
    dp = config.data_ranks(world_size)
    backend = "nccl" if device.type == "cuda" else "gloo"
    threads = torch.get_num_threads()
    axes = [f"TP{layout.tp}", f"PP{layout.pp}", f"DP{dp}"] + (
        [f"CP{layout.cp}"] if layout.cp > 1 else []
    )
    optim = config.optim
    tokens = train.global_batch_size * model.seq_len
    ramp = train.rampup_batch_size
    grown = f" (from {ramp[0]} by {ramp[1]} over {count(ramp[2])})" if ramp else ""
    facts = [
        f"model  {size(model)}: {model.num_layers} layers, "
        f"d {model.hidden_size}, {model.num_heads} heads, seq {model.seq_len}, "
        f"vocab {model.vocab_size}",
        f"data   {data}",
        f"batch  {train.global_batch_size} samples{grown} = {tokens} tokens = DP{dp} x "
        f"micro {train.micro_batch_size} x accum {config.num_microbatches(world_size)}",
        f"order  {layout.schedule}, bubble {100 * bubble:.1f}% by simulation",
        f"optim  {optim.optimizer}, ZeRO-{layout.zero}, {optim.lr_decay} from {optim.lr:.0e}, "
        f"{train.train_steps} steps",
    ]
    plural = "s" if threads > 1 else ""
    lines = [
        f"megalite {config.verb} | torch {torch.__version__} {backend} | {world_size} ranks, "
        f"{threads} thread{plural} each | out {train.out}",
        f"  layout {' x '.join(axes)} ({world_size} ranks)",
    ]
    lines += [f"      {line}" for line in layout_picture(config, world_size)]
    return lines + [f"  {fact}" for fact in facts]


def flops_rule(config: Config, device: torch.device, peak: float | None) -> str:
    """What a GPU's TFLOP/s and MFU count, and of which peak (TFLOP/s of a rank, None: unknown)."""
    flops = token_flops(config.model)
    products = "4N + 6n" if config.model.lora_rank else "6N"
    rule = (
        f"flops  a token {count(flops.causal)} = {products} + 6Lsh (causal), {count(flops.full)} = "
        f"{products} + 12Lsh (full), N {count(flops.weights)}"
    )
    name = torch.cuda.get_device_name(device)
    if peak is None:
        return f"{rule}; no MFU, as no peak is known of {name} in this precision"
    return f"{rule}; MFU of {peak:.0f}T, {name}'s dense bf16"


class Progress:
    """The running line: percent, loss, rate and the time that is left.

    `peak`: TFLOP/s of all ranks together, if it is known.
    """

    def __init__(self, config: Config, first_step: int, samples: int, *, peak: float | None = None):
        self.config, self.peak = config, peak
        self.started, self.first = time.monotonic(), first_step
        self.last_time, self.last_step, self.last_samples = self.started, first_step, samples

    def line(self, step: int, *, samples: int, loss: float, norm: float, lr: float) -> str:
        """The line of `step` (counted from 1), with which `samples` of the run are taken."""
        now = time.monotonic()
        train = self.config.train
        steps = max(1, step - self.last_step)
        per_step = (now - self.last_time) / steps
        taken = (samples - self.last_samples) * self.config.model.seq_len
        rate = taken / max(now - self.last_time, 1e-9)
        self.last_time, self.last_step, self.last_samples = now, step, samples
        # Of a batch that never changes, steps say as much.
        shown = f"  {count(samples)} samples" if train.rampup_batch_size else ""
        if self.peak is not None:
            mfu = token_flops(self.config.model).causal * rate / 1e12 / self.peak
            shown = f"  mfu {100 * mfu:.1f}%{shown}"
        left = (train.train_steps - step) * (now - self.started) / max(1, step - self.first)
        width = len(str(train.train_steps))
        return (
            f"step {step:>{width}}/{train.train_steps} {100 * step // train.train_steps:3d}%  "
            f"loss {loss:6.3f}  gnorm {norm:5.2f}  lr {lr:.1e}  {count(rate)} tok/s  "
            f"{per_step:.2f} s/step  eta {duration(left)}{shown}"
        )


def scaling(scale: float | None, skipped: int) -> str:
    """The loss scale of a step, and steps skipped since the last line; nothing without a scale."""
    if scale is None:
        return ""
    return f"  scale {scale:.10g}" + (f"  skipped {skipped}" if skipped else "")


def held_out(loss: float, bits: float | None, gzip_bits: float | None) -> str:
    """A held-out loss in words anyone can compare."""
    text = f"held-out loss {loss:.3f}"
    if bits is not None:
        text += f" = {bits:.3f} bits/byte"
    if gzip_bits is not None:
        text += f" (gzip -9 of the same text: {gzip_bits:.2f})"
    return text


def answered(question: str, answer: str) -> list[str]:
    """A held-out question and what the model says to it, a line each."""
    lines = []
    for sign, text in (("?", question), ("=", answer)):
        line = f"    {sign} {json.dumps(text.strip(), ensure_ascii=False)[1:-1]}"
        lines.append(line if len(line) <= WIDTH else line[: WIDTH - 3] + "...")
    return lines


def command(program: str, *words: str) -> str:
    """A command line that can be pasted into the shell this run was started from."""
    beside = Path(".venv/bin") / program
    if shutil.which(program) is None and beside.exists():
        program = str(beside)
    return " ".join((program, *words))


def is_number(x: float) -> bool:
    """Neither infinite nor NaN."""
    return math.isfinite(x)
