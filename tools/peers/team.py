"""The ranks of one system: started once, they take steps when they are told to."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TextIO

HERE = Path(__file__).resolve().parent


class Team:
    """The ranks of one system, started, waiting for orders between turns."""

    def __init__(self, script: str, options: list[str], world: int, *, python: str, threads: int):
        port = free_port()
        self.name, self.ranks, self.logs = script, [], []
        self.losses: list[float] = []
        for rank in range(world):
            env = os.environ | {
                "PYTHONPATH": str(HERE.parent.parent),
                "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}",
                "OMP_NUM_THREADS": str(threads),
                "OMP_WAIT_POLICY": "passive",  # threads that spin would count as CPU seconds
                "MASTER_ADDR": "localhost",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
            }
            log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the rank runs)
            command = [python, str(HERE / script), *options, "--threads", str(threads)]
            self.ranks.append(
                subprocess.Popen(
                    command,
                    env=env,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            )
            self.logs.append(log)
        self._answers()

    def _answers(self) -> list[dict]:
        answers = []
        for process in self.ranks:
            line = process.stdout.readline()
            while line and not line.startswith("{"):  # what a library printed at its start
                line = process.stdout.readline()
            if not line:
                self.stop()
                sys.exit(f"bench_peers: {self.name} failed:\n" + "".join(map(_tail, self.logs)))
            answers.append(json.loads(line))
        return answers

    def turn(self, steps: int) -> dict:
        """Take `steps` steps: CPU seconds of all ranks, wall seconds of the slowest, for one."""
        for process in self.ranks:
            process.stdin.write(f"{steps}\n")
            process.stdin.flush()
        answers = self._answers()
        for losses in zip(*(a["losses"] for a in answers), strict=True):
            self.losses.append(statistics.mean(x for x in losses if x is not None))
        return {
            "cpu": sum(sum(a["cpus"]) for a in answers) / steps,
            "wall": max(sum(a["walls"]) for a in answers) / steps,
            "rss": max(a["peak_rss_mb"] for a in answers),
        }

    def stop(self) -> None:
        """End the ranks."""
        for process in self.ranks:
            process.kill()
            process.wait()


def _tail(log: TextIO) -> str:
    log.seek(0)
    return log.read()[-2000:]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]
