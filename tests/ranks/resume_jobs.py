"""What the ranks of the checkpoint tests do: train, save, load, and say what numbers they hold.

A number is compared as the hash of its bytes, so equal means equal in every bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from megalite.checkpoint import manifest as mf
from megalite.checkpoint import save as save_module
from megalite.checkpoint.load import Reader, load_optimizer, load_weights, newest_for_all
from megalite.checkpoint.save import save
from megalite.core import comm
from megalite.core.comm import barrier
from megalite.core.config import Config
from megalite.core.errors import CheckpointError, PeerFailed, RunError
from megalite.core.mesh import Axis, Mesh
from megalite.core.params import named_parameters, traits_of
from megalite.core.shard import slices
from megalite.data.loader import Synthetic
from megalite.generate.engine import Request, complete
from megalite.generate.sample import Sampling
from megalite.generate.share import make_share
from megalite.optim.lr import learning_rate
from megalite.parallel import gather
from megalite.train.build import Engine, build_loader
from megalite.train.steps import Steps
from tests.ranks.jobs import engine_of

TOTAL_STEPS = 20


def facts(config: Config, step: int, samples: int) -> mf.Manifest:
    """What a manifest of this run says beside the numbers."""
    tree = json.loads(json.dumps(config.to_dict()))
    tokens = samples * config.model.seq_len
    return mf.Manifest(step, samples, tokens, optimizer_steps=step, config=tree, made_with={})


def advance(engine: Engine, samples: int, steps: int) -> tuple[int, list[str]]:
    """Train from the sample counter on; gives the counter after it and each loss, exactly."""
    config, mesh = engine.config, engine.mesh
    loader = build_loader(
        engine,
        Synthetic(config.model.vocab_size, config.model.seq_len, config.train.seed, length=50),
    )
    form = Steps(engine)
    taken = []
    for _ in range(steps):
        batch = config.batch_at(samples)
        done = 1 + next(n for n in count() if config.samples_after(n) == samples)
        lr = learning_rate(config.optim, done=done, warmup=3, total=TOTAL_STEPS)
        calls = loader.step(samples, config.num_microbatches(mesh.world_size, batch))
        taken.append(form.take(calls, lr=lr))
        samples += batch
    form.settle()
    return samples, [found.loss.item().hex() for found in taken]


def state_of(engine: Engine) -> str:
    """A hash of all that this rank holds: parameters, optimizer state and its step."""
    digest = hashlib.sha256(str(engine.optimizer.step_count).encode())
    with engine.zero.whole_params():
        for idx, bucket in enumerate(engine.zero.buckets):
            for name, flat in {"params": bucket.params, **engine.optimizer.numbers(idx)}.items():
                digest.update(name.encode() + flat.clone().numpy().tobytes())
    return digest.hexdigest()


def scaling_of(engine: Engine) -> list[dict]:
    """Steps of the optimizer and the state of its loss scale, if it has one."""
    optimizer = engine.optimizer
    if optimizer.scaler is None:
        return []
    return [{"steps": optimizer.step_count, **optimizer.scaler.state()}]


def load_newest(engine: Engine, run: str) -> mf.Manifest:
    """Take all numbers from the newest checkpoint of a run; gives its manifest."""
    directory, manifest, _ = newest_for_all(Path(run), engine.mesh, engine.device)
    load_optimizer(Reader(directory, manifest), engine.optimizer)
    return manifest


def train_through(rank: int, world: int, config: dict, out: str, dtype: str = "float32") -> dict:
    """Train 10 steps, save, and train 10 more without a stop."""
    engine = engine_of(Config.from_dict(config), rank, world, dtype)
    samples, first = advance(engine, 0, 10)
    made = replace(facts(engine.config, 10, samples), optimizer_steps=engine.optimizer.step_count)
    save(Path(out), engine.optimizer, engine.mesh, made)
    at_10, scaling = state_of(engine), scaling_of(engine)
    samples, second = advance(engine, samples, 10)
    scaling += scaling_of(engine)
    return {
        "losses": first + second,
        "at_10": at_10,
        "at_20": state_of(engine),
        "scaling": scaling,
    }


def resume(rank: int, world: int, config: dict, run: str, dtype: str = "float32") -> dict:
    """Go on from the newest checkpoint, in processes that know nothing of the run before."""
    engine = engine_of(Config.from_dict(config), rank, world, dtype)
    fresh = state_of(engine)
    manifest = load_newest(engine, run)
    at_10, scaling = state_of(engine), scaling_of(engine)
    _, losses = advance(engine, manifest.samples, 10)
    scaling += scaling_of(engine)
    return {
        "losses": losses,
        "fresh": fresh,
        "at_10": at_10,
        "at_20": state_of(engine),
        "scaling": scaling,
    }


def train_and_save(rank: int, world: int, config: dict, out: str) -> None:
    """Train 2 steps, so that weights and optimizer state have numbers of their own, and save."""
    engine = engine_of(Config.from_dict(config), rank, world, "float32")
    samples, _ = advance(engine, 0, 2)
    save(Path(out), engine.optimizer, engine.mesh, facts(engine.config, 2, samples))


def go_on(rank: int, world: int, config: dict, run: str, steps: int) -> list[float]:
    """Train those steps in float64 from the newest checkpoint, if any, and save; gives losses."""
    engine = engine_of(Config.from_dict(config), rank, world, "float64")
    samples, step, root = 0, 0, Path(run) / "checkpoints"
    if root.exists():
        manifest = load_newest(engine, run)
        samples, step = manifest.samples, manifest.step
    barrier(engine.mesh.world)
    samples, losses = advance(engine, samples, steps)
    save(root, engine.optimizer, engine.mesh, facts(engine.config, step + steps, samples))
    return [float.fromhex(loss) for loss in losses]


def load_elsewhere(rank: int, world: int, config: dict, run: str, weights_only: bool) -> list:
    """Load another layout's checkpoint; gives name, box and numbers of what this rank holds."""
    engine = engine_of(Config.from_dict(config), rank, world, "float32")
    with engine.zero.whole_params():
        for bucket in engine.zero.buckets:
            bucket.params.fill_(7.0)  # a number that is not loaded shows
    directory, manifest, _ = mf.newest(Path(run))
    reader = Reader(directory, manifest)
    if weights_only:
        with engine.zero.whole_params():
            for stage in engine.stages.values():
                load_weights(reader, dict(named_parameters(stage)))
    else:
        load_optimizer(reader, engine.optimizer)
    with engine.zero.whole_params():
        return list(_pieces_held(engine))


def _pieces_held(engine: Engine) -> Iterator[tuple]:
    for stage in engine.stages.values():
        for name, param in named_parameters(stage):
            traits = traits_of(param)
            for piece in traits.shard.pieces(traits.axes):
                numbers = param.detach()[slices(piece.local)].tolist()
                yield name, piece.whole, numbers


def save_and_fail(rank: int, world: int, config: dict, out: str, who: int, how: str) -> dict:
    """Save step 1 well; then the disk of rank `who` is full while step 2 is saved."""
    engine = engine_of(Config.from_dict(config), rank, world, "float32")
    root = Path(out) / "checkpoints"
    save(root, engine.optimizer, engine.mesh, facts(engine.config, 1, 0))

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    if rank == who:
        setattr(save_module, how, full)
    try:
        save(root, engine.optimizer, engine.mesh, facts(engine.config, 2, 0))
    except RunError as e:
        directory, _, passed_over = mf.newest(Path(out))
        return {
            "silent": isinstance(e, PeerFailed),
            "text": str(e),
            "newest": directory.name,
            "passed_over": passed_over,
        }
    raise AssertionError("a full disk went unnoticed")


def choose(rank: int, world: int, run: str, blind: list[int]) -> dict:
    """What `newest_for_all` gives where the ranks in `blind` cannot read manifests."""
    mesh = Mesh({"dp": world}, rank=rank, kind="real")
    if rank in blind:
        mf.NAME = "NOT-THERE.json"
    try:
        found = newest_for_all(Path(run), mesh, torch.device("cpu"))
    except (CheckpointError, PeerFailed) as e:
        return {"raised": type(e).__name__}
    return {"directory": found[0].name, "step": found[1].step, "passed_over": len(found[2])}


def greedy(rank: int, world: int, config: dict) -> list[list[int]]:
    """What the initial model says to three prompts."""
    engine = engine_of(Config.from_dict(config), rank, world, "float32")
    share = make_share(engine.config.model, engine.stages, engine.pipeline, slots=2)
    prompts = [[3], [5, 1, 4, 1], [9, 2]]
    how = Sampling(temperature=0.0)
    return complete(share, [Request(tokens=p, how=how, max_tokens=8) for p in prompts])


def losses_of(engine: Engine, samples: int, steps: int) -> list[float]:
    """The losses of the next steps."""
    return [float.fromhex(loss) for loss in advance(engine, samples, steps)[1]]


def train_save_and_go_on(rank: int, world: int, config: dict, out: str) -> list[float]:
    """Train 2 steps, save, and give the next losses of the run that stays in its layout."""
    engine = engine_of(Config.from_dict(config), rank, world, "float32")
    samples, _ = advance(engine, 0, 2)
    save(Path(out) / "checkpoints", engine.optimizer, engine.mesh, facts(engine.config, 2, samples))
    return losses_of(engine, samples, 2)


class LateGather:
    """Parameters of an update that are sent as they were, and put in place when waited for."""

    def __init__(self, x: Tensor, axis: Axis, *, out: Tensor):
        self.x, self.axis, self.out = x.clone(), axis, out

    def wait(self) -> Tensor:
        return comm.all_gather_start(self.x, self.axis, out=self.out).wait()


def move_with_gathers_that_come_late(rank: int, world: int, **kwargs) -> list[list[float]]:
    """`move`, where what a step sends is on its way for as long as it may be."""
    gather.comm = SimpleNamespace(all_gather_start=LateGather)
    try:
        return move(rank, world, **kwargs)
    finally:
        gather.comm = comm


def move(rank: int, world: int, config: dict, runs: dict[str, str]) -> list[list[float]]:
    """Load each run's checkpoint in this layout, save it again, and go on; gives the next losses.

    `runs`: from where to where. One engine takes them all, so what a load leaves behind shows.
    """
    engine = engine_of(Config.from_dict(config), rank, world, "float32")
    losses = []
    for source, target in runs.items():
        manifest = load_newest(engine, source)
        made = facts(engine.config, manifest.step, manifest.samples)
        save(Path(target) / "checkpoints", engine.optimizer, engine.mesh, made)
        losses.append(losses_of(engine, manifest.samples, 2))
    return losses
