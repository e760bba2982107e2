"""The table of `megalite verify`: what a row is, what came of it, and how it is shown.

Next: verify_command.py, which makes the rows; verify.py for the gaps that they show.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import torch

from megalite.core.config import Config
from megalite.train.covering import TRIPLES, Combo, Coverage, Drawn
from megalite.train.verify import CLOSE, CLOSE_LATER, NO_BIT, TOL, Gap
from megalite.train.verify_args import VerifyRun

HEADER = "result  ranks     loss     grad  weights  seconds  worst at"
ROUNDING = 10.0
"""Below fp64, how many times one process's own distance from fp64 a later step may show."""


@dataclass(frozen=True)
class Numbers:
    """In what numbers ranks train, and how far they may be from one process."""

    precision: str
    job_suffix: str = ""
    """Of the names of the functions in verify.py that the ranks run."""
    bounds: dict[str, float] | None = None
    """In place of those of the precision."""
    note: str = ""
    """Why these, where most layouts of the table are compared bit by bit."""


PLAIN = Numbers("fp64")
IN_BITS = Numbers("fp64", "_in_fixed_order", NO_BIT)


@dataclass(frozen=True)
class Row:
    """One layout to compare; the model and the batch are its own."""

    name: str
    config: Config
    world: int
    lengths_vary: bool = False


@dataclass(frozen=True)
class Result:
    """What came of one layout."""

    row: Row
    numbers: Numbers
    seconds: float
    worst: dict[str, Gap] = dataclasses.field(default_factory=dict)
    first: Gap | None = None
    """The first out of tolerance."""
    trouble: str = ""
    """Why there are no numbers, or that some were counted twice or never."""
    differing: int = 0
    """Numbers, over all ranks, whose bits are not those of one process."""

    @property
    def ok(self) -> bool:
        return self.first is None and not self.trouble


def head(precision: str, steps: int, fixed_order: bool, device: str) -> list[str]:
    """What is compared, and how far numbers may be off."""
    where = "on CPU" if device == "cpu" else f"on {torch.cuda.get_device_name()}"
    lines = [f"megalite verify: {precision} against one process in fp64, {steps} steps, {where}"]
    if fixed_order:
        return [
            *lines,
            "  exact sums, in any order: not one bit of any number may differ from one process;",
            f"  where that may rightly be, {CLOSE['grad']:g} is allowed (after the first step "
            f"{CLOSE_LATER['grad']:g}), and the row says why",
        ]
    bounds = ", ".join(f"{kind} {bound:g}" for kind, bound in TOL[precision].items())
    lines.append(f"  error: largest difference over the tensor's largest value; allowed: {bounds}")
    if precision != "fp64":
        lines.append(
            f"  after the first step {ROUNDING:g} times one process's own error is allowed, too"
        )
    return lines


def in_bits(results: list[Result]) -> str:
    """What to add to the last line of a table in fixed order."""
    bitwise = [result for result in results if result.numbers is IN_BITS]
    if not bitwise:
        return ""
    differing = sum(result.differing for result in bitwise)
    text = f"; {len(bitwise)} compared bit by bit: {differing} numbers differ"
    others = len(results) - len(bitwise)
    return text + (f"; {others} within {CLOSE['grad']:g}" if others else "")


def table_lines(result: Result) -> list[str]:
    """A result as the lines of the table."""

    def number(kind: str) -> str:
        return f"{result.worst[kind].error:.1e}" if kind in result.worst else "-"

    grad = result.worst.get("grad")
    lines = [
        f"{'ok' if result.ok else 'FAIL':<6}  {result.row.world:>5}  {number('loss'):>7}  "
        f"{number('grad'):>7}  {number('weights'):>7}  {result.seconds:>7.1f}  "
        f"{grad.where if grad else '-':<36}  {result.row.name}"
    ]
    if result.trouble:
        lines.append(f"        {result.trouble}")
    if result.numbers.note and result.numbers.bounds:
        bound = result.numbers.bounds["grad"]
        lines.append(f"        within {bound:g}: {result.numbers.note}")
    if gap := result.first:
        place = f" at {list(gap.index)}" if gap.index else ""
        lines.append(
            f"        first out of tolerance, step {gap.step}: {gap.kind} of {gap.name}{place}: "
            f"{gap.ours:.10g}, one process has {gap.reference:.10g} "
            f"(error {gap.error:.1e}, allowed {gap.allowed:.0e})"
        )
        if result.numbers is IN_BITS:
            lines.append(
                f"        {gap.ours.hex()} and {gap.reference.hex()}; {result.differing} numbers "
                "differ, on all ranks"
            )
        if gap.shard:
            lines.append(f"        its Shard: {gap.shard}")
    return lines


def coverage_lines(coverage: Coverage, drawn: list[Drawn]) -> list[str]:
    """How often each value was drawn, the combinations covered, and why others cannot be."""
    lines = ["rows that have each value, and legal combinations with it that rows cover:"]
    for name in drawn[0].row:
        counts = Counter(each.row[name] for each in drawn)
        values = list(dict.fromkeys(v for c in coverage.legal for n, v in c if n == name))
        shown = "  ".join(f"{value}: {counts[value]}" for value in values)
        legal = [combo for combo in coverage.legal if name in dict(combo)]
        covered = sum(combo in coverage.covered for combo in legal)
        lines.append(f"  {name:<18} {covered:>4} of {len(legal):<4}  {shown}")
    for size, what in ((2, "pairs"), (3, f"triples of {', '.join(TRIPLES[0])}")):
        legal = [combo for combo in coverage.legal if len(combo) == size]
        covered = sum(combo in coverage.covered for combo in legal)
        lines.append(f"{what}: {covered} of {len(legal)} legal ones covered")
    axes = Counter(tuple(each.row[axis] for axis in ("tp", "cp", "pp", "dp")) for each in drawn)
    lines.append(f"rows of tp2 cp2 pp2 dp2: {axes[2, 2, 2, 2]}")
    lines.append(f"combinations that no layout may have: {len(coverage.refused)}, by rule:")
    for rule, combos in coverage.refused_by_rule().items():
        some = "; ".join(_in_words(c) for c in combos[:4]) + ("; ..." if len(combos) > 4 else "")
        lines.append(f"  {len(combos):>4}  {rule}   ({some})")
    return lines


def _in_words(combo: Combo) -> str:
    return " ".join(f"{name}={value}" for name, value in combo)


def tree_of(
    run: VerifyRun,
    precision: str,
    results: list[Result],
    coverage: Coverage | None,
    *,
    rows_asked: int,
) -> dict[str, Any]:
    """The table as JSON has it, whole once it has all rows that were asked for."""
    rows = [
        {
            "layout": result.row.name,
            "ranks": result.row.world,
            "ok": result.ok,
            "seconds": round(result.seconds, 3),
            "worst": {kind: _finite(gap) for kind, gap in result.worst.items()},
            "first": _finite(result.first) if result.first else None,
            "compared": "within" if result.numbers is not IN_BITS else "bits",
            "why_within": result.numbers.note,
            "differing": result.differing,
            "trouble": result.trouble,
            "lengths_vary": result.row.lengths_vary,
            "config": result.row.config.to_dict(),
        }
        for result in results
    ]
    tree = {
        "precision": precision,
        "steps": run.verify.steps,
        "seed": run.train.seed,
        "fixed_order": run.verify.fixed_order,
        "tolerance": TOL[precision],
        "rows_asked": rows_asked,
        "rows": rows,
    }
    # What is covered is counted over all drawn rows, which must have run for that to be true.
    if coverage is not None and len(rows) == rows_asked:
        tree["combinations"] = {
            "legal": len(coverage.legal),
            "covered": len(coverage.covered),
            "refused": [[_in_words(combo), rule] for combo, rule in coverage.refused.items()],
        }
    return tree


def _finite(gap: Gap) -> dict[str, Any]:
    """A Gap as JSON, which has no infinity: None."""
    tree = asdict(gap)
    return {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in tree.items()
    }
