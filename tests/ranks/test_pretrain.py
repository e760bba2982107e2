"""Whole runs of `megalite pretrain`: how they end, what they leave, what they say if they fail."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megalite import __main__ as front
from megalite.checkpoint import manifest as mf
from megalite.core.config import (
    Config,
    DataConfig,
    LayoutConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from tests.unit.data.samples import make_text, make_tokenizer

JOBS = "tests.ranks.pretrain_jobs"
LAUNCH = Path(__file__).resolve().parents[2] / "examples" / "launch.sh"
VOCAB = 600
STEP_KEYS = [
    *("step", "tokens", "samples", "loss", "lr", "grad_norm", "step_ms", "tokens_per_s"),
    *("tflops_per_rank", "tflops_per_rank_full", "mfu", "mfu_full"),
    *("peak_mem_gb", "loss_scale", "skipped"),
]
EVALUATION_KEYS = ["step", "val_loss", "val_bits_per_byte", "gzip_bits_per_byte"]
TINY = (
    f"--num-layers 2 --hidden-size 16 --num-heads 2 --vocab-size {VOCAB} --seq-len 16 "
    "--micro-batch-size 1 --global-batch-size 2 --device cpu --log-interval 1 --eval-samples 2"
)


def config_of(out: Path, layout: dict | None = None, lr: float = 1e-3, **train) -> Config:
    model = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, vocab_size=61, seq_len=8)
    sizes = {"micro_batch_size": 1, "global_batch_size": 2, "device": "cpu", "train_steps": 4}
    return Config(
        model=model,
        layout=LayoutConfig(**(layout or {})),
        optim=OptimConfig(lr=lr),
        train=TrainConfig(out=str(out), **{**sizes, "log_interval": 1, **train}),
    )


@pytest.fixture
def train(run_ranks):
    """Runs a Config on as many ranks as it needs; gives each rank's code and words."""

    def run(config: Config, world: int = 1, **kwargs):
        return run_ranks(f"{JOBS}:train", world, config=config.to_dict(), **kwargs)

    return run


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """A directory with train and valid data of a tokenizer; pytest gets its signals back."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    make_tokenizer(VOCAB).save("tokenizer.json")
    for name, seed in (("train", 1), ("valid", 2)):
        Path(f"{name}.txt").write_text(make_text(seed, 30), encoding="utf-8")
        words = f"preprocess --input {name}.txt --tokenizer tokenizer.json --out {name} --workers 1"
        assert front.main(words.split()) == 0
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def launch(words: str, ranks: int = 2, **kwargs) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    return subprocess.Popen(
        [str(LAUNCH), str(ranks), *shlex.split(words)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **kwargs,
    )


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_launched_run_ends_well_and_its_next_command_works(prepared, capfd):
    words = f"pretrain --out run --data train --valid-data valid --tp 2 --train-steps 4 {TINY}"
    process = launch(f"{words} --eval-interval 2 --save-interval 2")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    run = prepared / "run"
    lines = lines_of(run)
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    assert all(list(line) == STEP_KEYS for line in steps)
    assert [line["tokens"] for line in steps] == [32, 64, 96, 128]
    evaluations = [line for line in lines if "loss" not in line]
    assert [line["step"] for line in evaluations] == [2, 4]
    assert all(list(line) == EVALUATION_KEYS for line in evaluations)
    assert list((run / "tb").glob("events.*"))
    assert [d.name for d in mf.step_dirs(run / "checkpoints")] == ["step-00000004", "step-00000002"]
    assert not (run / "logs" / "cause").exists()
    last = out.splitlines()[-1]
    found = re.fullmatch(r"next +(\S*megalite generate .*) \| (\S*tensorboard --logdir .*)", last)
    assert found, last
    _, *argv = shlex.split(found[1])
    capfd.readouterr()
    assert front.main(argv) == 0
    assert capfd.readouterr().out.startswith(argv[-1])
    assert Path(shlex.split(found[2])[-1]).is_dir()


def test_fp16_run_says_its_scale_and_what_it_skipped_and_resumes(train, tmp_path):
    optim = OptimConfig(
        lr_decay="constant", initial_loss_scale=2.0**24, loss_scale_window=3, hysteresis=1
    )

    def lines(name: str, steps: int, resume: bool = False) -> tuple[str, list[tuple]]:
        config = config_of(
            tmp_path / name, {}, precision="fp16", train_steps=steps, log_interval=4, resume=resume
        )
        ranks = train(replace(config, optim=optim), world=2)
        assert [(rank["code"], rank["err"]) for rank in ranks] == [(0, "")] * 2
        keys = ("step", "loss", "grad_norm", "loss_scale", "skipped")
        found = [tuple(line[key] for key in keys) for line in lines_of(tmp_path / name)]
        return ranks[0]["out"], found

    said, through = lines("through", 16)
    lines("stopped", 8)
    assert lines("stopped", 16, resume=True)[1] == through
    skipped = [line[-1] for line in through]
    assert skipped[0] == 1 and 0 < sum(skipped[8:]) < 8
    assert [line[2] is None for line in through] == [number == 1 for number in skipped]
    assert through[1][3] == through[0][3] / 2 == 2.0**23
    shown = re.findall(r"^step +(\d+)/.*  scale (\d+)(?:  skipped (\d+))?$", said, re.MULTILINE)
    ends = [1, 4, 8, 12, 16]
    assert [(int(step), float(scale), int(count or 0)) for step, scale, count in shown] == [
        (end, through[end - 1][3], sum(skipped[start:end]))
        for start, end in zip([0, *ends], ends, strict=False)
    ]


def test_last_step_is_sampled_once_where_there_is_no_held_out_text(prepared, train):
    base = config_of(prepared / "run", {}, eval_interval=2)
    data = DataConfig(data=str(prepared / "train"))
    config = replace(base, data=data, model=replace(base.model, vocab_size=VOCAB))
    assert config.train.train_steps == 4
    (ran,) = train(config, 1)
    assert sum("sample:" in line for line in ran["out"].splitlines()) == 2


@pytest.mark.parametrize("layout", [{"cp": 2}, {"cp": 2, "pp": 2, "cp_form": "ulysses"}])
def test_run_over_cut_sequences_evaluates_and_samples_as_one_process(layout, prepared, train):
    found = []
    for name, cut in (("whole", {}), ("cut", layout)):
        base = config_of(prepared / name, cut, eval_interval=2, eval_samples=3)
        data = DataConfig(data=str(prepared / "train"), valid_data=str(prepared / "valid"))
        config = replace(base, data=data, model=replace(base.model, vocab_size=VOCAB))
        ran = train(config, cut.get("cp", 1) * cut.get("pp", 1))
        assert [(r["code"], r["err"]) for r in ran] == [(0, "")] * len(ran)
        lines = lines_of(prepared / name)
        numbers = [v for line in lines for k, v in line.items() if k in (*EVALUATION_KEYS, "loss")]
        samples = [line for line in ran[0]["out"].splitlines() if "sample:" in line]
        assert len(samples) == 2
        found.append((numbers, samples))
    (whole, texts), (ours, our_texts) = found
    assert len(whole) == 4 * 2 + 2 * len(EVALUATION_KEYS)
    assert ours == pytest.approx(whole, rel=1e-5)
    assert our_texts == texts


@pytest.mark.parametrize("layout", [{}, {"cp": 2}], ids=["one process", "cp2"])
def test_run_with_documents_kept_apart_resumes_bitwise(layout, prepared, train):
    texts = [make_text(seed, 1 + seed % 3) for seed in range(60)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (prepared / "many.jsonl").write_text(lines, encoding="utf-8")
    words = "preprocess --input many.jsonl --tokenizer tokenizer.json --out many --workers 1"
    assert front.main(words.split()) == 0

    def run(name: str, steps: int, *, resume: bool = False, apart: bool = True) -> tuple:
        """Losses of all steps, the held-out loss at the end, and the newest checkpoint's files."""
        out, many = prepared / name, str(prepared / "many")
        base = config_of(out, layout, train_steps=steps, resume=resume)
        config = replace(
            base,
            data=DataConfig(data=many, valid_data=many, reset_attention_mask=apart),
            model=replace(base.model, vocab_size=VOCAB, seq_len=16),
            optim=replace(base.optim, lr=1e-2, lr_decay="constant"),
        )
        ran = train(config, layout.get("cp", 1))
        assert [(r["code"], r["err"]) for r in ran] == [(0, "")] * len(ran)
        assert ("60 documents kept apart" in ran[0]["out"]) == apart
        saved = json.loads((out / "config.json").read_text())
        assert saved["data"]["reset_attention_mask"] == apart
        found = lines_of(out)
        losses = [line["loss"] for line in found if "loss" in line]
        return losses, found[-1]["val_loss"], mf.newest(out)[1].files

    through, across = run("through", 4), run("across", 4, apart=False)
    run("stopped", 2)
    assert run("stopped", 4, resume=True) == through
    losses, val_loss, _ = through
    assert len(losses) == 4 and losses[0] > losses[-1] > 0
    assert losses[0] != across[0][0] and val_loss != across[1]


def processes_with(text: str) -> list[str]:
    listed = subprocess.run(["ps", "-A", "-o", "args="], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if text in line]


def test_interrupt_saves_says_how_to_go_on_and_leaves_no_process(tmp_path):
    out = tmp_path / "interrupted-run"
    process = launch(f"pretrain --out {out} --dp 2 --train-steps 1000000 {TINY}")
    try:
        metrics = out / "metrics.jsonl"
        deadline = time.monotonic() + 90
        while not metrics.exists() or metrics.read_text().count("\n") < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        said, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, err) == (130, "")
    steps = lines_of(out)[-1]["step"]
    stopped, following = said.splitlines()[-2:]
    assert stopped.startswith(f"stopped by SIGINT after step {steps}; ")
    assert stopped.endswith(f"step {steps} is in {out}/checkpoints")
    assert following == "next   the same command with --resume goes on to step 1000000"
    assert mf.newest(out)[1].step == steps
    assert processes_with(out.name) == []


def test_signal_to_one_rank_ends_all_in_order(tmp_path, train):
    config = config_of(tmp_path, {"pp": 2}, train_steps=100_000)
    found = train(config, 2, signal_at=3, signalled=1)
    assert [one["code"] for one in found] == [128 + signal.SIGTERM, 128 + signal.SIGINT]
    assert all(one["err"] == "" for one in found)
    steps = mf.newest(tmp_path)[1].step
    assert f"after step {steps}; " in found[0]["out"]
    resumed = replace(config, train=replace(config.train, resume=True, train_steps=steps + 2))
    again = train(resumed, 2)
    assert [one["code"] for one in again] == [0, 0]
    assert f"resumed at step {steps} " in again[0]["out"]
    assert [line["step"] for line in lines_of(tmp_path)] == list(range(1, steps + 3))


def test_failing_save_is_told_by_its_rank_alone(tmp_path, train):
    (tmp_path / "checkpoints").write_text("in the way")
    found = train(config_of(tmp_path, {"tp": 2, "pp": 2}), 4)
    assert [one["code"] for one in found] == [5] * 4
    assert [one["err"] for one in found[1:]] == [""] * 3
    said = found[0]["err"]
    assert said.startswith("megalite: error: rank 0 (pp0 dp0 tp0): checkpoint: cannot prepare: ")
    assert said.count("\n") == 1 and "earlier checkpoints are intact" in said
    log = (tmp_path / "logs" / "rank-0.log").read_text()
    assert "Traceback" in log and "_make_empty" in log
    assert "PeerFailed" in (tmp_path / "logs" / "rank-3.log").read_text()


def test_rank_without_memory_says_what_it_held_and_what_frees_most(tmp_path, run_ranks):
    config = config_of(tmp_path, {"dp": 2, "pp": 2, "zero": 0}).to_dict()
    found = run_ranks(f"{JOBS}:train_greedily", 4, config=config, greedy=2)
    assert [one["code"] for one in found] == [5] * 4
    assert [bool(one["err"]) for one in found] == [False, False, True, False]
    said = found[2]["err"]
    start = "megalite: error: rank 2 (pp1 dp0 tp0): out of memory: asked for 37252.90 GiB, held "
    assert said.startswith(start) and said.count("\n") == 1
    assert re.search(r"; the plan of pp1 is weights .* MiB; --\S+ \S+ frees most of it, ", said)
    assert "alloc_cpu" in (tmp_path / "logs" / "rank-2.log").read_text()


def test_loss_that_is_no_number_is_told_once(tmp_path, train):
    found = train(config_of(tmp_path, {"dp": 2}, lr=1e30, train_steps=50), 2)
    assert [one["code"] for one in found] == [5, 5]
    said = "".join(one["err"] for one in found)
    pattern = (
        r"megalite: error: rank [01] \(pp0 dp[01] tp0\): step \d+: loss \S+, gradient norm \S+ "
        r"\(lower --lr, or raise --warmup-steps; earlier checkpoints are intact\)\n"
    )
    assert re.fullmatch(pattern, said), said
    assert all((tmp_path / "logs" / f"rank-{r}.log").exists() for r in (0, 1))


def test_ranks_that_disagree_say_the_same_line(tmp_path, run_ranks):
    config = config_of(tmp_path).to_dict()
    assert run_ranks(f"{JOBS}:disagree", 2, config=config, lr_of=[0.1, 0.1]) == ["", ""]
    first, second, third = run_ranks(f"{JOBS}:disagree", 3, config=config, lr_of=[0.1, 0.1, 0.25])
    assert first == second == third
    assert re.fullmatch(
        r"config differs between ranks: rank 2 \(\S+\) has lr=0\.25, rank 0 has 0\.1 "
        r"\(start every rank with the same command and version\)",
        first,
    )


def test_ranks_that_disagree_on_the_layout_do_not_wait_for_each_other(tmp_path, run_ranks):
    configs = [config_of(tmp_path / "run", {axis: 2}).to_dict() for axis in ("tp", "pp")]
    first, second = run_ranks(f"{JOBS}:train_apart", 2, timeout=30, configs=configs)
    assert first == second and first["code"] == 2
    assert re.match(
        r"front door: config differs .* rank 1 \(\S+\) has tp=1, rank 0 has 2 ", first["err"]
    )
    assert not (tmp_path / "run").exists()


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "my_optimizer.py"


def test_ranks_with_unlike_files_of_one_name_do_not_start(tmp_path, run_ranks):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder, comment in zip(folders, ("", "# mended\n"), strict=True):
        folder.mkdir()
        (folder / "mine.py").write_text(EXAMPLE.read_text() + comment)
    config = config_of(tmp_path / "run", {"dp": 2})
    config = replace(config, optim=replace(config.optim, optimizer="mine.py:Lion"))
    job = {"config": config.to_dict(), "folders": [str(folder) for folder in folders]}
    first, second = run_ranks(f"{JOBS}:train_beside", 2, timeout=60, **job)
    assert first == second and first["code"] == 2
    assert re.match(
        r"front door: config differs between ranks: rank 1 \(\S+\) has sha256 of --optimizer="
        r"[0-9a-f]{64}, rank 0 has [0-9a-f]{64} ",
        first["err"],
    )
    assert not (tmp_path / "run").exists()


def test_run_names_its_own_files_and_says_when_they_have_changed(tmp_path, train):
    mine = tmp_path / "mine.py"
    mine.write_text(EXAMPLE.read_text())
    config = config_of(tmp_path / "run", {"dp": 2})
    config = replace(config, optim=replace(config.optim, optimizer=f"{mine}:Lion"))
    assert [one["code"] for one in train(config, 2)] == [0, 0]
    first = hashlib.sha256(mine.read_bytes()).hexdigest()
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["files"] == {"optimizer": {"path": f"{mine}:Lion", "sha256": first}}
    assert Config.from_dict(written) == config
    unchanged, _ = train(resumed(config), 2)
    assert "warning" not in unchanged["out"] and "resumed at step 4 " in unchanged["out"]
    mine.write_text(EXAMPLE.read_text() + "# mended\n")
    second = hashlib.sha256(mine.read_bytes()).hexdigest()
    again = replace(config, train=replace(config.train, resume=True, train_steps=8))
    changed, _ = train(again, 2)
    (told,) = [line for line in changed["out"].splitlines() if "warning" in line]
    assert told == (
        f"megalite: warning: --optimizer {mine}:Lion: has changed since the checkpoint was "
        f"written (sha256 {first[:12]}, now {second[:12]})"
    )
    assert mf.newest(tmp_path / "run")[1].step == 8


def test_batch_grows_with_the_samples_and_the_rate_with_the_tokens(tmp_path, train):
    config = config_of(
        tmp_path, {"dp": 2}, global_batch_size=6, rampup_batch_size=(2, 2, 12), train_steps=6
    )
    optim = replace(config.optim, lr_decay_by="tokens", lr_decay="linear", min_lr_ratio=0.0)
    ran = train(replace(config, optim=optim), 2)
    assert [(one["code"], one["err"]) for one in ran] == [(0, ""), (0, "")]
    lines = lines_of(tmp_path)
    # 2 until 6 samples are taken, 4 until 12, then 6.
    samples = [2, 4, 6, 10, 14, 20]
    assert [line["samples"] for line in lines] == samples
    assert [line["tokens"] for line in lines] == [8 * n for n in samples]
    assert [line["lr"] for line in lines] == pytest.approx([1e-3 * (1 - n / 20) for n in samples])
    shown = re.findall(r"eta \S+  (\d+) samples", ran[0]["out"])
    assert shown == [str(n) for n in samples]
    assert "batch  6 samples (from 2 by 2 over 12) = " in ran[0]["out"]


def test_deterministic_runs_give_the_same_numbers(tmp_path, train):
    """On a CPU those of a run that is not asked to be: that is accepted, and changes nothing."""
    kept = []
    for name in ("one", "again", "unasked"):
        config = config_of(tmp_path / name, {"dp": 2}, deterministic=name != "unasked")
        assert [(one["code"], one["err"]) for one in train(config, 2)] == [(0, "")] * 2
        lines = [line for line in lines_of(tmp_path / name) if "loss" in line]
        kept.append([(line["loss"], line["grad_norm"]) for line in lines])
    assert len(kept[0]) == 4 and kept[0] == kept[1] == kept[2]


@pytest.fixture
def done(tmp_path, train):
    """A run of four steps with a checkpoint at each second one."""
    config = config_of(tmp_path / "run", save_interval=2)
    (one,) = train(config)
    assert one["code"] == 0
    return config


def resumed(config: Config, **model) -> Config:
    train = replace(config.train, resume=True, train_steps=6)
    return replace(config, train=train, model=replace(config.model, **model))


def test_out_of_another_run_is_refused(done, train):
    (one,) = train(done)
    out = done.train.out
    assert (one["code"], one["err"]) == (
        2,
        f"front door: --out {out}: holds checkpoints of a run (use --resume to go on with it, or "
        "another --out)\n",
    )


def test_resume_with_another_model_names_the_flag(done, train):
    (one,) = train(resumed(done, hidden_size=32))
    newest = f"{done.train.out}/checkpoints/step-00000004"
    assert (one["code"], one["err"]) == (
        4,
        f"megalite: error: {newest}: was trained with --hidden-size 16, this run has 32\n",
    )


def test_weights_go_on_with_another_dropout_and_loss(done, train, tmp_path):
    more = {"dropout": 0.1, "attention_dropout": 0.1, "label_smoothing": 0.1, "z_loss": 1e-4}
    train_of = replace(done.train, out=str(tmp_path / "tuned"), init_from=done.train.out)
    tuned = replace(done, train=train_of, model=replace(done.model, **more))
    (one,) = train(tuned)
    assert (one["code"], one["err"]) == (0, "")
    lines = (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_resume_without_a_checkpoint_is_refused(tmp_path, train):
    (one,) = train(resumed(config_of(tmp_path / "new")))
    assert one["code"] == 4
    assert one["err"].startswith(f"megalite: error: {tmp_path / 'new'}: no checkpoint found")


def test_damaged_newest_checkpoint_falls_back_with_a_warning(done, train):
    out = Path(done.train.out)
    file = out / "checkpoints" / "step-00000004" / "shard-00000.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (one,) = train(resumed(done))
    assert (one["code"], one["err"]) == (0, "")
    assert f"megalite: warning: {file}: sha256 differs" in one["out"]
    assert "using step-00000002" in one["out"] and "resumed at step 2 " in one["out"]
    assert mf.newest(out)[1].step == 6
    mf.check_files(file.parent, mf.read(file.parent))  # written anew on the way


def test_cuda_without_a_gpu_is_one_line(tmp_path, train):
    config = config_of(tmp_path / "run", device="cuda")
    (one,) = train(config)
    if one["code"] == 0:
        pytest.skip("this machine has a GPU")
    line = "front door: --device cuda: no GPU is visible to torch (use --device cpu)\n"
    assert (one["code"], one["err"]) == (2, line)
    assert not (tmp_path / "run").exists()


def test_run_from_weights_of_another_says_what_it_passes_over_and_what_has_changed(tmp_path, train):
    mine = tmp_path / "mine.py"
    attention = (EXAMPLE.parent / "my_attention.py").read_text()
    mine.write_text(attention)
    first = config_of(tmp_path / "first", save_interval=2)
    first = replace(first, model=replace(first.model, attention=f"{mine}:MyAttention"))
    train(first)
    (tmp_path / "first/checkpoints/step-00000004" / mf.NAME).write_text("{}")
    mine.write_text(attention + "# mended\n")
    paths = {"out": str(tmp_path / "second"), "init_from": first.train.out}
    (ran,) = train(replace(first, train=replace(first.train, **paths)))
    older, changed = [line for line in ran["out"].splitlines() if "warning" in line]
    assert older.endswith("using step-00000002")
    assert f"--attention {mine}:MyAttention: has changed since" in changed
