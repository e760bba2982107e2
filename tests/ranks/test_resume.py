"""A run that stops and goes on is the run that never stopped; a checkpoint is of no layout."""

from __future__ import annotations

import json
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megalite.checkpoint import manifest as mf
from megalite.core.config import Config, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from megalite.core.shard import box_shape, slices
from megalite.models.presets import num_parameters

JOBS = "tests.ranks.resume_jobs"
MODEL = ModelConfig(
    num_layers=4, hidden_size=24, num_heads=4, vocab_size=61, seq_len=12, init_std=0.1
)
UNTIED_KV = replace(
    MODEL, num_kv_heads=2, tie_embeddings=False, norm="rmsnorm", activation="swiglu",
    position="rope", bias=False, ffn_hidden_size=96,
)  # fmt: skip
DROPOUT = replace(MODEL, dropout=0.1)


def config_of(layout: dict, model: ModelConfig = MODEL, **other) -> Config:
    ramp = other.get("rampup_batch_size")
    train = TrainConfig(micro_batch_size=1, global_batch_size=4, rampup_batch_size=ramp)
    optim = OptimConfig(lr=1e-2, **other.get("optim", {}))
    return Config(model=model, layout=LayoutConfig(**layout), optim=optim, train=train)


def world_of(layout: dict) -> int:
    return prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))


RESUMED = [
    ({}, MODEL, {}),
    ({"tp": 2, "pp": 2}, DROPOUT, {}),
    ({"dp": 2, "zero": 1}, MODEL, {}),
    ({"pp": 2, "dp": 2, "zero": 3}, MODEL, {}),
    ({"cp": 2, "dp": 2}, MODEL, {}),
    ({"tp": 2, "pp": 2, "dp": 2}, MODEL, {}),
    ({"tp": 2, "dp": 2}, MODEL, {"optim": {"optimizer": "muon"}}),
    ({"pp": 2, "dp": 2, "zero": 2, "schedule": "zb-h2", "post_validation": True}, DROPOUT, {}),
    # Batches of 2 for six steps, of 3 for four and on into the part after the stop, then of 4.
    ({}, MODEL, {"rampup_batch_size": (2, 1, 24)}),
]


def name_of(value):
    return " ".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else ""


@pytest.mark.parametrize("layout, model, other", RESUMED, ids=name_of)
def test_resumed_run_equals_the_uninterrupted_one_bitwise(
    layout, model, other, run_ranks, tmp_path
):
    config, world = config_of(layout, model, **other).to_dict(), world_of(layout)
    out = str(tmp_path / "checkpoints")
    through = run_ranks(f"{JOBS}:train_through", world, config=config, out=out)
    resumed = run_ranks(f"{JOBS}:resume", world, config=config, run=str(tmp_path))
    for whole, rest in zip(through, resumed, strict=True):
        assert rest["fresh"] != rest["at_10"] == whole["at_10"] != whole["at_20"]
        assert rest["losses"] == whole["losses"][10:]
        assert rest["at_20"] == whole["at_20"]
    assert len(set(through[0]["losses"])) == 20


def test_resumed_fp16_run_goes_on_with_its_loss_scale_bitwise(run_ranks, tmp_path):
    # Too large at first, and twice as large after each three good steps: both halves of the run
    # skip steps.
    scaling = {"initial_loss_scale": 2.0**24, "loss_scale_window": 3}
    config = config_of({"tp": 2, "dp": 2}, optim=scaling).to_dict()
    job = {"config": config, "dtype": "float16"}
    through = run_ranks(f"{JOBS}:train_through", 4, out=str(tmp_path / "checkpoints"), **job)
    resumed = run_ranks(f"{JOBS}:resume", 4, run=str(tmp_path), **job)
    for whole, rest in zip(through, resumed, strict=True):
        assert rest["at_10"] == whole["at_10"] != whole["at_20"] == rest["at_20"]
        assert rest["losses"] == whole["losses"][10:]
        assert rest["scaling"] == whole["scaling"] == through[0]["scaling"]
    at_10, at_20 = through[0]["scaling"]
    assert 0 < at_10["steps"] < 10 and at_10["steps"] < at_20["steps"] < at_10["steps"] + 10
    # Of a fresh scale the next steps would be others.
    assert at_10["scale"] < 2.0**24 and (at_10["good_steps"], at_10["tolerance"]) != (0, 2)


def whole_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, put together here; each number must be there exactly once."""
    manifest = mf.read(directory)
    mf.check_files(directory, manifest)
    files = {name: load_file(directory / name) for name in manifest.files}
    wholes = {}
    for name, saved in manifest.tensors.items():
        whole = torch.zeros(saved.shape)
        count = torch.zeros(saved.shape)
        for box in saved.boxes:
            numbers = files[box.file][box.key]
            assert tuple(numbers.shape) == box_shape(box.box)
            whole[slices(box.box)] = numbers
            count[slices(box.box)] += 1
        assert (count == 1).all(), name
        wholes[name] = whole
    stored = sum(tensor.numel() for file in files.values() for tensor in file.values())
    assert stored == sum(whole.numel() for whole in wholes.values())
    return wholes


SAVED = [
    ({"tp": 2, "pp": 2, "dp": 2, "zero": 1}, MODEL),
    ({"tp": 2, "pp": 2, "dp": 2, "zero": 0}, MODEL),
    ({"tp": 4, "dp": 2, "zero": 1}, UNTIED_KV),
    ({"pp": 2, "dp": 3, "zero": 3}, MODEL),
]
LOADED = [
    {},
    {"tp": 4},
    {"pp": 4},
    {"dp": 3},
    {"dp": 2, "zero": 3},
    {"tp": 2, "pp": 2, "vpp": 2, "schedule": "interleaved"},
]


@pytest.mark.parametrize("saved, model", SAVED, ids=name_of)
def test_checkpoint_loads_into_any_layout(saved, model, run_ranks, tmp_path):
    run_ranks(
        f"{JOBS}:train_and_save",
        world_of(saved),
        config=config_of(saved, model).to_dict(),
        out=str(tmp_path / "checkpoints"),
    )
    wholes = whole_tensors(tmp_path / "checkpoints" / "step-00000002")
    kinds = {name.partition("/")[0] for name in wholes}
    assert kinds == {"weights", "exp_avg", "exp_avg_sq"}
    assert sum(w.numel() for w in wholes.values()) == 3 * num_parameters(model)
    for layout in LOADED:
        seen = set()
        ranks = run_ranks(
            f"{JOBS}:load_elsewhere",
            world_of(layout),
            config=config_of(layout, model).to_dict(),
            run=str(tmp_path),
            weights_only=layout == {"tp": 4},
        )
        for rank in ranks:
            for name, box, numbers in rank:
                seen.add(name)
                part = wholes[f"weights/{name}"][slices(box)]
                assert torch.equal(torch.tensor(numbers), part), (layout, name, box)
        assert {f"weights/{name}" for name in seen} == {n for n in wholes if "weights/" in n}


MOVED = {
    "one": {},
    "tp2": {"tp": 2},
    "pp2 interleaved": {"pp": 2, "vpp": 2, "schedule": "interleaved"},
    "pp4 zb-h1": {"pp": 4, "schedule": "zb-h1"},
    "dp2 zero3": {"dp": 2, "zero": 3},
    "cp2 dp2 zero2": {"cp": 2, "dp": 2, "zero": 2},
    "tp2 pp2 dp2": {"tp": 2, "pp": 2, "dp": 2},
    "tp4 dp2 zero0": {"tp": 4, "dp": 2, "zero": 0},
}


@pytest.fixture(scope="module")
def stayed(run_ranks, tmp_path_factory):
    """Of each layout: the run that saved, its next losses, and its checkpoint's whole tensors."""
    folder = tmp_path_factory.mktemp("stayed")
    runs = {}
    for name, layout in MOVED.items():
        run, config = folder / name, config_of(layout).to_dict()
        losses = run_ranks(
            f"{JOBS}:train_save_and_go_on", world_of(layout), config=config, out=str(run)
        )
        runs[name] = run, losses[0], whole_tensors(run / "checkpoints" / "step-00000002")
    return runs


@pytest.mark.parametrize("target", MOVED)
def test_run_that_moves_is_the_run_that_stays(target, stayed, run_ranks, tmp_path):
    """All 7 pairs into a layout: numbers in every bit, the next losses to float32's rounding."""
    others = [name for name in MOVED if name != target]
    found = run_ranks(
        f"{JOBS}:move",
        world_of(MOVED[target]),
        config=config_of(MOVED[target]).to_dict(),
        runs={str(stayed[name][0]): str(tmp_path / name) for name in others},
    )
    for idx, name in enumerate(others):
        _, losses, wholes = stayed[name]
        moved = whole_tensors(tmp_path / name / "checkpoints" / "step-00000002")
        assert moved.keys() == wholes.keys()
        for tensor, whole in wholes.items():
            assert moved[tensor].numpy().tobytes() == whole.numpy().tobytes(), (name, tensor)
        assert len(losses) == 2 and len({tuple(each[idx]) for each in found}) == 1
        assert found[0][idx] == pytest.approx(losses, rel=0, abs=1e-6), name


def test_load_after_a_step_waits_for_what_the_step_sends(run_ranks, stayed, tmp_path):
    """A gather still under way would put the numbers of before over those that were loaded."""
    run, losses, wholes = stayed["one"]
    found = run_ranks(
        f"{JOBS}:move_with_gathers_that_come_late",
        2,
        config=config_of({"dp": 2, "zero": 1}).to_dict(),
        runs={str(run): str(tmp_path / "once"), f"{run}/": str(tmp_path / "again")},
    )
    moved = whole_tensors(tmp_path / "again" / "checkpoints" / "step-00000002")
    assert all(torch.equal(moved[tensor], whole) for tensor, whole in wholes.items())
    assert found[0][1] == pytest.approx(losses, rel=0, abs=1e-6)


CHAIN = [
    {"tp": 2, "dp": 2, "zero": 1},
    {"dp": 3, "zero": 3},
    {"tp": 4, "zero": 0},
    {"pp": 2, "dp": 2, "zero": 2},
]


def test_muon_run_that_changes_its_layout_on_the_way_is_the_one_that_did_not(run_ranks, tmp_path):
    def losses(layouts: list[dict], steps: int, run: Path) -> list[float]:
        found = []
        for layout in layouts:
            config = config_of(layout, UNTIED_KV, optim={"optimizer": "muon"})
            config = replace(config, train=replace(config.train, global_batch_size=12))
            job = {"config": config.to_dict(), "run": str(run), "steps": steps}
            found += run_ranks(f"{JOBS}:go_on", world_of(layout), **job)[0]
        return found

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    alone = losses([{}], 2 * len(CHAIN), tmp_path / "a")
    ours = losses(CHAIN, 2, tmp_path / "b")
    assert ours == pytest.approx(alone, rel=1e-10)
    last = mf.newest(tmp_path / "b")[1].tensors
    assert set(last) == set(mf.newest(tmp_path / "a")[1].tensors)
    momenta = {name for name in last if name.startswith("momentum/")}
    assert {name.split("/")[1].split(".")[0] for name in momenta} == {"layers"}


FAILURES = [(0, "_make_empty"), (3, "save_file"), (0, "save_file"), (0, "_commit")]


@pytest.mark.parametrize("who, how", FAILURES)
def test_full_disk_of_one_rank_stops_all_and_leaves_the_earlier_checkpoint(
    who, how, run_ranks, tmp_path
):
    layout = {"tp": 2, "pp": 2}
    config = config_of(layout).to_dict()
    found = run_ranks(
        f"{JOBS}:save_and_fail", 4, config=config, out=str(tmp_path), who=who, how=how
    )
    assert [rank for rank, one in enumerate(found) if not one["silent"]] == [who]
    assert "No space left on device" in found[who]["text"]
    assert all(one["newest"] == "step-00000001" and not one["passed_over"] for one in found)
    assert [d.name for d in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_all_ranks_read_the_checkpoint_that_the_first_one_chose(run_ranks, tmp_path):
    out = str(tmp_path / "checkpoints")
    job = {"config": config_of({}).to_dict(), "out": out}
    run_ranks(f"{JOBS}:train_through", 1, **job)
    run_ranks(f"{JOBS}:train_and_save", 1, **job)
    newest = tmp_path / "checkpoints" / "step-00000010"

    def choose(path, blind=()):
        return run_ranks(f"{JOBS}:choose", 3, run=str(path), blind=list(blind))

    for path in (tmp_path, newest):
        want = {"directory": newest.name, "step": 10, "passed_over": 0}
        assert choose(path) == [want] * 3
    assert [one["raised"] for one in choose(tmp_path, blind=[1])] == [
        *("PeerFailed", "CheckpointError", "PeerFailed"),
    ]
    (newest / "shard-00000.safetensors").write_bytes(b"")
    want = {"directory": "step-00000002", "step": 2, "passed_over": 0}
    assert choose(tmp_path) == [{**want, "passed_over": 1}, want, want]
    assert [one["raised"] for one in choose(newest)] == ["CheckpointError"] + 2 * ["PeerFailed"]


@pytest.mark.parametrize("layout", [{"tp": 2, "pp": 2}, {"pp": 2, "dp": 2}], ids=name_of)
@pytest.mark.parametrize("model", [MODEL, UNTIED_KV], ids=["tied", "untied"])
def test_pipeline_generates_what_one_process_does(layout, model, run_ranks):
    (alone,) = run_ranks(f"{JOBS}:greedy", 1, config=config_of({}, model).to_dict())
    together = run_ranks(
        f"{JOBS}:greedy", world_of(layout), config=config_of(layout, model).to_dict()
    )
    assert all(len(made) == 8 for made in alone)
    assert len({json.dumps(made) for made in alone}) == 3
    assert together == [alone] * len(together)
