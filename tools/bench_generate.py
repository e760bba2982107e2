"""Times generation beside `transformers.generate`: the same weights, prompts and greedy tokens.

    python tools/bench_generate.py --rounds 5 --json OUT

Random weights of ours, copied into the model of transformers, in this process, with the threads
that torch takes by itself. Prompts are read before the clock's first token; rounds are interleaved,
and the ratio is the median of the rounds' own. Needs the package `transformers`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megalite.core.config import ModelConfig
from megalite.core.mesh import Mesh
from megalite.core.params import initialize
from megalite.generate.engine import Request, complete
from megalite.generate.load import Place, untrained_share
from megalite.generate.sample import Sampling
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
SYSTEMS = ("megalite", "transformers")


def systems(shape: str, slots: int) -> dict[str, Callable[[list[list[int]], int], list[list[int]]]]:
    """What each system says greedily after prompts, so many tokens of it."""
    place = Place(slots=slots, dtype=torch.float32, device=torch.device("cpu"))
    share = untrained_share(SHAPES[shape], place, seed=1)

    def ours(prompts: list[list[int]], new: int) -> list[list[int]]:
        how = Sampling(temperature=0)
        return complete(share, [Request(tokens=p, how=how, max_tokens=new) for p in prompts])

    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from peers import hf

    theirs = hf.twin(untrained(SHAPES[shape]))
    return {"megalite": ours, "transformers": lambda p, new: hf.greedy(theirs, p, new)}


def untrained(model: ModelConfig) -> GPT:
    """The whole model with the initial weights that the share has."""
    stages = build_stages(
        model, Mesh({}), placement=(0,), layers=None, sequence_parallel=False, seed=1
    )
    initialize(stages[0], 1)
    return stages[0]


def measure(shape: str, batch: int, args: argparse.Namespace) -> list[dict]:
    """The rows of both systems."""
    known = SHAPES[shape].vocab_size
    prompts = [[(31 * i + 7 * j) % known for j in range(args.prompt)] for i in range(batch)]
    run = systems(shape, batch)
    said = {name: fn(prompts, args.new) for name, fn in run.items()}
    same = said["megalite"] == said["transformers"]
    seconds: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    cpu: dict[str, list[float]] = {name: [] for name in SYSTEMS}
    for _ in range(args.rounds):
        for name in SYSTEMS:
            wall, used = time.perf_counter(), time.process_time()
            run[name](prompts, args.new)
            seconds[name].append(time.perf_counter() - wall)
            cpu[name].append(time.process_time() - used)
    ratios = [b / a for a, b in zip(*(seconds[name] for name in SYSTEMS), strict=True)]
    by_cpu = [b / a for a, b in zip(*(cpu[name] for name in SYSTEMS), strict=True)]
    return [
        {
            "system": name,
            "layout": f"batch {batch}",
            "workload": shape,
            "world": 1,
            "tokens_per_s": batch * args.new / statistics.median(seconds[name]),
            "cpu_s": statistics.median(cpu[name]),
            "same_text": same,
            "ratio": statistics.median(ratios),
            "ratio_cpu": statistics.median(by_cpu),
        }
        for name in SYSTEMS
    ]


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
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    rows = []
    print("system        workload     batch     tokens/s   CPU s   ratio (CPU)  text")
    for shape in args.shape:
        for batch in args.batch:
            for row in measure(shape, batch, args):
                rows.append(row)
                text = "same" if row["same_text"] else "DIFFERS"
                print(
                    f"{row['system']:13} {row['workload']:12} {row['layout']:9}"
                    f"{row['tokens_per_s']:9.1f} {row['cpu_s']:7.2f}   {row['ratio']:5.2f} "
                    f"({row['ratio_cpu']:4.2f})  {text}",
                    flush=True,
                )
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n")
    return 0 if all(row["same_text"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
