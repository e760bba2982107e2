#!/usr/bin/env python3
"""Everything that needs a GPU, in one go: what `make gpu` calls.

    python3 tools/gpu.py                  kernels built, tested, sanitized and timed; training
                                          and generation timed; layouts verified, many ranks on it
    python3 tools/gpu.py --part kernels   or train, generate or layouts
    python3 tools/gpu.py --dry-run        the same steps at tiny sizes on a CPU

Uses the interpreter that runs it, and installs nothing: pure-Python packages that it lacks are
taken from vendor-wheels/, which `make wheels` fills on a machine with a network. Whatever else is
missing is named at once. Checks run beside each other where there are cores for it, and what is
timed runs alone. Every figure goes to docs/gpu/DATE-DEVICE.json, and its tables to a Markdown file
beside it, anew after each step, so that what ends it early leaves all that was done; those of a dry
run to runs/gpu-dry-run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import distributions
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WHEELS = ROOT / "vendor-wheels"
BUDGET = 540.0
"""Seconds for all steps: an hour of GPU yields the whole picture many times."""
CORES_OF_A_CHECK = 3
"""So many for each of those that run beside each other."""
NEEDED = ("torch", "numpy", "pytest", "hypothesis", "safetensors", "regex", "tyro", "tqdm")
NEEDED += ("tensorboard", "matplotlib")
WORKLOADS = ("gpt2-124m", "gpt3-1.3b", "llama-7b-wide")
FORMS = (("torch", (), 10), ("fused", (), 50), ("fused", ("--deterministic",), 10))
"""How training steps are timed: the ops' backend, flags, and steps."""


@dataclass
class Step:
    """A command of one part. `rows` names the file that it writes its figures to."""

    part: str
    name: str
    command: list[str]
    rows: Path | None = None
    wants: str = ""
    """A program without which it is not run, and said to be."""
    most: float = BUDGET
    """Seconds, so that none takes the time of all others."""
    timed: bool = True
    """It runs alone: figures of a GPU that others use, too, are worth nothing."""
    environment: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    outcome: str = "not run yet"
    figures: Any = None
    tail: list[str] = field(default_factory=list)
    process: subprocess.Popen | None = None


def steps_of(python: str, work: Path, dry: bool) -> list[Step]:
    """All that there is to do, in order."""

    def tool(name: str, *args: str) -> list[str]:
        return [python, f"tools/{name}.py", *args]

    def out(name: str) -> tuple[Path, list[str]]:
        path = work / f"{name}.json"
        return path, ["--json", str(path)]

    if dry:
        build = [python, "kernels/build.py", "--emulated"]
        quick = ["tests/kernels/test_adamw_kernel.py"]
    else:
        build = [python, "kernels/build.py", *_own_arch()]
        quick = ["tests/gpu/test_kernels.py"]
    steps = [Step("kernels", "build", build, most=90)]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    tests = [*pytest, *(quick if dry else ["tests/gpu"])]
    steps.append(Step("kernels", "tests", tests, most=200, timed=False))
    few = ["-k", "adamw or (softmax and causal) or (norm and (residual or rows_of_a_block))"]
    for kind in ("memcheck", "racecheck"):
        # torch asks the driver for things that it may not have, and goes on without.
        how = ["--tool", kind, "--error-exitcode", "9", "--report-api-errors", "no"]
        command = ["compute-sanitizer", *how, *pytest, *quick, *few]
        check = Step("kernels", kind, command, wants="compute-sanitizer", most=200, timed=False)
        # Each tensor is an allocation of its own: beyond one is not inside another.
        check.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        steps.append(check)
    for precision in ("fp32", "bf16"):
        path, json_out = out(f"verify-{precision}")
        args = ["--random", "2" if dry else "40", "--max-ranks", "2" if dry else "8", *json_out]
        args += ["--device", "cpu" if dry else "cuda", "--precision", precision, "--steps", "2"]
        command = [python, "-m", "megalite", "verify", *args]
        verify = Step("layouts", f"verify {precision}", command, path, most=200, timed=False)
        steps.append(verify)
    path, json_out = out("kernels")
    small = ["--dry-run", "--rounds", "2"] if dry else []
    bench = tool("bench_kernels", *small, *json_out)
    steps.append(Step("kernels", "bench", bench, path, most=120))
    for workload in ("tiny",) if dry else WORKLOADS:
        for backend, more, count in FORMS[:1] if dry else FORMS:
            path, json_out = out(f"train-{workload}-{'-'.join([backend, *more])}")
            args = ["--workload", workload, "--layouts", "one", "--rounds", "1", *json_out, *more]
            args += ["--steps", "2", "--warmup", "1"] if dry else ["--steps", str(count)]
            args += ["--device", "cpu" if dry else "cuda", "--ops-backend", backend]
            name = " ".join([workload, backend, *more])
            steps.append(Step("train", name, tool("bench_train", *args), path, most=90))
    for precision in ("fp32", "bf16"):
        path, json_out = out(f"generate-{precision}")
        args = ["--device", "cpu" if dry else "cuda", "--precision", precision, *json_out]
        args += ["--shape", "gpt2-tiny", "--rounds", "1"] if dry else ["--rounds", "5"]
        steps.append(Step("generate", precision, tool("bench_generate", *args), path, most=60))
    return steps


def _own_arch() -> list[str]:
    """The architecture of the GPU here, so that the build takes seconds."""
    asked = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    lines = subprocess.run(asked, capture_output=True, text=True).stdout.split()
    return ["--arch", lines[0].replace(".", "")] if lines else []


# -- what is missing ---------------------------------------------------------------------------


def use_wheels() -> None:
    """Packages of vendor-wheels/ that are not installed can be imported, by children, too."""
    here = {name.lower().replace("-", "_") for d in distributions() if (name := d.metadata["Name"])}
    found = sorted(WHEELS.glob("*-none-any.whl"))
    wheels = [str(path) for path in found if path.name.split("-")[0].lower() not in here]
    sys.path += wheels
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]), *wheels]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)


def missing(dry: bool) -> list[str]:
    """All that is not there, in words."""
    found = [f"the Python package {name}" for name in NEEDED if find_spec(name) is None]
    if dry:
        return found
    if shutil.which("nvidia-smi") is None:
        found.append("an NVIDIA driver (nvidia-smi)")
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    nvcc = [shutil.which("nvcc"), *(shutil.which("nvcc", path=f"{home}/bin") for home in homes)]
    if not any(nvcc):
        found.append("CUDA's compiler (nvcc)")
    return found


# -- running -----------------------------------------------------------------------------------


def run(step: Step, deadline: float) -> None:
    """Run a step until then or its own end, show what it prints, and keep what it gave."""
    print(f"{step.part}: {step.name}: {' '.join(step.command)}", flush=True)
    seconds = min(step.most, deadline - time.monotonic())
    if step.wants and shutil.which(step.wants) is None:
        step.outcome = f"not run: no {step.wants} here"
    elif seconds <= 0:
        step.outcome = "not run: no time left"
    else:
        _run(step, seconds)
    print(f"{step.part}: {step.name}: {step.outcome} ({step.seconds:.0f} s)", flush=True)


def _run(step: Step, seconds: float) -> None:
    start, lines = time.monotonic(), []
    # A session of its own, so that all it has started can be ended with it.
    with subprocess.Popen(
        step.command,
        cwd=ROOT,
        env={**os.environ, **step.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        step.process = process
        timer = threading.Timer(seconds, _end, [process])
        timer.daemon = True
        timer.start()
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(f"  {step.name}: {line}", end="", flush=True)
                lines.append(without_places(line.rstrip()))
            process.wait()
        finally:
            timer.cancel()
            _end(process)
    step.seconds = time.monotonic() - start
    step.tail = lines[-20:]
    code = process.returncode
    step.outcome = (
        "ok" if code == 0 else f"stopped by its time or {-code}" if code < 0 else "FAILED"
    )
    if step.rows is not None and step.rows.exists():
        step.figures = json.loads(step.rows.read_text(encoding="utf-8"))


def _end(process: subprocess.Popen) -> None:
    """And all that it has started, if anything of that is left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_all(steps: list[Step], done: Callable[[], None]) -> None:
    """One after the other, but checks beside each other; `done` after each."""
    deadline = time.monotonic() + BUDGET
    beside = max(1, (os.cpu_count() or 1) // CORES_OF_A_CHECK)
    for timed, some in groupby(steps, key=lambda step: step.timed):
        with ThreadPoolExecutor(1 if timed else beside) as pool:
            group = list(some)
            running = [pool.submit(run, step, deadline) for step in group]
            try:
                for ended in as_completed(running):
                    ended.result()
                    done()
            except BaseException:  # Ctrl-C, say, which reaches none of their sessions
                pool.shutdown(wait=False, cancel_futures=True)
                for step in group:
                    if step.process is not None:
                        _end(step.process)
                raise


def machine() -> dict[str, str]:
    """What the figures were seen on."""
    asked = "import torch; print(torch.__version__, torch.version.cuda)"
    versions = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True)
    torch, cuda = (versions.stdout.split() or ["?", "?"])[:2]
    smi = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    device, driver = "CPU", ""
    if shutil.which("nvidia-smi"):
        lines = subprocess.run(smi, capture_output=True, text=True).stdout.splitlines()
        device, _, driver = (lines or ["CPU, "])[0].partition(", ")
    git, commit = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"], ""
    if shutil.which("git"):
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "date": date.today().isoformat(),
        "device": device,
        "driver": driver,
        "torch": torch,
        "cuda": cuda,
        "python": sys.version.split()[0],
        "commit": commit or "unknown",
    }


# -- what is written ---------------------------------------------------------------------------


def without_places(text: str) -> str:
    """As it would read on any machine."""
    return text.replace(sys.executable, "python3").replace(str(ROOT) + os.sep, "")


KEPT = ("part", "name", "command", "outcome", "seconds", "figures", "tail")


def write(about: dict[str, str], steps: list[Step], place: Path) -> None:
    """All that has been found so far."""
    rows = [{key: getattr(step, key) for key in KEPT} for step in steps]
    for row in rows:
        row["command"] = [without_places(word) for word in row["command"]]
    text = json.dumps({**about, "steps": rows}, indent=1) + "\n"
    place.with_suffix(".json").write_text(text, encoding="utf-8")
    place.with_suffix(".md").write_text(report(about, steps), encoding="utf-8")
    for step in steps:
        if step.name == "bench" and step.figures:
            draw(step.figures, place.with_suffix(".svg"))


def draw(rows: list[dict], path: Path) -> None:
    """The ops' shares of a copy's speed as bars, one group for each op."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    rows = [row for row in rows if "not_run" not in row]
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


def report(about: dict[str, str], steps: list[Step]) -> str:
    """The tables, as Markdown."""
    where = ", ".join(f"{name} {value}" for name, value in about.items() if value)
    lines = [f"# {about['device']}, {about['date']}", "", f"`make gpu` on {where}.", ""]
    lines += ["| part | step | outcome | seconds |", "|---|---|---|---|"]
    for step in steps:
        lines.append(f"| {step.part} | {step.name} | {step.outcome} | {step.seconds:.0f} |")
    for step in steps:
        if step.figures is None:
            continue
        if step.name == "bench":
            lines += ["", *_kernel_table(step.figures)]
        if step.part == "layouts":
            rows = step.figures["rows"]
            wrong = sum(not row["ok"] for row in rows)
            lines += ["", f"`{step.name}`: {len(rows)} layouts, {wrong} differ from one process."]
    trained = [row for step in steps if step.part == "train" for row in step.figures or []]
    if trained:
        lines += ["", *_training_table(trained)]
    generated = [row for step in steps if step.part == "generate" for row in step.figures or []]
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
    for row in rows:
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

Medians; optimizer included; data in the order of a run. MFU is of the GPU's dense bf16 peak, by
6N + 6Lsh flops a token (causal) and by 6N + 12Lsh (full): megalite/train/flops.py.

| model | parameters | tokens a step | ops | ms | tokens/s | MFU | full | peak GB |
|---|---|---|---|---|---|---|---|---|"""


def _training_table(rows: list[dict]) -> list[str]:
    lines = TRAINING.splitlines()
    for row in rows:
        lines.append(
            f"| {row['workload']} | {row['params'] / 1e6:.0f}M | {row['tokens_per_step']} "
            f"| {row['ops_backend']}{', deterministic' * row['deterministic']} "
            f"| {row['step_ms']:.1f} | {row['tokens_per_s']:.0f} | {_share(row['mfu'])} "
            f"| {_share(row['mfu_full'])} | {row['peak_mb'] / 1024:.1f} |"
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


def main(argv: list[str] | None = None) -> int:
    """Check, run and write; 1 if a step failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--part", choices=("kernels", "train", "generate", "layouts"), help="one part alone"
    )
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    args = parser.parse_args(argv)
    use_wheels()
    if lacking := missing(args.dry_run):
        wheels = "make wheels, where there is a network, brings pure-Python ones"
        print(f"gpu: error: missing here: {'; '.join(lacking)} ({wheels})", file=sys.stderr)
        return 2
    about = machine()
    target = ROOT / ("runs/gpu-dry-run" if args.dry_run else "docs/gpu")
    work = ROOT / "runs" / ("gpu-dry-run" if args.dry_run else "gpu")
    for folder in (target, work):
        folder.mkdir(parents=True, exist_ok=True)
    for old in work.glob("*.json"):
        old.unlink()
    steps = [s for s in steps_of(sys.executable, work, args.dry_run) if args.part in (None, s.part)]
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{about['date']}-{about['device']}").strip("-")
    name += f"-{args.part}" if args.part else ""
    run_all(steps, lambda: write(about, steps, target / name))
    print(f"written: {(target / name).relative_to(ROOT)}.json and .md")
    return 1 if any(step.outcome.startswith(("FAILED", "stopped")) for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
