"""The warm process that ranks are forked from: it imports all that they need, computes nothing.

    python -m megalite.train.zygote

A child of it is a rank in milliseconds instead of the seconds that importing torch takes. It must
not compute: children of a parent that had run tensor operations or a backward have hung, because
fork copies no threads but copies their locks. Nor can they use a GPU. Its other side is ranks.py,
which sends one JSON line a job to its standard input:

    {"target": "module:name", "world": 4, "device": "cpu", "kwargs": {...}, "timeout": 60.0,
     "grace": 5.0, "keep": false}

and one JSON line comes back on standard output, {"results": [one a rank], "output": text} or
{"error": text}. The target is called as name(rank, world, **kwargs) in each rank, inside a gloo
process group if world > 1, and returns what JSON can hold. A job's ranks end with it; with `keep`
they wait for the next one, which forks only those that are missing. After a job that failed, all
are new.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import pkgutil
import select
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.core import host_group, mesh

LATE = ("numpy.random", "torch.fx.experimental.symbolic_shapes")
"""What numpy and torch put off until its first use: half a second in each rank's first backward."""
TAIL_LINES = 60
"""How much of a rank's output an error shows."""


class NoTensorOps(TorchDispatchMode):
    """Any tensor operation inside is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} ran in the process that ranks are forked from")


def import_everything(name: str) -> None:
    """Import LATE, and each module of a package; one that cannot be, or computes, is an error.

    But what needs a package of others that is not installed here is left to the rank that asks for
    it: a machine that only trains may have nothing to serve pages with.
    """
    with NoTensorOps():
        for late in LATE:
            importlib.import_module(late)
        package = importlib.import_module(name)
        # A package is handed out before walk_packages, which hides errors, imports it itself.
        for module in pkgutil.walk_packages(package.__path__, f"{name}."):
            # __main__ imports the rest inside its functions, and is not made to be imported.
            if module.name.endswith("__main__"):
                continue
            try:
                importlib.import_module(module.name)
            except ModuleNotFoundError as missing:
                if (missing.name or name).partition(".")[0] == name:
                    raise


@dataclass
class Child:
    """One forked rank."""

    rank: int
    pid: int
    jobs: int
    """Write end of a pipe that the rank reads its jobs from, a line each."""
    said: int
    """Read end of a pipe whose only writer is the rank: a byte when it has left a result, end of
    file when it has died."""
    status: int | None = None
    """None while it lives."""


class Zygote:
    """Serves jobs until standard input ends."""

    def __init__(self, replies: int) -> None:
        self.replies = replies
        # The other way round: the ranks read it, and end when its only writer, this process, has.
        self.lifeline, self.lifeline_writer = os.pipe()
        self.ranks: list[Child] = []
        """Those that live, by number: a job has as many of the first as it asks for."""

    def serve(self) -> None:
        """Answer every line of standard input with one line."""
        self.reply({"ready": os.getpid()})
        # Unbuffered, so that `select` sees what has not been read.
        with open(0, "rb", buffering=0, closefd=False) as lines:
            while line := lines.readline():
                self.reply(self.run(json.loads(line)))
        self.end_ranks()

    def reply(self, answer: dict) -> None:
        """Write one line."""
        write_line(self.replies, answer)

    def run(self, job: dict) -> dict:
        """Give the job to its ranks, wait for them, and gather what they left."""
        has_died = any(reap(child, os.WNOHANG) for child in self.ranks)
        if has_died or not job["keep"]:
            self.end_ranks()
        with tempfile.TemporaryDirectory(prefix="megalite-ranks-") as name:
            folder = Path(name)
            is_kept = False
            try:
                while len(self.ranks) < job["world"]:
                    self.ranks.append(self.fork(len(self.ranks)))
                children = self.ranks[: job["world"]]
                for child in children:
                    with contextlib.suppress(BrokenPipeError):  # it has died: `wait` will see
                        write_line(child.jobs, {**job, "folder": name})
                ended_by = self.wait(children, job["timeout"], job["grace"])
                is_kept = job["keep"] and not ended_by and all(c.status is None for c in children)
            finally:
                if not is_kept:
                    self.end_ranks()
            return gather(children, ended_by, folder)

    def end_ranks(self) -> None:
        """End all that live; the next job has new ones."""
        kill(self.ranks)
        self.ranks = []

    def fork(self, rank: int) -> Child:
        """Start one rank."""
        assert threading.active_count() == 1, "a thread would not survive the fork"
        assert torch.get_num_threads() == 1, "start with OMP_NUM_THREADS=1"
        jobs, jobs_writer = os.pipe()
        said, said_writer = os.pipe()
        pid = os.fork()
        if pid:
            os.close(jobs)
            os.close(said_writer)
            return Child(rank, pid, jobs_writer, said)
        code = 1
        try:
            for fd in (jobs_writer, said, self.lifeline_writer, self.replies):
                os.close(fd)
            code = run_rank(rank, jobs, said_writer, self.lifeline)
        finally:
            # Never back into the server's loop, whatever happened.
            os._exit(code)

    def wait(self, children: list[Child], timeout: float, grace: float) -> str:
        """Wait until all ranks are done, or it is time to kill those left. Returns why it is."""
        # The ranks' own stack dumps and group timeouts come first.
        deadline, why = time.monotonic() + timeout + 1.0, f"no end after {timeout:g} s"
        running = {child.said: child for child in children}
        while running:
            left = deadline - time.monotonic()
            if left <= 0:
                return why
            ready, _, _ = select.select([0, *running], [], [], min(left, 1.0))
            if 0 in ready:
                # The client sends nothing during a job: this is the end of file of its death.
                self.end_ranks()
                os._exit(1)
            for said, child in list(running.items()):
                if said in ready and os.read(said, 1):
                    del running[said]
                    continue
                # Without end of file too: what a dead rank had forked may keep its pipe open.
                if not reap(child, 0 if said in ready else os.WNOHANG):
                    continue
                del running[said]
                if time.monotonic() + grace < deadline:
                    deadline = time.monotonic() + grace
                    why = f"killed {grace:g} s after rank {child.rank} had failed"
        return ""


def write_line(fd: int, tree: dict) -> None:
    """Write `tree` to a pipe as one line of JSON."""
    data = (json.dumps(tree) + "\n").encode()
    while data:
        data = data[os.write(fd, data) :]


def reap(child: Child, flags: int = 0) -> bool:
    """Take the exit status of a rank and end what it left running. Returns whether it ended."""
    pid, status = os.waitpid(child.pid, flags)
    if not pid:
        return False
    child.status = os.waitstatus_to_exitcode(status)
    os.close(child.jobs)
    os.close(child.said)
    end(os.killpg, child)
    return True


def kill(children: list[Child]) -> None:
    """End the ranks that still run, with all that they started, and take their exit status."""
    running = [child for child in children if child.status is None]
    for child in running:
        # Its own session, so its process group is its pid; unless it has not got so far yet.
        end(os.killpg, child)
        end(os.kill, child)
    for child in running:
        reap(child)


def end(how: Callable[[int, int], None], child: Child) -> None:
    """SIGKILL, if there is anyone left to take it (macOS: PermissionError if all are zombies)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        how(child.pid, signal.SIGKILL)


def run_rank(rank: int, jobs: int, said: int, lifeline: int) -> int:
    """Be one rank: run each job that comes, until one fails. Returns the exit code."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    faulthandler.enable()
    threading.Thread(target=die_with_parent, args=(lifeline,), daemon=True).start()
    with open(jobs, "rb") as lines:
        for line in lines:
            job = json.loads(line)
            if not run_job(rank, job, Path(job["folder"])):
                return 1
            os.write(said, b".")
            if not job["keep"]:
                break  # others may wait for a rank that left early: its end tells them
    return 0


def run_job(rank: int, job: dict, folder: Path) -> bool:
    """Leave this rank's result in `folder`, or its traceback. Returns whether it has a result."""
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for fd in (1, 2):
        os.dup2(log, fd)
    os.close(log)
    # A rank that hangs says where, just before it is killed.
    faulthandler.dump_traceback_later(job["timeout"])
    try:
        left = {"result": call(rank, job, folder)}
        if job["keep"]:
            let_go()
        text, is_well = json.dumps(left), True
    except BaseException:
        # Also SystemExit: a rank that leaves early has failed.
        left = {"traceback": traceback.format_exc(), "at": time.monotonic()}
        text, is_well = json.dumps(left), False
    faulthandler.cancel_dump_traceback_later()
    # Whole or absent: a rank may be killed while it writes.
    part = folder / f"rank-{rank}.part"
    part.write_text(text, encoding="utf-8")
    part.rename(folder / f"rank-{rank}.json")
    sys.stdout.flush()
    sys.stderr.flush()
    return is_well


def let_go() -> None:
    """Give back what a job leaves, so that ranks that share a GPU hold no more than they use."""
    gc.collect()  # a model and the groups of its mesh refer to themselves
    torch.cuda.empty_cache()  # does nothing where CUDA was not asked for


def call(rank: int, job: dict, folder: Path) -> object:
    """What the job's target returns on this rank."""
    module, _, name = job["target"].partition(":")
    target = getattr(importlib.import_module(module), name)
    world, backend, device = job["world"], "gloo", torch.device("cpu")
    if job["device"] == "cuda":
        gpus = torch.cuda.device_count()
        backend = "nccl" if world <= gpus else host_group.BACKEND
        device = torch.device("cuda", rank % gpus)
        torch.cuda.set_device(device)
    if world == 1:
        return target(0, 1, **job["kwargs"])
    mesh.connect(
        rank=rank,
        world_size=world,
        backend=backend,
        timeout=timedelta(seconds=job["timeout"]),
        device=device,
        meet_at=folder / "store",
    )
    result = target(rank, world, **job["kwargs"])
    mesh.disconnect(together=True)
    return result


def die_with_parent(lifeline: int) -> None:
    """End this rank, and all that it started, when the process it was forked from is gone."""
    os.read(lifeline, 1)
    os.killpg(os.getpid(), signal.SIGKILL)


def gather(children: list[Child], ended_by: str, folder: Path) -> dict:
    """The answer: every rank's result, or one text about those that failed, the first one first."""
    left, logs = {}, {}
    for child in children:
        file, log = folder / f"rank-{child.rank}.json", folder / f"rank-{child.rank}.log"
        left[child.rank] = json.loads(file.read_text()) if file.exists() else {}
        logs[child.rank] = log.read_text(errors="replace").strip() if log.exists() else ""
    if not ended_by and all("result" in left[c.rank] for c in children):
        output = "\n".join(f"[rank {rank}] {text}" for rank, text in logs.items() if text)
        return {"results": [left[c.rank]["result"] for c in children], "output": output}
    failed = [c for c in children if "result" not in left[c.rank]]
    # A crash leaves no time, and comes first: what the others raised is most often its echo.
    failed.sort(key=lambda c: (c.status == -signal.SIGKILL, left[c.rank].get("at", 0.0), c.rank))
    texts = [f"{len(failed)} of {len(children)} ranks failed{': ' + ended_by if ended_by else ''}"]
    for child in failed:
        text = f"rank {child.rank} {how_it_ended(child)}"
        tail = "\n".join(logs[child.rank].splitlines()[-TAIL_LINES:])
        texts += [
            text,
            left[child.rank].get("traceback", ""),
            f"its output:\n{tail}" if tail else "",
        ]
    return {"error": "\n".join(text.rstrip() for text in texts if text)}


def how_it_ended(child: Child) -> str:
    """The exit status in words."""
    assert child.status is not None
    if child.status < 0:
        return f"ended by {signal.Signals(-child.status).name}"
    return "raised" if child.status else "ended without a result"


def main(package: str = "megalite") -> None:
    """Get warm by importing `package`, then serve."""
    replies = os.dup(1)
    # What a module prints must not end up between the answers.
    os.dup2(2, 1)
    zygote = Zygote(replies)
    try:
        import_everything(package)
    except BaseException:
        zygote.reply({"error": traceback.format_exc()})
        return
    # The collector must not touch, and so copy, every page that the ranks share with this process.
    gc.collect()
    gc.freeze()
    zygote.serve()


if __name__ == "__main__":
    main()
