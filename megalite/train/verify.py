"""What the ranks of `megalite verify` do: train a few steps, compare every number with one process.

The reference is the model run whole, in one process, in float64: it writes its losses, gradients,
norms and weights as whole tensors. A rank of a layout reads them and compares its own boxes, found
through each parameter's Shard; no number is gathered to be compared. The oracle's tests call the
same functions. Next: verify_command.py, which draws layouts and starts the ranks.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from megalite.checkpoint.load import Reader, load_optimizer, newest_for_all
from megalite.checkpoint.manifest import Manifest
from megalite.checkpoint.save import save
from megalite.core.call import Call
from megalite.core.config import Config
from megalite.core.mesh import Mesh
from megalite.core.params import named_parameters, traits_of
from megalite.core.precision import DTYPES
from megalite.core.shard import Box, in_words, slices
from megalite.data.loader import Synthetic
from megalite.models.build import mesh_factors
from megalite.train.as_ranks import AttentionAsRanks, rounding_of
from megalite.train.build import (
    Engine,
    build_engine,
    build_loader,
    mesh_sizes,
)
from megalite.train.exact import exact_sums
from megalite.train.loop import Reduced, forward_backward, update
from megalite.train.steps import Steps

# s sequence, b micro batch

MASKED = 0.15
"""Share of labels that take no part, drawn per sample."""
KINDS = ("init", "grad", "weights", "update", "loss", "norm")
"""What is compared, what names a tensor first. `update` is the weights' error in learning rates,
where the weights' own size would hide it."""
TOL: dict[str, dict[str, float]] = {
    "fp64": {"init": 1e-14, "loss": 1e-10, "norm": 1e-10, "grad": 1e-10, "weights": 1e-10},
    "fp32": {"init": 1e-6, "loss": 1e-5, "norm": 1e-5, "grad": 1e-5, "update": 1e-3},
    # 8 bits of mantissa: enough to see a sum that is missing or made twice, and not much more.
    "bf16": {"init": 8e-3, "loss": 2e-2, "norm": 5e-2, "grad": 2e-1},
    # 11 bits.
    "fp16": {"init": 1e-3, "loss": 5e-3, "norm": 2e-2, "grad": 6e-2},
}
"""Bounds of max|a - b| / max(max|reference|, a floor of its kind), by precision."""
NO_BIT = dict.fromkeys(KINDS, 0.0)
"""Bounds where no sum depends on its order (exact.py)."""
CLOSE = {**dict.fromkeys(TOL["fp64"], 1e-13), "init": 1e-14}
"""In fp64, of a layout that rounds other numbers (`other_rounding`)."""
CLOSE_LATER = dict.fromkeys(TOL["fp64"], 1e-12)
"""The same once Adam has divided what was rounded by small gradients."""


@dataclass(frozen=True)
class Gap:
    """The largest difference found in one tensor, or in a scalar."""

    kind: str
    name: str
    step: int
    error: float
    ours: float
    reference: float
    index: tuple[int, ...] = ()
    """In the whole tensor."""
    shard: str = ""
    allowed: float = math.inf

    @property
    def where(self) -> str:
        return self.name if self.kind not in ("loss", "norm") else self.kind


@dataclass
class Findings:
    """The worst gap of each kind, and of the first step with any out of bounds the worst one.

    After the first update, rounding that Adam has divided by small gradients is in all numbers:
    `later` bounds those steps where that is more than `bounds`.
    """

    bounds: dict[str, float]
    later: dict[str, float] = field(default_factory=dict)
    worst: dict[str, Gap] = field(default_factory=dict)
    first: Gap | None = None
    differing: int = 0
    """Numbers whose bits are not the reference's."""

    def see(self, gap: Gap) -> None:
        """Keep what is worse than all before."""
        allowed = self.bounds.get(gap.kind, math.inf)
        if gap.step > 0:
            allowed = max(allowed, self.later.get(gap.kind, 0.0))
        gap = replace(gap, allowed=allowed)
        if gap.kind not in self.worst or gap.error > self.worst[gap.kind].error:
            self.worst[gap.kind] = gap
        if gap.error > allowed and (self.first is None or _urgency(gap) < _urgency(self.first)):
            self.first = gap

    def see_tensor(
        self, kind: str, step: int, part: Part, *, ours: np.ndarray, whole: np.ndarray, floor: float
    ) -> None:
        """Compare one box of a tensor with the reference's whole one."""
        theirs = whole[slices(part.box)]
        self.differing += int(np.count_nonzero(_bits(ours) != _bits(theirs)))
        gaps = np.abs(ours - theirs)
        at = np.unravel_index(int(gaps.argmax()), gaps.shape)  # the first NaN, if there is one
        error = float(gaps[at]) / floor
        error = math.inf if math.isnan(error) else error
        index = tuple(int(i) + lo for i, (lo, _) in zip(at, part.box, strict=True))
        self.see(
            Gap(kind, part.name, step, error, float(ours[at]), float(theirs[at]), index, part.shard)
        )


@dataclass(frozen=True)
class Part:
    """A box of a whole tensor."""

    name: str
    box: Box
    shard: str


def _bits(numbers: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(numbers, dtype=np.float64).view(np.int64)


def _urgency(gap: Gap) -> tuple[int, int, bool, float]:
    """Smaller is more telling: an early step, a tensor before a scalar, a large error.

    A fault of the forward pass is in all gradients of the step, and the name is then a hint: the
    largest error of a matrix, since the few numbers of a norm or bias are off by more or less.
    """
    return gap.step, KINDS.index(gap.kind), len(gap.index) < 2, -gap.error


def engine_of(
    config: Config, rank: int, world: int, precision: str, device: str = "cpu", **kwargs: Any
) -> Engine:
    """The engine of this rank, in the process group that there is."""
    kind = "real" if world > 1 else "single"
    sizes, factors = mesh_sizes(config, world), mesh_factors(config.model, config.layout.tp)
    mesh = Mesh(sizes, rank=rank, kind=kind, factors=factors)
    here = torch.device("cpu" if device == "cpu" else f"cuda:{torch.cuda.current_device()}")
    return build_engine(config, mesh, device=here, dtype=DTYPES[precision], **kwargs)


class Checked(Synthetic):
    """Synthetic windows with masked labels, whose lengths differ if `varying`.

    Tokens, documents, masks and lengths follow from a window's number alone; so do, where the
    config learns preferences, the place where a pair's second answer begins, and what the model is
    said to have thought of both before. No label at a position in `blank` takes part.
    """

    WINDOWS = 1 << 10

    def __init__(self, config: Config, varying: bool, blank: Sequence[int]):
        s = config.model.seq_len
        super().__init__(config.model.vocab_size, s, seed=5, length=self.WINDOWS)
        self.blank = list(blank)
        self.lengths = s - np.arange(self.WINDOWS) % 3 * (s // 4) if varying else None
        if config.data.prefers:
            self.reference = np.random.default_rng(7).normal(size=self.WINDOWS)

    def window(self, idx: int) -> np.ndarray:
        """Tokens [s + 1] of window `idx`, s its own length."""
        return super().window(idx)[: self.length_of(idx) + 1]

    def starts(self, idx: int) -> np.ndarray:
        """Start of the document of each input [s] of window `idx`."""
        if self.reference is None:
            return super().starts(idx)[: self.length_of(idx)]
        places = np.arange(self.length_of(idx))
        second = int(np.random.default_rng([11, idx]).integers(1, len(places)))
        return np.where(places < second, 0, second)

    def learned(self, idx: int) -> np.ndarray:
        """Which labels count: all but a drawn share and those in `blank`."""
        counts = np.random.default_rng([9, idx]).random(self.seq_len) >= MASKED
        counts[self.blank] = False
        return counts[: self.length_of(idx)]


def calls_of(engine: Engine, step: int, varying: bool, blank: Sequence[int] = ()) -> list[Call]:
    """This rank's microbatches of a step over Checked windows."""
    config = engine.config
    before = config.samples_after(step)
    count = config.num_microbatches(engine.mesh.world_size, config.batch_at(before))
    return build_loader(engine, Checked(config, varying, blank)).step(before, count)


def reference(
    rank: int,
    world: int,
    config: dict,
    steps: int,
    varying: bool,
    out: str,
    blank: Sequence[int] = (),
    save_to: str = "",
    **kwargs: Any,
) -> list[float]:
    """Train one process in float64 and write every number to `out` (npz); gives the losses.

    `save_to`: a directory for a checkpoint of how it stands before the last step.
    """
    engine = engine_of(Config.from_dict(config), rank, world, "fp64", **kwargs)
    numbers: dict[str, np.ndarray] = {}

    def keep(what: str, number_of: Callable[[Any], Tensor]) -> None:
        for stage in engine.stages.values():
            for name, param in named_parameters(stage):
                if param.requires_grad or not what.endswith("grad"):
                    numbers[f"{what}/{name}"] = number_of(param).numpy().copy()

    keep("init", lambda param: param.detach())
    losses = []
    for step in range(steps):
        if save_to and step == steps - 1:
            save_after(engine, step, Path(save_to))
        found = forward_backward(engine, calls_of(engine, step, varying, blank))
        numbers[f"{step}/loss"], numbers[f"{step}/norm"] = found.loss.numpy(), found.norm.numpy()
        losses.append(found.loss.item())
        keep(f"{step}/grad", partial(_scaled_grad, by=found.correction))
        update(engine, found, lr=engine.config.optim.lr)
        keep(f"{step}/weights", lambda param: param.detach())
    np.savez(out, **numbers)  # type: ignore[arg-type]
    return losses


def _scaled_grad(param: nn.Parameter, by: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad * by


def compare(
    rank: int,
    world: int,
    config: dict,
    precision: str,
    steps: int,
    varying: bool,
    ref: str,
    later: dict[str, float] | None = None,
    bounds: dict[str, float] | None = None,
    blank: Sequence[int] = (),
    save_to: str = "",
    go_on_from: str = "",
    **kwargs: Any,
) -> dict:
    """Train this layout and compare with the file that `reference` wrote.

    `bounds` stand in for those of the precision; `later`: wider ones for the steps after the first.
    `save_to`: a directory for a checkpoint after the last step. `go_on_from`: one that another
    layout saved there; it is loaded then, and one step more is compared.

    Gives, as JSON: `worst`, the worst Gap of each kind; `first`, the first out of tolerance (None);
    `differing`, how many numbers here have other bits; `owned`, how many numbers of the gradients
    this rank counts, over all ranks the model once; and `size`, the numbers of the model.
    """
    engine = engine_of(Config.from_dict(config), rank, world, precision, **kwargs)
    want = dict(np.load(Path(ref)))
    findings = Findings(bounds or TOL[precision], later or {})
    with engine.zero.whole_params():
        _compare_weights(engine, 0, "init", want, findings)
    owned, taken = 0, Steps(engine)
    for step in range(steps):
        calls = calls_of(engine, step, varying, blank)
        owned += _compare_step(taken, step, calls, want, findings, last=step == steps - 1)
    if save_to:
        save_after(engine, steps, Path(save_to))
    if go_on_from:
        _load(engine, Path(go_on_from))
        calls = calls_of(engine, steps, varying, blank)
        _compare_step(taken, steps, calls, want, findings, last=True)
    return {
        "worst": {kind: asdict(gap) for kind, gap in findings.worst.items()},
        "first": asdict(findings.first) if findings.first else None,
        "differing": findings.differing,
        "owned": owned // steps,
        "size": sum(tensor.size for name, tensor in want.items() if name.startswith("0/grad/")),
    }


def _compare_step(
    steps: Steps, step: int, calls: list[Call], want: dict, findings: Findings, *, last: bool
) -> int:
    """Take a step and compare all of it; gives how many numbers of the gradients were counted.

    The weights of a step that is settled late are compared after the last alone: those before it
    show in what follows, and to look at them would be to wait.
    """
    engine = steps.engine
    found = steps.forward_backward(calls)
    _compare_scalars(found, step, want, findings)
    zero = engine.zero
    assert zero.all_landed(len(calls)), zero.landed
    owned = _compare_grads(engine, step, found.correction, want, findings)
    steps.update(found, lr=engine.config.optim.lr)
    if last or not steps.late:
        steps.settle()
        with engine.zero.whole_params():
            _compare_weights(engine, step, f"{step}/weights", want, findings)
    return owned


def save_after(engine: Engine, steps: int, root: Path) -> None:
    """Save a checkpoint of an engine that has taken that many steps."""
    config = engine.config
    samples = config.samples_after(steps)
    tokens = samples * config.model.seq_len
    tree = json.loads(json.dumps(config.to_dict()))
    facts = Manifest(steps, samples, tokens, optimizer_steps=steps, config=tree, made_with={})
    save(root / "checkpoints", engine.optimizer, engine.mesh, facts)


def _load(engine: Engine, root: Path) -> None:
    """Load the checkpoint that `save_after` put there, over numbers that it must replace."""
    optimizer, axes = engine.optimizer, engine.mesh.axes
    for idx, bucket in enumerate(engine.zero.buckets):
        boxes = bucket.layout.boxes(bucket.updated, lambda slot: slot.shard.pieces(axes))
        for box, flat in product(list(boxes), optimizer.numbers(idx).values()):
            box.of(flat.detach(), bucket.updated[0]).fill_(7.0)
    optimizer.step_count = 0
    directory, manifest, _ = newest_for_all(root, engine.mesh, engine.device)
    load_optimizer(Reader(directory, manifest), optimizer)


def other_rounding(config: Config) -> str:
    """Why numbers of a layout may rightly have other bits than one process's; empty if not."""
    if config.model.attention != "softmax" and rounding_of(config):
        return "with --cp-form ring, or fewer kv heads than tp, only our own attention is known"
    return ""


def reference_in_fixed_order(
    rank: int, world: int, rounding: dict | None = None, **kwargs: Any
) -> list[float]:
    """`reference` with exact sums; `rounding` is what AttentionAsRanks takes."""
    if rounding:
        kwargs["attention"] = partial(AttentionAsRanks, **rounding)
    with exact_sums():
        return reference(rank, world, **kwargs)


def compare_in_fixed_order(rank: int, world: int, **kwargs: Any) -> dict:
    """`compare` with exact sums."""
    with exact_sums():
        return compare(rank, world, **kwargs)


def gap_from(tree: dict) -> Gap:
    """The Gap of a `compare`."""
    return Gap(**{**tree, "index": tuple(tree["index"])})


def most_urgent(gaps: list[Gap]) -> Gap:
    """Of several ranks' first gaps the one to name: of the first step, a tensor, the largest."""
    return min(gaps, key=_urgency)


def _compare_scalars(found: Reduced, step: int, want: dict, findings: Findings) -> None:
    for kind, ours in (("loss", found.loss), ("norm", found.norm)):
        theirs = float(want[f"{step}/{kind}"])
        error = abs(ours.item() - theirs) / abs(theirs)
        error = math.inf if math.isnan(error) else error
        findings.differing += ours.item() != theirs
        findings.see(Gap(kind, kind, step, error, ours.item(), theirs))


def _compare_grads(
    engine: Engine, step: int, correction: Tensor, want: dict, findings: Findings
) -> int:
    zero, owned, axes = engine.zero, 0, engine.mesh.axes
    for bucket in zero.buckets:
        if bucket.layout.key.frozen:
            continue
        base = bucket.updated[0]
        for box in bucket.layout.boxes(bucket.updated, lambda slot: slot.shard.pieces(axes)):
            slot = box.slot
            whole = want[f"{step}/grad/{slot.name}"]
            ours = (box.of(bucket.grads, base).double() * correction).cpu().numpy()
            floor = max(float(np.abs(whole).max()), 1e-3 * _layer_rms(slot.name, step, want))
            part = Part(slot.name, box.whole, in_words(slot.shard))
            findings.see_tensor("grad", step, part, ours=ours, whole=whole, floor=floor)
        for box in bucket.layout.boxes(zero.my_range(bucket), lambda slot: slot.owned):
            owned += box.of(bucket.grads, base).numel()
    return owned


def _layer_rms(name: str, step: int, want: dict) -> float:
    """Root mean square of the gradients of the layer that a tensor belongs to, or of itself."""
    layer = ".".join(name.split(".")[:2]) + "." if name.startswith("layers.") else name
    members = [v for k, v in want.items() if k.startswith(f"{step}/grad/{layer}")]
    return float(np.sqrt(sum((m**2).sum() for m in members) / sum(m.size for m in members)))


def _compare_weights(engine: Engine, step: int, under: str, want: dict, findings: Findings) -> None:
    """Compare the parameters with those `under` that name: as they begin, or after a step."""
    start = under == "init"
    for stage in engine.stages.values():
        for name, param in named_parameters(stage):
            traits = traits_of(param)
            whole = want[f"{under}/{name}"]
            floor = max(1e-3, float(np.abs(whole).max()))
            inside = np.zeros(param.shape, dtype=bool)
            values = param.detach().double().cpu().clone().numpy()
            for piece in traits.shard.pieces(traits.axes):
                ours = values[slices(piece.local)]
                part = Part(name, piece.whole, in_words(traits.shard))
                kinds = (
                    (("init", floor),)
                    if start
                    else (("weights", floor), ("update", engine.config.optim.lr))
                )
                for kind, unit in kinds:
                    findings.see_tensor(kind, step, part, ours=ours, whole=whole, floor=unit)
                inside[slices(piece.local)] = True
            # Padding rows stay zero, as they begin: no update ever reaches them.
            outside = float(np.abs(values[~inside]).sum())
            if outside != 0:
                gap = Gap("init", f"{name} (padding)", step, math.inf, outside, 0.0)
                findings.see(replace(gap, shard=in_words(traits.shard)))
