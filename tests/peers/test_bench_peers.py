"""tools/bench_peers.py starts torch's own systems from our weights, and losses agree."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "bench_peers.py"
pytestmark = pytest.mark.peers


def run_tool(out: Path, *options: str) -> list[dict]:
    command = [sys.executable, str(TOOL), "--workload", "tiny", "--json", str(out)]
    small = ["--rounds", "1", "--steps", "1", "--warmup", "1"]
    done = subprocess.run([*command, *small, *options], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    ("layout", "peer"),
    [
        ("one", "torch"),
        ("dp2-zero1", "torch-ddp"),
        ("dp2-zero3", "torch-fsdp2"),
        ("tp2", "torch-dtensor"),
        ("tp2", "torch-dtensor-fused"),
        ("pp2", "torch-pipelining"),
    ],
)
def test_losses_agree_with_torch_at_each_step(layout: str, peer: str, tmp_path: Path) -> None:
    (found,) = run_tool(tmp_path / "out.json", "--layout", layout, "--only", peer)
    assert found["worst_loss_difference"] < 1e-5
    assert [len(losses) for losses in found["losses"].values()] == [3, 3]
    for row in found["rows"]:
        assert list(row)[:4] == ["system", "layout", "workload", "world"]
        assert row["cpu_s_per_step"] > 0 and row["loss_last"] < row["loss_first"]


def test_peer_that_is_not_there_is_listed_as_not_run(tmp_path: Path) -> None:
    (found,) = run_tool(tmp_path / "out.json", "--layout", "one", "--only", "nanogpt")
    assert found["rows"][0]["system"] == "nanogpt"
    assert "--peer nanogpt=PATH" in found["rows"][0]["not_run"]
