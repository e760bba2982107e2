"""torchrun, but the last word belongs to the rank that failed. Called by launch.sh.

torchrun answers a failed rank with a log line for each process, a long report and exit code 1. This
runs the same torchrun in this process, keeps its report off the screen and ends with the rank's own
exit code: 2 to 5 mean that the rank has said in one line what is wrong (megalite/core/errors.py).
Of any other death, such as a kill for lack of memory, the line is printed here.

The arguments are torchrun's.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

OWN_CODES = range(2, 6)
STOPPED = (128 + signal.SIGINT, 128 + signal.SIGTERM)
RUN_ERROR = 5


def root_cause(error: ChildFailedError) -> tuple[int, int]:
    """The rank that failed first and its exit code, negative for a signal.

    torchrun ends the other ranks with SIGTERM and lists them as well; before that, some may have
    died of the lost connection. A signal, or a mistake the rank could name, is neither.
    """

    def suspicion(item: tuple[int, int]) -> tuple[int, int]:
        rank, code = item
        if code == -signal.SIGTERM:
            return 3, rank
        return (0 if code < 0 else 1 if code in OWN_CODES else 2), rank

    codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
    return min(codes.items(), key=suspicion)


def say_death(rank: int, code: int) -> None:
    """Prints what is known of a rank that could not speak for itself."""
    if code == -signal.SIGKILL:
        why = "killed by SIGKILL (out of memory? see --micro-batch-size and --recompute)"
    elif code < 0:
        why = f"killed by {signal.Signals(-code).name}"
    else:
        why = f"exit code {code} (see above, and the run's logs/rank-{rank}.log)"
    print(f"megalite: error: rank {rank} died: {why}", file=sys.stderr)


def end_ranks() -> None:
    """Kills the ranks that are left after Ctrl-C.

    The first asks them to stop, and torchrun waits for it; a third makes torchrun end without them.
    They are sessions of their own, so that no key on the terminal reaches them any more.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True)
        pairs = [line.split() for line in listed.stdout.splitlines()]
        for pid in [int(pid) for pid, parent in pairs if int(parent) == os.getpid()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def main() -> int:
    """Runs torchrun and gives the exit code of the whole."""
    # The agent logs each signal it sends and each exit it sees; the ranks' own output is untouched.
    logging.disable(logging.CRITICAL)
    try:
        run.run(run.parse_args(sys.argv[1:]))
    except ChildFailedError as error:
        rank, code = root_cause(error)
        if code in OWN_CODES or code in STOPPED:
            return code
        say_death(rank, code)
        return RUN_ERROR
    except SignalException as error:
        end_ranks()
        return 128 + error.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main())
