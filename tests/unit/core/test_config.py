"""The Config: its fields, its ranges, its file form. Layout rows: tests/unit/test_front_door.py."""

import dataclasses
import json
import math
from typing import get_type_hints

import pytest

from megalite.core.check_values import RULE_OF, divisors, kinds_of, nearest
from megalite.core.cli import field_docs
from megalite.core.config import Config, LayoutConfig, ModelConfig, OptimConfig, TrainConfig
from megalite.core.errors import UserError
from megalite.train.recipes import RECIPES

GROUPS = [type(getattr(Config(), f.name)) for f in dataclasses.fields(Config)]


def numeric_fields():
    for group in GROUPS:
        for name, hint in get_type_hints(group).items():
            if set(kinds_of(hint)[0]) & {int, float}:
                yield group, name, hint


def refusal(group, **values):
    with pytest.raises(UserError) as caught:
        Config(**{group: type(getattr(Config(), group))(**values)}).check(1)
    return str(caught.value)


def test_field_names_are_unique_over_all_groups():
    names = [f.name for group in GROUPS for f in dataclasses.fields(group)]
    assert len(names) == len(set(names))


def test_every_field_is_documented():
    for group in GROUPS:
        docs = field_docs(group)
        missing = [f.name for f in dataclasses.fields(group) if not docs.get(f.name, "").strip()]
        assert not missing, f"{group.__name__}: {missing}"


def test_every_number_has_a_range():
    assert [name for _, name, _ in numeric_fields() if name not in RULE_OF] == []


def test_every_number_refuses_what_is_no_number():
    group_of = {type(getattr(Config(), f.name)): f.name for f in dataclasses.fields(Config)}
    for group, name, _ in numeric_fields():
        for bad in (math.nan, math.inf, -1, True, "3"):
            text = refusal(group_of[group], **{name: bad})
            assert text.startswith(f"--{name.replace('_', '-')} {bad}: "), text


def test_default_config_and_all_recipes_are_legal():
    Config().check(1)
    for make in RECIPES.values():
        layout = make().layout
        make().check(layout.tp * layout.pp * layout.cp * (layout.dp or 1))


LEGAL = [  # what larger systems refuse, and what sits on the edge of a rule
    ({"layout": LayoutConfig(pp=2, zero=0)}, 2),
    ({"layout": LayoutConfig(pp=4, zero=1), "train": TrainConfig(global_batch_size=4)}, 4),
    ({"layout": LayoutConfig(tp=1, sequence_parallel=True)}, 1),
    ({"layout": LayoutConfig(pp=3)}, 3),
    ({"layout": LayoutConfig(tp=4), "model": ModelConfig(vocab_size=50257)}, 4),
    ({"layout": LayoutConfig(tp=4), "model": ModelConfig(num_kv_heads=2)}, 8),
    ({"layout": LayoutConfig(tp=2, sequence_parallel=False), "model": ModelConfig(seq_len=255)}, 2),
    ({"layout": LayoutConfig(cp=2)}, 2),
    ({"layout": LayoutConfig(cp=2), "model": ModelConfig(seq_len=4)}, 2),
    ({"layout": LayoutConfig(cp=2, cp_form="ulysses"), "model": ModelConfig(seq_len=254)}, 2),
    (
        {
            "layout": LayoutConfig(tp=2, cp=2, cp_form="ulysses"),
            "model": ModelConfig(num_kv_heads=1, attention_dropout=0.1, sliding_window=3),
        },
        4,
    ),
    (
        {
            "layout": LayoutConfig(tp=4, cp=2, sequence_parallel=False),
            "model": ModelConfig(seq_len=252),
        },
        8,
    ),
    ({"layout": LayoutConfig(cp=8, cp_form="gather"), "model": ModelConfig(num_heads=1)}, 8),
    ({"layout": LayoutConfig(pp=2, vpp=2, schedule="interleaved")}, 2),
    ({"layout": LayoutConfig(pp=2, pp_layers=(1, 3))}, 2),
    ({"train": TrainConfig(precision="bf16", device="cpu")}, 1),
    ({"train": TrainConfig(precision="bf16", device="cuda")}, 1),
    ({"train": TrainConfig(precision="fp16", device="cpu")}, 1),
    ({"train": TrainConfig(precision="fp16"), "optim": OptimConfig(loss_scale=128.0)}, 1),
    ({"optim": OptimConfig(warmup_steps=100, clip_grad=0.0, weight_decay=0.0)}, 1),
    ({"model": ModelConfig(sliding_window=1, position="rope", dropout=0.99)}, 1),
]


@pytest.mark.parametrize("groups, world", LEGAL)
def test_legal_config_is_accepted(groups, world):
    Config(**groups).check(world)


def test_data_ranks_are_what_the_other_axes_leave():
    config = Config(layout=LayoutConfig(tp=2, pp=2), train=TrainConfig(global_batch_size=24))
    assert config.data_ranks(12) == 3
    assert config.num_microbatches(12) == 2


def test_json_round_trip_gives_the_same_config():
    config = Config(
        layout=LayoutConfig(pp=2, pp_layers=(3, 1), bucket_mb=2.5),
        model=ModelConfig(num_kv_heads=2, logit_soft_cap=30.0),
    )
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_partial_dict_keeps_the_other_defaults():
    assert Config.from_dict({"optim": {"lr": 0.5}}).optim.beta1 == OptimConfig().beta1


@pytest.mark.parametrize(
    "tree, text",
    [
        ({"optimizer": {}}, "config: unknown group 'optimizer'"),
        ({"optim": {"lrr": 1}}, "config optim: unknown key 'lrr'"),
        ({"optim": 3}, "config optim: expected an object"),
        ([], "config: expected an object"),
    ],
)
def test_foreign_dict_is_refused(tree, text):
    with pytest.raises(UserError, match=text):
        Config.from_dict(tree)


def test_divisors_and_nearest():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(49) == [1, 7, 49]
    assert nearest(divisors(4096), to=100, count=3) == [32, 64, 128]


def test_schedule_of_the_users_own_is_proven_at_the_microbatches_of_the_step(tmp_path):
    table = tmp_path / "mine.csv"
    train = TrainConfig(micro_batch_size=4, global_batch_size=8)
    config = Config(layout=LayoutConfig(pp=2, schedule=str(table)), train=train)
    table.write_text("F0@0,F1@0,B0@0,B1@0,R@0\nF0@1,F1@1,B0@1,B1@1,R@1\n")
    config.check(2)
    # One microbatch alone would run; of two, rank 0 wants to end the first before the second.
    table.write_text("F0@0,B0@0,F1@0,B1@0,R@0\nF0@1,F1@1,B0@1,B1@1,R@1\n")
    with pytest.raises(UserError) as caught:
        config.check(2)
    assert str(caught.value) == (
        "--schedule mine.csv: deadlock: rank 0 waits at B0@0 for B0@1 of rank 1; "
        "rank 1 waits at F1@1 for F1@0 of rank 0"
    )
    with pytest.raises(UserError, match="is written for 2 microbatches, the step has 4 "):
        dataclasses.replace(config, train=TrainConfig(global_batch_size=16)).check(2)


def ramp_of(*ramp, last=16):
    return Config(train=TrainConfig(global_batch_size=last, rampup_batch_size=ramp))


def test_batch_is_a_function_of_the_samples_taken():
    config = ramp_of(4, 4, 30)
    assert list(config.batch_sizes()) == [4, 8, 12, 16]
    at = {0: 4, 4: 4, 9: 4, 10: 8, 19: 8, 20: 12, 29: 12, 30: 16, 10**9: 16}
    assert {samples: config.batch_at(samples) for samples in at} == at
    assert {Config().batch_at(samples) for samples in (0, 7, 10**9)} == {16}


@pytest.mark.parametrize("ramp", [(4, 4, 30), (1, 1, 1), (2, 14, 1000), (8, 2, 77)])
def test_samples_after_some_steps_are_those_of_each_step(ramp):
    config, samples = ramp_of(*ramp), 0
    for step in range(200):
        assert config.samples_after(step) == samples
        samples += config.batch_at(samples)
    assert ramp_of(*ramp).samples_after(10**9) > 10**9
    assert Config().samples_after(7) == 7 * 16
