"""The command line: what it reads, what it refuses, what wins. Exact lines: test_front_door.py."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import tyro
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.core.check_values import flag
from megalite.core.cli import field_docs, options_of, parse
from megalite.core.config import Config, ModelConfig, OptimConfig, PathText
from megalite.core.errors import UserError

MODELS = {"wide": {"hidden_size": 512, "num_heads": 8}}
RECIPES = {
    "small": lambda: Config(
        model=ModelConfig(hidden_size=64, num_layers=7, dropout=0.5), optim=OptimConfig(lr=0.25)
    )
}


@dataclass(frozen=True, kw_only=True)
class Flat:
    """A schema of a data verb."""

    source: tyro.conf.Positional[Path]
    """File to read."""
    note: tyro.conf.Positional[str] = "none"
    """Words to add."""
    out: PathText = "out.bin"
    """File to write."""
    size: int = 3
    """How many."""
    share: float | None = None
    """What part (None: all)."""
    kind: Literal["a", "b"] = "a"
    """Which."""
    names: tuple[str, ...] = ()
    """Several words."""
    loud: bool = False
    """Say more."""


def config_of(*argv):
    return parse(argv, Config, models=MODELS, recipes=RECIPES, prog="megalite pretrain")


def flat_of(*argv):
    return parse(argv, Flat, prog="megalite thing")


def refusal(read, *argv):
    with pytest.raises(UserError) as caught:
        read(*argv)
    return str(caught.value)


def test_no_arguments_give_the_defaults():
    assert config_of() == Config()


def test_flags_of_every_kind_are_read():
    made = flat_of("x", "hi you", "--size", "4", "--share=0.5", "--kind=b", "--names=p,q", "--loud")
    assert made == Flat(
        source=Path("x"), note="hi you", size=4, share=0.5, kind="b", names=("p", "q"), loud=True
    )


def test_positional_text_may_begin_with_a_dash_after_two_dashes():
    assert flat_of("--size=5", "--", "a", "--help") == Flat(source=Path("a"), note="--help", size=5)


def test_value_may_begin_with_dashes_after_an_equals_sign():
    assert config_of("--sample-prompt=--x =y").train.sample_prompt == "--x =y"


def test_none_and_empty_undo_what_a_recipe_set():
    assert config_of("--num-kv-heads", "None", "--valid-data", "") == Config()


def test_list_is_comma_separated():
    assert config_of("--pp-layers", "3,3,2,2").layout.pp_layers == (3, 3, 2, 2)


def test_switch_has_a_no_form():
    assert config_of("--no-sequence-parallel").layout.sequence_parallel is False
    assert config_of("--sequence-parallel").layout.sequence_parallel is True


def test_home_is_expanded_in_paths_only(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    made = config_of("--out=~/run", "--sample-prompt=~/x")
    assert (made.train.out, made.train.sample_prompt) == (f"{tmp_path}/run", "~/x")
    assert flat_of("~/in").source == tmp_path / "in"


def test_model_wins_over_recipe_and_flags_win_over_both():
    made = config_of("--recipe", "small", "--model", "wide", "--num-heads", "4")
    assert made.optim.lr == 0.25  # recipe
    assert made.model == ModelConfig(hidden_size=512, num_heads=4)  # a model is whole: no 7 layers


def test_order_of_arguments_does_not_matter():
    argv = ["--recipe=small", "--model=wide", "--num-heads=4", "--lr=1"]
    assert config_of(*argv) == config_of(*reversed(argv))


@pytest.mark.parametrize("is_directory", [True, False])
def test_config_file_is_a_starting_point(tmp_path, is_directory):
    run = RECIPES["small"]()
    (tmp_path / "config.json").write_text(json.dumps(run.to_dict()))
    place = tmp_path if is_directory else tmp_path / "config.json"
    assert config_of("--config", str(place)) == run
    assert config_of(f"--config={place}", "--lr=1").optim == OptimConfig(lr=1.0)


BAD_FILES = {
    "lr = 3": "not JSON (Expecting value: line 1 column 1 (char 0))",
    "[" * 100_000: "not JSON (",
    '{"optim": {"lr": NaN}}': "--lr nan: must be a finite number > 0",
    '{"optim": {"lr": "x"}}': "--lr x: expected a number",
    '{"optim": {"lrr": 1}}': "config optim: unknown key 'lrr' (written by another version?)",
    '{"train": {"device": "tpu"}}': "--device tpu: expected one of auto, cpu, cuda",
    '{"train": {"resume": 1}}': "--resume 1: expected true or false",
    '{"layout": {"pp_layers": [1, "2"]}}': "--pp-layers (1, '2'): expected integers as 3,3,2,2",
}


@pytest.mark.parametrize("text", BAD_FILES, ids=lambda text: text[:20])
def test_damaged_config_file_is_refused_by_name(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    assert refusal(config_of, f"--config={path}").startswith(f"--config {path}: {BAD_FILES[text]}")


NEIGHBOURS = [
    ("--learing-rate", "--lr"),
    ("--learning_rate", "--lr"),
    ("--layers", "--num-layers"),
    ("--batch-size", "--micro-batch-size"),
    ("--warmup", "--warmup-steps"),
    ("--tensor-model-parallel-size", "--tp"),
    ("--pipeline-model-parallel-size", "--pp"),
    ("--no-sequence-paralel", "--sequence-parallel"),
    ("--save", "--save-interval"),
    ("-lr", "--lr"),
    ("--recpie", "--recipe"),
]


@pytest.mark.parametrize("typed, meant", NEIGHBOURS)
def test_unknown_option_names_its_neighbour(typed, meant):
    assert refusal(config_of, typed, "3") == f"unknown option {typed} (did you mean {meant}?)"


def test_option_like_nothing_is_not_given_a_neighbour():
    assert "did you mean" not in refusal(config_of, "--xyzzy", "3")


@pytest.mark.parametrize(
    "argv, text",
    [
        ([], "SOURCE: is required (see megalite thing --help)"),
        (["a", "b", "c"], "unexpected argument 'c' (see megalite thing --help)"),
        (["a", "-5"], "unknown option -5 (put -- before text that begins with -)"),
        (["a", ""], "NOTE: must not be empty"),
        (["a", "--source", "b"], "unknown option --source (put -- before text that begins with -)"),
        (["a", "--out="], "--out: must not be empty"),
        (["a", "--size", "1.5"], "--size 1.5: expected an integer"),
        (["a", "--size", "9" * 70], f"--size {'9' * 57}...: must be at most 2147483647"),
        (["a", "--share", "nan"], "--share nan: must be a finite number"),
        (["a", "--loud=yes"], "--loud: takes no value (use --loud or --no-loud)"),
        (["a", "--loud", "--no-loud"], "--loud: given twice"),
    ],
)
def test_flat_schema_refuses(argv, text):
    assert refusal(flat_of, *argv) == text


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_grouped_and_ends_the_program(word, capsys):
    with pytest.raises(SystemExit) as stop:
        config_of(word, "--nonsense")
    assert stop.value.code == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    groups = [f.name for f in dataclasses.fields(Config)]
    places = [shown.out.index(f"{name} options") for name in ["start", *groups]]
    assert places == sorted(places)
    assert all(flag(o.name) in shown.out for o in options_of(Config))
    assert "--no-sequence-parallel" in shown.out
    assert field_docs(OptimConfig)["lr"] in shown.out


WORDS = st.sampled_from(
    ["--lr", "--lr=1", "--tp", "2", "-1", "--", "=", "--=", "-", "", "nan", "--no-bias", "--bias=0"]
    + ["--pp-layers", "1,", "3,,1", "--model", "wide", "--config", "--device", "cpu", "\x00", "\n"]
)


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(st.lists(WORDS | st.text(max_size=4), max_size=4).filter(lambda a: "-h" not in a))
def test_any_words_give_a_config_or_one_refusal(argv):
    try:
        assert isinstance(config_of(*argv), Config)
    except UserError as error:
        assert str(error)
        assert "cannot read the arguments" not in str(error)  # ours came before tyro's
