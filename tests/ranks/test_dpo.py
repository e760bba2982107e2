"""`megalite dpo`, whole: the same at every layout, and what the published formula says."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megalite import __main__ as front
from megalite.checkpoint.manifest import newest
from megalite.core.config import (
    Config,
)
from megalite.data.chat import Template
from megalite.data.preferences import Pairs, read_preferences, render_pair
from megalite.data.tokenizer import Tokenizer
from megalite.generate.cache import Part, Step
from megalite.generate.load import Place, load_share, open_checkpoint
from megalite.train.preference import REFERENCE
from tests.ranks.tuning import Tuned, pretrained

TOL, BETA = 1e-10, 0.3
SEEN = ("loss", "preferred", "margin")
KEYS = (*SEEN, "grad_norm", "tokens", *(f"val_{key}" for key in SEEN))
LAYOUTS = [
    {"tp": 2, "pp": 2, "zero": 0, "schedule": "zb-h1"},
    {"cp": 2, "dp": 2, "zero": 3},
    {"cp": 2, "tp": 2, "pp": 2},
    {"dp": 4, "zero": 1, "recompute": "selective"},
]


@pytest.fixture(scope="module")
def base(run_ranks, tmp_path_factory):
    """A short pretraining run, and pairs of many lengths."""

    def example(i: int) -> dict:
        texts = {"chosen": "to" * (1 + i % 5), "rejected": "ka" * (1 + i % 4) + "e"}
        return {"prompt": "say " + "ka" * (i % 7), **texts}

    return pretrained(tmp_path_factory.mktemp("dpo"), run_ranks, example)


@pytest.fixture(scope="module")
def tune(base):
    """Runs dpo at a layout."""

    def run(name: str, layout: dict, **how) -> Tuned:
        how |= {"data": {"dpo_beta": BETA}, "lr": 3e-3, "eval_interval": 2, "eval_samples": 4}
        return base.tune(name, layout, **how)

    return run


@pytest.fixture(scope="module")
def alone(tune):
    """One process."""
    return tune("one", {}, micro=2)


def numbers(lines: list, key: str) -> list:
    """All values that a run has written down for a key."""
    return [line[key] for line in lines if line.get(key) is not None]


def assert_equal(found: list, want: list):
    """What two runs have written down; but at step 1 the policy is the reference, every gain
    rounding noise, and `preferred` would compare its signs."""
    for key in KEYS:
        first = 1 if key == "preferred" else 0
        ours, theirs = numbers(found, key)[first:], numbers(want, key)[first:]
        assert theirs and ours == pytest.approx(theirs, rel=TOL), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_preferences_learned_at_a_layout_equal_one_process(alone, tune, layout):
    _, lines, out, _ = tune("-".join(f"{k}{v}" for k, v in layout.items()), layout)
    assert_equal(lines, alone[1])
    with np.load(alone[2] / REFERENCE) as ours, np.load(out / REFERENCE) as theirs:
        assert (
            set(ours)
            == set(theirs)
            == {f"{n}{e}" for n in ("train", "valid") for e in ("", "-sha256")}
        )
        for name in ("train", "valid"):
            assert (np.abs(ours[name] - theirs[name]) <= TOL).all()
            assert (ours[name] != 0).all()


def log_p(share, rendered) -> torch.Tensor:
    """log p of what a conversation is learned for, from logits of a model that sees it alone."""
    ids = rendered.ids[:-1]
    step = Step((Part(0, 0, tuple(ids), len(ids)),))
    each = share.run(step).log_softmax(-1)
    at = [i for i in range(len(ids)) if rendered.learned[i + 1]]
    return each[at, [rendered.ids[i + 1] for i in at]].sum()


def test_reference_and_loss_are_what_the_answers_alone_give(alone, base):
    """The published formula, from logits of generation, in which no pair is packed."""
    home = base.home
    template = Template(Tokenizer.load(home / "tokenizer.json"))
    pairs = Pairs([render_pair(template, p) for p in read_preferences(home / "valid.jsonl")], 96)
    place = Place(slots=1, dtype=torch.float64, device=torch.device("cpu"))
    ratios = []
    for run in (home / "base", alone[2]):
        share = load_share(open_checkpoint(run), place)
        each = [log_p(share, good) - log_p(share, bad) for good, bad in pairs.pairs]
        ratios.append(torch.stack(each))
    before, after = ratios
    with np.load(alone[2] / REFERENCE) as file:
        assert (np.abs(before.numpy() - file["valid"]) <= 1e-9).all()
    loss = -F.logsigmoid(BETA * (after - before)).mean()
    assert numbers(alone[1], "val_loss")[-1] == pytest.approx(loss.item(), rel=1e-9)
    right = ((after - before) > 0).double().mean()
    assert numbers(alone[1], "val_preferred")[-1] == pytest.approx(right.item())


def test_training_prefers_more_and_says_so(alone):
    said, lines, _, _ = alone
    assert numbers(lines, "loss")[0] == pytest.approx(math.log(2))
    assert numbers(lines, "margin")[0] == pytest.approx(0, abs=TOL)
    assert numbers(lines, "preferred")[-1] > 0.5 and numbers(lines, "margin")[-1] > 0
    assert numbers(lines, "val_loss")[-1] < numbers(lines, "val_loss")[0] < math.log(2)
    assert said.startswith("megalite dpo | ") and "40 pairs of answers" in said
    assert re.search(r"^reference of 47 pairs in ", said, re.M)
    assert re.search(
        r"^  held-out preferred 1\.00 \(7 of 7\) \| loss 0\.\d+ \| margin ", said, re.M
    )


def test_adapters_learn_preferences_at_a_layout_as_in_one_process(tune):
    _, want, _, _ = tune("lora-one", {}, micro=2, lora=2)
    _, lines, _, _ = tune("lora-many", {"tp": 2, "cp": 2, "zero": 2}, lora=2)
    assert_equal(lines, want)


def test_resumed_run_keeps_its_reference_at_another_layout(alone, tune, base):
    home = base.home
    tune("halves", {}, micro=2, save_interval=2)
    (home / "halves" / "checkpoints" / "step-00000004" / "MANIFEST.json").unlink()
    said, lines, _, _ = tune("halves", {"tp": 2, "dp": 2}, save_interval=2, resume=True)
    assert "reference of" not in said and "resumed at step 2" in said
    assert_equal(lines, alone[1])


def test_resumed_run_refuses_other_pairs(tune, base):
    home = base.home
    tune("moved", {}, micro=2, save_interval=2)
    (home / "moved" / "checkpoints" / "step-00000004" / "MANIFEST.json").unlink()
    with np.load(home / "moved" / REFERENCE) as file:
        kept = dict(file)
    kept["train-sha256"] = np.array("0" * 64)
    np.savez(home / "moved" / REFERENCE, **kept)
    said = tune("moved", {}, micro=2, save_interval=2, resume=True, code=2)[3]
    assert "is of other train pairs than this run's" in said
    (home / "moved" / REFERENCE).unlink()
    said = tune("moved", {}, micro=2, save_interval=2, resume=True, code=4)[3]
    assert "a run of megalite dpo begins with it" in said


@pytest.fixture
def at_home(base, monkeypatch):
    """The directory of `base`."""
    yield from base.entered(monkeypatch)


def test_command_learns_with_a_beta_of_its_own(at_home):
    line = "dpo --init-from base --data train.jsonl --out told --train-steps 1 --device cpu"
    assert front.main(line.split()) == 0
    config = Config.from_dict(json.loads(Path("told/config.json").read_text()))
    assert config.data.dpo_beta == 0.1 and config.model.hidden_size == 16
    assert newest(Path("told"))[1].step == 1


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        ("dpo --data synthetic", 2, "not for dpo (name a .jsonl file of pairs of answers, or"),
        ("sft --data train.jsonl --dpo-beta 0.1", 2, "--dpo-beta 0.1: not for sft"),
        ("pretrain --dpo-beta 0.1", 2, "--dpo-beta 0.1: not for pretrain (use megalite dpo)"),
        ("dpo --data train.jsonl --z-loss 0.1", 2, "--z-loss 0.1: is of the cross entropy"),
        ("dpo --data train.jsonl --dpo-beta -1", 2, "--dpo-beta -1: must be a finite number >= 0"),
        (
            "dpo --data train.jsonl --init-from base --seq-len 9 --device cpu --out short",
            3,
            "no pair of answers has at most --seq-len 9 tokens together",
        ),
    ],
)
def test_mistake_is_one_line(at_home, capsys, line, code, words):
    assert front.main(line.split()) == code
    said = capsys.readouterr()
    assert words in said.err and "Traceback" not in said.err + said.out
