"""What `make gpu` has found, as Markdown tables and a picture.

python tools/gpu_report.py docs/gpu/DATE-DEVICE.json      prints the tables
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def draw(rows: list[dict], path: Path) -> None:
    """The ops' shares of a copy's speed as bars, one group for each op."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "not_run" not in row]
    if not rows:
        return
    ops = list(dict.fromkeys(row["workload"] for row in rows))
    systems = list(dict.fromkeys(row["system"] for row in rows))
    share = {(row["workload"], row["system"]): 100 * row["of_copy"] for row in rows}
    thick = 0.8 / len(systems)
    figure, axes = plt.subplots(figsize=(9, 1 + 0.45 * len(ops)), layout="constrained")
    for i, system in enumerate(systems):
        at = [n + i * thick for n in range(len(ops))]
        axes.barh(at, [share.get((op, system), 0.0) for op in ops], thick, label=system)
    axes.axvline(100, color="black", linewidth=0.8)
    axes.set_yticks([n + 0.4 - thick / 2 for n in range(len(ops))], ops)
    axes.invert_yaxis()
    axes.set_xlabel("speed, % of a plain copy of the same bytes")
    axes.legend()
    figure.savefig(path)
    plt.close(figure)


def report(about: dict[str, Any]) -> str:
    """The tables, as Markdown, of what `make gpu` keeps as JSON."""
    steps = about["steps"]
    given = {name: value for name, value in about.items() if name != "steps" and value}
    where = ", ".join(f"{name} {value}" for name, value in given.items())
    lines = [f"# {about['device']}, {about['date']}", "", f"`make gpu` on {where}.", ""]
    lines += ["| part | step | outcome | seconds |", "|---|---|---|---|"]
    for step in steps:
        lines.append(
            f"| {step['part']} | {step['name']} | {step['outcome']} | {step['seconds']:.0f} |"
        )
    for step in steps:
        if step["figures"] is None:
            continue
        if step["name"] == "bench":
            lines += ["", *_kernel_table(step["figures"])]
        if step["part"] == "layouts":
            rows, asked = step["figures"]["rows"], step["figures"]["rows_asked"]
            wrong = sum(not row["ok"] for row in rows)
            found = f"{len(rows)} of {asked} layouts, {wrong} differ from one process."
            lines += ["", f"`{step['name']}`: {found}"]
    trained = [row for step in steps if step["part"] == "train" for row in step["figures"] or []]
    if trained:
        lines += ["", *_training_table(trained)]
    generated = [
        row for step in steps if step["part"] == "generate" for row in step["figures"] or []
    ]
    if generated:
        lines += ["", *_generation_table(generated)]
    return "\n".join(lines) + "\n"


def _kernel_table(rows: list[dict]) -> list[str]:
    lines = [
        "## Ops",
        "",
        "`of copy`: the time of a plain copy of the bytes that the op must move,",
    ]
    lines += ["over the op's.", ""]
    lines += ["| op | system | ms | GB/s | of copy | over torch | goals |"]
    lines += ["|---|---|---|---|---|---|---|"]
    ops = list(dict.fromkeys(row["workload"] for row in rows))
    for row in sorted(rows, key=lambda row: ops.index(row["workload"])):
        if "not_run" in row:
            head = f"| {row['workload']} | {row['system']} |"
            lines.append(f"{head} not run: {row['not_run']} | | | | |")
            continue
        goals, over = "", ""
        if row["system"] == "megalite" and row["met"] is not None:
            over = "" if row["over_torch"] is None else f"{row['over_torch']:.2f}"
            goals = ", ".join(f"{name} {goal:g}" for name, goal in row["goals"].items())
            goals += (": met" if row["met"] else ": **missed**") if goals else ""
        lines.append(
            f"| {row['workload']} | {row['system']} | {row['ms']:.4f} | {row['gb_per_s']:.0f} "
            f"| {100 * row['of_copy']:.1f}% | {over} | {goals} |"
        )
    return lines


TRAINING = """## Training steps

N parameters; medians, and the least and most; optimizer included; data in the order of a run. MFU
is of the GPU's dense bf16 peak, by 6N + 6Lsh flops a token (causal) and by 6N + 12Lsh (full):
megalite/train/flops.py.

| model | N | samples x tokens | ops | type | steps | ms | tokens/s | MFU | goal | full | peak GB |
|---|---|---|---|---|---|---|---|---|---|---|---|"""
LEAST_MFU = {"gpt2-124m": 0.40, "gpt3-1.3b": 0.50, "llama-7b-wide": 0.55}
"""Goals for the fused ops on one GPU."""


def _training_table(rows: list[dict]) -> list[str]:
    lines = TRAINING.splitlines()
    for row in rows:
        mfu, ops = row["mfu"], row["ops_backend"] + ", deterministic" * row["deterministic"]
        least = LEAST_MFU.get(row["workload"]) if ops == "fused" and mfu is not None else None
        goal = ""
        if least is not None:
            goal = f"{100 * least:g}%: {'met' if mfu >= least else '**missed**'}"
        spread = f"{row['step_ms']:.1f} ({row['step_ms_least']:.1f} to {row['step_ms_most']:.1f})"
        lines.append(
            f"| {row['workload']} | {row['params'] / 1e6:.0f}M "
            f"| {row['global_batch_size']} x {row['seq_len']}, {row['micro_batch_size']} at once "
            f"| {ops} | {row['dtype']} | {row['steps']} | {spread} | {row['tokens_per_s']:.0f} "
            f"| {_share(mfu)} | {goal} | {_share(row['mfu_full'])} | {row['peak_mb'] / 1024:.1f} |"
        )
    return [*lines, "", *_compared(rows)]


def _compared(rows: list[dict]) -> list[str]:
    """How far the ops' backends are apart in the losses of the same steps, and what bits cost."""
    by_ops = {(r["workload"], r["ops_backend"], r["deterministic"]): r for r in rows}
    lines = []
    for workload in dict.fromkeys(row["workload"] for row in rows):
        fused, torchs = (by_ops.get((workload, ops, False)) for ops in ("fused", "torch"))
        if fused and torchs:
            pairs = list(zip(fused["losses"], torchs["losses"], strict=False))
            apart = max(abs(a - b) / b for a, b in pairs)
            words = f"losses of fused and torch's ops differ by {apart:.1e} at most"
            lines.append(f"- {workload}: {words}, in {len(pairs)} steps.")
        if fused and (same := by_ops.get((workload, "fused", True))):
            times = same["step_ms"] / fused["step_ms"]
            lines.append(
                f"- {workload}: a step with --deterministic takes {times:.3f} times as long."
            )
    return lines


GENERATION = """## Generation

Greedy, prompts of 16 tokens and 64 new ones, reading included; `megalite-launched` is ours without
recordings.

| model | batch | system | precision | tokens/s | times as long as ours | text |
|---|---|---|---|---|---|---|"""


def _generation_table(rows: list[dict]) -> list[str]:
    lines = GENERATION.splitlines()
    for row in rows:
        head = f"| {row['workload']} | {row['layout']} | {row['system']} | {row['precision']} |"
        if "not_run" in row:
            lines.append(f"{head} not run: {row['not_run']} | | |")
            continue
        text = "same" if row["same_text"] else "differs"
        lines.append(f"{head} {row['tokens_per_s']:.0f} | {row['ratio']:.2f} | {text} |")
    return lines


def _share(mfu: float | None) -> str:
    return "" if mfu is None else f"{100 * mfu:.1f}%"


if __name__ == "__main__":
    print(report(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), end="")
