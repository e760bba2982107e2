"""`megalite sft` from a run of `megalite pretrain`: the same at every layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megalite import __main__ as front
from megalite.checkpoint.load import Reader
from megalite.checkpoint.manifest import newest
from megalite.core.config import (
    Config,
)
from megalite.core.errors import UserError
from megalite.generate.cache import Part, Step
from megalite.generate.load import Place, load_share, open_checkpoint
from megalite.layers.linear import is_adapter
from megalite.train.merge import MergeArgs, merge_lora
from tests.ranks.tuning import Tuned, pretrained

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
    """A short pretraining run, and conversations of many lengths."""

    def example(i: int) -> dict:
        return {"prompt": "say " + "ka" * (i % 9), "completion": "to" * (1 + i % 5)}

    return pretrained(tmp_path_factory.mktemp("sft"), run_ranks, example)


@pytest.fixture(scope="module")
def tune(base):
    """Runs sft at a layout."""

    def run(name: str, layout: dict, *, pack: bool, lr: float = 1e-2, **how) -> Tuned:
        return base.tune(name, layout, data={"pack": pack}, lr=lr, **how)

    return run


@pytest.fixture(scope="module")
def alone(tune):
    """One process, packed and not."""
    return {pack: tune(f"one-{pack}", {}, pack=pack, micro=2) for pack in (True, False)}


@pytest.mark.parametrize(("layout", "pack"), LAYOUTS)
def test_fine_tuning_at_a_layout_equals_one_process(alone, tune, layout, pack):
    name = "-".join(f"{key}{value}" for key, value in layout.items())
    said, lines, *_ = tune(f"{name}-{pack}", layout, pack=pack)
    theirs, reference, *_ = alone[pack]
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
    lines = tune(f"lora-{name}", layout, pack=True, lora=3).lines
    for key in ("loss", "grad_norm", "val_loss", "val_exact_match"):
        want = [line[key] for line in adapted.lines if line.get(key) is not None]
        found = [line[key] for line in lines if line.get(key) is not None]
        assert len(want) >= 1 and found == pytest.approx(want, rel=TOL), key
    losses = [line["loss"] for line in adapted.lines if line.get("loss") is not None]
    assert losses[-1] < losses[0]


def weights_of(run: Path) -> dict:
    """All weights of a run's newest checkpoint, whole, and the names of what else is kept."""
    directory, manifest, _ = newest(run)
    reader = Reader(directory, manifest)
    names = [n.partition("/")[2] for n in manifest.tensors if n.startswith("weights/")]
    return {name: reader.whole(f"weights/{name}") for name in names}, manifest


def test_all_but_adapters_stays_bit_for_bit_and_has_no_state(adapted, base):
    before, _ = weights_of(base.home / "base")
    after, manifest = weights_of(adapted.out)
    assert all(torch.equal(after[name], before[name]) for name in before)
    added = after.keys() - before.keys()
    assert len(added) == 2 * 2 * 4 and all(is_adapter(name) for name in added)
    assert all((after[name] != 0).any() for name in added)
    states = {n.partition("/")[2] for n in manifest.tensors if not n.startswith("weights/")}
    assert states == added


def test_merged_run_computes_what_the_adapters_do(adapted, tmp_path, base):
    merged = tmp_path / "merged"
    merge_lora(MergeArgs(checkpoint=str(adapted.out), out=str(merged)))
    place = Place(slots=1, dtype=torch.float64, device=torch.device("cpu"))
    step = Step((Part(0, 0, tuple(range(30)), 30),))
    runs = (adapted.out, merged, base.home / "base")
    ours, plain, before = (load_share(open_checkpoint(run), place).run(step) for run in runs)
    assert ((ours - plain).abs() <= TOL).all()
    assert ((ours - before).abs() > 1e-3).any()
    assert open_checkpoint(merged).model.lora_rank == 0
    assert (merged / "tokenizer.json").exists() and (merged / "chat_template.jinja").exists()
    with pytest.raises(UserError, match="has no adapters"):
        merge_lora(MergeArgs(checkpoint=str(merged), out=str(tmp_path / "again")))


def test_resumed_adapters_take_the_steps_that_were_left_at_another_layout(adapted, tune, base):
    tune("lora-halves", {"dp": 2, "zero": 1}, pack=True, lora=3, save_interval=2)
    newest_one = base.home / "lora-halves" / "checkpoints" / "step-00000004"
    (newest_one / "MANIFEST.json").unlink()
    layout = {"tp": 2, "zero": 3}
    lines = tune("lora-halves", layout, pack=True, lora=3, save_interval=2, resume=True).lines
    for key in ("loss", "grad_norm", "val_loss"):
        want = [x[key] for x in adapted.lines if x.get(key) is not None]
        assert [x[key] for x in lines if x.get(key) is not None] == pytest.approx(want, rel=TOL)


def test_adapters_are_not_dropped_by_a_run_without_them(adapted, at_home, capfd):
    asked = ["sft", "--init-from", str(adapted.out), "--data", "train.jsonl", "--out", "dropped"]
    with pytest.raises(SystemExit) as raised:
        front.main([*asked, "--lora-rank", "0", "--device", "cpu"])
    assert raised.value.code == 4
    assert "was trained with --lora-rank 3, this run has 0" in capfd.readouterr().err


def test_header_says_what_is_learned_from(alone):
    for pack, (said, *_) in alone.items():
        words = "40 conversations in " + ("" if pack else "40 samples")
        assert words in said and "% of tokens learned" in said
    assert "in 40 samples" not in alone[True][0]


def test_held_out_loss_does_not_depend_on_packing(tune):
    """With the weights as they are: conversations of a window do not see each other."""
    found = []
    for pack in (True, False):
        lines = tune(f"still-{pack}", {}, pack=pack, micro=2, lr=1e-30).lines
        found.append(lines[-1]["val_loss"] if "val_loss" in lines[-1] else lines[-2]["val_loss"])
    assert found[0] == pytest.approx(found[1], rel=TOL)


def test_run_leaves_what_a_chat_needs(alone):
    said, _, out, _ = alone[True]
    assert f"megalite chat {out} --temperature 0" in said.splitlines()[-1]
    assert said.startswith("megalite sft | ")
    assert "held-out exact match 0." in said and " of 7)" in said
    assert (out / "chat_template.jinja").read_text().startswith("{% for message in messages %}")
    assert (out / "tokenizer.json").exists()


def test_resumed_sft_takes_the_steps_that_were_left(alone, tune, base):
    whole = alone[True].lines
    tune("halves", {}, pack=True, micro=2, save_interval=2)
    newest = base.home / "halves" / "checkpoints" / "step-00000004"
    (newest / "MANIFEST.json").unlink()
    lines = tune("halves", {}, pack=True, micro=2, save_interval=2, resume=True).lines
    for key in ("loss", "grad_norm", "lr", "val_loss"):
        assert [x[key] for x in lines if key in x] == [x[key] for x in whole if key in x], key


@pytest.fixture
def at_home(base, monkeypatch):
    """The directory of `base`."""
    yield from base.entered(monkeypatch)


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
