#!/usr/bin/env python3
"""Everything that needs a GPU, in one go: what `make gpu` calls.

    python3 tools/gpu.py                  kernels built, tested, sanitized and timed; training
                                          and generation timed; layouts verified, many ranks on it
    python3 tools/gpu.py --part kernels   or train, generate or layouts
    python3 tools/gpu.py --dry-run        the same steps at tiny sizes on a CPU

Uses the interpreter that runs it, and installs nothing: pure-Python packages that it lacks are
taken from vendor-wheels/, which `make wheels` fills on a machine with a network. Whatever else is
missing is named at once. Checks run beside each other where there are cores for it, and what is
timed runs alone; what matters most comes first, and each step has a limit. Every figure goes to
docs/gpu/DATE-DEVICE.json, and its tables to a Markdown file beside it, anew after each step, so
that what ends it early leaves all that was done; those of a dry run to runs/gpu-dry-run. What a
step printed is in runs/gpu.
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

from gpu_report import draw, report

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
BENCH = "bench"


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
    """What it has written to `rows`."""
    tail: list[str] = field(default_factory=list)
    process: subprocess.Popen | None = None


def steps_of(python: str, work: Path, dry: bool) -> list[Step]:
    """All that there is to do, what matters most first."""
    torchs, ours, deterministic = (_training(python, work, dry, *form) for form in FORMS)
    fp32, bf16 = (_generation(python, work, dry, precision) for precision in ("fp32", "bf16"))
    build, checks, bench = _kernels(python, work, dry)
    checks += [_layouts(python, work, dry, precision) for precision in ("fp32", "bf16")]
    return [build, *ours, *checks, bench, bf16, *torchs, fp32, *deterministic]


def _tool(python: str, name: str, path: Path, *args: str) -> list[str]:
    return [python, f"tools/{name}.py", "--json", str(path), *args]


def _kernels(python: str, work: Path, dry: bool) -> tuple[Step, list[Step], Step]:
    """Their build, what checks them, and what times them."""
    build = [python, "kernels/build.py", *(["--emulated"] if dry else _own_arch())]
    quick = "tests/kernels/test_adamw_kernel.py" if dry else "tests/gpu/test_kernels.py"
    pytest = [python, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider"]
    tests = [*pytest, quick if dry else "tests/gpu"]
    checks = [Step("kernels", "tests", tests, most=160, timed=False)]
    sanitizer = "compute-sanitizer"
    few = ["-k", "adamw or (softmax and causal) or (norm and (residual or rows_of_a_block))"]
    for kind, more in (("memcheck", ["--padding", "32"]), ("racecheck", [])):
        # Of ours alone; and torch asks the driver for things that it may not have.
        only = ["--kernel-name", "kns=megalite", "--report-api-errors", "no", *more]
        how = [_program(sanitizer) or sanitizer, "--tool", kind, "--error-exitcode", "9", *only]
        # Each tensor an allocation of its own: what is beyond one is not inside another.
        alone = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [*how, *pytest, quick, *few]
        check = Step("kernels", kind, command, most=160, timed=False, environment=alone)
        check.wants = sanitizer
        checks.append(check)
    path = work / "kernels.json"
    small = ["--dry-run", "--rounds", "2"] if dry else []
    bench = _tool(python, "bench_kernels", path, *small)
    return (
        Step("kernels", "build", build, most=60),
        checks,
        Step("kernels", BENCH, bench, path, most=140),
    )


def _layouts(python: str, work: Path, dry: bool, precision: str) -> Step:
    path = work / f"verify-{precision}.json"
    args = ["--random", "2" if dry else "40", "--max-ranks", "2" if dry else "8", "--steps", "2"]
    args += ["--device", "cpu" if dry else "cuda", "--precision", precision, "--json", str(path)]
    command = [python, "-m", "megalite", "verify", *args]
    return Step("layouts", f"verify {precision}", command, path, most=160, timed=False)


def _training(
    python: str, work: Path, dry: bool, backend: str, more: tuple[str, ...], count: int
) -> list[Step]:
    """Steps of each model."""
    if dry and backend != "torch":  # there is nothing to fuse
        return []
    steps = []
    for workload in ("tiny",) if dry else WORKLOADS:
        name = " ".join([workload, backend, *more])
        path = work / f"train-{name.replace(' ', '-')}.json"
        args = ["--workload", workload, "--layouts", "one", "--rounds", "1", *more]
        args += ["--steps", "2", "--warmup", "1"] if dry else ["--steps", str(count)]
        args += ["--device", "cpu" if dry else "cuda", "--ops-backend", backend]
        steps.append(Step("train", name, _tool(python, "bench_train", path, *args), path, most=85))
    return steps


def _generation(python: str, work: Path, dry: bool, precision: str) -> Step:
    path = work / f"generate-{precision}.json"
    args = ["--device", "cpu" if dry else "cuda", "--precision", precision]
    args += ["--shape", "gpt2-tiny", "--rounds", "1"] if dry else ["--rounds", "3"]
    command = _tool(python, "bench_generate", path, *args)
    return Step("generate", precision, command, path, most=50)


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
    if _program("nvcc") is None:
        found.append("CUDA's compiler (nvcc)")
    return found


def _program(name: str) -> str | None:
    """Where it is, if it is in PATH or beside CUDA's."""
    homes = (os.environ.get("CUDA_HOME"), "/usr/local/cuda")
    places = [shutil.which(name), *(shutil.which(name, path=f"{home}/bin") for home in homes)]
    return next(filter(None, places), None)


# -- running -----------------------------------------------------------------------------------


def run(step: Step, deadline: float) -> None:
    """Run a step until then or its own end, show what it prints, and keep what it gave."""
    print(f"{step.part}: {step.name}: {' '.join(step.command)}", flush=True)
    seconds = min(step.most, deadline - time.monotonic())
    if step.wants and _program(step.wants) is None:
        step.outcome = f"not run: no {step.wants} here"
    elif seconds <= 0:
        step.outcome = "not run: no time left"
    else:
        _run(step, seconds)
    print(f"{step.part}: {step.name}: {step.outcome} ({step.seconds:.0f} s)", flush=True)


def _run(step: Step, seconds: float) -> None:
    start, lines = time.monotonic(), list[str]()
    log = ROOT / "runs" / "gpu" / f"{step.part}-{step.name.replace(' ', '-')}.log"
    # A session of its own, so that all it has started can be ended with it.
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env={**os.environ, **step.environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    step.process = process

    def read() -> None:
        assert process.stdout is not None
        with open(log, "w", encoding="utf-8") as file:
            for line in process.stdout:
                print(f"  {step.name}: {line}", end="", flush=True)
                file.write(line)
                lines.append(without_places(line.rstrip()))

    # In a thread, as what has left the session may hold the pipe open for longer.
    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        process.wait(seconds)
        ends = {0: "ok"}.get(process.returncode, f"FAILED ({process.returncode})")
    except subprocess.TimeoutExpired:
        ends = f"stopped after {seconds:.0f} s"
    finally:
        _end(process)
    process.wait()
    reader.join(5)
    step.seconds = time.monotonic() - start
    step.tail = lines[-20:]
    step.outcome = ends
    if step.rows is not None and step.rows.exists():
        step.figures = json.loads(step.rows.read_text(encoding="utf-8"))


def _end(process: subprocess.Popen) -> None:
    """And all that it has started, if anything of that is left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_all(steps: list[Step], done: Callable[[Step], None]) -> None:
    """One after the other, but checks beside each other; `done` of each that has ended."""
    deadline = time.monotonic() + BUDGET
    beside = max(1, (os.cpu_count() or 1) // CORES_OF_A_CHECK)
    for timed, some in groupby(steps, key=lambda step: step.timed):
        with ThreadPoolExecutor(1 if timed else beside) as pool:
            group = list(some)
            running = {pool.submit(run, step, deadline): step for step in group}
            try:
                for ended in as_completed(running):
                    step = running[ended]
                    if error := ended.exception():
                        step.outcome = f"FAILED ({type(error).__name__}: {error})"
                        print(f"{step.part}: {step.name}: {step.outcome}", flush=True)
                    done(step)
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
    # Whoever owns the checkout; and whether it is that commit's.
    describe = ["describe", "--always", "--dirty"]
    git, commit = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *describe], ""
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


def write(about: dict[str, str], steps: list[Step], ended: Step, place: Path) -> None:
    """All that has been found so far; `ended` is the step that has just done so."""
    rows = [{key: getattr(step, key) for key in KEPT} for step in steps]
    for row in rows:
        row["command"] = [without_places(word) for word in row["command"]]
    tree = {**about, "steps": rows}
    text = json.dumps(tree, indent=1) + "\n"
    for suffix, words in ((".json", text), (".md", report(tree))):
        part = place.with_suffix(".part")
        part.write_text(words, encoding="utf-8")
        part.replace(place.with_suffix(suffix))  # whole, whenever this is ended
    if ended.name == BENCH and ended.figures:
        draw(ended.figures, place.with_suffix(".svg"))


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
    for folder in (target, work, ROOT / "runs" / "gpu"):
        folder.mkdir(parents=True, exist_ok=True)
    for old in work.glob("*.json"):
        old.unlink()
    steps = [s for s in steps_of(sys.executable, work, args.dry_run) if args.part in (None, s.part)]
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{about['date']}-{about['device']}").strip("-")
    name += f"-{args.part}" if args.part else ""
    written = f"{(target / name).relative_to(ROOT)}.json and .md"
    try:
        run_all(steps, lambda ended: write(about, steps, ended, target / name))
    except KeyboardInterrupt:
        print(f"gpu: interrupted; steps that had ended are in {written}", file=sys.stderr)
        return 130
    print(f"written: {written}")
    return 1 if any(step.outcome.startswith(("FAILED", "stopped")) for step in steps) else 0


if __name__ == "__main__":
    sys.exit(main())
