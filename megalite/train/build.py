"""Config to engine: the only place where all rooms meet.

An Engine is one rank's share of the model with everything that trains it: stages, buckets,
optimizer, pipeline. Nothing in it is specific to a kind of parallelism; one process is the same
thing with one rank. Next: loop.py, which takes steps with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache

import torch
from torch import nn

from megalite.core import mesh as mesh_module
from megalite.core.config import Config
from megalite.core.errors import UserError
from megalite.core.mesh import Mesh
from megalite.core.params import initialize
from megalite.core.precision import default_dtype, dtype_of
from megalite.core.unit import recomputing
from megalite.core.world import World
from megalite.data.loader import Loader, TokenSource
from megalite.models.build import build_stages, mesh_factors
from megalite.models.gpt import GPT
from megalite.ops import backend
from megalite.ops.library import NoKernels
from megalite.optim.optimizer import Optimizer
from megalite.optim.rules import Rules
from megalite.optim.scaler import LossScaler
from megalite.parallel.pipeline import Pipeline
from megalite.parallel.zero import Zero
from megalite.schedule.action import Schedule
from megalite.schedule.check import check
from megalite.schedule.custom import load_schedule
from megalite.train.agree import check_agreement
from megalite.train.heap import keep_freed_memory
from megalite.train.own_files import attention_of

BUCKET_MB = {"cpu": 4.0, "cuda": 64.0}
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, eq=False)
class Engine:
    """One rank's share of a model in training."""

    config: Config
    mesh: Mesh
    device: torch.device
    dtype: torch.dtype
    stages: Mapping[int, GPT]
    zero: Zero
    optimizer: Optimizer
    pipeline: Pipeline

    @property
    def counts_loss(self) -> bool:
        """Whether this rank's loss counts: one rank of the last stage for each part of a batch, or
        of its sequences.
        """
        return self.pipeline.has_loss and self.mesh.coords["tp"] == 0


def schedule_maker(config: Config) -> Callable[[int], Schedule]:
    """Gives the checked schedule of a number of microbatches. Raises UserError for one that cannot
    run.
    """
    layout = config.layout
    try:
        make = load_schedule(layout.schedule)
    except ValueError as e:
        raise UserError(f"--schedule {e}") from None

    @lru_cache(maxsize=8)
    def schedule(num_microbatches: int) -> Schedule:
        try:
            made = make(layout.pp, num_microbatches, layout.vpp)
            check(made, tied=(0, made.num_stages - 1) if config.model.tie_embeddings else None)
        except ValueError as e:
            raise UserError(f"--schedule {e}") from None
        return made

    return schedule


def pick_device(config: Config, world: World) -> torch.device:
    """The device of this rank. Raises UserError where --device cuda cannot be had."""
    asked = config.train.device
    gpus = torch.cuda.device_count() if asked != "cpu" and torch.cuda.is_available() else 0
    if asked == "cpu" or (asked == "auto" and gpus == 0):
        return torch.device("cpu")
    if gpus == 0:
        raise UserError("--device cuda: no GPU is visible to torch (use --device cpu)")
    if world.local_size > gpus:
        raise UserError(
            f"--device {asked}: {world.local_size} ranks but {gpus} GPUs here (use --device cpu)"
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


def pick_dtype(config: Config, device: torch.device) -> torch.dtype:
    """The dtype of weights and matmuls."""
    return dtype_of(config.train.precision, device)


def build_mesh(config: Config, world: World, device: torch.device) -> Mesh:
    """Join the other ranks. All ranks of the world call it together."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    mesh_module.connect(
        rank=world.rank, world_size=world.size, backend=backend, timeout=TIMEOUT, device=device
    )
    kind = "real" if world.size > 1 else "single"
    # Before the layout's groups are made: ranks that disagree on it would wait for each other.
    check_agreement(config, Mesh({"dp": world.size}, rank=world.rank, kind=kind), device)
    return Mesh(
        mesh_sizes(config, world.size),
        rank=world.rank,
        kind=kind,
        factors=mesh_factors(config.model, config.layout.tp),
        timeout=TIMEOUT,
    )


def mesh_sizes(config: Config, world_size: int) -> dict[str, int]:
    """Ranks along each axis, of a world that the config's check accepted."""
    layout = config.layout
    return {"pp": layout.pp, "dp": config.data_ranks(world_size), "cp": layout.cp, "tp": layout.tp}


def build_engine(
    config: Config,
    mesh: Mesh,
    *,
    device: torch.device,
    dtype: torch.dtype,
    attention: Callable[..., nn.Module] | None = None,
) -> Engine:
    """This rank's stages with initial weights, and what trains them. All ranks call it together."""
    try:
        train = config.train
        backend.use(train.ops_backend, device, deterministic=train.deterministic)
    except NoKernels as error:
        raise UserError(str(error)) from None
    layout = config.layout
    if device.type == "cpu" and layout.zero < 2:
        keep_freed_memory()
    make = schedule_maker(config)
    with default_dtype(dtype):
        stages = build_stages(
            config.model,
            mesh,
            placement=make(1).placement,
            layers=layout.pp_layers,
            sequence_parallel=layout.sequence_parallel,
            seed=config.train.seed,
            attention=attention or attention_of(config),
        )
    for stage in stages.values():
        stage.run_unit = recomputing(
            stage,
            layout.recompute,
            modules=layout.recompute_modules,
            layers=layout.recompute_layers,
        )
    megabytes = layout.bucket_mb if layout.bucket_mb is not None else BUCKET_MB[device.type]
    rules = Rules(config.optim)
    zero = Zero(
        stages,
        mesh,
        stage=layout.zero,
        bucket_bytes=megabytes * 2**20,
        device=device,
        rule_of=rules.of,
        sent_as=torch.bfloat16 if layout.grad_reduce_dtype == "bf16" else None,
    )
    for stage in stages.values():
        initialize(stage, config.train.seed)
    zero.keep_params()
    scaler = LossScaler(config.optim) if dtype is torch.float16 else None
    optimizer = Optimizer(zero, config.optim, rules, scaler)
    pipeline = Pipeline(
        make, stages, mesh, dtype=dtype, device=device, enter=zero.enter, reduce=zero.reduce
    )
    return Engine(config, mesh, device, dtype, stages, zero, optimizer, pipeline)


def build_loader(engine: Engine, source: TokenSource) -> Loader:
    """What gives this rank's microbatches of `source`, as the engine's config has them."""
    config, mesh = engine.config, engine.mesh
    return Loader(
        source,
        mesh,
        seed=config.train.seed,
        micro_batch_size=config.train.micro_batch_size,
        num_microbatches=config.num_microbatches(mesh.world_size),
        device=engine.device,
        sequence_parallel=config.layout.sequence_parallel,
        cp_form=config.layout.cp_form,
        reset_attention_mask=config.data.keeps_documents_apart,
        dpo_beta=config.data.dpo_beta,
    )
