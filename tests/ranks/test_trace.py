"""--trace-steps: rows without holes, a strict Trace Event Format, and bubbles by the simulator."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from pathlib import Path

import pytest

from megalite.core.config import Config, LayoutConfig, ModelConfig, TrainConfig
from megalite.core.log import CollectiveLog
from megalite.schedule.generators import one_f_one_b
from megalite.train.metrics import read_metrics
from megalite.train.trace import bubbles, merged

KEYS = {
    "M": {"ph", "name", "pid", "tid", "ts", "args"},
    "X": {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"},
    "b": {"ph", "name", "cat", "pid", "tid", "id", "ts", "args"},
    "e": {"ph", "name", "cat", "pid", "tid", "id", "ts"},
}
WORLD = 4
ROUNDING = 0.002
"""Microseconds: times are written in nanoseconds."""


def config_of(out: Path, **train) -> Config:
    model = ModelConfig(num_layers=2, hidden_size=64, num_heads=2, vocab_size=61, seq_len=64)
    sizes = {"micro_batch_size": 2, "global_batch_size": 16, "device": "cpu", "train_steps": 4}
    asked = {**sizes, "log_interval": 1, "eval_interval": 0, **train}
    return Config(
        model=model,
        layout=LayoutConfig(pp=2, dp=2),
        train=TrainConfig(out=str(out), **asked),
    )


@pytest.fixture(scope="module")
def run(run_ranks, tmp_path_factory):
    """A run whose steps 2 to 4 are traced, and what rank 0 printed."""
    out = tmp_path_factory.mktemp("traced") / "run"
    config = config_of(out, trace_steps="2:4")
    first, *_ = run_ranks("tests.ranks.pretrain_jobs:train", WORLD, config=config.to_dict())
    assert first["code"] == 0, first
    return out, first["out"]


@pytest.fixture(scope="module")
def trace(run) -> dict:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads((run[0] / "trace.json").read_text(), parse_constant=refuse)


def rows_of(trace: dict) -> dict[int, list[dict]]:
    """Slices by rank, in order of time, an outer one before those inside."""
    rows = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["ph"] == "X":
            rows[event["pid"]].append(event)
    for row in rows.values():
        row.sort(key=lambda e: (e["ts"], -e["dur"]))
    return rows


def test_trace_keeps_the_trace_event_format(trace):
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    open_at: dict[tuple, float] = {}
    for event in trace["traceEvents"]:
        assert set(event) == KEYS[event["ph"]], event
        assert isinstance(event["name"], str) and event["name"]
        assert event["pid"] in range(WORLD) and event["tid"] in (0, 1)
        assert math.isfinite(event["ts"]) and event.get("dur", 0) >= 0
        key = (event.get("cat"), event.get("id"), event["name"])
        if event["ph"] == "b":
            assert key not in open_at
            open_at[key] = event["ts"]
        elif event["ph"] == "e":
            assert event["ts"] >= open_at.pop(key)
    assert not open_at


def test_slices_of_a_row_nest_or_follow_each_other(trace):
    for row in rows_of(trace).values():
        ends: list[float] = []
        for event in row:
            stop = event["ts"] + event["dur"]
            while ends and ends[-1] <= event["ts"] + ROUNDING:
                ends.pop()
            assert len(ends) <= 1 and all(stop <= end + ROUNDING for end in ends), event
            ends.append(stop)


def test_spans_of_a_rank_sum_to_the_step_time(run, trace):
    step_ms = {line["step"]: line["step_ms"] for line in read_metrics(run[0])}
    for rank, row in rows_of(trace).items():
        whole = {e["args"]["step"]: e for e in row if e["cat"] == "step"}
        assert set(whole) == {2, 3, 4}
        missing, apart = [], []
        for step, outer in whole.items():
            start, stop = outer["ts"], outer["ts"] + outer["dur"]
            inner = [e for e in row if e is not outer and start <= e["ts"] < stop]
            inner = [e for e in inner if e["cat"] != "step"]
            missing.append(abs(sum(e["dur"] for e in inner) / outer["dur"] - 1))
            counted = sum(e["dur"] for e in inner if e["name"] != "write metrics")
            apart.append(abs(counted / 1000 / step_ms[step] - 1))
        # A step of 30 ms may be put off for a while between two looks at a clock, but not each: a
        # span that is not there is missing in all of them.
        assert min(missing) < 0.02
        if rank == 0:  # who times the steps of metrics.jsonl, by another clock
            assert min(apart) < 0.02


def test_rows_hold_each_action_of_the_schedule_once_a_step(trace):
    wanted = [sorted(map(str, rank)) for rank in one_f_one_b(2, 4).actions]
    for rank, row in rows_of(trace).items():
        done = sorted(e["name"] for e in row if e["cat"] == "action")
        assert done == sorted(3 * wanted[rank // 2])


def test_collectives_name_op_axis_bytes_and_site(trace):
    begun = [e for e in trace["traceEvents"] if e["ph"] == "b"]
    assert {"reduce_scatter dp*cp", "all_gather dp*cp", "all_reduce world"} <= {
        e["name"] for e in begun
    }
    gather = next(e for e in begun if e["name"] == "all_gather dp*cp")
    assert gather["args"]["bytes"] > 0 and gather["args"]["ranks"] == 2
    assert gather["args"]["site"].startswith("megalite/parallel/gather.py:")


def test_bubbles_are_in_the_trace_and_on_the_console(run, trace):
    facts = trace["otherData"]
    assert len(facts["measured"]) == 3 and facts["lost_collectives"] == 0
    assert all(0 < share < 1 for share in (*facts["measured"], facts["predicted"]))
    (line,) = [x for x in run[1].splitlines() if x.startswith("trace  steps 2 to 4 in")]
    assert f"{100 * facts['predicted']:.1f}%" in line
    assert not list(run[0].glob("trace-*.json"))


def test_log_that_nobody_traces_keeps_nothing():
    log = CollectiveLog()
    log.doing("wait")
    assert log.stretches is None


def part(rank: int, host: str, barrier: float, start: float) -> dict:
    event = {"ph": "X", "ts": 1e6 * start, "dur": 1.0}
    return {"rank": rank, "host": host, "barrier": barrier, "events": [event]}


def test_clocks_of_hosts_are_laid_on_each_other_and_those_of_a_host_are_left():
    parts = [
        part(0, "a", 100.0, 101.0),
        part(1, "a", 100.5, 101.0),  # left the same barrier late, on the same clock
        part(2, "b", 7.25, 8.0),
        part(3, "b", 7.0, 8.0),
    ]
    assert [e["ts"] for e in merged(parts)] == [1e6, 1e6, 1e6, 1e6]


def test_bubble_of_a_trace_made_by_hand():
    events = []
    for rank, slices in enumerate(
        [
            [("F", 0, 10), ("wait", 10, 50), ("B", 50, 70)],
            [("wait", 0, 10), ("F", 10, 20), ("B", 20, 50)],
        ]
    ):
        events.append({"name": "step 1", "cat": "step", "pid": rank, "ts": 0, "dur": 80})
        events[-1]["args"] = {"step": 1}
        for name, start, stop in slices:
            args = {"op": name, "stage": rank, "microbatch": 0}
            cat = "wait" if name == "wait" else "action"
            event = {"name": name, "cat": cat, "pid": rank, "ts": start, "dur": stop - start}
            events.append({**event, "args": args})
        args = {"op": "R", "stage": rank, "microbatch": -1}
        events.append({"name": "R", "cat": "action", "pid": rank, "ts": 70, "dur": 0, "args": args})
    found = bubbles(events, one_f_one_b(2, 1))
    assert found.measured == [0.5] and found.predicted == pytest.approx(0.5)
    assert found.predicted_makespan == pytest.approx(70e-6)
