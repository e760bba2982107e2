"""Times each op on a GPU: our kernel, torch, torch.compile; Liger and Apex if installed.

    python tools/bench_kernels.py --rounds 50 --json OUT
    python tools/bench_kernels.py --dry-run               tiny sizes on a CPU, by the references

The limit of each is a plain copy on the device of as many bytes as the op must move, timed in the
same run: `of copy` is the copy's time over the op's. Calls are replayed from CUDA graphs, so that
no time of the host is in them, each after other data were read into the L2 cache; figures are
medians. `off` is the largest difference of our result from torch's, over torch's largest number.
What torch compiles comes last, since compiling takes longest; OUT is whole after every case.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Run from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from kernel_cases import COMPILED, DRY, GROUPS, Call, Case, Sizes, peers
from torch import Tensor

from megalite.core.errors import UserError
from megalite.data.atomic import write_json
from megalite.ops import backend
from megalite.ops.library import NoKernels

WARM_UP = 0.1
"""Seconds."""


class Timer:
    """Milliseconds of one call, as the median of `rounds`.

    On a GPU all is to run on its `stream`: a backward does on that of its forward, and a graph
    records one.
    """

    def __init__(self, device: torch.device, rounds: int):
        self.device, self.rounds = device, rounds
        self._copies: dict[int, float] = {}
        self.stream = torch.cuda.Stream() if device.type == "cuda" else None
        if device.type == "cuda":
            cache = torch.cuda.get_device_properties(device).L2_cache_size
            self._others = torch.zeros(cache, device=device)  # four times as many bytes

    def __call__(self, call: Call) -> float:
        if self.device.type == "cpu":
            times = []
            for _ in range(self.rounds + 1):
                start = time.perf_counter()
                call()
                times.append(1e3 * (time.perf_counter() - start))
            return statistics.median(times[1:])
        for _ in range(3):
            call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            call()
        marks = []
        self._warm_up()
        for _ in range(self.rounds):
            self._others.sum()  # read, so that nothing waits in the cache to be written
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            marks.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in marks)

    def _warm_up(self) -> None:
        """A GPU that was idle, while something was compiled, takes a while to its full clock."""
        until = time.perf_counter() + WARM_UP
        while time.perf_counter() < until:
            self._others.sum()
            torch.cuda.synchronize()

    def copy(self, nbytes: int) -> float:
        """A copy that reads half of so many bytes and writes the other half."""
        if nbytes not in self._copies:
            source = torch.randint(128, (nbytes // 2,), dtype=torch.int8, device=self.device)
            target = torch.empty_like(source)
            self._copies[nbytes] = self(lambda: target.copy_(source))
        return self._copies[nbytes]


def difference(ours: Any, theirs: Any) -> float:
    """The largest, over the largest number of theirs; of all tensors of a result."""
    pairs = [(ours, theirs)] if isinstance(ours, Tensor) else list(zip(ours, theirs, strict=True))
    worst = 0.0
    for a, b in pairs:
        gap = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp_min(1e-30)
        worst = max(worst, math.inf if gap.isnan() else gap.item())
    return worst


def rows_of(case: Case, timer: Timer, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    """A row for each system; on a CPU no goal is met or missed.

    Another's failure is its row's `not_run`; ours ends the run.
    """
    goals = {"of_copy": case.goal, "ms": case.most_ms, "over_torch": case.over_torch}
    on_gpu = timer.device.type == "cuda"
    off = None
    if case.same and {"megalite", "torch"} <= set(case.systems):
        off = difference(case.systems["megalite"](), case.systems["torch"]())
    copy = timer.copy(case.nbytes)
    took: dict[str, float | str] = {}
    for name, call in case.systems.items():
        try:
            took[name] = timer(call)
        except Exception as error:
            if name == "megalite":
                raise
            took[name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
    for name, ms in took.items():
        row: dict[str, Any] = {
            "system": name,
            "layout": "one",
            "workload": f"{case.op} {'x'.join(map(str, case.shape))}",
            "world": 1,
            "dtype": str(dtype).removeprefix("torch."),
        }
        if isinstance(ms, str):
            yield row | {"not_run": ms}
            continue
        row |= {"ms": ms, "copy_ms": copy, "of_copy": copy / ms}
        row["gb_per_s"] = case.nbytes / ms / 1e6
        if name == "megalite":
            torchs = took["torch"]
            row |= {"off": off, "over_torch": None if isinstance(torchs, str) else torchs / ms}
            row["goals"] = {name: goal for name, goal in goals.items() if goal is not None}
            reached = (
                ms <= goal if name == "ms" else (row[name] or 0.0) >= goal
                for name, goal in row["goals"].items()
            )
            row["met"] = all(reached) if on_gpu else None
        yield row


def line_of(row: dict[str, Any], dry: bool) -> str:
    """A line of the table."""
    head = f"{row['workload']:<48}{row['system']:<15}"
    if "not_run" in row:
        return f"{head} not run: {row['not_run']}"
    line = f"{head}{row['ms']:>9.4f}{row['gb_per_s']:>9.0f}{100 * row['of_copy']:>8.1f}%"
    if row["system"] != "megalite":
        return line
    words = "" if row["over_torch"] is None else f"  {row['over_torch']:.2f}x torch"
    words += "" if row["off"] is None else f", off {row['off']:.1e}"
    if row["goals"] and not dry:
        goals = ", ".join(f"{name} {goal:g}" for name, goal in row["goals"].items())
        words += f"; goal {goals}: {'met' if row['met'] else 'MISSED'}"
    return line + words


HEADER = f"{'op':<48}{'system':<15}{'ms':>9}{'GB/s':>9}{'of copy':>9}"


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print and write; 0, whether goals are met or not."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=sorted(GROUPS), help="one group of ops")
    parser.add_argument("--rounds", type=int, default=50, help="timed calls of each")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--json", metavar="OUT", help="write every row")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        print("bench_kernels: error: no GPU is visible to torch (use --dry-run)", file=sys.stderr)
        return 2
    sizes = DRY() if args.dry_run else Sizes()
    try:
        backend.use("auto" if args.dry_run else "fused", sizes.device)
    except (NoKernels, UserError) as error:
        print(f"bench_kernels: error: {error}", file=sys.stderr)
        return 2
    absent = ", ".join(sorted({"liger", "apex"} - peers()))
    where = "a CPU, by the references" if args.dry_run else torch.cuda.get_device_name()
    print(f"on {where}; torch {torch.__version__}" + (f"; not run: {absent}" if absent else ""))
    print(f"\n{HEADER}")
    timer, rows = Timer(sizes.device, args.rounds), []
    # One formula stands for norms of all widths, each of which is compiled.
    torch._dynamo.config.recompile_limit = 64
    with torch.cuda.stream(timer.stream):
        for compiled in (False, True):
            for case in _cases(sizes, args.only, compiled=compiled):
                for row in rows_of(case, timer, sizes.dtype):
                    rows.append(row)
                    print(line_of(row, args.dry_run), flush=True)
                if args.json:
                    write_json(args.json, rows)
    return 0


def _cases(sizes: Sizes, only: str | None, *, compiled: bool) -> Iterator[Case]:
    """Each with the systems that torch compiles, or with the others."""
    for name, cases in GROUPS.items():
        if only not in (None, name):
            continue
        for case in cases(sizes):
            some = {n: call for n, call in case.systems.items() if (n == COMPILED) == compiled}
            if some:
                yield replace(case, systems=some)
        torch._dynamo.reset()


if __name__ == "__main__":
    sys.exit(main())
