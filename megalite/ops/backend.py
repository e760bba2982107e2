"""Who computes an op: our CUDA kernels, NVIDIA's Apex, or torch. Asked here, and nowhere else.

An op's file has its reference in torch, which runs wherever the kernels do not: on a CPU, for a
type they lack, where they are not built. `--ops-backend` chooses: `torch` never uses kernels,
`fused` insists on them, `auto` takes them where they are. `apex` is `auto`, but for what Apex has:
norms and AdamW.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megalite.ops.apex import Apex
from megalite.ops.library import BUILT, DTYPES, Library, NoKernels

FIXED_BLOCKS = 132
"""With --deterministic, whatever the GPU: one for each of an H100's processors."""

TYPES = {getattr(torch, name): number for name, number in DTYPES.items()}


class _Taken:
    """What this process computes with."""

    library: Library | None = None
    apex: Apex | None = None
    fixed_blocks: bool = False


def use(name: str, device: torch.device, *, deterministic: bool = False) -> None:
    """Choose for this process: "auto", "fused", "torch" or "apex"; and whether the order of sums is
    the same on every GPU.

    Raises NoKernels where they are asked for and there are none, or others than the sources say.
    """
    if name in ("fused", "apex") and device.type != "cuda":
        raise NoKernels(f"--ops-backend {name}: needs a GPU, not --device {device.type}")
    if name == "fused" and not BUILT.exists():
        raise NoKernels("--ops-backend fused: the kernels are not built (run make kernels)")
    apex = Apex() if name == "apex" else None
    built = name != "torch" and device.type == "cuda" and BUILT.exists()
    use_library(Library() if built else None)
    use_apex(apex)
    _Taken.fixed_blocks = deterministic


def use_library(library: Library | None) -> Library | None:
    """Run ops by this library from now on (None: by torch); gives the one before.

    An emulated one takes CPU tensors, and no others.
    """
    before, _Taken.library = _Taken.library, library
    return before


def use_apex(apex: Apex | None) -> Apex | None:
    """Run norms and AdamW by Apex from now on (None: as the others); gives the one before."""
    before, _Taken.apex = _Taken.apex, apex
    return before


def apex_for(*tensors: Tensor | None) -> Apex | None:
    """Apex, if it is to compute with these tensors: all there, of one type, on its device."""
    apex, given = _Taken.apex, [t for t in tensors if t is not None]
    if apex is None or len(given) < len(tensors) or len({t.dtype for t in given}) > 1:
        return None
    fits = all(t.device.type == apex.device and t.dtype in TYPES for t in given)
    return apex if fits else None


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels compute with these tensors; booleans are masks, integers are names."""
    if _Taken.library is None:
        return False
    device = "cpu" if _Taken.library.emulated else "cuda"
    known = (*TYPES, torch.bool, torch.int64)
    return all(t is None or t.device.type == device and t.dtype in known for t in tensors)


def alike(*tensors: Tensor | None) -> bool:
    """Whether those of them that hold numbers have one type: a kernel reads all by one."""
    return len({t.dtype for t in tensors if t is not None and t.is_floating_point()}) <= 1


def takes_alike(*tensors: Tensor | None) -> bool:
    """Whether they do, of a kernel that has one type for all of these."""
    return takes(*tensors) and alike(*tensors)


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


def blocks_to_fill(like: Tensor) -> int:
    """Blocks of a kernel of which a processor holds one: a sum's order depends on their number."""
    if _Taken.fixed_blocks:
        return FIXED_BLOCKS
    if like.device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(like.device).multi_processor_count
