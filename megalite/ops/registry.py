"""Ops as torch.library knows them: what lets compile, fake tensors and checkpointing see a kernel.

Autograd stands outside, as a Function in the op's file: half the overhead of a registered formula,
and the backward is an op of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_type_hints

import torch
from torch import Tensor

from megalite.ops import backend

LIBRARY = torch.library.Library("megalite", "FRAGMENT")
_KINDS = {Tensor: "Tensor", Tensor | None: "Tensor?", bool: "bool", int: "int", float: "float"}


def define(
    name: str,
    inputs: type[Any],
    outputs: int,
    *,
    kernel: Callable[[Any], Any],
    reference: Callable[[Any], Any],
    shapes: Callable[[Any], Any],
    fits: Callable[[Any], bool] | None = None,
) -> Callable[..., Any]:
    """A function of the fields of the named tuple `inputs`, which gives `outputs` tensors.

    Where our kernels take its tensors it is the op torch.ops.megalite.<name>, which runs `kernel`
    of the tuple, or `shapes`, which gives empty results. Elsewhere it is `reference` itself, so
    that torch sees what that is made of; tests hold `kernel` against it. `fits` says of the tuple
    whether the kernel knows this mixture of types; without it, all numbers have to be of one.
    """
    kinds = get_type_hints(inputs).items()
    takes = ", ".join(f"{_KINDS[kind]} {field}" for field, kind in kinds)
    gives = "Tensor" if outputs == 1 else f"({', '.join(['Tensor'] * outputs)})"
    LIBRARY.define(f"{name}({takes}) -> {gives}")
    op = getattr(torch.ops.megalite, name).default

    def ours(given: Any) -> bool:
        tensors = [x for x in given if isinstance(x, Tensor)]
        return backend.takes(*tensors) and (fits(given) if fits else backend.alike(*tensors))

    def run(*args: Any) -> Any:
        given = inputs(*args)
        return kernel(given) if ours(given) else reference(given)

    def call(*args: Any) -> Any:
        given = inputs(*args)
        return op(*given) if ours(given) else reference(given)

    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"megalite::{name}", lambda *a: shapes(inputs(*a)), lib=LIBRARY)
    return call
