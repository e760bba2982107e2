"""The emulator finds what it is there for: bugs are planted in the bodies, and the tests must fail.

What passes on a GPU by luck fails here: a warp runs as far ahead as barriers allow. What reads or
writes beyond an array is found by the sanitizers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import build
from megalite.ops.library import SOURCES

HERE = Path(__file__).parent
TESTS = [
    str(HERE / "test_norm_kernels.py") + "::test_any_width",
    str(HERE / "test_softmax_kernels.py") + "::test_any_length",
]
FEW = "(256 or 1000 or 1023 or 4097) and dtype1"
UNITS = {"norm.cu", "softmax.cu", "version.cu"}
"""What those take: the others need not be compiled for each bug."""
ALL_TESTS = [
    str(HERE / f"test_{name}.py")
    for name in ("norm_kernels", "softmax_kernels", "cross_entropy_kernels", "adamw_kernel")
] + [str(HERE / "test_elementwise_kernels.py")]
OF_ALL = f"({FEW}) or steps or factor or fused_projection or bias_gradient"

# What is wrong; the file, and what stands there instead of what.
BUGS = {
    "read before it is written": ("common.cuh", "        __syncthreads();\n", ""),
    "overwritten before it is read": ("common.cuh", "        turn_ ^= 1;\n", ""),
    "half of a warp is added": ("common.cuh", "far = WARP / 2", "far = WARP / 4"),
    "some threads pass by a barrier": (
        "common.cuh",
        "        __syncthreads();\n",
        "        if (warp) __syncthreads();\n",
    ),
    "lanes are left out of a mask": ("common.cuh", "(~0u,", "(~1u,"),
}
BEYOND = {
    "beyond the row": ("norm.cuh", "at < n_; at +=", "at <= n_; at +="),
    "beyond shared memory": ("common.cuh", "(2 * (n) * megalite::MAX_WARPS)", "(n)"),
    "16 bytes from anywhere": ("norm.cu", "a.n % V == 0 && aligned(16,", "aligned(1,"),
}


def planted(folder: Path, file: str, right: str, wrong: str) -> Path:
    """The kernels' sources with one change."""
    shutil.copytree(SOURCES.parent / "emulator", folder / "emulator")
    sources = Path(shutil.copytree(SOURCES, folder / "csrc"))
    text = (sources / file).read_text()
    assert right in text
    for unit in sources.glob("*.cu"):
        if unit.name not in UNITS:
            unit.unlink()
    (sources / file).write_text(text.replace(right, wrong, 1))
    return sources


def run(
    sources: Path,
    library: Path,
    order: str,
    *,
    sanitized: bool = False,
    tests: list[str] = TESTS,
    few: str = FEW,
) -> tuple[int, str]:
    """Exit code and output of some tests of the ops by this library."""
    env = {
        **os.environ,
        "EMULATED_LIBRARY": str(library),
        "EMULATED_SOURCES": str(sources),
        "EMULATOR_ORDER": order,
    }
    if sanitized:
        named = [build.compiler(), "-print-file-name=libasan.so"]
        env["LD_PRELOAD"] = subprocess.run(named, capture_output=True, text=True).stdout.strip()
        env["ASAN_OPTIONS"] = "detect_leaks=0"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-s"]
    done = subprocess.run(
        [*command, *tests, "-k", few], env=env, capture_output=True, text=True, timeout=600
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("bug", BUGS)
def test_bug_is_found_in_one_order_or_the_other(bug, tmp_path):
    sources = planted(tmp_path, *BUGS[bug])
    library = tmp_path / "planted.so"
    build.build_emulated(library, sources=sources)
    codes = [run(sources, library, order)[0] for order in ("forward", "backward")]
    assert 1 in codes and set(codes) <= {0, 1}


def test_sanitizers_find_nothing_in_what_is_right(tmp_path):
    library = tmp_path / "sanitized.so"
    build.build_emulated(library, sanitize=True)
    how = {"sanitized": True, "tests": ALL_TESTS, "few": OF_ALL}
    code, text = run(SOURCES, library, "backward", **how)
    assert code == 0 and " passed" in text, text[-2000:]


@pytest.mark.parametrize("bug", BEYOND)
def test_sanitizers_find_what_is_beyond(bug, tmp_path):
    sources = planted(tmp_path, *BEYOND[bug])
    library = tmp_path / "planted.so"
    build.build_emulated(library, sanitize=True, sources=sources)
    code, text = run(sources, library, "forward", sanitized=True)
    assert code != 0 and ("AddressSanitizer" in text or "runtime error" in text)
