"""`megalite inspect` and `convert one-file` on a checkpoint that eight ranks wrote."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import load_file

from megalite.__main__ import main
from megalite.data.indexed import IndexedWriter
from megalite.models.presets import num_parameters
from tests.ranks.test_resume import JOBS, MODEL, config_of, whole_tensors


@pytest.fixture(scope="module")
def run(run_ranks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = config_of({"tp": 2, "pp": 2, "dp": 2}).to_dict()
    run_ranks(f"{JOBS}:train_and_save", 8, config=config, out=str(folder / "checkpoints"))
    return folder


def test_one_file_holds_every_weight_whole(run, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    assert main(["convert", "one-file", str(run), "--out", str(out)]) == 0
    found = load_file(out)
    want = whole_tensors(run / "checkpoints" / "step-00000002")
    weights = {n.removeprefix("weights/"): t for n, t in want.items() if n.startswith("weights/")}
    assert found.keys() == weights.keys()
    assert all(np.array_equal(found[name], weights[name].numpy()) for name in found)
    assert f"{num_parameters(MODEL):,} numbers" in capsys.readouterr().out
    assert main(["convert", "one-file", str(run), "--out", str(out)]) == 2
    said = f"megalite: error: --out {out}: is there already (name another file)\n"
    assert capsys.readouterr().err == said


def test_inspect_shows_a_checkpoint(run, capsys):
    assert main(["inspect", str(run)]) == 0
    printed = capsys.readouterr().out
    assert "step 2" in printed and "files: 8" in printed
    assert f"tensors, {num_parameters(MODEL):,} numbers" in printed
    assert "layers.3.mlp.up.weight" in printed


def test_inspect_names_a_damaged_file(run, tmp_path, capsys):
    copy = tmp_path / "step-00000002"
    copy.mkdir()
    for file in (run / "checkpoints" / "step-00000002").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    shard = sorted(copy.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"\0")
    assert main(["inspect", str(copy)]) == 4
    assert f"{shard}: sha256 differs" in capsys.readouterr().err


def test_inspect_shows_a_dataset(tmp_path, capsys):
    with IndexedWriter(str(tmp_path / "data"), 100) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document([4, 99])
    for name in ("data", "data.bin", "data.idx"):
        assert main(["inspect", str(tmp_path / name)]) == 0
        assert "5 tokens as uint16, 2 documents" in capsys.readouterr().out


def test_inspect_of_nothing_is_one_line(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
