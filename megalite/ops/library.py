"""The built CUDA kernels as C functions: found, checked against their sources, and called.

`make kernels` puts the library into built/ beside this file. It knows nothing of torch or Python,
so one build serves every version of both; nothing here imports torch either. Next: backend.py.
"""

from __future__ import annotations

import ctypes
import hashlib
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

BUILT = Path(__file__).parent / "built" / "libmegalite_kernels.so"
"""Not among modules: Python would take any .so there for one, and try to import it."""
SOURCES = Path(__file__).resolve().parents[2] / "kernels" / "csrc"

DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}
"""Names of torch's types, as csrc/common.cuh numbers them."""

_LETTERS = {"i": c_int, "l": c_int64, "f": c_float, "p": c_void_p}
SIGNATURES = {
    # dtype, y sum mean rstd, x residual weight bias, in_fp32, rows n, eps, stream
    "norm_forward": "i pppp pppp i ll f p",
    # dtype, dx dweight dbias shares, dy x dsum weight, in_fp32, mean rstd, rows n count, stream
    "norm_backward": "i pppp pppp i pp lll p",
    # dtype, y x, mask and its strides, bias and its, batch heads queries keys, causal window scale,
    # stream
    "softmax_forward": "i pp plll plll llll i l f p",
    "softmax_backward": "i ppp llll i l f p",
    # dtype, y x bias, tanh, rows n, stream
    "gelu": "i ppp i ll p",
    # dtype, dx dbias shares, dy x bias, tanh, rows n count, stream
    "gelu_backward": "i ppp ppp i lll p",
    # dtype, y x, rows n, stream
    "swiglu": "i pp ll p",
    "swiglu_backward": "i ppp ll p",
    # dtype, y x cos sin, strides of x and of angles, tokens batch heads half, back, stream
    "rope": "i pppp lll ll llll i p",
    # dtype, y x residual names, rows n least, factor, stream
    "dropout": "i pppp lll f p",
    # dtype, top sums x label, rows n known, stream
    "cross_entropy_forward": "i pppp lll p",
    # dtype, x lse scale label, rows n known vocabulary, smoothing z, stream
    "cross_entropy_backward": "i pppp llll ff p",
    # dtype, master averages gradient, copy and its dtype, factor skip, n step, rates, stream
    "adamw": "i pppp pi pp ll fffff p",
}
"""Of each function: a letter for each argument."""


def source_hash(folder: Path = SOURCES) -> str:
    """Of the kernels' sources, names and contents: 16 hexadecimal digits."""
    found = hashlib.sha256()
    for path in sorted(folder.glob("*.cu*")):
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]


class NoKernels(ValueError):
    """Kernels that are asked for are not there, or not those that the sources say."""


class Library:
    """The functions of one built library, by their names without `megalite_`.

    Raises NoKernels if it cannot be loaded, or was built from other sources than those here.
    """

    def __init__(self, path: Path = BUILT, sources: Path = SOURCES):
        try:
            self._lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise NoKernels(f"{path}: cannot be loaded ({error}): run make kernels") from None
        for name in ("source_hash", "error"):
            getattr(self._lib, f"megalite_{name}").restype = c_char_p
        built_from = self._lib.megalite_source_hash().decode()
        if sources.is_dir() and built_from != (now := source_hash(sources)):
            raise NoKernels(
                f"{path}: built from other sources ({built_from}, here {now}): run make kernels"
            )
        self.emulated = bool(self._lib.megalite_emulated())
        self._functions: dict[str, Any] = {}

    def _function(self, name: str) -> Any:
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = getattr(self._lib, f"megalite_{name}")
            function.argtypes = [_LETTERS[letter] for letter in SIGNATURES[name].replace(" ", "")]
            function.restype = c_int
        return function

    def launch(self, name: str, *args: Any) -> None:
        """Call a function that launches kernels. Raises RuntimeError with the device's error."""
        code = self._function(name)(*args)
        if code:
            reason = self._lib.megalite_error(code).decode()
            raise RuntimeError(f"megalite_{name}: {reason} (error {code})")
