"""What the ranks of an oracle row do: train a few steps and compare every number with one process.

The one-process run writes its losses, gradients, norms and weights as whole tensors; a rank of a
layout reads them and compares its own boxes, found through each parameter's Shard. No number is
gathered to be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from megalite.core.call import IGNORE, Call, Context, make_call
from megalite.core.config import Config
from megalite.core.mesh import Mesh
from megalite.core.params import named_parameters, traits_of
from megalite.core.shard import slices
from megalite.data.loader import Synthetic
from megalite.train.build import Engine, build_engine, mesh_factors, mesh_sizes
from megalite.train.loop import forward_backward, update

CPU = torch.device("cpu")
DTYPES = {"float64": torch.float64, "float32": torch.float32}
MASKED = 0.15
"""Share of labels that take no part, drawn per sample."""


def engine_of(config: Config, rank: int, world: int, dtype: str, **kwargs) -> Engine:
    """The engine of this rank, on gloo where there is more than one."""
    kind = "real" if world > 1 else "single"
    mesh = Mesh(mesh_sizes(config, world), rank=rank, kind=kind, factors=mesh_factors(config))
    return build_engine(config, mesh, device=CPU, dtype=DTYPES[dtype], **kwargs)


def calls_of(engine: Engine, step: int, varying: bool, blank: Sequence[int] = ()) -> list[Call]:
    """This rank's microbatches: masked labels, and lengths that differ by microbatch if `varying`.

    Samples, masks and lengths follow from the number of the sample alone. No label at a position in
    `blank` takes part.
    """
    config, mesh = engine.config, engine.mesh
    size, s = config.train.micro_batch_size, config.model.seq_len
    dp = mesh.axis("dp")
    source = Synthetic(config.model.vocab_size, s, seed=5)
    cut = mesh.axis("tp") if config.layout.sequence_parallel else None
    context = Context(mesh.axis("cp"), config.layout.cp_form)
    calls = []
    for m in range(config.num_microbatches(mesh.world_size)):
        first = step * config.train.global_batch_size + (m * dp.size + dp.idx) * size
        length = s - (first // size % 3) * (s // 4) if varying else s
        rows, masks = [], []
        for number in range(first, first + size):
            rows.append(source.window(number)[: length + 1])
            mask = np.random.default_rng([9, number]).random(s) < MASKED
            mask[list(blank)] = True
            masks.append(mask[:length])
        tokens = torch.from_numpy(np.stack(rows).T.copy())
        labels = tokens[1:].masked_fill(torch.from_numpy(np.stack(masks).T.copy()), IGNORE)
        samples = torch.arange(first, first + size)
        tokens = tokens[:-1].contiguous()
        calls.append(make_call(tokens, labels, samples, seq_cut=cut, context=context))
    return calls


def reference(
    rank: int,
    world: int,
    config: dict,
    dtype: str,
    steps: int,
    varying: bool,
    blank: list[int],
    out: str,
) -> list[float]:
    """Train one process and write every number to `out` (npz); gives the losses."""
    engine = engine_of(Config.from_dict(config), rank, world, dtype)
    numbers: dict[str, np.ndarray] = {}
    losses = []
    for step in range(steps):
        found = forward_backward(engine, calls_of(engine, step, varying, blank))
        numbers[f"{step}/loss"] = found.loss.numpy()
        numbers[f"{step}/norm"] = found.norm.numpy()
        losses.append(found.loss.item())
        for stage in engine.stages.values():
            for name, param in named_parameters(stage):
                assert param.grad is not None
                numbers[f"{step}/grad/{name}"] = (param.grad * found.correction).numpy()
        update(engine, found, lr=engine.config.optim.lr)
        for stage in engine.stages.values():
            for name, param in named_parameters(stage):
                numbers[f"{step}/weights/{name}"] = param.detach().numpy().copy()
    np.savez(out, **numbers)
    return losses


def compare(
    rank: int,
    world: int,
    config: dict,
    dtype: str,
    steps: int,
    varying: bool,
    blank: list[int],
    ref: str,
) -> dict:
    """Train this layout and compare with the file that `reference` wrote.

    Gives the worst error of each kind with the tensor's name, and how many numbers of each step's
    gradients this rank owns: over all ranks they are the model, once.
    """
    engine = engine_of(Config.from_dict(config), rank, world, dtype)
    want = dict(np.load(Path(ref)))
    worst: dict[str, tuple[float, str]] = {}

    def see(kind: str, name: str, error: float) -> None:
        error = float("inf") if error != error else error
        if error > worst.get(kind, (-1.0, ""))[0]:
            worst[kind] = (error, name)

    owned = 0
    for step in range(steps):
        found = forward_backward(engine, calls_of(engine, step, varying, blank))
        for kind, ours in (("loss", found.loss), ("norm", found.norm)):
            theirs = float(want[f"{step}/{kind}"])
            see(kind, f"step {step}", abs(ours.item() - theirs) / abs(theirs))
        assert engine.zero.all_landed(engine.config.num_microbatches(world)), engine.zero.landed
        owned += _compare_grads(engine, step, found.correction, want, see)
        update(engine, found, lr=engine.config.optim.lr)
        with engine.zero.whole_params():
            _compare_weights(engine, step, want, see)
    return {"worst": worst, "owned": owned // steps}


def _compare_grads(engine: Engine, step: int, correction: torch.Tensor, want: dict, see) -> int:
    zero, owned, axes = engine.zero, 0, engine.mesh.axes
    for bucket in zero.buckets:
        base, end = zero.updated_range(bucket)
        flat = zero.grads_of(bucket)
        for part in bucket.layout.boxes((base, end), lambda slot: slot.shard.pieces(axes)):
            whole = want[f"{step}/grad/{part.slot.name}"]
            ours = (part.of(flat, base).double() * correction).numpy()
            floor = max(np.abs(whole).max(), 1e-3 * _layer_rms(part.slot.name, step, want))
            error = np.abs(ours - whole[slices(part.whole)]).max() / floor
            see("grad", f"{part.slot.name} step {step}", float(error))
        for part in bucket.layout.boxes(zero.my_range(bucket), lambda slot: slot.owned):
            owned += part.of(bucket.grads, bucket.updated[0]).numel()
    return owned


def _layer_rms(name: str, step: int, want: dict) -> float:
    layer = name.split(".")[:2] if name.startswith("layers.") else [name]
    prefix = f"{step}/grad/{'.'.join(layer)}"
    members = [v for k, v in want.items() if k.startswith(prefix)]
    return float(np.sqrt(sum((m**2).sum() for m in members) / sum(m.size for m in members)))


def _compare_weights(engine: Engine, step: int, want: dict, see) -> None:
    for stage in engine.stages.values():
        for name, param in named_parameters(stage):
            traits = traits_of(param)
            whole = want[f"{step}/weights/{name}"]
            inside = 0
            for piece in traits.shard.pieces(traits.axes):
                ours = param.detach()[slices(piece.local)].double().clone().numpy()
                gap = float(np.abs(ours - whole[slices(piece.whole)]).max())
                see("weights", f"{name} step {step}", gap / max(1e-3, float(np.abs(whole).max())))
                see("update", f"{name} step {step}", gap / engine.config.optim.lr)
                inside += ours.size
            if inside < param.numel():  # padding rows stay zero, so no update ever reaches them
                outside = param.detach().double().abs().sum() - sum(
                    param.detach()[slices(p.local)].double().abs().sum()
                    for p in traits.shard.pieces(traits.axes)
                )
                see(
                    "weights",
                    f"{name} padding",
                    float(outside.abs()) if outside.abs() > 1e-9 else 0.0,
                )
