"""The warm process that ranks are forked from: it imports all that they need, computes nothing.

    python -m megalite.train.zygote

A child of it is a rank in milliseconds instead of the seconds that importing torch takes. It must
not compute: children of a parent that had run tensor operations or a backward have hung, because
fork copies no threads but copies their locks. Nor can they use a GPU. Its other side is ranks.py,
which sends one JSON line a job to its standard input:

    {"target": "module:name", "world": 4, "kwargs": {...}, "timeout": 60.0, "grace": 5.0}

and one JSON line comes back on standard output, {"results": [one a rank], "output": text} or
{"error": text}. The target is called as name(rank, world, **kwargs) in each rank, inside a gloo
process group if world > 1, and returns what JSON can hold.
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
    alive: int
    """Read end of a pipe whose only writer is the rank: end of file when it has died."""
    status: int | None = None


class Zygote:
    """Serves jobs until standard input ends."""

    def __init__(self, replies: int) -> None:
        self.replies = replies
        # The other way round: the ranks read it, and end when its only writer, this process, has.
        self.lifeline, self.lifeline_writer = os.pipe()

    def serve(self) -> None:
        """Answer every line of standard input with one line."""
        self.reply({"ready": os.getpid()})
        # Unbuffered, so that `select` sees what has not been read.
        with open(0, "rb", buffering=0, closefd=False) as lines:
            while line := lines.readline():
                self.reply(self.run(json.loads(line)))

    def reply(self, answer: dict) -> None:
        """Write one line."""
        data = (json.dumps(answer) + "\n").encode()
        while data:
            data = data[os.write(self.replies, data) :]

    def run(self, job: dict) -> dict:
        """Fork the job's ranks, wait for them, and gather what they left."""
        assert threading.active_count() == 1, "a thread would not survive the fork"
        assert torch.get_num_threads() == 1, "start with OMP_NUM_THREADS=1"
        with tempfile.TemporaryDirectory(prefix="megalite-ranks-") as name:
            folder = Path(name)
            children: list[Child] = []
            try:
                for rank in range(job["world"]):
                    children.append(self.fork(rank, job, folder))
                ended_by = self.wait(children, job["timeout"], job["grace"])
            finally:
                kill(children)
            return gather(children, ended_by, folder)

    def fork(self, rank: int, job: dict, folder: Path) -> Child:
        """Start one rank."""
        alive, alive_writer = os.pipe()
        pid = os.fork()
        if pid:
            os.close(alive_writer)
            return Child(rank, pid, alive)
        code = 1
        try:
            os.close(alive)
            os.close(self.lifeline_writer)
            os.close(self.replies)
            code = run_rank(rank, job, folder, self.lifeline)
        finally:
            # Never back into the server's loop, whatever happened.
            os._exit(code)

    def wait(self, children: list[Child], timeout: float, grace: float) -> str:
        """Wait until all ranks have ended, or it is time to kill those left. Returns why it is."""
        # The ranks' own stack dumps and group timeouts come first.
        deadline, why = time.monotonic() + timeout + 1.0, f"no end after {timeout:g} s"
        running = {child.alive: child for child in children}
        while running:
            left = deadline - time.monotonic()
            if left <= 0:
                return why
            ready, _, _ = select.select([0, *running], [], [], min(left, 1.0))
            if 0 in ready:
                # The client sends nothing during a job: this is the end of file of its death.
                kill(children)
                os._exit(1)
            for alive, child in list(running.items()):
                # Without end of file too: what a dead rank had forked may keep its pipe open.
                if not reap(child, 0 if alive in ready else os.WNOHANG):
                    continue
                del running[alive]
                if child.status != 0 and time.monotonic() + grace < deadline:
                    deadline = time.monotonic() + grace
                    why = f"killed {grace:g} s after rank {child.rank} had failed"
        return ""


def reap(child: Child, flags: int = 0) -> bool:
    """Take the exit status of a rank and end what it left running. Returns whether it ended."""
    pid, status = os.waitpid(child.pid, flags)
    if not pid:
        return False
    child.status = os.waitstatus_to_exitcode(status)
    os.close(child.alive)
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


def run_rank(rank: int, job: dict, folder: Path, lifeline: int) -> int:
    """Be one rank of `job`, leave its result or traceback in `folder`, return the exit code."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for fd, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(fd, target)
    faulthandler.enable()
    # A rank that hangs says where, just before it is killed.
    faulthandler.dump_traceback_later(job["timeout"])
    threading.Thread(target=die_with_parent, args=(lifeline,), daemon=True).start()
    try:
        left = {"result": call(rank, job, folder)}
        text, code = json.dumps(left), 0
    except BaseException:
        # Also SystemExit: a rank that leaves early has failed.
        text, code = json.dumps({"traceback": traceback.format_exc(), "at": time.monotonic()}), 1
    (folder / f"rank-{rank}.json").write_text(text, encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    return code


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
        # A rank that was killed while it wrote leaves half a line; its exit status says enough.
        left[child.rank] = (
            json.loads(file.read_text()) if file.exists() and child.status in (0, 1) else {}
        )
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
