"""`megalite sft` from a run of `megalite pretrain`: the same at every layout."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalite import __main__ as front
from megalite.checkpoint.load import Reader
from megalite.checkpoint.manifest import newest
from megalite.core.config import (
    Config,
    DataConfig,
    LayoutConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from megalite.core.errors import UserError
from megalite.generate.cache import Part, Step
from megalite.generate.load import Place, load_share, open_checkpoint
from megalite.layers.linear import is_adapter
from megalite.train.merge import MergeArgs, merge_lora
from tests.unit.data.samples import make_tokenizer

JOBS = "tests.ranks.pretrain_jobs"
VOCAB = 300
TOL = 1e-10
LAYOUTS = [
    ({"tp": 2}, True),
    ({"tp": 2, "pp": 2, "dp": 2, "zero": 3}, True),
    ({"pp": 2, "dp": 2, "zero": 2, "schedule": "zb-h1"}, True),
    ({"cp": 2, "dp": 2}, True),
    ({"tp": 2, "dp": 2}, False),
    ({"tp": 2, "cp": 2, "pp": 2}, False),
    ({"dp": 4, "zero": 3}, False),
]


@pytest.fixture(scope="module")
def base(run_ranks, tmp_path_factory):
    """A directory with a short pretraining run, and conversations of many lengths."""
    home = tmp_path_factory.mktemp("sft")
    tokenizer = make_tokenizer(VOCAB)
    for name, count in (("train", 40), ("valid", 7)):
        with (home / f"{name}.jsonl").open("w") as file:
            for i in range(count):
                line = {"prompt": "say " + "ka" * (i % 9), "completion": "to" * (1 + i % 5)}
                file.write(json.dumps(line) + "\n")
    tokenizer.save(home / "tokenizer.json")
    config = Config(
        model=ModelConfig(
            num_layers=2, hidden_size=16, num_heads=2, vocab_size=VOCAB, seq_len=96,
            position="rope",
        ),
        data=DataConfig(tokenizer=str(home / "tokenizer.json")),
        train=TrainConfig(
            out=str(home / "base"), precision="fp64", device="cpu", train_steps=2,
            micro_batch_size=2, global_batch_size=8,
        ),
    )  # fmt: skip
    (ended,) = run_ranks(f"{JOBS}:train", 1, config=config.to_dict())
    assert ended["code"] == 0, ended
    return home, config


@pytest.fixture(scope="module")
def tune(base, run_ranks):
    """Runs sft at a layout; gives what rank 0 says and the lines of metrics."""
    home, config = base

    def run(
        name: str,
        layout: dict,
        *,
        pack: bool,
        micro: int = 1,
        lr: float = 1e-2,
        lora: int = 0,
        **train,
    ):
        world = 1
        for axis in ("tp", "pp", "cp", "dp"):
            world *= layout.get(axis, 1)
        out = home / name
        tuned = replace(
            config,
            model=replace(config.model, lora_rank=lora),
            layout=LayoutConfig(**layout),
            data=DataConfig(
                data=str(home / "train.jsonl"), valid_data=str(home / "valid.jsonl"), pack=pack
            ),
            optim=OptimConfig(lr=lr),
            train=replace(
                config.train, out=str(out), init_from=str(home / "base"), train_steps=4,
                micro_batch_size=micro, log_interval=1, **train,
            ),
        )  # fmt: skip
        ended = run_ranks(f"{JOBS}:train", world, config=tuned.to_dict())
        assert all(one["code"] == 0 for one in ended), ended
        lines = (out / "metrics.jsonl").read_text().splitlines()
        return ended[0]["out"], [json.loads(line) for line in lines], out

    return run


@pytest.fixture(scope="module")
def alone(tune):
    """One process, packed and not."""
    return {pack: tune(f"one-{pack}", {}, pack=pack, micro=2) for pack in (True, False)}


@pytest.mark.parametrize(("layout", "pack"), LAYOUTS)
def test_fine_tuning_at_a_layout_equals_one_process(alone, tune, layout, pack):
    name = "-".join(f"{key}{value}" for key, value in layout.items())
    said, lines, _ = tune(f"{name}-{pack}", layout, pack=pack)
    theirs, reference, _ = alone[pack]
    for key in ("loss", "grad_norm", "val_loss", "val_bits_per_byte", "val_exact_match"):
        want = [line[key] for line in reference if line.get(key) is not None]
        found = [line[key] for line in lines if line.get(key) is not None]
        assert len(want) >= 1 and found == pytest.approx(want, rel=TOL), key
    answers = [line for line in theirs.splitlines() if line.startswith("    ? ")]
    assert len(answers) == 3 and answers[0] in said


LORA = [
    {"tp": 2, "dp": 2, "zero": 1},
    {"tp": 2, "pp": 2, "dp": 2, "zero": 3},
    {"pp": 2, "dp": 2, "zero": 2, "schedule": "zb-h1"},
    {"cp": 2, "tp": 2, "sequence_parallel": False},
]


@pytest.fixture(scope="module")
def adapted(tune):
    """One process that learns adapters alone."""
    return tune("lora-one", {}, pack=True, micro=2, lora=3)


@pytest.mark.parametrize("layout", LORA)
def test_adapters_learned_at_a_layout_equal_one_process(adapted, tune, layout):
    name = "-".join(f"{key}{value}" for key, value in layout.items())
    _, lines, _ = tune(f"lora-{name}", layout, pack=True, lora=3)
    for key in ("loss", "grad_norm", "val_loss", "val_exact_match"):
        want = [line[key] for line in adapted[1] if line.get(key) is not None]
        found = [line[key] for line in lines if line.get(key) is not None]
        assert len(want) >= 1 and found == pytest.approx(want, rel=TOL), key
    losses = [line["loss"] for line in adapted[1] if line.get("loss") is not None]
    assert losses[-1] < losses[0]


def weights_of(run: Path) -> dict:
    """All weights of a run's newest checkpoint, whole, and the names of what else is kept."""
    directory, manifest, _ = newest(run)
    reader = Reader(directory, manifest)
    names = [n.partition("/")[2] for n in manifest.tensors if n.startswith("weights/")]
    return {name: reader.whole(f"weights/{name}") for name in names}, manifest


def test_all_but_adapters_stays_bit_for_bit_and_has_no_state(adapted, base):
    before, _ = weights_of(base[0] / "base")
    after, manifest = weights_of(adapted[2])
    assert all(torch.equal(after[name], before[name]) for name in before)
    added = after.keys() - before.keys()
    assert len(added) == 2 * 2 * 4 and all(is_adapter(name) for name in added)
    assert all((after[name] != 0).any() for name in added)
    states = {n.partition("/")[2] for n in manifest.tensors if not n.startswith("weights/")}
    assert states == added


def test_merged_run_computes_what_the_adapters_do(adapted, tmp_path, base):
    merged = tmp_path / "merged"
    merge_lora(MergeArgs(checkpoint=str(adapted[2]), out=str(merged)))
    place = Place(slots=1, dtype=torch.float64, device=torch.device("cpu"))
    step = Step((Part(0, 0, tuple(range(30)), 30),))
    runs = (adapted[2], merged, base[0] / "base")
    ours, plain, before = (load_share(open_checkpoint(run), place).run(step) for run in runs)
    assert ((ours - plain).abs() <= TOL).all()
    assert ((ours - before).abs() > 1e-3).any()
    assert open_checkpoint(merged).model.lora_rank == 0
    assert (merged / "tokenizer.json").exists() and (merged / "chat_template.jinja").exists()
    with pytest.raises(UserError, match="has no adapters"):
        merge_lora(MergeArgs(checkpoint=str(merged), out=str(tmp_path / "again")))


def test_resumed_adapters_take_the_steps_that_were_left_at_another_layout(adapted, tune, base):
    tune("lora-halves", {"dp": 2, "zero": 1}, pack=True, lora=3, save_interval=2)
    newest_one = base[0] / "lora-halves" / "checkpoints" / "step-00000004"
    (newest_one / "MANIFEST.json").unlink()
    layout = {"tp": 2, "zero": 3}
    _, lines, _ = tune("lora-halves", layout, pack=True, lora=3, save_interval=2, resume=True)
    for key in ("loss", "grad_norm", "val_loss"):
        want = [x[key] for x in adapted[1] if x.get(key) is not None]
        assert [x[key] for x in lines if x.get(key) is not None] == pytest.approx(want, rel=TOL)


def test_adapters_are_not_dropped_by_a_run_without_them(adapted, at_home, capfd):
    asked = ["sft", "--init-from", str(adapted[2]), "--data", "train.jsonl", "--out", "dropped"]
    with pytest.raises(SystemExit) as raised:
        front.main([*asked, "--lora-rank", "0", "--device", "cpu"])
    assert raised.value.code == 4
    assert "was trained with --lora-rank 3, this run has 0" in capfd.readouterr().err


def test_header_says_what_is_learned_from(alone):
    for pack, (said, _, _) in alone.items():
        words = "40 conversations in " + ("" if pack else "40 samples")
        assert words in said and "% of tokens learned" in said
    assert "in 40 samples" not in alone[True][0]


def test_held_out_loss_does_not_depend_on_packing(tune):
    """With the weights as they are: conversations of a window do not see each other."""
    found = []
    for pack in (True, False):
        _, lines, _ = tune(f"still-{pack}", {}, pack=pack, micro=2, lr=1e-30)
        found.append(lines[-1]["val_loss"] if "val_loss" in lines[-1] else lines[-2]["val_loss"])
    assert found[0] == pytest.approx(found[1], rel=TOL)


def test_run_leaves_what_a_chat_needs(alone):
    said, _, out = alone[True]
    assert f"megalite chat {out} --temperature 0" in said.splitlines()[-1]
    assert said.startswith("megalite sft | ")
    assert "held-out exact match 0." in said and " of 7)" in said
    assert (out / "chat_template.jinja").read_text().startswith("{% for message in messages %}")
    assert (out / "tokenizer.json").exists()


def test_resumed_sft_takes_the_steps_that_were_left(alone, tune, base):
    _, whole, _ = alone[True]
    tune("halves", {}, pack=True, micro=2, save_interval=2)
    newest = base[0] / "halves" / "checkpoints" / "step-00000004"
    (newest / "MANIFEST.json").unlink()
    _, lines, _ = tune("halves", {}, pack=True, micro=2, save_interval=2, resume=True)
    for key in ("loss", "grad_norm", "lr", "val_loss"):
        assert [x[key] for x in lines if key in x] == [x[key] for x in whole if key in x], key


@pytest.fixture
def at_home(base, monkeypatch):
    """The directory of `base`; pytest gets its signals back."""
    home, _ = base
    monkeypatch.chdir(home)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield home
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_command_takes_model_and_tokenizer_from_the_run_it_begins_from(at_home, capsys):
    line = "sft --init-from base --data train.jsonl --out told --train-steps 1 --device cpu"
    assert front.main(line.split()) == 0
    config = Config.from_dict(json.loads(Path("told/config.json").read_text()))
    assert config.model.hidden_size == 16 and config.model.position == "rope"
    assert Path("told/tokenizer.json").exists()
    line = f"{line} --hidden-size 32"
    with pytest.raises(SystemExit) as ended:
        front.main(line.replace("told", "other").split())
    assert ended.value.code == 4
    assert "was trained with --hidden-size 16, this run has 32" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("sft --data synthetic", 2, "--data synthetic: not for sft (name a .jsonl file"),
        ("pretrain --data train.jsonl", 2, "not for pretrain (preprocess it, or use megalite sft)"),
        ("sft --data train.jsonl --valid-data text", 2, "is not of the kind of --data"),
        ("sft --data none.jsonl", 3, "--data none.jsonl: no such file"),
        ("sft --data train.jsonl --device cpu", 2, "conversations need a tokenizer"),
        (
            "sft --data train.jsonl --init-from base --seq-len 4 --device cpu --out short",
            3,
            "no conversation has an answer within --seq-len 4",
        ),
        ("sft --data train.jsonl --tp 2", 2, "examples/launch.sh 2 sft --data train.jsonl --tp 2"),
    ],
)
def test_mistake_is_one_line(at_home, capsys, line, code, words):
    assert front.main(line.split()) == code
    said = capsys.readouterr()
    assert words in said.err and "Traceback" not in said.err + said.out
