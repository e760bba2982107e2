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
TESTS = {
    "norm": str(HERE / "test_norm_kernels.py"),
    "softmax": str(HERE / "test_softmax_kernels.py") + "::test_any_length",
}
FALSE = "assert tensor(False)"
FEW = "(any_width or any_length) and (256 or 1000 or 1023 or 4097) and dtype1 or rows_of_a_block"
ALL_TESTS = [
    str(HERE / f"test_{name}.py")
    for name in (
        "norm_kernels", "softmax_kernels", "cross_entropy_kernels", "adamw_kernel",
        "elementwise_kernels",
    )
]  # fmt: skip
OF_ALL = f"({FEW}) or steps or factor or fused_projection or bias_gradient"

# What is wrong; the file, what stands there instead of what, and the words of the test that fails.
BUGS = {
    "read before it is written": ("common.cuh", " __syncthreads();\n", " {}\n", FALSE),
    "row is read before it is written": ("common.cuh", " row_barrier();\n", " {}\n", FALSE),
    "overwritten before it is read": ("common.cuh", "        turn_ ^= 1;\n", "", FALSE),
    "half of a warp is added": ("common.cuh", "far = WARP / 2", "far = WARP / 4", FALSE),
    "some threads pass by a barrier": (
        "common.cuh",
        "            __syncthreads();\n",
        "            { if (warp) __syncthreads(); }\n",
        "while others wait at the barrier",
    ),
    "some of a row pass by its barrier": (
        "common.cuh",
        "            row_barrier();\n",
        "            { if (warp) row_barrier(); }\n",
        "one at the row's barrier of line",
    ),
    "rows are added before they are there": (
        "norm.cuh",
        "    __syncthreads();\n    for (int i = number",
        "    for (int i = number",
        FALSE,
    ),
    "packs are overwritten by a row that is done": (
        "norm.cuh",
        "    __syncthreads();  // no row needs its packs any more\n",
        "",
        FALSE,
    ),
    "packs are read before they have come": (
        "norm.cuh",
        "wait_for_copies<AHEAD>();",
        "wait_for_copies<TURNS>();",
        "ended before copies that it asked for have come",
    ),
    "packs are asked for while they are read": (
        "norm.cuh",
        "turn == 0 ? AHEAD : turn - 1",
        "turn",
        FALSE,
    ),
    "lanes are left out of a mask": ("common.cuh", "(~0u,", "(~1u,", "mask leaves out lanes"),
}
BEYOND = {
    "beyond the row": ("norm.cuh", "at < n_; at +=", "at <= n_; at +="),
    "beyond shared memory": ("common.cuh", "(2 * (n) * megalite::MAX_WARPS)", "(n)"),
    "16 bytes from anywhere": ("norm.cu", "a.n % V == 0 && aligned(16,", "aligned(1,"),
}


def planted(folder: Path, file: str, right: str, wrong: str) -> tuple[Path, list[str]]:
    """The sources of one unit with one change, and the tests that take it."""
    shutil.copytree(SOURCES.parent / "emulator", folder / "emulator")
    sources = Path(shutil.copytree(SOURCES, folder / "csrc"))
    text = (sources / file).read_text()
    assert right in text
    (sources / file).write_text(text.replace(right, wrong, 1))
    # Rows with a barrier of their own are those of norm backward.
    name = file.partition(".")[0].replace("common", "norm" if "row_b" in right else "softmax")
    for unit in sources.glob("*.cu"):
        if unit.stem not in (name, "version"):
            unit.unlink()
    return sources, [TESTS[name]]


def run(
    sources: Path,
    library: Path,
    order: str,
    tests: list[str],
    *,
    few: str = FEW,
    sanitized: bool = False,
) -> tuple[int, str]:
    """Exit code and output of tests of the ops by this library."""
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
    *change, words = BUGS[bug]
    sources, tests = planted(tmp_path, *change)
    library = tmp_path / "planted.so"
    build.build_emulated(library, sources=sources)
    ends = (run(sources, library, order, tests) for order in ("forward", "backward"))
    assert any(code == 1 and words in text for code, text in ends)


def test_sanitizers_find_nothing_in_what_is_right(tmp_path):
    library = tmp_path / "sanitized.so"
    build.build_emulated(library, sanitize=True)
    code, text = run(SOURCES, library, "backward", ALL_TESTS, few=OF_ALL, sanitized=True)
    assert code == 0 and " passed" in text, text[-2000:]


@pytest.mark.parametrize("bug", BEYOND)
def test_sanitizers_find_what_is_beyond(bug, tmp_path):
    sources, tests = planted(tmp_path, *BEYOND[bug])
    library = tmp_path / "planted.so"
    build.build_emulated(library, sanitize=True, sources=sources)
    code, text = run(sources, library, "forward", tests, sanitized=True)
    assert code != 0 and ("AddressSanitizer" in text or "runtime error" in text)
