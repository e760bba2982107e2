"""NVIDIA's Apex, where it is installed: its norms and its AdamW, behind the names our ops have.

Package indexes give the name `apex` to an unrelated web toolkit, so what is found under it is
looked at before any of it runs. Chosen in backend.py, and called from norm.py and adamw.py.
"""

from __future__ import annotations

from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from megalite.ops.library import NoKernels

HALLMARKS = ("normalization/fused_layer_norm.py", "optimizers/fused_adam.py")
"""Files that NVIDIA's package has and the other one has not."""
EXTENSIONS = ("amp_C", "fused_layer_norm_cuda")
"""What NVIDIA's package lacks where it was built without CUDA."""
REMEDY = "build NVIDIA/apex from its source with APEX_CPP_EXT=1 APEX_CUDA_EXT=1"
ADAM_W_MODE = 1


class Apex:
    """The functions of an installed Apex. Raises NoKernels, in one line, if there is none."""

    device = "cuda"
    """The type of the devices it computes on."""

    def __init__(self) -> None:
        check_installed()
        try:
            self._norms = import_module("apex.normalization.fused_layer_norm")
            self._apply = import_module("apex.multi_tensor_apply").multi_tensor_applier
            self._adam = import_module("amp_C").multi_tensor_adam
        except (ImportError, AttributeError) as error:
            raise NoKernels(
                f"--ops-backend apex: NVIDIA's Apex does not load ({error}): {REMEDY}, for torch "
                f"{torch.__version__}"
            ) from None

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """Of the last dimension of `x` [..., h]; all of one dtype."""
        return self._norms.fused_layer_norm_affine(x, weight, bias, weight.shape, eps)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Of the last dimension of `x` [..., h]; both of one dtype."""
        return self._norms.fused_rms_norm_affine(x, weight, weight.shape, eps)

    def adamw_(
        self,
        tensors: tuple[Tensor, Tensor, Tensor, Tensor],
        step: int,
        rates: tuple[float, float, float, float, float],
    ) -> None:
        """One update in place of gradient, parameter and both averages; `rates` are lr, beta1,
        beta2, eps and weight decay.
        """
        # Apex wants a flag that says to skip the step; its AdamW does not look at it.
        skip = torch.zeros(1, dtype=torch.int32, device=tensors[0].device)
        *moments, weight_decay = rates
        how = (step, ADAM_W_MODE, 1, weight_decay)  # 1: averages are corrected for their start
        self._apply(self._adam, skip, [[t] for t in tensors], *moments, *how)


def check_installed() -> None:
    """Raise NoKernels unless the package that would be imported as `apex` is NVIDIA's, with its
    CUDA extensions. Imports nothing.
    """
    spec = find_spec("apex")
    if spec is None:
        raise NoKernels(f"--ops-backend apex: no package apex is installed ({REMEDY})")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any(all((folder / file).is_file() for file in HALLMARKS) for folder in folders):
        raise NoKernels(
            f"--ops-backend apex: {_named(spec)} is not NVIDIA's: it has no {HALLMARKS[0]} "
            f"(pip uninstall apex, then {REMEDY})"
        )
    if missing := [name for name in EXTENSIONS if find_spec(name) is None]:
        raise NoKernels(
            f"--ops-backend apex: {_named(spec)} was built without {', '.join(missing)} ({REMEDY})"
        )


def _named(spec: ModuleSpec) -> str:
    """`apex 0.9.10 at FILE`, as its metadata says."""
    try:
        release = version("apex")
    except PackageNotFoundError:
        release = "of no version"
    return f"apex {release} at {spec.origin or list(spec.submodule_search_locations or ())}"
