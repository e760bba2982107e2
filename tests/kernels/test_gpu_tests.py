"""The tests for a GPU are collected, and those of kernels pass, where a GPU is only pretended."""

from __future__ import annotations

import subprocess
import sys

from tests.kernels.conftest import HOME

OF_EACH_OP = "test_kernels and (steps or nan_stays or padding or far_from_zero)"


def test_tests_for_a_gpu_run(emulated_library):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += ["-p", "tests.kernels.pretend_gpu", "tests/gpu", "-k", OF_EACH_OP]
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-2000:]
    assert "skipped" not in done.stdout
