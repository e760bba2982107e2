"""Builds the kernels for the CPU, once, and has ops run by them."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from megalite.ops import backend
from megalite.ops.library import Library

HOME = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(HOME / "kernels"))

import build  # noqa: E402


class Counting(Library):
    """Remembers its launches, so that a test can say that ours computed, and not the reference."""

    names: tuple[str, ...] = ()

    @property
    def count(self):
        return len(self.names)

    def launch(self, name, *args):
        self.names += (name,)
        super().launch(name, *args)


@pytest.fixture(scope="session", autouse=True)
def a_compiler():
    """Skips, with the reason, where there is none."""
    try:
        build.compiler()
    except build.BuildFailed as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def emulated_library(a_compiler):
    """Of the sources as they are. EMULATED_LIBRARY names one that is built already."""
    given = os.environ.get("EMULATED_LIBRARY")
    if given:
        return Counting(Path(given), Path(os.environ["EMULATED_SOURCES"]))
    out = HOME / "build" / "libmegalite_emulated.so"
    build.build_emulated(out)
    return Counting(out)


@contextmanager
def run_by(library):
    """Ops are this library's, which counts from none."""
    before = backend.use_library(library)
    library.names = ()
    yield library
    backend.use_library(before)


@pytest.fixture
def emulated(emulated_library):
    """Ops of CPU tensors run the CUDA bodies."""
    with run_by(emulated_library) as library:
        yield library
