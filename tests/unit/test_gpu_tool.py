"""tools/gpu.py and tools/bench_kernels.py as far as a CPU allows; the rest needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))

import gpu  # noqa: E402


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
    gpu.draw(rows, tmp_path / "bars.svg")
    assert "adamw 1000" in (tmp_path / "bars.svg").read_text()
