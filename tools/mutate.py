"""Faults made by rule, each of which `megalite verify` has to catch: a mutation suite.

    python tools/mutate.py                    # all of them; exits 1 if one survives
    python tools/mutate.py --random 40 --seed 1

Three kinds. Every collective and transfer of a step, found by running the layouts of LAYOUTS and
noting who asks, is left out, done twice, run over another axis, or answered with its last result.
Every field of every parameter's Shard is said to be another. Every edge of every schedule, an
action that needs another, is broken. What changes no number is listed in EQUIVALENT with the
reason why; of all others verify must say that something differs, or not run. What the ranks do:
mutants.py.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

# Run from a checkout that is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megalite.core.config import Config, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from megalite.core.errors import RunError
from megalite.data.atomic import write_json
from megalite.schedule.action import Action, Schedule, needs
from megalite.schedule.check import check
from megalite.schedule.generators import SCHEDULES
from megalite.train.ranks import Ranks
from megalite.train.verify_command import reference_of, result_of
from megalite.train.verify_table import Row
from tools.mutants import CHANGES, SHARD_CHANGES

STEPS = 2
SECONDS = 60.0
"""Until a run that hangs is given up."""
JOB = "tools.mutants"

GPT = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, vocab_size=61, seq_len=16,
                  init_std=0.1)  # fmt: skip
LLAMA = replace(GPT, norm="rmsnorm", activation="swiglu", position="rope", bias=False,
                ffn_hidden_size=64, qk_norm=True, num_kv_heads=1, tie_embeddings=False)  # fmt: skip
LAYOUTS: dict[str, tuple[ModelConfig, dict]] = {
    "tp2 dp2": (GPT, {"tp": 2, "dp": 2}),
    "tp2 dp2 zero0 no-sp": (GPT, {"tp": 2, "dp": 2, "zero": 0, "sequence_parallel": False}),
    "llama kv1 tp2 dp2 zero3": (LLAMA, {"tp": 2, "dp": 2, "zero": 3}),
    "cp2 dp2 zero2": (GPT, {"cp": 2, "dp": 2, "zero": 2}),
    "llama tp2 cp2 gather": (LLAMA, {"tp": 2, "cp": 2, "cp_form": "gather"}),
    "tp2 cp2 ulysses": (GPT, {"tp": 2, "cp": 2, "cp_form": "ulysses"}),
    "pp2 dp2": (GPT, {"pp": 2, "dp": 2}),
    "tp2 pp2 zb-h1": (LLAMA, {"tp": 2, "pp": 2, "schedule": "zb-h1"}),
}
"""At least two axes of two ranks each, so that another axis is one of the same size."""

EQUIVALENT = {
    ("all_reduce max", "double"): "the largest of numbers that are all the largest is the same",
    ("all_reduce max", "stale"): "what is taken off all logits of a token, alike on all ranks, "
    "leaves its loss the same: the peak only keeps the exponentials small",
    ("all_gather", "double"): "a second gather brings the same parts to the same places",
    ("broadcast", "double"): "a second broadcast brings the same numbers",
}
"""(operation, change) -> why no number can differ."""


@dataclass(frozen=True)
class Mutant:
    """One fault."""

    kind: str
    """comm, shard or schedule."""
    where: str
    change: str
    layouts: tuple[str, ...] = ()
    """Those in which the place occurs."""
    op: str = ""
    schedule: Schedule | None = None

    @property
    def why_equivalent(self) -> str:
        return EQUIVALENT.get((self.op, self.change), "")

    def __str__(self) -> str:
        return f"{self.kind} {self.where}{' ' + self.op if self.op else ''}: {self.change}"


class Bench:
    """Runs mutants of the layouts on ranks of its own."""

    def __init__(self, ranks: Ranks, folder: Path):
        self.ranks, self.folder = ranks, folder

    def row_of(self, name: str) -> Row:
        """The layout of that name with two small microbatches."""
        model, given = LAYOUTS[name]
        layout = LayoutConfig(**given, bucket_mb=0.01)
        optim = OptimConfig(lr=1e-2, eps=1e-4, clip_grad=0.5)
        train = TrainConfig(micro_batch_size=1, global_batch_size=2 * (layout.dp or 1))
        world = layout.tp * layout.pp * layout.cp * (layout.dp or 1)
        config = Config(model=model, layout=layout, optim=optim, train=train)
        config.check(world)
        return Row(name, config, world)

    def run(self, name: str, job: str, **kwargs: object) -> list[dict]:
        """What a job of mutants.py gives on each rank of a layout."""
        row = self.row_of(name)
        ref = str(reference_of(row, self.ranks, self.folder, STEPS))
        asked = {"config": row.config.to_dict(), "steps": STEPS, "ref": ref, **kwargs}
        return self.ranks.run(
            f"{JOB}:{job}", row.world, kwargs=asked, timeout=SECONDS, grace=2.0
        ).results

    def caught(self, mutant: Mutant) -> str:
        """How verify sees a mutant: refused, numbers, error or hang; empty if it does not."""
        if mutant.schedule is not None:
            try:
                check(mutant.schedule, tied=(0, mutant.schedule.num_stages - 1))
            except ValueError:
                return "refused"
            return ""
        for name in mutant.layouts:
            try:
                found = self.run(
                    name, f"{mutant.kind}_mutant", where=mutant.where, change=mutant.change
                )
            except RunError as error:
                return "hang" if re.search("no end after|[Tt]imed out", str(error)) else "error"
            if not result_of(self.row_of(name), found, 0.0).ok:
                return "numbers"
        return ""


def places(bench: Bench, job: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """The pairs that a job of mutants.py finds, in order, each with the layouts that have it."""
    seen: dict[tuple[str, str], dict[str, None]] = {}
    for name in LAYOUTS:
        for rank in bench.run(name, job):
            for where, what in rank[job]:
                seen.setdefault((where, what), {})[name] = None
    return [(where, what, tuple(names)) for (where, what), names in sorted(seen.items())]


def comm_mutants(bench: Bench) -> Iterator[Mutant]:
    """Each collective and transfer of a step with each change."""
    for where, op, layouts in places(bench, "sites"):
        for change in CHANGES:
            if not (change == "wrong axis" and op == "transfer"):  # it has no axis to be wrong
                yield Mutant("comm", where, change, layouts, op)


def shard_mutants(bench: Bench) -> Iterator[Mutant]:
    """Each parameter of a model with each change of its Shard that can be made."""
    for where, change, layouts in places(bench, "shards"):
        assert change in SHARD_CHANGES
        yield Mutant("shard", where, change, layouts)


def schedule_mutants() -> Iterator[Mutant]:
    """Each edge of each schedule broken: what is needed comes too late, or never."""
    for name, make in SCHEDULES.items():
        schedule = make(2, 3, 2 if name in ("interleaved", "zb-v") else 1)
        for rank, actions in enumerate(schedule.actions):
            for action in actions:
                for before in needs(action, schedule):
                    yield _broken(name, schedule, rank, action, before)


def _broken(name: str, schedule: Schedule, rank: int, action: Action, before: Action) -> Mutant:
    lists = [list(actions) for actions in schedule.actions]
    if before in lists[rank]:
        lists[rank].remove(action)
        lists[rank].insert(lists[rank].index(before), action)
        change = f"{action} before {before}"
    else:
        home = schedule.placement[before.stage]
        lists[home].remove(before)
        change = f"{action} without {before}"
    made = replace(schedule, actions=tuple(map(tuple, lists)))
    return Mutant("schedule", name, change, schedule=made)


def drawn(mutants: list[Mutant], count: int | None, seed: int) -> list[Mutant]:
    """`count` of them (None: all); of schedules, which are many and cheap, at most a quarter."""
    if count is None:
        return mutants
    chance = random.Random(seed)
    cheap = [m for m in mutants if m.kind == "schedule"]
    dear = [m for m in mutants if m.kind != "schedule"]
    most = min(len(dear), count - count // 4)
    return chance.sample(dear, most) + chance.sample(cheap, min(len(cheap), count - most))


def every_mutant(bench: Bench) -> list[Mutant]:
    """All of them; for each layout two runs on ranks find what there is to change."""
    return [*comm_mutants(bench), *shard_mutants(bench), *schedule_mutants()]


def report(bench: Bench, mutants: list[Mutant]) -> list[dict]:
    """Try each, print what came of it, and give the rows."""
    rows = []
    for mutant in mutants:
        how = "equivalent" if mutant.why_equivalent else bench.caught(mutant) or "SURVIVED"
        rows.append({"mutant": str(mutant), "kind": mutant.kind, "came_of_it": how})
        if how == "SURVIVED" or mutant.kind != "schedule":
            print(f"{how:<10}  {mutant}", flush=True)
    return rows


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--random", type=int, help="try this many, drawn by --seed")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="try those whose line contains this")
    parser.add_argument("--json", help="write the rows to this file")
    args = parser.parse_args()
    with Ranks() as ranks, tempfile.TemporaryDirectory(prefix="megalite-mutate-") as folder:
        bench = Bench(ranks, Path(folder))
        mutants = [m for m in every_mutant(bench) if args.only in str(m)]
        rows = report(bench, drawn(mutants, args.random, args.seed))
    counts = Counter((row["kind"], row["came_of_it"]) for row in rows)
    for (kind, how), count in sorted(counts.items()):
        print(f"{kind:<9} {how:<10} {count:>5}")
    for (op, change), why in EQUIVALENT.items():
        print(f"equivalent: {op}, {change}: {why}")
    if args.json:
        write_json(args.json, {"seed": args.seed, "rows": rows})
    return int(any(row["came_of_it"] == "SURVIVED" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
