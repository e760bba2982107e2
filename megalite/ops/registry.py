"""Ops as torch.library knows them: what lets compile, fake tensors and checkpointing see a kernel.

Autograd stands outside, as a Function in the op's file: half the overhead of a registered formula,
and the backward is an op of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from megalite.ops import backend

LIBRARY = torch.library.Library("megalite", "FRAGMENT")


def define(
    schema: str,
    *,
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    shapes: Callable[..., Any],
) -> Any:
    """The op torch.ops.megalite.<name of the schema>, with three functions of the same arguments.

    `kernel` runs ours; `reference` runs where they do not, and is what tests hold `kernel` against;
    `shapes` gives empty results.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema)

    def run(*args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        return (kernel if backend.takes(*tensors) else reference)(*args)

    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"megalite::{name}", shapes, lib=LIBRARY)
    return getattr(torch.ops.megalite, name).default
