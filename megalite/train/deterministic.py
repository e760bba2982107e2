"""--deterministic: what torch and CUDA must be told so that a run gives the same bits again.

Our own kernels add in one order anyway; megalite/ops/backend.py makes it the same on every GPU.
"""

from __future__ import annotations

import os

import torch

from megalite.core.errors import UserError

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
WORKSPACES = (":4096:8", ":16:8")
"""Those with which cuBLAS promises the same result, whichever streams use it."""


def be_deterministic(device: torch.device) -> None:
    """Have this process compute alike each time. To be called before CUDA multiplies anything.

    On a CPU torch does so without being told. Raises UserError where the environment forbids it.
    """
    if device.type != "cuda":
        return
    workspace = os.environ.setdefault(WORKSPACE, WORKSPACES[0])
    if workspace not in WORKSPACES:
        raise UserError(
            f"--deterministic: the environment has {WORKSPACE}={workspace}, with which cuBLAS is "
            f"not (unset it, or set it to {' or '.join(WORKSPACES)})"
        )
    # An op that has no such algorithm raises; attention's backward takes the one that does not add
    # by atomics. cuDNN's attention has none.
    torch.use_deterministic_algorithms(True)
    # By itself that also writes NaN to all memory that is taken: a pass over every result.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
