"""`--trace-steps`: what every rank did in a few steps, as one Chrome trace, RUN/trace.json.

Perfetto (ui.perfetto.dev) and chrome://tracing open it. A rank's time is one row without holes:
actions (F, B, I, W, R), waits for other stages, and the rest of the step by name; its collectives
lie below, each from where it was started to where this rank saw its end. Ranks of one host share a
clock; clocks of hosts are laid on each other at one barrier before the first traced step, so hosts
are off by what that barrier lets its ranks apart. On a GPU the times are those of the host, which
runs ahead. What the rows are made of: core/log.py.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from megalite.core import comm
from megalite.core.log import Collective, Stretch
from megalite.core.mesh import Mesh
from megalite.schedule.action import Action, Op, Schedule
from megalite.schedule.simulate import bubble, simulate

Event = dict[str, Any]
ACTIONS_ROW, COLLECTIVES_ROW = 0, 1


class Bubbles(NamedTuple):
    """Share of a step's pipeline time in which ranks do no action, and that time in seconds."""

    measured: list[float]
    """Of each traced step."""
    predicted: float
    """Of the schedule, simulated with the mean times that these actions took."""
    measured_makespan: list[float]
    predicted_makespan: float


class Trace:
    """The traced steps of one rank; all ranks call each method together."""

    def __init__(self, out: Path, mesh: Mesh, steps: range):
        self.out, self.mesh, self.log, self.steps = out, mesh, mesh.log, steps
        self.spans: list[tuple[int, float, float]] = []
        """Number, begin and end of each traced step so far."""
        self.barrier, self.began, self.first, self.done = 0.0, 0.0, 0, False

    def enter(self, step: int) -> None:
        """Begin a step; the first of those traced starts the recording."""
        if step not in self.steps or self.done:
            return
        if self.log.stretches is None:
            comm.barrier(self.mesh.world)
            self.barrier, self.first = time.perf_counter(), self.log.total
            self.log.stretches = []
        self.began = time.perf_counter()

    def leave(self, step: int) -> None:
        """End a step."""
        if self.log.stretches is not None:
            self.log.doing("between steps")
            self.spans.append((step, self.began, self.log.stretches[-1].start))

    def finish(self, schedule_for: Callable[[int], Schedule]) -> Bubbles | None:
        """Write the trace, if there is one that is not written yet; rank 0 gets its bubbles.

        The ranks hand their rows over as files beside it, so they share a file system.
        """
        if self.log.stretches is None:
            return None
        part = {
            "rank": self.mesh.rank,
            "host": socket.gethostname(),
            "barrier": self.barrier,
            "lost": max(0, self.log.total - self.first - len(self.log.entries)),
            "events": self._events(),
        }
        self.log.stretches, self.done = None, True
        self._part(self.mesh.rank).write_text(json.dumps(part), encoding="utf-8")
        comm.barrier(self.mesh.world)
        if self.mesh.rank > 0:
            return None
        paths = [self._part(rank) for rank in range(self.mesh.world_size)]
        parts = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        events = merged(parts)
        done = [e["args"]["microbatch"] for e in events if e.get("cat") == "action"]
        found = bubbles(events, schedule_for(1 + max(done)))  # of the largest batch
        facts = {"clock": CLOCK, "lost_collectives": sum(p["lost"] for p in parts)}
        tree = {"traceEvents": events, "displayTimeUnit": "ms"}
        fresh = self.out / "trace.json.tmp"
        fresh.write_text(json.dumps({**tree, "otherData": {**facts, **found._asdict()}}), "utf-8")
        os.replace(fresh, self.out / "trace.json")
        for path in paths:
            path.unlink()
        return found

    def _part(self, rank: int) -> Path:
        return self.out / f"trace-{rank:05d}.json"

    def _events(self) -> list[Event]:
        assert self.log.stretches is not None
        rank, at = self.mesh.rank, " ".join(f"{k} {v}" for k, v in self.mesh.coords.items())
        events = [
            _named("process_name", rank, 0, f"rank {rank}: {at}"),
            _named("thread_name", rank, ACTIONS_ROW, "actions"),
            _named("thread_name", rank, COLLECTIVES_ROW, "collectives"),
        ]
        for step, start, end in self.spans:
            events.append(_slice(f"step {step}", "step", rank, start, end, {"step": step}))
        ends = [s.start for s in self.log.stretches[1:]]
        for stretch, end in zip(self.log.stretches, ends, strict=False):
            if any(start <= stretch.start < stop for _, start, stop in self.spans):
                events.append(_stretch_event(stretch, end, rank))
        for entry in self.log.since(self.first):
            events += _collective_events(entry, rank)
        return events


CLOCK = (
    "microseconds of rank 0's monotonic clock since a barrier before the first step; ranks of one "
    "host share a clock, other hosts are laid on it at that barrier"
)


def _named(what: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}


def _slice(name: str, cat: str, rank: int, start: float, end: float, args: dict) -> Event:
    place = {"ph": "X", "name": name, "cat": cat, "pid": rank, "tid": ACTIONS_ROW}
    return {**place, "ts": 1e6 * start, "dur": 1e6 * (end - start), "args": args}


def _stretch_event(stretch: Stretch, end: float, rank: int) -> Event:
    start, what, action = stretch
    if action is None:
        return _slice(what, "rest", rank, start, end, {})
    args = {"op": action.op.value, "stage": action.stage, "microbatch": action.microbatch}
    name, cat = (str(action), "action") if what == "act" else (f"wait for {action}", "wait")
    return _slice(name, cat, rank, start, end, args)


def _collective_events(entry: Collective, rank: int) -> list[Event]:
    """Its begin and end: those of one rank overlap, so they are no slices of one row."""
    end = time.perf_counter() if entry.ended is None else entry.ended
    args = {"axis": entry.axis, "ranks": entry.size, "bytes": entry.nbytes, "wire": entry.wire}
    args |= {"site": entry.site, "ended": entry.completed}
    same = {"name": f"{entry.op} {entry.axis}", "cat": "comm", "pid": rank, "tid": COLLECTIVES_ROW}
    same["id"] = f"{rank}.{entry.seq}"
    return [
        {"ph": "b", **same, "ts": 1e6 * entry.issued, "args": args},
        {"ph": "e", **same, "ts": 1e6 * end},
    ]


def merged(parts: list[dict]) -> list[Event]:
    """All ranks' events on rank 0's clock, from its barrier on.

    Of each host the rank that left the barrier first says how far its clock is from rank 0's.
    """
    first: dict[str, float] = {}
    for part in parts:
        first[part["host"]] = min(part["barrier"], first.get(part["host"], part["barrier"]))
    events = []
    for part in parts:
        for event in part["events"]:
            if event["ph"] != "M":
                event["ts"] = round(event["ts"] - 1e6 * first[part["host"]], 3)
            if "dur" in event:
                event["dur"] = round(event["dur"], 3)
            events.append(event)
    return events


def bubbles(events: list[Event], schedule: Schedule) -> Bubbles:
    """What the traced steps lost to waiting, and what the simulator says that they should."""
    ranks = 1 + max(event["pid"] for event in events)
    took: dict[tuple[Op, int], list[float]] = defaultdict(list)
    shares, makespans = [], []
    for step in sorted({e["args"]["step"] for e in events if e.get("cat") == "step"}):
        busy, starts, ends = 0.0, [], []
        whole = {e["pid"]: e for e in events if e["name"] == f"step {step}"}
        for event in events:
            inside = event.get("cat") in ("action", "wait") and _within(event, whole[event["pid"]])
            if inside:
                starts.append(event["ts"])
                ends.append(event["ts"] + event["dur"])
            if inside and event["cat"] == "action":
                busy += event["dur"]
                key = Op(event["args"]["op"]), event["args"]["stage"]
                took[key].append(event["dur"] / 1e6)
        makespans.append((max(ends) - min(starts)) / 1e6)
        shares.append(1 - busy / 1e6 / (ranks * makespans[-1]))
    mean = {key: sum(times) / len(times) for key, times in took.items()}

    def cost(action: Action) -> float:
        return mean[action.op, action.stage]

    timeline = simulate(schedule, cost)
    return Bubbles(shares, bubble(timeline), makespans, timeline.makespan)


def _within(event: Event, step: Event) -> bool:
    return step["ts"] <= event["ts"] < step["ts"] + step["dur"]
