"""Ranks for a command that starts its own: forked on this machine from one warm process.

    with Ranks() as ranks:
        results, output = ranks.run("megalite.train.verify:compare", 4, kwargs={...}, timeout=60)

Each job's ranks are new processes with gloo between them; on GPUs with NCCL where each has its own.
With `keep` they live on from job to job, with a new process group for each: for jobs that leave
nothing behind in their process. What the warm process does: zygote.py.
"""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from megalite.core.errors import RunError

PACKAGE_FOLDER = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
"""Until the imports are done, on a machine that is busy."""
SPARE_SECONDS = 30.0
"""How much longer than a job may take its answer is waited for."""


class Answer(NamedTuple):
    """What a job gave: each rank's result in rank order, and what the ranks printed."""

    results: list[Any]
    output: str


class Ranks:
    """The warm process, started at the first job and ended by `close`.

    `keep`: a job's ranks take the next one, too, so that a GPU is set up once a rank. After a job
    that failed they are new.
    """

    def __init__(self, device: str = "cpu", *, keep: bool = False) -> None:
        self.device, self.keep = device, keep
        self.process: subprocess.Popen[bytes] | None = None
        self.unread = b""

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def run(
        self,
        target: str,
        world: int,
        *,
        kwargs: dict,
        timeout: float,
        grace: float = 5.0,
        device: str | None = None,
    ) -> Answer:
        """What `target` ("module:function") gives on each rank.

        `device`: where this job computes, if not where the others do. Ranks that still run
        `timeout` seconds after the start, or `grace` seconds after another rank failed, are killed.
        Raises RunError with the failed ranks' tracebacks.
        """
        if self.process is None:
            self.start()
        assert self.process is not None and self.process.stdin is not None
        job = {
            "target": target,
            "world": world,
            "device": device or self.device,
            "kwargs": kwargs,
            "timeout": timeout,
            "grace": grace,
            "keep": self.keep,
        }
        self.process.stdin.write((json.dumps(job) + "\n").encode())
        answer = self.read(timeout + SPARE_SECONDS)
        if "error" in answer:
            raise RunError(f"{target} on {world} ranks: {answer['error']}")
        return Answer(answer["results"], answer["output"])

    def start(self) -> None:
        """Start the warm process; RunError if a module of ours cannot be imported."""
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        # This very copy, whatever the current directory is and whatever is installed.
        path = (str(PACKAGE_FOLDER), env.get("PYTHONPATH"))
        env["PYTHONPATH"] = os.pathsep.join(part for part in path if part)
        # The name of the machine need not resolve, and nothing here leaves it.
        env["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
        # macOS ends a fork that touches what its Objective-C runtime had begun to initialize.
        env["OBJC_DISABLE_INITIALIZE_FORK_SAFETY"] = "YES"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "megalite.train.zygote"],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # Ctrl-C is for the process that asks, which then closes this one.
            start_new_session=True,
        )
        if "error" in (ready := self.read(START_SECONDS)):
            raise RunError(f"the process that ranks are forked from raised\n{ready['error']}")

    def read(self, seconds: float) -> dict:
        """The next line that the warm process writes within `seconds`."""
        assert self.process is not None and self.process.stdout is not None
        deadline = time.monotonic() + seconds
        while b"\n" not in self.unread:
            fd = self.process.stdout.fileno()
            ready, _, _ = select.select([fd], [], [], max(deadline - time.monotonic(), 0))
            data = os.read(fd, 1 << 16) if ready else b""
            if not data:
                what = "has ended" if ready else f"said nothing for {seconds:g} s"
                self.close()
                raise RunError(f"the process that ranks are forked from {what}")
            self.unread += data
        line, self.unread = self.unread.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        """End the warm process; the next job starts a new one."""
        if self.process is None:
            return
        process, self.process, self.unread = self.process, None, b""
        assert process.stdin is not None and process.stdout is not None
        process.stdin.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def last_words(text: str) -> str:
    """What the first traceback ends with, in a line, and the rank, or the process, that raised."""
    said = re.search(
        r"^(rank \d+|the process .*?) raised\nTraceback.*?^([A-Za-z_][\w.]*(?::[^\n]*)?)$",
        text,
        re.S | re.M,
    )
    return f"{said[1]}: {said[2]}" if said else "; ".join(text.splitlines()[:2])
