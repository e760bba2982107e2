"""tools/gpu.py and tools/bench_kernels.py as far as a CPU allows; the rest needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import bench_kernels  # noqa: E402
import gpu  # noqa: E402
import gpu_report  # noqa: E402
import kernel_cases  # noqa: E402


def run(*args: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *args]
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True
    )


def test_what_is_missing_is_named_at_once(tmp_path):
    done = run("-S", "tools/gpu.py", PATH=str(tmp_path), PYTHONPATH="", CUDA_HOME="")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    for name in ("torch", "numpy", "safetensors", "matplotlib"):  # no wheel of ours brings them
        assert name in gpu.NEEDED
        assert f"the Python package {name}" in done.stderr
    assert "an NVIDIA driver" in done.stderr and "make wheels" in done.stderr


def test_dry_run_writes_figures_and_tables_and_touches_no_docs():
    before = sorted((ROOT / "docs").rglob("*"))
    done = run("tools/gpu.py", "--dry-run", "--part", "train")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted((ROOT / "docs").rglob("*")) == before
    written = sorted((ROOT / "runs" / "gpu-dry-run").glob("*-train.json"))[-1]
    made = json.loads(written.read_text())
    (step,) = made["steps"]
    assert step["outcome"] == "ok" and step["figures"][0]["tokens_per_step"] == 8 * 64
    assert str(ROOT) not in written.read_text()
    table = written.with_suffix(".md").read_text()
    assert "| tiny |" in table and "## Training steps" in table


def script(tmp_path, words: str, **fields) -> gpu.Step:
    command = [sys.executable, "-c", words]
    return gpu.Step("kernels", "script", command, tmp_path / "rows.json", **fields)


def test_step_without_end_is_stopped_with_all_that_it_started(tmp_path):
    """A child that holds the GPU on would be timed with the next step."""
    child = "import time; time.sleep(60)"
    words = (
        f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', '{child}']);"
        f"open({str(tmp_path / 'rows.json')!r}, 'w').write(str(child.pid)); child.wait()"
    )
    step = script(tmp_path, words, most=5.0)
    gpu.run_all([step], lambda ended: None)
    assert step.outcome == "stopped after 5 s" and step.seconds < 60
    status = Path(f"/proc/{step.figures}/stat")
    assert not status.exists() or status.read_text().split()[2] == "Z"


def test_what_is_written_after_each_step_is_whole(tmp_path):
    steps = [script(tmp_path, "print('first')"), script(tmp_path, "import sys; sys.exit(3)")]
    found = []

    def done(ended):
        gpu.write({"device": "CPU", "date": "today"}, steps, ended, tmp_path / "out")
        found.append(json.loads((tmp_path / "out.json").read_text())["steps"])

    gpu.run_all(steps, done)
    assert [step["outcome"] for step in found[0]] == ["ok", "not run yet"]
    assert [step["outcome"] for step in found[1]] == ["ok", "FAILED (3)"]
    assert found[1][0]["tail"] == ["first"]
    assert "| kernels | script | FAILED (3) |" in (tmp_path / "out.md").read_text()


def test_checks_run_beside_each_other_and_what_is_timed_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 2 * gpu.CORES_OF_A_CHECK)
    words = "import time; print(time.time()); time.sleep(1); print(time.time())"
    steps = [script(tmp_path, words, timed=timed) for timed in (False, False, True, True)]
    gpu.run_all(steps, lambda ended: None)
    spans = [tuple(map(float, step.tail)) for step in steps]
    assert spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]
    assert max(spans[0][1], spans[1][1]) <= spans[2][0] and spans[2][1] <= spans[3][0]


def test_another_system_s_failure_is_a_row_of_its_own():
    def fails():
        raise RuntimeError("no such kernel\nand more")

    systems = {"megalite": lambda: torch.ones(3), "torch": lambda: torch.ones(3), "liger": fails}
    case = kernel_cases.Case("op", (3,), 24, systems, goal=0.9)
    timer = bench_kernels.Timer(torch.device("cpu"), 2)
    rows = list(bench_kernels.rows_of(case, timer, torch.float32))
    assert [row.get("not_run") for row in rows] == [None, None, "RuntimeError: no such kernel"]
    assert "not run: RuntimeError" in bench_kernels.line_of(rows[2], dry=True)
    assert "| op 3 | liger | not run: RuntimeError: no such kernel |" in "\n".join(
        gpu_report._kernel_table(rows)
    )


def test_training_s_goals_and_what_is_compared_are_of_the_rows_they_name():
    row = {
        "workload": "gpt2-124m", "params": 124e6, "global_batch_size": 64, "seq_len": 1024,
        "micro_batch_size": 32, "dtype": "bfloat16", "steps": 10, "step_ms_least": 1.0,
        "step_ms_most": 9.0, "tokens_per_s": 1e5, "mfu_full": 0.5, "peak_mb": 1024.0,
    }  # fmt: skip
    torchs = {"ops_backend": "torch", "deterministic": False, "losses": [10.0, 8.0], "mfu": 0.41}
    fused = {"ops_backend": "fused", "deterministic": False, "losses": [10.0, 8.4, 7.0]}
    rows = [row | fused | {"mfu": 0.39, "step_ms": 4.0}, row | torchs | {"step_ms": 8.0}]
    rows.append(row | fused | {"mfu": 0.35, "step_ms": 5.0, "deterministic": True})
    lines = gpu_report._training_table(rows)
    assert [("missed" in line, "met" in line) for line in lines if "10 | " in line] == [
        (True, False), (False, False), (False, False)
    ]  # fmt: skip
    assert lines[-2:] == [
        "- gpt2-124m: losses of fused and torch's ops differ by 5.0e-02 at most, in 2 steps.",
        "- gpt2-124m: a step with --deterministic takes 1.250 times as long.",
    ]
    rows[0]["mfu"] = 0.41
    assert "40%: met" in "\n".join(gpu_report._training_table(rows))


def test_bench_has_each_system_beside_a_copy(tmp_path):
    out = tmp_path / "rows.json"
    done = run(
        "tools/bench_kernels.py",
        *("--dry-run", "--only", "optimizer", "--rounds", "2", "--json", str(out)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())
    assert [row["system"] for row in rows] == ["megalite", "torch"]
    for row in rows:
        assert row["ms"] > 0 and row["of_copy"] == row["copy_ms"] / row["ms"]
    assert rows[0]["goals"] == {"of_copy": 0.93} and rows[0]["met"] is None
    gpu_report.draw(rows, tmp_path / "bars.svg")
    assert "adamw 1000" in (tmp_path / "bars.svg").read_text()
