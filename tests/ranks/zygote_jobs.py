"""Jobs that test the harness itself; each is called as name(rank, world, ...) in a forked rank."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
import weakref

import torch
import torch.distributed as dist


def report(rank: int, world: int, scale: int) -> dict:
    """Who I am, and whether compute libraries are as a fresh process has them."""
    print(f"hello from {rank}")
    return {
        "rank": rank,
        "world": world,
        "scaled": scale * rank,
        "threads": torch.get_num_threads(),
        "grouped": dist.is_initialized(),
        "session": os.getsid(0) == os.getpid(),
        "pid": os.getpid(),
        "parent": os.getppid(),
        "warm": "megalite.schedule.check" in sys.modules,
    }


def sum_of_ranks(rank: int, world: int) -> list[float]:
    """An all_reduce of rank + 1 and of its square."""
    x = torch.tensor([rank + 1.0, (rank + 1.0) ** 2])
    dist.all_reduce(x)
    return x.tolist()


def train_a_little(rank: int, world: int) -> float:
    """Forward, backward and a gradient reduction: what children of a used parent hang at."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(64, 64)
    layer(torch.ones(32, 64)).square().mean().backward()
    grad = layer.weight.grad
    before = grad.sum().item()
    dist.all_reduce(grad)
    return grad.sum().item() / before


LEFT: list[weakref.ref] = []
"""What earlier jobs of this process left."""


def leaves_a_circle(rank: int, world: int) -> dict:
    """How much of earlier jobs is still here, while this one leaves what refers to itself."""
    here = sum(ref() is not None for ref in LEFT)
    layer = torch.nn.Linear(2, 2)
    layer.itself = [layer]
    LEFT.append(weakref.ref(layer))
    group = dist.new_group([0, 1])
    dist.all_reduce(torch.ones(1), group=group)
    layer.group = group
    files = len(os.listdir("/dev/fd"))
    threads = len(os.listdir("/proc/self/task")) if os.path.exists("/proc/self/task") else 0
    return {"jobs": len(LEFT), "here": here, "files": files, "threads": threads}


def has_cuda(rank: int, world: int) -> bool:
    """Whether this process has touched a GPU."""
    return torch.cuda.is_initialized()


def hold_lock(path: str) -> int:
    """Make a file that stays locked as long as this process, or one given the result, lives."""
    fd = os.open(path + ".part", os.O_WRONLY | os.O_CREAT)
    fcntl.flock(fd, fcntl.LOCK_EX)
    os.rename(path + ".part", path)
    return fd


def one_raises(rank: int, world: int, who: int, lock_folder: str) -> int:
    """One rank raises, once the others hold their locks; they would sleep on."""
    if rank != who:
        hold_lock(os.path.join(lock_folder, str(rank)))
    dist.barrier()
    if rank == who:
        raise KeyError("the number 17 is missing")
    time.sleep(300)
    return rank


def one_raises_others_reduce(rank: int, world: int, who: int) -> None:
    """One rank raises while the others wait for it in a collective, and so fail too."""
    if rank == who:
        time.sleep(0.3)
        raise KeyError("the number 17 is missing")
    dist.all_reduce(torch.ones(1))


def one_hangs(rank: int, world: int, who: int) -> int:
    """One rank never comes back, nor lets the others into the final barrier."""
    if rank == who:
        sleep_on_purpose()
    return rank


def sleep_on_purpose() -> None:
    """A name to look for in the hung rank's stack."""
    time.sleep(300)


def one_crashes(rank: int, world: int, who: int) -> int:
    """One rank reads address 0."""
    if rank == who:
        ctypes.string_at(0)
    return rank


def leaves_early(rank: int, world: int) -> None:
    """Exit as a command line would."""
    sys.exit(0)


def returns_a_set(rank: int, world: int) -> set:
    """Something that JSON does not hold."""
    return {rank}


def starts_a_process(rank: int, world: int, lock: str, hang: bool) -> None:
    """Start a process that shares a lock with this rank, then hang, or leave it behind."""
    fd = hold_lock(lock)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], pass_fds=[fd])
    if hang:
        open(lock + ".started", "w").close()
        time.sleep(300)


def dies_while_its_fork_lives(rank: int, world: int, lock: str) -> None:
    """End by SIGKILL, with a forked child that still holds every file of the dead rank."""
    hold_lock(lock)
    if os.fork() == 0:
        time.sleep(300)
    os.kill(os.getpid(), signal.SIGKILL)
