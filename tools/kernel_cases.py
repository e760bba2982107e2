"""What bench_kernels.py times: each op at its shapes, by every system, and what it should reach."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.core.mesh import Mesh
from megalite.layers.loss import cross_entropy
from megalite.ops.adamw import adamw_
from megalite.ops.dropout import dropout
from megalite.ops.gelu import gelu
from megalite.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from megalite.ops.rope import rope, rope_angles
from megalite.ops.softmax import scaled_softmax
from megalite.ops.swiglu import swiglu

EPS = 1e-5
COMPILED = "torch.compile"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Case:
    """One op of one shape, as several systems compute it."""

    op: str
    shape: tuple[int, ...]
    nbytes: int
    """What any of them must read and write."""
    systems: dict[str, Call]
    goal: float | None = None
    """The least share of the copy's speed."""
    most_ms: float | None = None
    over_torch: float | None = None
    """How many times torch's speed it should be."""
    same: bool = True
    """Systems give the same numbers: not where they change what they are given."""


@dataclass
class Sizes:
    """What the ops are timed at."""

    rows: int = 8192
    widths: tuple[int, ...] = (1024, 4096, 8192, 12288)
    scores: tuple[int, ...] = (8, 32, 2048, 2048)
    logits: tuple[int, int] = (8192, 128256)
    params: int = 124_000_000
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))
    dtype: torch.dtype = torch.bfloat16

    def drawn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, device=self.device, dtype=dtype or self.dtype)


DRY = partial(
    Sizes,
    rows=8,
    widths=(4096,),
    scores=(2, 2, 16, 16),
    logits=(16, 512),
    params=1000,
    device=torch.device("cpu"),
)


def with_others(
    ours: Call, torchs: Callable[..., Any], *args: Any, compiles: bool = True, **others: Call
) -> dict[str, Call]:
    """Ours, torch's formula, the same compiled if it `compiles`, and what else is installed."""
    found = {"megalite": ours, "torch": partial(torchs, *args), **others}
    if compiles:
        found[COMPILED] = partial(torch.compile(torchs, dynamic=False), *args)
    return found


def backward_of(call: Call, leaves: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Call:
    """The backward alone of what `call` computes, again and again."""
    made: list[Any] = []

    def run() -> Any:
        if not made:
            outs = call()
            made.append(outs if isinstance(outs, tuple) else (outs,))
        return torch.autograd.grad(made[0], leaves, grads, retain_graph=True)

    return run


# -- the cases ---------------------------------------------------------------------------------


def norms(sizes: Sizes) -> Iterator[Case]:
    """LayerNorm and RMSNorm, alone and after a residual's addition."""
    for h in sizes.widths:
        yield from _norm_cases(sizes, "layer norm", h, with_bias=True)
        yield from _norm_cases(sizes, "rms norm", h, with_bias=False)


def _norm_cases(sizes: Sizes, name: str, h: int, *, with_bias: bool) -> Iterator[Case]:
    rows = sizes.rows
    x, residual, dy, dtotal = (sizes.drawn(rows, h) for _ in range(4))
    weight, bias = sizes.drawn(h), sizes.drawn(h) if with_bias else None
    leaves = (x, residual, weight) + ((bias,) if bias is not None else ())
    for leaf in leaves:
        leaf.requires_grad_()
    element, wide_enough = x.element_size(), h >= 4096
    compiles = h in (4096, max(sizes.widths))  # which takes seconds for each
    known = _peers_norm(x, weight, bias)

    def formula(x: Tensor) -> Tensor:
        if bias is None:
            return F.rms_norm(x, (h,), weight, EPS)
        return F.layer_norm(x, (h,), weight, bias, EPS)

    def added(x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total, formula(total)

    def ours() -> Tensor:
        return rms_norm(x, weight, EPS) if bias is None else layer_norm(x, weight, bias, EPS)

    def ours_added() -> tuple[Tensor, Tensor]:
        if bias is None:
            return add_rms_norm(x, residual, weight, EPS)
        return add_layer_norm(x, residual, weight, bias, EPS)

    def case(op: str, moved: int, systems: dict, goal: float, **more: Any) -> Case:
        nbytes = moved * rows * h * element
        return Case(op, (rows, h), nbytes, systems, goal if wide_enough else None, **more)

    alone = tuple(leaf for leaf in leaves if leaf is not residual)
    forward = with_others(ours, formula, x, compiles=compiles, **known)
    yield case(name, 2, {n: _without_grad(call) for n, call in forward.items()}, 0.95)
    back = {n: backward_of(call, alone, (dy,)) for n, call in forward.items()}
    yield case(f"{name} backward", 3, back, 0.88, over_torch=2.0 if wide_enough else None)
    forward = with_others(ours_added, added, x, residual, compiles=compiles)
    yield case(f"add + {name}", 4, {n: _without_grad(c) for n, c in forward.items()}, 0.95)
    back = {n: backward_of(call, leaves, (dtotal, dy)) for n, call in forward.items()}
    yield case(f"add + {name} backward", 4, back, 0.88)


def _without_grad(call: Call) -> Call:
    def run() -> Any:
        with torch.no_grad():
            return call()

    return run


def _peers_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> dict[str, Call]:
    found: dict[str, Call] = {}
    h = x.shape[-1]
    if "liger" in peers():
        from liger_kernel.transformers import functional as liger

        if bias is None:
            found["liger"] = lambda: liger.liger_rms_norm(x, weight, EPS, in_place=False)
        else:
            found["liger"] = lambda: liger.liger_layer_norm(x, weight, bias, EPS)
    if "apex" in peers():
        from apex.normalization import fused_layer_norm as apex

        if bias is None:
            found["apex"] = lambda: apex.fused_rms_norm_affine(x, weight, (h,), EPS)
        else:
            found["apex"] = lambda: apex.fused_layer_norm_affine(x, weight, bias, (h,), EPS)
    return found


@lru_cache
def peers() -> frozenset[str]:
    """Those that are installed; Apex by the module that NVIDIA's alone has."""
    from importlib.util import find_spec

    found = {"liger": find_spec("liger_kernel"), "apex": find_spec("fused_layer_norm_cuda")}
    return frozenset(name for name, spec in found.items() if spec is not None)


def softmaxes(sizes: Sizes) -> Iterator[Case]:
    """Softmax of attention's scores, whole, masked and causal."""
    shape, scale = sizes.scores, 0.125
    scores, dy = sizes.drawn(*shape).requires_grad_(), sizes.drawn(*shape)
    element, count = scores.element_size(), math.prod(shape)
    queries, keys = shape[-2:]
    hidden = torch.ones(queries, keys, dtype=torch.bool, device=sizes.device).triu(1)
    seen = torch.rand(shape[0], 1, queries, keys, device=sizes.device) > 0.1
    seen[..., 0] = True  # torch's formula has no answer for a row that sees nothing

    def plain(scores: Tensor) -> Tensor:
        return torch.softmax(scores * scale, -1)

    def masked(scores: Tensor) -> Tensor:
        return torch.softmax((scores * scale).masked_fill(~seen, -torch.inf), -1)

    def causal(scores: Tensor) -> Tensor:
        return torch.softmax((scores * scale).masked_fill(hidden, -torch.inf), -1)

    for name, formula, given, goals, moved in (
        ("softmax", plain, {}, (0.92, 0.90), (2.0, 3.0)),
        ("softmax masked", masked, {"mask": seen}, (0.92, None), (2.0, 3.0)),
        # Half of what is read is not seen; all of the result is written.
        ("softmax causal", causal, {"causal": True}, (0.88, 0.88), (1.5, 2.0)),
    ):
        ours = partial(scaled_softmax, scores, scale=scale, **given)  # type: ignore[arg-type]
        forward = with_others(ours, formula, scores)
        once = {n: _without_grad(call) for n, call in forward.items()}
        yield Case(name, shape, int(moved[0] * count * element), once, goals[0])
        if goals[1] is not None:
            back = {n: backward_of(call, (scores,), (dy,)) for n, call in forward.items()}
            nbytes = int(moved[1] * count * element)
            yield Case(f"{name} backward", shape, nbytes, back, goals[1])


def elementwise(sizes: Sizes) -> Iterator[Case]:
    """What a layer does to each number alone: at one width, forward and backward."""
    rows, h = sizes.rows, max(w for w in sizes.widths if w <= 4096)
    x, both, dy = sizes.drawn(rows, h), sizes.drawn(rows, 2 * h), sizes.drawn(rows, h)
    heads = sizes.drawn(rows // 8, 8, h // 64, 64)
    places = torch.arange(rows // 8, device=sizes.device)[:, None]
    cos, sin = rope_angles(places, 64, 1e4, sizes.dtype)
    names = torch.randint(2**62, (rows, 1), device=sizes.device)
    for leaf in (x, both, heads):
        leaf.requires_grad_()

    def torch_swiglu(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, dim=-1)
        return F.silu(gate) * up

    def torch_rope(heads: Tensor) -> Tensor:
        return torch.addcmul(heads * cos, heads.roll(32, dims=-1), sin)

    def torch_dropout(x: Tensor) -> Tensor:
        return dy + F.dropout(x, 0.1)

    turned = sizes.drawn(*heads.shape)
    for name, ours, formula, leaf, grad, moved in (
        ("gelu", gelu, F.gelu, x, dy, (2, 3)),
        ("swiglu", swiglu, torch_swiglu, both, dy, (3, 5)),
        ("rope", partial(rope, cos=cos, sin=sin), torch_rope, heads, turned, (2, 2)),
        ("dropout + add", lambda x: dropout(x, names, 0.1, dy), torch_dropout, x, dy, (3, 2)),
    ):
        forward = with_others(partial(ours, leaf), formula, leaf)
        once = {n: _without_grad(call) for n, call in forward.items()}
        nbytes = [n * rows * h * x.element_size() for n in moved]
        same = name != "dropout + add"  # whose masks differ
        yield Case(name, tuple(leaf.shape), nbytes[0], once, 0.93, same=same)
        back = {n: backward_of(call, (leaf,), (grad,)) for n, call in forward.items()}
        yield Case(f"{name} backward", tuple(leaf.shape), nbytes[1], back, 0.93, same=same)


def cross_entropies(sizes: Sizes) -> Iterator[Case]:
    """Forward and backward of the loss: logits are read twice and their gradients written once."""
    rows, vocab = sizes.logits
    logits = sizes.drawn(rows, vocab).requires_grad_()
    labels = torch.randint(vocab, (rows,), device=sizes.device)
    one = Mesh({"tp": 1}, rank=0, kind="single").axis("tp")

    def ours() -> Any:
        return torch.autograd.grad(cross_entropy(logits, labels, vocab, one).sum(), logits)

    def formula(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.float(), labels, reduction="sum")

    compiled = torch.compile(formula, dynamic=False)
    systems = {"megalite": ours}
    for name, fn in (("torch", formula), (COMPILED, compiled)):
        systems[name] = lambda fn=fn: torch.autograd.grad(fn(logits, labels), logits)
    if "liger" in peers():
        from liger_kernel.transformers import functional as liger

        systems["liger"] = lambda: torch.autograd.grad(
            liger.liger_cross_entropy(logits, labels, reduction="sum"), logits
        )
    nbytes = 3 * rows * vocab * logits.element_size()
    full = sizes.device.type == "cuda"
    yield Case(
        "cross entropy, forward and backward",
        (rows, vocab),
        nbytes,
        systems,
        most_ms=1.8 if full else None,
        over_torch=3.0,
        same=False,  # ours leaves the gradients in the logits
    )


def optimizers(sizes: Sizes) -> Iterator[Case]:
    """AdamW of a flat range in float32, with the factor that clips and a copy for the matmuls."""
    n = sizes.params
    made = [sizes.drawn(n, dtype=torch.float32) for _ in range(3)]
    made.append(torch.rand(n, device=sizes.device))
    param, grad, mean, square = made
    rates = {"lr": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
    step, factor = (torch.full((), number, device=sizes.device) for number in (10.0, 1.0))
    copy = torch.empty(n, device=sizes.device, dtype=sizes.dtype)

    def ours() -> None:
        extra = {"factor": factor, "copy": copy}
        adamw_(param, grad, mean, square, step=10, **extra, **rates)  # type: ignore[arg-type]

    def torchs() -> None:
        grad.mul_(factor)
        torch._fused_adamw_(
            [param], [grad], [mean], [square], [], [step], amsgrad=False, maximize=False, **rates
        )
        copy.copy_(param)

    systems: dict[str, Call] = {"megalite": ours, "torch": torchs}
    yield Case("adamw", (n,), (28 + copy.element_size()) * n, systems, goal=0.93, same=False)


GROUPS = {
    "norm": norms,
    "softmax": softmaxes,
    "elementwise": elementwise,
    "loss": cross_entropies,
    "optimizer": optimizers,
}
