"""What the script of every system shares: the case to train on, and steps taken on demand.

A system's script builds its model from the case's weights, and `serve` then takes steps when the
driver (bench_peers.py) asks for them over stdin, and answers each order with one JSON line. So two
systems can be started once and take turns, and while one works the other sleeps. It knows torch and
numpy and nothing of megalite: a peer's own interpreter runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

LR, BETAS, EPS, WEIGHT_DECAY = 1e-4, (0.9, 0.95), 1e-8, 0.1
"""Of AdamW in every system; no warm-up, no clipping, and norms and biases do not decay."""


@dataclass(frozen=True)
class Workload:
    """A model and a batch."""

    num_layers: int
    hidden_size: int
    num_heads: int
    seq_len: int
    vocab_size: int
    micro_batch_size: int
    global_batch_size: int


WORKLOADS = {
    "gpt-10m": Workload(6, 384, 6, 256, 4096, 4, 16),
    "gpt-30m": Workload(8, 512, 8, 512, 16384, 2, 8),
    "tiny": Workload(4, 64, 4, 64, 512, 2, 8),
}


@dataclass(frozen=True)
class Case:
    """What one rank of one system is to run."""

    workload: Workload
    layout: str
    llama: bool
    """The model has LLaMA's form instead of GPT-2's, and an untied head."""
    fused: bool
    """AdamW is torch's fused form, where the script chooses the optimizer."""
    source: str
    """Folder of the peer's checkout, where it has one."""
    tokens: Tensor
    """[steps, global batch, seq_len + 1] int64."""
    weights: dict[str, Tensor]
    """The whole initial model, by megalite's names."""
    rank: int
    world: int


def open_case() -> Case:
    """The case that the driver names on the command line and in the environment of this rank."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--file", required=True)
    parser.add_argument("--workload", choices=WORKLOADS, required=True)
    parser.add_argument("--layout", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--source", default="")
    parser.add_argument("--llama", action="store_true")
    parser.add_argument("--fused", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with np.load(args.file, allow_pickle=False) as found:
        arrays = {name: torch.from_numpy(found[name]) for name in found.files}
    return Case(
        workload=WORKLOADS[args.workload],
        layout=args.layout,
        llama=args.llama,
        fused=args.fused,
        source=args.source,
        tokens=arrays.pop("tokens"),
        weights=arrays,
        rank=int(os.environ["RANK"]),
        world=int(os.environ["WORLD_SIZE"]),
    )


def write_case(path: Path, tokens: np.ndarray, weights: dict[str, Tensor]) -> None:
    """The file that `open_case` reads."""
    np.savez(path, tokens=tokens, **{name: w.numpy() for name, w in weights.items()})


def microbatches(case: Case, step: int, idx: int = 0, dp: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Inputs and targets [b, s] of data rank `idx`, dealt out microbatch by microbatch."""
    parts = case.tokens[step].split(case.workload.micro_batch_size)[idx::dp]
    return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in parts]


def decay_groups(params: Iterable[nn.Parameter]) -> list[dict]:
    """Optimizer groups: matrices decay, norms and biases do not."""
    both = list(params)
    return [
        {"params": [p for p in both if p.dim() > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in both if p.dim() <= 1], "weight_decay": 0.0},
    ]


def adamw(params: Iterable[nn.Parameter], case: Case) -> torch.optim.AdamW:
    """torch's AdamW, as it comes or fused."""
    chosen = {"fused": True} if case.fused else {}
    return torch.optim.AdamW(decay_groups(params), lr=LR, betas=BETAS, eps=EPS, **chosen)


@contextlib.contextmanager
def chatter_to_stderr() -> Iterator[None]:
    """For code that prints: stdout belongs to the answers."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def serve(step: Callable[[int], float | None]) -> None:
    """Answer `N` on stdin with N more steps, as one JSON line, until stdin ends.

    `step(number)` trains on one global batch and gives its loss on this rank, None where the rank
    has none. CPU seconds are those of this process; the answer also has its peak memory so far.
    """
    answers = sys.stdout
    number = 0
    gc.collect()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for order in sys.stdin:
        losses, walls, cpus = [], [], []
        for _ in range(int(order)):
            wall, cpu = time.perf_counter(), time.process_time()
            with chatter_to_stderr():
                losses.append(step(number))
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
            number += 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak_mb = peak / (2**20 if sys.platform == "darwin" else 2**10)
        answer = {"losses": losses, "walls": walls, "cpus": cpus, "peak_rss_mb": peak_mb}
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)  # gloo's threads can abort an interpreter that shuts down around them
