"""A checkpoint directory is whole and unchanged, or it is refused in one line. One process."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError

from megalite.checkpoint import manifest as mf
from megalite.checkpoint import save as save_module
from megalite.checkpoint.load import Reader, load_optimizer, load_weights
from megalite.checkpoint.save import check_space, remove_partial, save
from megalite.core.config import Config, ModelConfig, TrainConfig
from megalite.core.errors import CheckpointError, RunError, UserError
from megalite.core.mesh import Mesh
from megalite.core.params import named_parameters
from megalite.models.presets import num_parameters
from megalite.train.build import Engine, build_engine

CONFIG = Config(
    model=ModelConfig(num_layers=1, hidden_size=8, num_heads=2, vocab_size=13, seq_len=4),
    train=TrainConfig(micro_batch_size=1, global_batch_size=1),
)


def make_engine(seed: int = 1) -> Engine:
    config = replace(CONFIG, train=replace(CONFIG.train, seed=seed))
    return build_engine(config, Mesh({}), device=torch.device("cpu"), dtype=torch.float32)


def facts(step: int) -> mf.Manifest:
    config = json.loads(json.dumps(CONFIG.to_dict()))
    return mf.Manifest(
        step=step, samples=2 * step, tokens=8 * step, optimizer_steps=step, config=config,
        made_with={}
    )  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run directory with checkpoints of steps 1 to 3, each with the weights of that seed."""
    for step in (1, 2, 3):
        engine = make_engine(seed=step)
        save(tmp_path / "checkpoints", engine.optimizer, engine.mesh, facts(step))
    return tmp_path


def step_dir(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def shard(run, step):
    return step_dir(run, step) / "shard-00000.safetensors"


def weights_of(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in named_parameters(engine.stages[0])}


def load_into(directory, engine):
    load_optimizer(Reader(directory, mf.read(directory)), engine.optimizer)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def rewrite(directory, change):
    """Change the manifest and sign it again: what a hostile writer would do."""
    tree = json.loads((directory / mf.NAME).read_text())
    del tree["sha256"]
    change(tree)
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    text = json.dumps({**tree, "sha256": digest}, indent=1, sort_keys=True) + "\n"
    (directory / mf.NAME).write_text(text)


def test_saved_numbers_come_back(run):
    directory, manifest, passed_over = mf.newest(run)
    assert (directory, passed_over) == (step_dir(run, 3), [])
    assert replace(manifest, tensors={}, files={}) == facts(3)
    engine = make_engine(seed=9)
    load_optimizer(Reader(directory, manifest), engine.optimizer)
    assert same(weights_of(engine), weights_of(make_engine(seed=3)))
    assert engine.optimizer.step_count == 3


def test_weights_alone_come_back(run):
    engine = make_engine(seed=9)
    reader = Reader(step_dir(run, 2), mf.read(step_dir(run, 2)))
    load_weights(reader, dict(named_parameters(engine.stages[0])))
    assert same(weights_of(engine), weights_of(make_engine(seed=2)))


def test_step_directory_is_a_path_to_itself(run):
    assert mf.newest(step_dir(run, 1))[1].step == 1


def test_any_changed_byte_of_the_manifest_is_refused(run):
    path = step_dir(run, 1) / mf.NAME
    whole = path.read_bytes()
    mf.read(path.parent)
    assert len(whole) > 5000
    # Every byte at both ends, and some of the rest; 0x20 turns letters into others and blanks to
    # NUL.
    places = [*range(150), *range(150, len(whole) - 150, 61), *range(len(whole) - 150, len(whole))]
    for at in places:
        flip = 0x20 if at % 2 else 0x01
        path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match=r"MANIFEST\.json: .*\(file damaged\)"):
            mf.read(path.parent)


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_cut_manifest_is_refused(run, keep):
    path = step_dir(run, 1) / mf.NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"\(file damaged\)"):
        mf.read(path.parent)


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", "[" * 100_000, '{"sha256": 1}', "\xff"])
def test_other_text_is_no_manifest(run, text):
    path = step_dir(run, 1) / mf.NAME
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"\(file damaged\)"):
        mf.read(path.parent)


def test_every_changed_byte_of_a_shard_is_refused(run):
    manifest = mf.read(step_dir(run, 1))
    whole = shard(run, 1).read_bytes()
    for at in range(0, len(whole), 97):
        shard(run, 1).write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match="sha256 differs from the manifest"):
            mf.check_files(step_dir(run, 1), manifest)


def test_files_that_are_not_as_listed_are_refused(run):
    manifest, path = mf.read(step_dir(run, 1)), shard(run, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    size = len(whole)
    with pytest.raises(CheckpointError, match=f"{size - 1} bytes, the manifest says {size}"):
        mf.check_files(path.parent, manifest)
    shutil.copy(shard(run, 2), path)  # a sound file, of another step
    with pytest.raises(CheckpointError, match="sha256 differs"):
        mf.check_files(path.parent, manifest)
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        mf.check_files(path.parent, manifest)


def test_shard_that_cannot_be_read_is_refused(run, monkeypatch):
    def broken(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(mf, "file_sha256", broken)
    with pytest.raises(CheckpointError, match=r"shard-00000\..*: cannot be read \(Input/output"):
        mf.newest(step_dir(run, 1))


def test_file_name_that_leaves_the_directory_is_refused(run):
    directory = step_dir(run, 1)
    (run / "checkpoints" / "secret").write_bytes(shard(run, 1).read_bytes())

    def move_out(tree):
        tree["files"]["../secret"] = tree["files"].pop("shard-00000.safetensors")
        for tensor in tree["tensors"].values():
            for box in tensor["boxes"]:
                box["file"] = "../secret"

    rewrite(directory, move_out)
    with pytest.raises(CheckpointError, match=r"file name '\.\./secret' leaves the directory"):
        mf.newest(directory)


def test_box_in_a_file_that_is_not_listed_is_refused(run):
    name = next(n for n in mf.read(step_dir(run, 1)).tensors if n.startswith("weights/"))
    rewrite(
        step_dir(run, 1),
        lambda tree: tree["tensors"][name]["boxes"][0].update(file="../secret"),
    )
    with pytest.raises(CheckpointError, match="edited by hand"):
        mf.read(step_dir(run, 1))


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda tree: tree.update(format=2), r"format 2, this version reads 1"),
        (lambda tree: tree.pop("format"), r"format None, this version reads 1"),
        (lambda tree: tree.pop("step"), "edited by hand"),
        (lambda tree: tree.update(more=1), "edited by hand"),
        (lambda tree: tree.update(tensors=[1]), "edited by hand"),
        (lambda tree: tree["tensors"].update(x={"boxes": 3}), "edited by hand"),
    ],
)
def test_manifest_of_another_kind_is_refused(run, change, text):
    rewrite(step_dir(run, 1), change)
    with pytest.raises(CheckpointError, match=text):
        mf.read(step_dir(run, 1))


def test_damaged_ones_are_passed_over_with_the_reason(run):
    shard(run, 3).write_bytes(shard(run, 3).read_bytes()[:-4])
    (step_dir(run, 2) / mf.NAME).unlink()
    directory, manifest, passed_over = mf.newest(run)
    assert (directory, manifest.step) == (step_dir(run, 1), 1)
    assert len(passed_over) == 2
    assert passed_over[0].startswith(f"{shard(run, 3)}: ") and "bytes" in passed_over[0]
    assert passed_over[1].startswith(f"{step_dir(run, 2) / mf.NAME}: not there")


def test_nothing_left_is_an_error_that_names_the_newest(run):
    for step in (1, 2, 3):
        shard(run, step).unlink()
    with pytest.raises(CheckpointError, match=r"step-00000003.*missing"):
        mf.newest(run)


def test_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint found"):
        mf.newest(tmp_path)
    with pytest.raises(CheckpointError, match="no such directory"):
        mf.newest(tmp_path / "absent")


def test_unfinished_save_is_ignored_and_removed(run):
    shutil.copytree(step_dir(run, 3), run / "checkpoints" / ".partial-00000009")
    assert mf.newest(run)[1].step == 3
    remove_partial(run / "checkpoints")
    assert sorted(d.name for d in (run / "checkpoints").iterdir()) == [
        f"step-{n:08d}" for n in (1, 2, 3)
    ]


def test_same_step_saved_again_takes_the_place(run):
    engine = make_engine(seed=77)
    save(run / "checkpoints", engine.optimizer, engine.mesh, facts(2))
    fresh = make_engine(seed=9)
    load_into(step_dir(run, 2), fresh)
    assert same(weights_of(fresh), weights_of(engine))
    assert len(list((run / "checkpoints").iterdir())) == 3


FULL = OSError(28, "No space left on device")
FAILURES = [
    ("save_file", FULL, "write"),
    ("save_file", SafetensorError("I/O error: No space left on device (os error 28)"), "write"),
    ("_make_empty", FULL, "prepare"),
    ("_sync_file", FULL, "write"),
    ("_commit", FULL, "commit"),
]


@pytest.mark.parametrize("where, error, what", FAILURES)
def test_failing_write_leaves_the_earlier_ones(run, monkeypatch, where, error, what):
    def fail(*args):
        raise error

    monkeypatch.setattr(save_module, where, fail)
    engine = make_engine()
    text = f"cannot {what}: .*No space left on device.*earlier checkpoints are intact"
    with pytest.raises(RunError, match=text):
        save(run / "checkpoints", engine.optimizer, engine.mesh, facts(3))
    assert [d.name for d in mf.step_dirs(run / "checkpoints")] == [
        f"step-{n:08d}" for n in (3, 2, 1)
    ]
    assert not list((run / "checkpoints").glob(".partial-*"))
    assert mf.newest(run)[2] == []


def test_half_a_shard_on_a_full_disk_is_removed(run, monkeypatch):
    def half(data, path):
        path.write_bytes(b"half")
        raise FULL

    monkeypatch.setattr(save_module, "save_file", half)
    engine = make_engine()
    with pytest.raises(RunError):
        save(run / "checkpoints", engine.optimizer, engine.mesh, facts(4))
    assert mf.newest(run)[1].step == 3 and not list((run / "checkpoints").glob(".partial-*"))


def test_nothing_but_safetensors_and_json_is_written(run):
    names = {path.name for path in run.rglob("*") if path.is_file()}
    assert names == {mf.NAME, "shard-00000.safetensors"}
    data = shard(run, 1).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    stored = sum(v["data_offsets"][1] - v["data_offsets"][0] for v in header.values())
    assert stored == 3 * 4 * num_parameters(CONFIG.model)  # weights and two moments, in float32


@pytest.mark.parametrize(
    "change, text",
    [
        ({"hidden_size": 16}, r"mlp\.up\.bias: checkpoint is \[32\], model wants \[64\]"),
        ({"num_layers": 2}, r"layers\.1\..* is not in this checkpoint"),
    ],
)
def test_other_model_is_refused_by_name(run, change, text):
    config = replace(CONFIG, model=replace(CONFIG.model, **change))
    engine = build_engine(config, Mesh({}), device=torch.device("cpu"), dtype=torch.float32)
    with pytest.raises(CheckpointError, match=text):
        load_into(step_dir(run, 1), engine)


def test_hole_in_a_tensor_is_refused(run):
    directory = step_dir(run, 1)
    manifest = mf.read(directory)
    name, tensor = next((n, t) for n, t in manifest.tensors.items() if len(t.shape) == 2)
    rows, columns = tensor.shape
    box = replace(tensor.boxes[0], box=((0, rows - 1), (0, columns)))
    holed = replace(manifest, tensors={**manifest.tensors, name: replace(tensor, boxes=(box,))})
    with pytest.raises(
        CheckpointError, match=rf"{columns * (rows - 1)} of {columns * rows} numbers"
    ):
        load_optimizer(Reader(directory, holed), make_engine().optimizer)


def test_space_is_checked_before_the_run(tmp_path, monkeypatch):
    engine = make_engine()
    check_space(tmp_path, engine.optimizer, engine.mesh)
    needed = 12 * num_parameters(CONFIG.model)

    def disk_with(free):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    disk_with(needed)
    check_space(tmp_path, engine.optimizer, engine.mesh)
    disk_with(needed - 1)
    with pytest.raises(UserError, match=r"--out .*: 0\.0 MiB free, a checkpoint needs 0\.0 MiB"):
        check_space(tmp_path, engine.optimizer, engine.mesh)
