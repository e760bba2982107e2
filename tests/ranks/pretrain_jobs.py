"""Ranks that run `pretrain` as torchrun's would, and say how they ended."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from dataclasses import replace
from pathlib import Path

import torch

from megalite.core.config import Config
from megalite.core.errors import UserError
from megalite.core.mesh import Mesh, disconnect
from megalite.core.world import World
from megalite.parallel.pipeline import Pipeline
from megalite.plan.out_of_memory import explain
from megalite.train.agree import check_agreement
from megalite.train.pretrain import pretrain


def train(rank: int, world: int, config: dict, signal_at: int = 0, signalled: int = 0) -> dict:
    """Run `pretrain`; rank `signalled` sends itself SIGINT after `signal_at` lines of metrics."""
    here = World(rank=rank, size=world, local_rank=rank, local_size=world, launched=world > 1)
    if signal_at and rank == signalled:
        metrics = Path(config["train"]["out"]) / "metrics.jsonl"

        def watch(number: int, frame: object) -> None:
            if metrics.exists() and metrics.read_text().count("\n") >= signal_at:
                signal.setitimer(signal.ITIMER_REAL, 0)
                os.kill(os.getpid(), signal.SIGINT)

        signal.signal(signal.SIGALRM, watch)
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.05)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            pretrain(Config.from_dict(config), here, explain)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except UserError as e:  # the front door's part, for mistakes that all ranks see alike
            code = e.exit_code
            print(f"front door: {e}", file=err)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def disagree(rank: int, world: int, config: dict, lr_of: list[float]) -> str:
    """The line about a config that differs by rank, over a mesh that does not follow from it."""
    base = Config.from_dict(config)
    mine = replace(base, optim=replace(base.optim, lr=lr_of[rank]))
    mesh = Mesh({"dp": world}, rank=rank, kind="real")
    try:
        check_agreement(mine, mesh, torch.device("cpu"))
    except UserError as e:
        return str(e)
    return ""


def train_beside(rank: int, world: int, config: dict, folders: list[str]) -> dict:
    """Run `pretrain` with one config in a working directory for each rank."""
    os.chdir(folders[rank])
    return train(rank, world, config)


def train_apart(rank: int, world: int, configs: list[dict]) -> dict:
    """Run `pretrain` with a config for each rank."""
    return train(rank, world, configs[rank])


def train_greedily(rank: int, world: int, config: dict, greedy: int) -> dict:
    """Run `pretrain`; rank `greedy` asks for 40 TB where its microbatches run."""
    if rank == greedy:
        Pipeline.run = lambda *args, **kwargs: torch.empty(10**13)
    found = train(rank, world, config)
    disconnect()  # as the end of its process would: the others notice
    return found
