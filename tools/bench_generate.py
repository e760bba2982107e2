"""Times generation beside `transformers.generate`: the same weights, prompts and greedy tokens.

    python tools/bench_generate.py --rounds 5 --json OUT
    python tools/bench_generate.py --device cuda --precision bf16

Random weights of ours, copied into the model of transformers, in this process, with the threads
that torch takes by itself. Reading the prompts is part of the time; rounds are interleaved, and the
ratio is the median of the rounds' own. On a GPU our own steps without recordings are measured, too.
Where the package `transformers` is not there, its rows say that it was not run.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from megalite.core.config import ModelConfig
from megalite.core.mesh import Mesh
from megalite.core.params import initialize
from megalite.core.precision import DTYPES
from megalite.data.atomic import write_json
from megalite.generate.engine import Request, complete
from megalite.generate.load import Place, untrained_share
from megalite.generate.sample import Sampling
from megalite.generate.share import Share
from megalite.models.build import build_stages
from megalite.models.gpt import GPT

SHAPES = {
    "gpt2-124m": ModelConfig(
        num_layers=12, hidden_size=768, num_heads=12, vocab_size=50257, seq_len=1024,
        position="learned",
    ),
    "llama-134m": ModelConfig(
        num_layers=12, hidden_size=768, num_heads=12, num_kv_heads=4, vocab_size=32000,
        seq_len=1024, position="rope", norm="rmsnorm", activation="swiglu", bias=False,
        tie_embeddings=False,
    ),
    "gpt2-tiny": ModelConfig(
        num_layers=3, hidden_size=96, num_heads=4, vocab_size=503, seq_len=128,
        position="learned", init_std=0.1,
    ),
    "llama-tiny": ModelConfig(
        num_layers=3, hidden_size=96, num_heads=4, num_kv_heads=2, vocab_size=503, seq_len=128,
        position="rope", norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False,
        init_std=0.1,
    ),
}  # fmt: skip
OURS, THEIRS, LAUNCHED = "megalite", "transformers", "megalite-launched"
Greedy = Callable[[list[list[int]], int], list[list[int]]]


def systems(shape: str, slots: int, args: argparse.Namespace) -> dict[str, Greedy | None]:
    """What each system says greedily after prompts, so many tokens of it; None: it is not here."""
    device, dtype = torch.device(args.device), DTYPES[args.precision]
    place = Place(slots=slots, dtype=dtype, device=device)
    share = untrained_share(SHAPES[shape], place, seed=1)

    def greedy(share: Share) -> Greedy:
        def run(prompts: list[list[int]], new: int) -> list[list[int]]:
            how = Sampling(temperature=0)
            return complete(share, [Request(tokens=p, how=how, max_tokens=new) for p in prompts])

        return run

    found: dict[str, Greedy | None] = {OURS: greedy(share), THEIRS: None}
    if share.recorded is not None:
        found[LAUNCHED] = greedy(replace(share, recorded=None))
    if importlib.util.find_spec("transformers") is not None:
        sys.path.insert(0, str(Path(__file__).resolve().parent))
        from peers import hf

        theirs = hf.twin(untrained(SHAPES[shape])).to(device, dtype)
        found[THEIRS] = lambda p, new: hf.greedy(theirs, p, new)
    return found


def untrained(model: ModelConfig) -> GPT:
    """The whole model with the initial weights that the share has."""
    stages = build_stages(
        model, Mesh({}), placement=(0,), layers=None, sequence_parallel=False, seed=1
    )
    initialize(stages[0], 1)
    return stages[0]


def measure(shape: str, batch: int, args: argparse.Namespace) -> list[dict]:
    """The rows of all systems."""
    known = SHAPES[shape].vocab_size
    prompts = [[(31 * i + 7 * j) % known for j in range(args.prompt)] for i in range(batch)]
    run = systems(shape, batch, args)
    here = {name: fn for name, fn in run.items() if fn is not None}
    said, failed = {}, {}
    for name, fn in list(here.items()):
        try:
            said[name] = fn(prompts, args.new)
        except Exception as error:
            if name != THEIRS:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            del here[name]
    seconds: dict[str, list[float]] = {name: [] for name in here}
    cpu: dict[str, list[float]] = {name: [] for name in here}
    for _ in range(args.rounds):
        for name, fn in here.items():
            wall, used = time.perf_counter(), time.process_time()
            fn(prompts, args.new)
            seconds[name].append(time.perf_counter() - wall)
            cpu[name].append(time.process_time() - used)
    rows = []
    for name in run:
        row = {"system": name, "layout": f"batch {batch}", "workload": shape, "world": 1}
        rows.append({**row, "device": args.device, "precision": args.precision})
        if name not in here:
            rows[-1]["not_run"] = failed.get(name, "the package is not installed")
            continue
        rows[-1].update(
            tokens_per_s=batch * args.new / statistics.median(seconds[name]),
            cpu_s=statistics.median(cpu[name]),
            same_text=said[name] == said[OURS],
            ratio=_ratio(seconds[name], seconds[OURS]),
            ratio_cpu=_ratio(cpu[name], cpu[OURS]),
        )
    return rows


def _ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times as long they take."""
    return statistics.median(b / a for a, b in zip(ours, theirs, strict=True))


def main() -> int:
    """Print a table; give the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--shape", nargs="*", choices=SHAPES, default=["gpt2-124m", "llama-134m"])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens after it")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=DTYPES, default="fp32")
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    rows = []
    print("system             workload     batch     tokens/s   CPU s   ours is (CPU)  text")
    for shape in args.shape:
        for batch in args.batch:
            for row in measure(shape, batch, args):
                rows.append(row)
                print(line_of(row), flush=True)
            if args.json:
                write_json(args.json, rows)
    # Rounded to bf16, logits of random weights tie now and then.
    differs = [row for row in rows if not row.get("same_text", True)]
    return 1 if differs and args.precision in ("fp32", "fp64") else 0


def line_of(row: dict) -> str:
    """A row of the table."""
    head = f"{row['system']:18} {row['workload']:12} {row['layout']:9}"
    if "not_run" in row:
        return f"{head} not run: {row['not_run']}"
    text = "same" if row["same_text"] else "DIFFERS"
    ratios = f"{row['ratio']:5.2f}x ({row['ratio_cpu']:4.2f})"
    return f"{head}{row['tokens_per_s']:9.1f} {row['cpu_s']:7.2f}   {ratios}  {text}"


if __name__ == "__main__":
    sys.exit(main())
