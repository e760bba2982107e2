"""Who computes an op: our CUDA kernels, or torch. Asked here, and nowhere else.

An op's file has its reference in torch, which runs wherever the kernels do not: on a CPU, for a
type they lack, where they are not built. `--ops-backend` chooses: `torch` never uses kernels,
`fused` insists on them, `auto` takes them where they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite.ops.library import BUILT, DTYPES, Library, NoKernels

TYPES = {getattr(torch, name): number for name, number in DTYPES.items()}


class _Taken:
    """What this process computes with."""

    library: Library | None = None


def use(name: str, device: torch.device) -> None:
    """Choose for this process: "auto", "fused", "torch" or "apex".

    Raises NoKernels where they are asked for and there are none, or others than the sources say.
    """
    if name == "apex":
        raise NoKernels("--ops-backend apex: is not used yet (use --ops-backend torch)")
    if name == "fused" and device.type != "cuda":
        raise NoKernels(f"--ops-backend fused: the kernels need a GPU, not --device {device.type}")
    if name == "fused" and not BUILT.exists():
        raise NoKernels("--ops-backend fused: the kernels are not built (run make kernels)")
    built = name != "torch" and device.type == "cuda" and BUILT.exists()
    use_library(Library() if built else None)


def use_library(library: Library | None) -> Library | None:
    """Run ops by this library from now on (None: by torch); gives the one before.

    An emulated one takes CPU tensors, and no others.
    """
    before, _Taken.library = _Taken.library, library
    return before


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels compute with these tensors; booleans are masks, integers are names."""
    if _Taken.library is None:
        return False
    device = "cpu" if _Taken.library.emulated else "cuda"
    known = (*TYPES, torch.bool, torch.int64)
    return all(t is None or t.device.type == device and t.dtype in known for t in tensors)


def takes_alike(*tensors: Tensor | None) -> bool:
    """Whether they do, of a kernel that has one type for all of these."""
    return takes(*tensors) and len({t.dtype for t in tensors if t is not None}) == 1


def ask(name: str, *args: int) -> int:
    """A number from a function of the library that launches nothing."""
    assert _Taken.library is not None
    return _Taken.library.ask(name, *args)


def launch(name: str, like: Tensor, *args: Any) -> None:
    """Call a function of the library on `like`'s device, on its current stream.

    Tensors go as addresses (None as null), their first argument is the type of `like`. Raises
    RuntimeError with the device's error.
    """
    library = _Taken.library
    assert library is not None
    plain = [arg.data_ptr() if isinstance(arg, Tensor) else arg for arg in args]
    if library.emulated:
        library.launch(name, TYPES[like.dtype], *plain, None)
        return
    with torch.cuda.device(like.device):
        stream = torch.cuda.current_stream(like.device).cuda_stream
        library.launch(name, TYPES[like.dtype], *plain, stream)


def wide(x: Tensor) -> Tensor:
    """`x` in at least float32: what references compute in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def aligned16(*tensors: Tensor | None) -> bool:
    """Whether all of them start at a multiple of 16 bytes."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def blocks_to_fill(like: Tensor) -> int:
    """Blocks for a kernel whose blocks stay: the order of a sum depends on their number."""
    if like.device.type != "cuda":
        return 4
    return 2 * torch.cuda.get_device_properties(like.device).multi_processor_count
