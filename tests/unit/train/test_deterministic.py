"""--deterministic tells torch, cuBLAS and our kernels so; what comes of it needs a GPU to see."""

from __future__ import annotations

import os

import pytest
import torch

from megalite.core.errors import UserError
from megalite.ops import backend
from megalite.train.deterministic import WORKSPACE, be_deterministic

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def told(monkeypatch):
    """Puts back what torch was told."""
    monkeypatch.setenv(WORKSPACE, "")
    monkeypatch.delenv(WORKSPACE)
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark, torch.backends.cuda.cudnn_sdp_enabled()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    cudnn.deterministic, cudnn.benchmark = before[:2]
    torch.backends.cuda.enable_cudnn_sdp(before[2])


def test_a_gpu_s_libraries_are_told(told):
    be_deterministic(CUDA)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert os.environ[WORKSPACE] == ":4096:8"


def test_a_cpu_is_not_touched(told):
    be_deterministic(CPU)
    assert not torch.are_deterministic_algorithms_enabled() and WORKSPACE not in os.environ


def test_a_workspace_of_the_user_s_that_will_do_is_kept(told, monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":16:8")
    be_deterministic(CUDA)
    assert os.environ[WORKSPACE] == ":16:8"


def test_a_workspace_that_will_not_do_is_refused(told, monkeypatch):
    monkeypatch.setenv(WORKSPACE, ":0:0")
    with pytest.raises(UserError, match="--deterministic: the environment has .*=:0:0"):
        be_deterministic(CUDA)
    assert not torch.are_deterministic_algorithms_enabled()


def test_blocks_do_not_depend_on_the_gpu():
    x = torch.empty(1)
    backend.use("torch", CPU)
    usual = backend.blocks_to_fill(x)
    backend.use("torch", CPU, deterministic=True)
    fixed = backend.blocks_to_fill(x)
    backend.use("auto", CPU)
    assert usual == backend.blocks_to_fill(x) != fixed == 132
