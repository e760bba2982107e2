"""Runs the commands of the guide, as they stand there or in a form that takes seconds.

The small form is what a test runs: the same command with a few flags in place of its own. A verb
that has none runs as it is written, so that nothing can be left out.
"""

from __future__ import annotations

import email
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tools.guide.chapters import ROOT, Command

TRAINING = {
    "--train-steps": "2",
    "--micro-batch-size": "1",
    "--global-batch-size": "2",
    "--eval-interval": "0",
    "--device": "cpu",
}
SMALL: dict[str, dict[str, str]] = {
    "pretrain": TRAINING,
    "sft": TRAINING,
    "dpo": {**TRAINING, "--data": "runs/guide/conversations/valid-pairs.jsonl"},
    "conversations": {"--functions": "3", "--stdlib": str(Path(email.__file__).parent)},
    "generate": {"--max-tokens": "3", "--device": "cpu"},
    "chat": {"--max-tokens": "3", "--device": "cpu"},
    "serve": {"--port": "0", "--device": "cpu"},
}
"""Flags of the small form, by verb."""
# Threads that wait for each other between such small products take longer than one.
SMALL_PROCESS = {"SMOKE": "1", "OMP_NUM_THREADS": "1"}
"""What a process finds in its environment then."""
UNTRIMMED = ("--dry-run",)
"""Flags with which a verb is small as it is."""
SAID = "Hello.\n/reset\n"
"""What is typed into a chat."""
SERVES = "on http"
SECONDS = 120.0


class CommandError(Exception):
    """A command of the guide that does not run, with what it said."""


Verb = Callable[[list[str]], int]
"""Runs a command line of megalite in this process and gives its exit code."""


def run(command: Command, *, smoke: bool, here: Path, verb: Verb | None = None) -> None:
    """Run one command in `here`. Raises CommandError if it fails.

    `verb` runs lines of `megalite` in this process, where that will do; otherwise each is a process
    of its own.
    """
    words = small(command.words) if smoke else command.words
    if words[0] == "megalite" and words[1] == "serve":
        return _serve(words, command, here, smoke=smoke)
    if words[0] == "megalite" and words[1] != "chat" and verb is not None:
        if code := verb(words[1:]):
            raise CommandError(f"{command.where}: {command.text}: exit code {code}")
        return
    _process(words, command, here, smoke=smoke)


def small(words: Sequence[str]) -> list[str]:
    """A command with the flags of its small form."""
    verb = next((word for word in words[:3] if word in SMALL), None)
    if verb is None or any(flag in words for flag in UNTRIMMED):
        return list(words)
    found = list(words)
    for flag, value in SMALL[verb].items():
        if flag in found:
            found[found.index(flag) + 1] = value
        else:
            found += [flag, value]
    return found


def _start(words: Sequence[str], here: Path, more: Mapping[str, str]) -> subprocess.Popen[str]:
    megalite = [sys.executable, "-m", "megalite"]
    programs = {"megalite": megalite, "python": [sys.executable], "make": ["bash"]}
    line = [*programs.get(words[0], [words[0]]), *words[1:]]
    if words[0] == "make":
        line = ["bash", f"examples/{words[1]}.sh"]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        line,
        cwd=here,
        env={**os.environ, "PYTHONPATH": path, "PYTHON": sys.executable, **more},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def _process(words: Sequence[str], command: Command, here: Path, *, smoke: bool) -> None:
    process = _start(words, here, SMALL_PROCESS if smoke else {})
    try:
        said, _ = process.communicate(SAID, timeout=SECONDS if smoke else None)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise CommandError(f"{command.where}: {command.text}: took too long") from None
    if process.returncode:
        tail = "\n".join(said.splitlines()[-15:])
        raise CommandError(f"{command.where}: {command.text}: {process.returncode}\n{tail}")


def _serve(words: Sequence[str], command: Command, here: Path, *, smoke: bool) -> None:
    """Start a server, wait until it says that it serves, and end it."""
    process = _start(words, here, SMALL_PROCESS if smoke else {})
    said: list[str] = []
    assert process.stdout is not None
    end = time.monotonic() + SECONDS
    try:
        for line in process.stdout:
            said.append(line)
            if SERVES in line or time.monotonic() > end:
                break
        # Not by SIGINT, which what runs in the background may have been told to ignore.
        process.terminate()
        process.wait(timeout=SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if not any(SERVES in line for line in said):
        raise CommandError(f"{command.where}: {command.text}: served nothing\n{''.join(said)}")
