"""How a run ends before its last step: one cause on the screen, tracebacks in logs/, exit codes.

Ctrl-C and SIGTERM end it in order, after a step and a checkpoint. A rank that fails says why, once
for the whole run: the first to make `logs/cause` speaks, the others, and those that only lost their
peer, are silent.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from megalite.core.config import Config
from megalite.core.errors import CheckpointError, PeerFailed, RunError, UserError
from megalite.core.mesh import disconnect
from megalite.core.world import World

Explain = Callable[[Exception, Config, World], str]
"""What an exception that says memory is short means for a rank: plan/out_of_memory.py, from above.
"""


class Stopped(Exception):
    """The run ended in order before its last step: all ranks have saved and raise this together."""

    def __init__(self, signal_number: int):
        # A rank that was told to stop by the others ends as if by SIGTERM.
        self.exit_code = 128 + (signal_number or signal.SIGTERM)


@dataclass
class Stop:
    """Set by Ctrl-C or SIGTERM; the ranks agree on it with the next gradient norm."""

    signal_number: int = 0

    @property
    def asked(self) -> bool:
        return self.signal_number != 0

    def listen(self) -> None:
        """Take over both signals."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number


def logs_of(config: Config) -> Path:
    """Where the ranks of a run write their tracebacks."""
    return Path(config.train.out) / "logs"


@contextmanager
def failures_told(config: Config, world: World, explain: Explain | None = None) -> Iterator[None]:
    """Run the body; turn what it raises into one line, a traceback file and an exit code."""
    place = place_of(config, world)
    try:
        yield
    except Stopped as e:
        disconnect()
        sys.exit(e.exit_code)
    except PeerFailed:
        _write_traceback(config, world)
        sys.exit(RunError.exit_code)
    except (RunError, CheckpointError) as e:
        _write_traceback(config, world)
        # A damaged checkpoint may be seen by one rank alone, so it is not left to the front door;
        # but which rank saw it says nothing.
        _tell(config, str(e) if isinstance(e, CheckpointError) else f"{place}: {e}")
        sys.exit(e.exit_code)
    except UserError:
        raise  # alike on every rank: the front door prints it once
    except Exception as e:
        path = _write_traceback(config, world)
        cause = f"{type(e).__name__}: {e}"
        if explain is not None and is_out_of_memory(e):
            with suppress(MemoryError):  # the host may not even have enough left for that
                cause = explain(e, config, world)
        _tell(config, f"{place}: {cause} (traceback in {path})")
        sys.exit(RunError.exit_code)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a GPU or the host had no room; torch says the latter by a RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _write_traceback(config: Config, world: World) -> Path:
    path = logs_of(config) / f"rank-{world.rank}.log"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
    except OSError:
        traceback.print_exc()  # no room for a log: the screen is what is left
    return path


def _tell(config: Config, text: str) -> None:
    """Print the cause, unless another rank has."""
    line = f"megalite: error: {' '.join(text.split())}"
    try:
        claim = os.open(logs_of(config) / "cause", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return
    except OSError:
        claim = None  # nothing can be written here: better told twice than never
    print(line, file=sys.stderr, flush=True)
    if claim is not None:
        with os.fdopen(claim, "w", encoding="utf-8") as file:
            file.write(line + "\n")


def forget_cause(config: Config) -> None:
    """Make room for the cause of a new attempt; rank 0 calls it before the others can fail."""
    (logs_of(config) / "cause").unlink(missing_ok=True)


def place_of(config: Config, world: World) -> str:
    """`rank 5 (pp1 dp0 tp1)`."""
    layout, rank = config.layout, world.rank
    rank, tp = divmod(rank, layout.tp)
    rank //= layout.cp
    pp, dp = divmod(rank, config.data_ranks(world.size))
    return f"rank {world.rank} (pp{pp} dp{dp} tp{tp})"
