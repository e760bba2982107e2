"""TensorBoard's own reader finds in a run's `tb/` what metrics.jsonl says."""

import signal
from pathlib import Path

import pytest

from megalite import __main__ as front
from megalite.train.metrics import TAGS, Metrics, read_metrics
from tests.unit.data.samples import make_text, make_tokenizer

pytestmark = pytest.mark.peers
STEPS = 4


@pytest.fixture(scope="module")
def reader():
    return pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def read(reader, run: Path):
    """The accumulator of a run, all points kept."""
    found = reader.EventAccumulator(str(run / "tb"), size_guidance={"scalars": 0, "tensors": 0})
    return found.Reload()


def points(accumulator, tag):
    return {event.step: event.value for event in accumulator.Scalars(tag)}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of four steps on text, with two evaluations; pytest gets its signals back."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    make_tokenizer(600).save("tokenizer.json")
    Path("text.txt").write_text(make_text(1, 30), encoding="utf-8")
    words = "preprocess --input text.txt --tokenizer tokenizer.json --out text --workers 1"
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    assert front.main(words.split()) == 0
    words = (
        f"pretrain --out run --data text --valid-data text --train-steps {STEPS} --eval-interval 2 "
        "--num-layers 1 --hidden-size 16 --num-heads 2 --vocab-size 600 --seq-len 16 --device cpu "
        "--micro-batch-size 1 --global-batch-size 2 --eval-samples 2"
    )
    assert front.main(words.split()) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return tmp_path / "run"


def test_reader_finds_every_number_of_metrics_jsonl(run, reader):
    accumulator = read(reader, run)
    lines = read_metrics(run)
    checked = set()
    for key, tag in TAGS.items():
        want = {line["step"]: line[key] for line in lines if line.get(key) is not None}
        if want:
            assert points(accumulator, tag) == pytest.approx(want, rel=1e-6), tag
            checked.add(tag)
    assert 0 <= points(accumulator, "perf/bubble")[0] < 1
    assert checked | {"perf/bubble"} == set(accumulator.Tags()["scalars"])
    # Without a GPU there is no MFU to speak of; only fp16 has a loss scale, sft an exact match, and
    # dpo preferences.
    absent = {"perf/mfu", "perf/mfu_full", "perf/bubble", "train/loss_scale"}
    absent |= {"val/exact_match"}
    absent |= {f"{of}/{tag}" for of in ("train", "val") for tag in ("preferred", "margin")}
    assert set(TAGS.values()) - checked == absent
    assert set(points(accumulator, "train/loss")) == set(range(1, STEPS + 1))
    assert set(points(accumulator, "val/bpb")) == {2, STEPS}
    assert len(accumulator.Tensors("sample/text_summary")) == 2


def test_every_tag_is_one_that_the_reader_finds(tmp_path, reader):
    log = Metrics(tmp_path, from_step=0)
    log.write(1, **{key: float(n) for n, key in enumerate(TAGS)})
    log.close()
    accumulator = read(reader, tmp_path)
    assert set(accumulator.Tags()["scalars"]) == set(TAGS.values())
    for n, tag in enumerate(TAGS.values()):
        assert points(accumulator, tag) == {1: n}


def test_resumed_run_forgets_the_steps_it_takes_again(tmp_path, reader):
    log = Metrics(tmp_path, from_step=0)
    for step in range(1, 7):
        log.write(step, loss=float(step))
    log.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # killed while it wrote
    log = Metrics(tmp_path, from_step=4)
    for step in (5, 6):
        log.write(step, loss=step + 0.5)
    log.close()
    want = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5.5, 6: 6.5}
    assert {line["step"]: line["loss"] for line in read_metrics(tmp_path)} == want
    assert points(read(reader, tmp_path), "train/loss") == want
