"""Parameters: made from a Shard, filled by name, and the one way a gradient lands in them.

`new_param` gives an uninitialised local tensor that carries its Shard and how to fill it;
`initialize` fills a whole module, each element a pure function of (seed, parameter name, place in
the whole tensor), so every layout starts from the same weights. `add_weight_grad` adds a weight
gradient straight into `.grad`, which is a view of a flat bucket in training. What is not here:
buckets (parallel/buckets.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megalite.core import matmul, rng
from megalite.core.mesh import Axis
from megalite.core.shard import Shard, slices

# t tokens (rows of a flattened [s, b, ...]), d_in and d_out features on this rank


@dataclass(frozen=True)
class Traits:
    """What the library knows of a parameter beside its numbers; it hangs on it as `.traits`."""

    shard: Shard
    axes: Mapping[str, Axis]
    """The axes that the Shard names."""
    init: Callable[[int, Tensor], Tensor]
    """(key, int64 indices into the whole tensor) -> float64 values."""
    decay: bool
    """Weight decay applies (matrices), or not (norms, biases)."""
    lr_mult: float = 1.0
    uses: int = 1
    """Gradient contributions that one microbatch's backward makes; a tied table has two."""


def constant(value: float) -> Callable[[int, Tensor], Tensor]:
    """An init that fills with one value."""
    return lambda key, index: torch.full(
        index.shape, value, dtype=torch.float64, device=index.device
    )


def gaussian(std: float) -> Callable[[int, Tensor], Tensor]:
    """An init of normal numbers with that standard deviation."""
    return lambda key, index: rng.normal(key, index).mul_(std)


def new_param(
    shard: Shard,
    axes: Mapping[str, Axis],
    *,
    init: Callable[[int, Tensor], Tensor],
    decay: bool | None = None,
    lr_mult: float = 1.0,
    uses: int = 1,
) -> nn.Parameter:
    """An uninitialised parameter of this rank's part of `shard`, in torch's default dtype."""
    param = nn.Parameter(torch.empty(shard.local_shape(axes)))
    decay = len(shard.shape) > 1 if decay is None else decay
    give_traits(param, Traits(shard, axes, init, decay, lr_mult, uses))
    return param


def give_traits(param: nn.Parameter, traits: Traits) -> None:
    """Hang `traits` on a parameter, in place of those it had."""
    param.traits = traits  # type: ignore[attr-defined]


def traits_of(param: nn.Parameter) -> Traits:
    """The Traits of a parameter; raises TypeError for one that `new_param` did not make."""
    traits = getattr(param, "traits", None)
    if traits is None:
        raise TypeError(
            f"a parameter of shape {tuple(param.shape)} has no Shard: make it with new_param"
        )
    return traits


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, by the name it has in the whole model."""
    for name, param in module.named_parameters():
        traits_of(param)
        yield name, param


def is_hidden_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether this is a matrix inside a layer: no table, head, norm, bias or position."""
    return name.startswith("layers.") and len(shape) == 2


@torch.no_grad()
def initialize(module: nn.Module, seed: int, chunk: int = 1 << 20) -> None:
    """Fill every parameter of `module` by name; rows beyond the whole tensor become zero."""
    for name, param in named_parameters(module):
        traits = traits_of(param)
        key = rng.key(seed, "init", name)
        param.zero_()
        for piece in traits.shard.pieces(traits.axes):
            target = param[slices(piece.local)]
            rows_at_once = max(1, chunk // max(1, target[0].numel()))
            for row in range(0, target.shape[0], rows_at_once):
                part = target[row : row + rows_at_once]
                starts = [lo for lo, _ in piece.whole]
                starts[0] += row
                index = _whole_index(part.shape, starts, traits.shard.shape, param.device)
                part.copy_(traits.init(key, index))


def _whole_index(
    shape: torch.Size, starts: list[int], whole: tuple[int, ...], device: torch.device
) -> Tensor:
    """Row-major indices into the whole tensor of a box of it."""
    index = torch.zeros((1,) * len(shape), dtype=torch.int64, device=device)
    for dim, (n, start, size) in enumerate(zip(shape, starts, whole, strict=True)):
        step = torch.arange(start, start + n, dtype=torch.int64, device=device)
        index = index * size + step.view([-1 if d == dim else 1 for d in range(len(shape))])
    return index.expand(shape)


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype gradients and optimizer state of a parameter are kept in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def add_weight_grad(weight: nn.Parameter, dy: Tensor, x: Tensor) -> None:
    """Add dy^T x, from [t, d_out] and [t, d_in], to `weight.grad`, and count it as landed."""
    matmul.add_product(grad_of(weight), dy, x)
    landed(weight)


def grad_of(param: nn.Parameter) -> Tensor:
    """Where a contribution to the gradient is added: `param.grad`, made in `acc_dtype` if need be.

    A parameter whose whole gradient lives only for a microbatch has a `grad_home` that is asked.
    """
    home = getattr(param, "grad_home", None)
    if home is not None:
        return home(param)
    if param.grad is None:
        wide = acc_dtype(param.dtype)
        # Without this torch refuses a float32 gradient on a bfloat16 parameter.
        param.grad_dtype = wide
        param.grad = torch.zeros(param.shape, dtype=wide, device=param.device)
    return param.grad


def listen(
    param: nn.Parameter,
    listener: Callable[[nn.Parameter], None],
    home: Callable[[nn.Parameter], Tensor] | None = None,
) -> None:
    """Have `listener` called at each contribution that lands in this parameter's gradient.

    With a `home`, contributions are added to what it gives at that moment, and `.grad` stays None.
    """
    param.on_landed = listener  # type: ignore[attr-defined]
    param.grad_home = home  # type: ignore[attr-defined]

    def added_by_autograd(param: nn.Parameter) -> None:
        if home is not None:
            assert param.grad is not None
            home(param).add_(param.grad)
            param.grad = None
        listener(param)

    # What autograd adds up by itself (norms, a fork's plain F.linear) never comes by `landed`.
    param.register_post_accumulate_grad_hook(added_by_autograd)


def landed(param: nn.Parameter) -> None:
    """Say that one contribution to this parameter's gradient is complete."""
    listener = getattr(param, "on_landed", None)
    if listener is not None:
        listener(param)
