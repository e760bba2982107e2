"""Steps that do not wait for the gradient norm are those that do, in every bit."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest

from megalite.checkpoint import manifest as mf
from megalite.core.config import Config, LayoutConfig, ModelConfig, OptimConfig, TrainConfig

JOBS = "tests.ranks.steps_jobs"
TIED = ModelConfig(
    num_layers=4, hidden_size=24, num_heads=4, vocab_size=61, seq_len=12, init_std=0.1
)
UNTIED = replace(TIED, tie_embeddings=False, dropout=0.1)
STEPS = 6
NEVER, ALWAYS = 0.0, 1e-3


def config_of(layout: dict, model: ModelConfig, clip: float, **optim) -> dict:
    config = Config(
        model=model,
        layout=LayoutConfig(**{"schedule": "zb-h2", **layout}),
        optim=OptimConfig(clip_grad=clip, **optim),
        train=TrainConfig(micro_batch_size=1, global_batch_size=8),
    )
    return config.to_dict()


def world_of(layout: dict) -> int:
    return prod(layout.get(axis, 1) for axis in ("tp", "pp", "cp", "dp"))


LAYOUTS = [
    ({"pp": 2}, UNTIED, {}),
    ({"pp": 4}, UNTIED, {}),
    ({"pp": 2, "dp": 2, "zero": 1}, TIED, {}),
    ({"pp": 2, "dp": 2, "zero": 2}, UNTIED, {"optimizer": "muon"}),
    ({"pp": 2, "dp": 2, "zero": 3}, UNTIED, {}),
    ({"pp": 2, "schedule": "zb-v", "vpp": 2}, TIED, {}),
]


def name_of(value):
    return " ".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else ""


@pytest.mark.parametrize("layout, model, optim", LAYOUTS, ids=name_of)
def test_late_norm_changes_no_bit_however_often_it_clips(layout, model, optim, run_ranks):
    world = world_of(layout)

    def undone(clip: float) -> int:
        config = config_of(layout, model, clip, **optim)
        ranks = run_ranks(f"{JOBS}:both", world, config=config, steps=STEPS)
        for rank in ranks:
            assert rank["late"] == rank["barrier"]
            assert rank["undone"] == ranks[0]["undone"]
        norms.append(ranks[0]["norms"])
        return ranks[0]["undone"]

    norms: list[list[float]] = []
    assert undone(NEVER) == 0
    # Each step is clipped: the first guess is taken back, and there is no other.
    assert undone(ALWAYS) == 1
    between = sorted(norms[0])[STEPS // 2]
    assert undone(between) >= 1
    assert min(norms[2]) < between < max(norms[2])


@pytest.mark.parametrize("clip, taken_back", [(NEVER, 0), (1e3, 1)])
def test_nan_on_one_rank_spreads_as_with_the_barrier(clip, taken_back, run_ranks):
    config = config_of({"pp": 2, "dp": 2}, UNTIED, clip)
    ranks = run_ranks(f"{JOBS}:both", 4, config=config, steps=4, nan_at=1)
    for rank in ranks:
        assert rank["late"] == rank["barrier"]
        assert rank["undone"] == taken_back
        assert rank["norms"][0] > 0 and rank["norms"][1] != rank["norms"][1]


def test_first_rank_runs_its_warmup_before_the_last_has_given_its_norm(run_ranks, tmp_path):
    config = config_of({"pp": 4}, UNTIED, NEVER)
    flag = str(tmp_path / "ahead")
    actions = run_ranks(f"{JOBS}:run_ahead", 4, config=config, flag=flag)[0]
    first = actions.index("optimizer")
    warmup = [f"F{m}@0" for m in range(7)]  # 2 pp - 1
    assert actions[first + 1 : first + 9] == [*warmup, "validate"]


TIMED = ("step_ms", "tokens_per_s", "tflops_per_rank", "tflops_per_rank_full", "peak_mem_gb")


def test_pretrain_writes_the_same_lines_and_checkpoints(run_ranks, tmp_path):
    def run(name: str, late: bool, steps: int, resume: bool = False) -> tuple:
        """What was printed without times, the metrics likewise, and every checkpoint's files."""
        out = tmp_path / name
        layout = {"pp": 2, "post_validation": late}
        config = Config.from_dict(config_of(layout, UNTIED, 2.0, lr=1e-2, lr_decay_by="tokens"))
        train = replace(
            config.train, out=str(out), train_steps=steps, save_interval=2, resume=resume,
            device="cpu", log_interval=1,
        )  # fmt: skip
        job = "tests.ranks.pretrain_jobs:train"
        config = replace(config, train=train, optim=replace(config.optim, lr_decay="constant"))
        ranks = run_ranks(job, 2, config=config.to_dict())
        assert [(r["code"], r["err"]) for r in ranks] == [(0, "")] * 2
        said = re.findall(r"^step .*?lr \S+", ranks[0]["out"], re.MULTILINE)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        written = [{k: v for k, v in line.items() if k not in TIMED} for line in lines]
        return said, written, [mf.read(d).files for d in mf.step_dirs(out / "checkpoints")]

    said, written, saved = run("barrier", False, 7)
    assert len(said) == len(written) == 7 and len(saved) == 4
    # Both guesses that stand and guesses that do not.
    assert min(line["grad_norm"] for line in written) < 2.0 < written[0]["grad_norm"]
    assert run("late", True, 7) == (said, written, saved)
    run("stopped", True, 4)
    assert run("stopped", True, 7, resume=True) == (said[4:], written, saved)


def test_late_run_that_diverges_ends_as_any(run_ranks, tmp_path):
    ended = []
    for late in (False, True):
        config = Config.from_dict(
            config_of({"pp": 2, "post_validation": late}, UNTIED, 1.0, lr=1e30)
        )
        out = str(tmp_path / str(late))
        train = replace(config.train, out=out, train_steps=50, device="cpu", log_interval=1)
        config = replace(config, train=train)
        found = run_ranks("tests.ranks.pretrain_jobs:train", 2, config=config.to_dict())
        # Either rank may be the first to say it.
        said = "".join(r["err"] for r in found).partition("): ")[2]
        ended.append(([r["code"] for r in found], said))
        assert len(Path(out, "metrics.jsonl").read_text().splitlines()) < 49
    assert ended[0] == ended[1]
    assert ended[0][0] == [5, 5] and ended[0][1].count("lower --lr") == 1
