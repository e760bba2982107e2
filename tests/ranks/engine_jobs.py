"""What the ranks of test_engine.py do: schedules and forks by hand, against one process."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megalite.core.config import Config, LayoutConfig, ModelConfig, TrainConfig
from megalite.core.log import Collective, Hold
from megalite.core.mesh import Mesh
from megalite.core.params import constant, gaussian, initialize, named_parameters, new_param
from megalite.core.shard import whole
from megalite.layers.attention import Attention
from megalite.models.build import build_stages
from megalite.models.gpt import GPT
from megalite.optim.optimizer import Optimizer
from megalite.parallel import gather
from megalite.parallel.pipeline import Pipeline
from megalite.parallel.zero import Zero
from megalite.schedule.action import ALL_MICROBATCHES, Action, Op, Schedule
from megalite.schedule.check import check
from megalite.schedule.generators import one_f_one_b
from megalite.train.build import Engine
from megalite.train.loop import forward_backward, train_step
from tests.ranks.jobs import CPU, calls_of, engine_of

MODEL = ModelConfig(
    num_layers=2, hidden_size=12, num_heads=3, vocab_size=17, seq_len=6, init_std=0.2
)
MODEL_OF_4 = replace(MODEL, num_layers=4)
TOL = 1e-12

ScheduleFor = Callable[[int], Schedule]


def config_of(model: ModelConfig = MODEL, microbatches: int = 3, **layout) -> Config:
    train = TrainConfig(micro_batch_size=2, global_batch_size=2 * microbatches)
    return Config(model=model, layout=LayoutConfig(**layout), train=train)


def built(config: Config, mesh: Mesh, schedule_for: ScheduleFor) -> Engine:
    """An engine in float64 that runs any schedule, in a table or not."""
    torch.set_default_dtype(torch.float64)
    made = schedule_for(1)
    stages = build_stages(
        config.model, mesh, placement=made.placement, layers=None, sequence_parallel=True, seed=1
    )
    zero = Zero(stages, mesh, stage=config.layout.zero, bucket_bytes=2000, device=CPU)
    for stage in stages.values():
        initialize(stage, 1)
    pipeline = Pipeline(
        schedule_for,
        stages,
        mesh,
        dtype=torch.float64,
        device=CPU,
        enter=zero.enter,
        reduce=zero.reduce,
    )
    optimizer = Optimizer(zero, config.optim)
    return Engine(config, mesh, CPU, torch.float64, stages, zero, optimizer, pipeline)


def gradients(engine: Engine) -> dict[str, Tensor]:
    """Of one step, by name; a table that two stages hold is there once."""
    found = forward_backward(engine, calls_of(engine, 0, False))
    assert engine.zero.all_landed(engine.config.num_microbatches(engine.mesh.world_size))
    params = {n: p for s in engine.stages.values() for n, p in named_parameters(s)}
    # A W that ran in autograd's sight would hang its graph on the gradient, and keep it.
    assert not any(p.grad.requires_grad for p in params.values())
    return {name: p.grad * found.correction for name, p in params.items()}


def assert_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for name, tensor in ours.items():
        scale = theirs[name].abs().max()
        assert (tensor - theirs[name]).abs().max() <= TOL * scale, name


# -- I and W ------------------------------------------------------------------------------------


def by_hand(ranks: int, n: int) -> Schedule:
    """Two stages on one rank or two, with I as early and W as late as the list shows."""

    def act(op: Op, stage: int, microbatch: int = ALL_MICROBATCHES) -> Action:
        return Action(op, stage, microbatch)

    every = range(n)
    if ranks == 1:
        actions = []
        for m in every:
            actions += [act(Op.F, 0, m), act(Op.F, 1, m), act(Op.I, 1, m), act(Op.I, 0, m)]
            if m:  # one microbatch late
                actions += [act(Op.W, 0, m - 1), act(Op.W, 1, m - 1)]
        actions += [act(Op.W, 1, n - 1), act(Op.R, 1), act(Op.W, 0, n - 1), act(Op.R, 0)]
        made = Schedule("by hand", n, (0, 0), (tuple(actions),))
    else:
        first = [act(Op.F, 0, m) for m in every] + [act(Op.I, 0, m) for m in every]
        first += [act(Op.W, 0, m) for m in reversed(every)] + [act(Op.R, 0)]
        second = [act(op, 1, m) for m in every for op in (Op.F, Op.I)]
        second += [act(Op.W, 1, m) for m in every] + [act(Op.R, 1)]
        made = Schedule("by hand", n, (0, 1), (tuple(first), tuple(second)))
    check(made, tied=(0, 1))
    return made


def check_split_backward(rank: int, world: int) -> None:
    """Gradients of a schedule with I and W against 1F1B in one process."""
    config = config_of(pp=world, zero=0)
    mesh = Mesh({"pp": world}, rank=rank, kind="real" if world > 1 else "single")
    ours = gradients(built(config, mesh, lambda n: by_hand(world, n)))
    theirs = gradients(built(config_of(zero=0), Mesh({}), lambda n: one_f_one_b(1, n)))
    assert_equal(ours, theirs)
    if world == 1:
        assert ours.keys() == theirs.keys()


# -- a fork's own layer -------------------------------------------------------------------------


class PlainLinear(nn.Module):
    """What a researcher writes first: F.linear on whole parameters."""

    def __init__(self, d_in: int, d_out: int, mesh: Mesh, std: float):
        super().__init__()
        axes = mesh.axis("tp").named
        self.weight = new_param(whole(d_out, d_in), axes, init=gaussian(std))
        self.bias = new_param(whole(d_out), axes, init=constant(0.0))

    def forward(self, x: Tensor, call) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class PlainAttention(Attention):
    """Ours with plain linears of the same names, so of the same initial weights."""

    def __init__(self, cfg: ModelConfig, mesh: Mesh, **kwargs):
        super().__init__(cfg, mesh, **kwargs)
        self.qkv = PlainLinear(cfg.hidden_size, 3 * cfg.hidden_size, mesh, cfg.init_std)
        std = cfg.init_std / (2 * cfg.num_layers) ** 0.5
        self.out = PlainLinear(cfg.hidden_size, cfg.hidden_size, mesh, std)


def check_plain_layer(rank: int, world: int, zero: int, recompute: str) -> None:
    """Three steps of a fork with plain layers, dp and ZeRO, against ours in one process.

    At stage 3 freed parameters are overwritten with NaN first: who still reads them, shows it.
    """
    if zero == 3:
        gather.empty = _poison
    config = config_of(microbatches=2 * world, dp=world, zero=zero, recompute=recompute)
    fork = engine_of(config, rank, world, "float64", attention=PlainAttention)
    ours = engine_of(config_of(microbatches=2 * world), 0, 1, "float64")
    assert isinstance(fork.stages[0].layers["0"].attention.qkv, PlainLinear)
    for step in range(3):
        for engine in (fork, ours):
            train_step(engine, calls_of(engine, step, False), lr=1e-3)
        assert fork.zero.all_landed(config.num_microbatches(world))
        with fork.zero.whole_params():
            params = (dict(named_parameters(e.stages[0])) for e in (fork, ours))
            # Adam divides by the root of small squares: rounding grows, what is missing is more.
            for (name, a), (_, b) in zip(*(p.items() for p in params), strict=True):
                assert (a - b).abs().max() <= 1e-9, (name, step)
        assert zero < 3 or not any(b.is_whole for b in fork.zero.buckets)


def _poison(bucket) -> None:
    """In place of freeing: the memory stays, and holds NaN."""
    bucket.params.data.fill_(float("nan"))
    bucket.is_whole = False


# -- memory of what was sent --------------------------------------------------------------------


def output_bytes(rank: int, world: int, ends_in_tanh: bool) -> list[int]:
    """Storage of each output of this rank's stage after a step, whose gradients are right."""
    mesh = Mesh({"pp": world}, rank=rank, kind="real")
    engine = built(config_of(pp=world, zero=0), mesh, lambda n: one_f_one_b(world, n))
    alone = built(config_of(zero=0), Mesh({}), lambda n: _two_stages_in_turn(n))
    outputs: list[Tensor] = []
    for stages in (engine.stages, alone.stages):
        if ends_in_tanh and 0 in stages:
            _end_in_tanh(stages[0])
    for stage in engine.stages.values():
        stage.register_forward_hook(lambda module, args, y: outputs.append(y))
    assert_equal(gradients(engine), gradients(alone))
    return [y.untyped_storage().nbytes() for y in outputs]


def output_bytes_of_layout(rank: int, world: int, **layout) -> list[int]:
    """Storage of each output of this rank's stage after a step of a layout."""
    engine = engine_of(config_of(pp=world, **layout), rank, world, "float64")
    outputs: list[Tensor] = []
    for stage in engine.stages.values():
        stage.register_forward_hook(lambda module, args, y: outputs.append(y))
    forward_backward(engine, calls_of(engine, 0, False))
    return [y.untyped_storage().nbytes() for y in outputs]


def most_under_way(rank: int, world: int, microbatches: int, **layout) -> int:
    """The most messages of this rank to another one that a step had not let go of at a time."""
    config = config_of(MODEL_OF_4, microbatches, pp=world, **layout)
    engine = engine_of(config, rank, world, "float64")
    pipes, most = engine.pipeline.pipes, 0
    send = pipes.send

    def counted(dst: int, *message) -> None:
        nonlocal most
        send(dst, *message)
        most = max(most, len(pipes._sending[dst]))

    pipes.send = counted
    forward_backward(engine, calls_of(engine, 0, False))
    assert not any(pipes._sending.values())
    return most


def _two_stages_in_turn(n: int) -> Schedule:
    order = ((Op.F, 0), (Op.F, 1), (Op.B, 1), (Op.B, 0))
    actions = [Action(op, stage, m) for m in range(n) for op, stage in order]
    actions += [Action(Op.R, stage, ALL_MICROBATCHES) for stage in (1, 0)]
    return Schedule("in turn", n, (0, 0), (tuple(actions),))


def _end_in_tanh(stage: GPT) -> None:
    stage.register_forward_hook(lambda module, args, y: torch.tanh(y))


# -- transfers that are held --------------------------------------------------------------------


def held_transfers(rank: int, world: int, seconds: float, overlap: bool) -> dict:
    """Losses of two steps whose sends are held; when each was asked for, and each receive ended."""
    config = config_of(pp=world)
    found = {}
    for name, hold in (("free", None), ("held", Hold(_on_sends(seconds), overlap))):
        engine = engine_of(config, rank, world, "float64")
        engine.mesh.log.hold = hold
        steps = [train_step(engine, calls_of(engine, step, False), lr=1e-3) for step in range(2)]
        found[name] = [step.loss.item() for step in steps]
    entries = engine.mesh.log.entries
    found["sent"] = [e.issued for e in entries if e.op == "send"]
    found["received"] = [e.ended for e in entries if e.op == "recv"]
    return found


def _on_sends(seconds: float) -> Callable[[Collective], float]:
    return lambda entry: seconds if entry.op == "send" else 0.0
