"""What torch knows of the ops: schemas, shapes, compile, checkpointing. And the build."""

from __future__ import annotations

import pkgutil
import shutil
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import build
from megalite.ops import backend, library
from megalite.ops.dropout import dropout
from megalite.ops.gelu import gelu
from megalite.ops.library import BUILT, SOURCES, Library, NoKernels
from megalite.ops.norm import add_layer_norm, layer_norm, rms_norm
from megalite.ops.rope import rope, rope_angles
from megalite.ops.softmax import scaled_softmax
from megalite.ops.swiglu import swiglu

OPS = torch.ops.megalite
X, W = torch.randn(6, 32), torch.randn(32)
SCORES, MASK = torch.randn(2, 3, 4, 16), torch.rand(4, 16) > 0.3
HEADS, NAMES = torch.randn(2, 3, 4, 16), torch.randint(-(2**63), 2**63 - 1, (6, 1))
COS, SIN = rope_angles(torch.arange(2)[:, None], 16, 10_000.0, torch.float32)
CALLS = {
    "norm": (X, X, W, W, 1e-5, True),
    "norm_backward": (X, X, X, W, torch.randn(6), torch.rand(6), True),
    "softmax": (SCORES, MASK, None, True, 0, 0.5),
    "softmax_backward": (SCORES, SCORES.softmax(-1), False, 0, 0.5),
    "gelu": (X, W, True),
    "gelu_backward": (X, X, W, False),
    "swiglu": (X,),
    "swiglu_backward": (X[:, :16], X),
    "rope": (HEADS, COS, SIN, True),
    "dropout": (X, NAMES, X, 0.3),
}


@pytest.fixture(params=["kernels", "reference"])
def either(request, emulated_library):
    """The ops by the CUDA bodies, and by what stands in for them."""
    before = backend.use_library(emulated_library if request.param == "kernels" else None)
    yield
    backend.use_library(before)


@pytest.mark.parametrize("name", CALLS)
def test_op_is_what_it_says(either, name):
    torch.library.opcheck(getattr(OPS, name).default, CALLS[name])


@pytest.mark.parametrize("name", CALLS)
def test_reference_and_kernels_agree(emulated, name):
    ours = getattr(OPS, name)(*CALLS[name])
    backend.use_library(None)
    theirs = getattr(OPS, name)(*CALLS[name])
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


NARROW = torch.bfloat16
MIXED = {
    "norm, of the residual": ("norm", (X.to(NARROW), X, W.to(NARROW), W.to(NARROW), 1e-5, True)),
    "norm, of the weights": ("norm", (X, X, W.to(NARROW), W.to(NARROW), 1e-5, True)),
    "norm, of the bias": ("norm", (X.to(NARROW), None, W, W.to(NARROW), 1e-5, True)),
    "softmax, of the bias": ("softmax", (SCORES.to(NARROW), None, SCORES, False, 0, 1.0)),
    "gelu, of the bias": ("gelu", (X, W.to(NARROW), True)),
    "swiglu, of the gradient": ("swiglu_backward", (X[:, :16].to(NARROW), X)),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_a_kernel_would_read_by_another_type_is_the_reference_s(emulated, name):
    op, given = MIXED[name]
    ours = getattr(OPS, op)(*given)
    assert emulated.count == 0
    backend.use_library(None)
    torch.testing.assert_close(ours, getattr(OPS, op)(*given), rtol=0, atol=0)


def test_sum_that_nobody_uses_has_no_gradient_to_be_read(emulated, monkeypatch):
    x, residual = X.clone().requires_grad_(), X.clone().requires_grad_()
    seen = []
    launch = backend.launch
    monkeypatch.setattr(backend, "launch", lambda *args: (seen.append(args), launch(*args)))
    add_layer_norm(x, residual, W, W, 1e-5)[1].backward(X)
    assert [args[0] for args in seen] == ["norm_forward", "norm_backward"]
    assert sum(arg is None for arg in seen[1]) == 1  # dsum: all else is there
    layer_norm(x + residual.detach(), W, W, 1e-5).backward(X)
    torch.testing.assert_close(x.grad, 2 * residual.grad)


def test_shapes_on_a_gpu_that_is_not_there(emulated):
    with FakeTensorMode():
        x, w = (
            torch.empty(5, 64, device="cuda", dtype=torch.bfloat16),
            torch.empty(64, device="cuda"),
        )
        y, total, mean, rstd = OPS.norm(x, x, w, None, 1e-6, True)
        assert y.device.type == "cuda" and y.dtype == total.dtype == torch.bfloat16
        assert mean.shape == rstd.shape == (5,) and mean.dtype == torch.float32


def model(x, w, scores):
    total, y = add_layer_norm(x, 2 * x, w, None, 1e-5)
    weights = scaled_softmax(rope(scores, COS, SIN), causal=True, scale=0.5)
    y = dropout(gelu(rms_norm(y, w, 1e-5), w), NAMES, 0.3, total)
    return swiglu(y).sum() + (total * total).sum() + (weights * scores).sum()


def grads(fn):
    leaves = [t.clone().requires_grad_() for t in (X, W, SCORES)]
    fn(*leaves).backward()
    return [leaf.grad for leaf in leaves]


def test_compiled_model_is_the_same(emulated):
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(grads(compiled), grads(model))


def test_checkpointed_model_is_the_same(emulated):
    again = grads(lambda *leaves: checkpoint(model, *leaves, use_reentrant=False))
    torch.testing.assert_close(again, grads(model), rtol=0, atol=0)


def test_library_of_other_sources_is_refused(emulated_library, tmp_path):
    sources = shutil.copytree(SOURCES, tmp_path / "csrc")
    (sources / "norm.cuh").write_text("// changed\n")
    with pytest.raises(NoKernels, match="built from other sources"):
        Library(build.HERE.parent / "build" / "libmegalite_emulated.so", sources)
    with pytest.raises(NoKernels, match="cannot be loaded"):
        Library(tmp_path / "none.so")


def test_python_does_not_take_the_library_for_a_module(tmp_path):
    """Ranks import whatever is in the package."""
    at = tmp_path / BUILT.relative_to(Path(library.__file__).parent)
    at.parent.mkdir(exist_ok=True)
    at.touch()
    assert not list(pkgutil.walk_packages([str(tmp_path)]))


def test_launch_that_fails_says_why(emulated_library):
    with pytest.raises(RuntimeError, match="megalite_norm_forward: no kernel for this dtype"):
        numbers = (9, *[None] * 8, 0, 1, 8, 1e-5, None)
        emulated_library.launch("norm_forward", *numbers)


@pytest.mark.parametrize("name", ["fused", "apex"])
def test_backend_that_needs_a_gpu_is_refused_without(name):
    with pytest.raises(NoKernels, match=f"--ops-backend {name}: needs a GPU, not --device cpu"):
        backend.use(name, torch.device("cpu"))


def test_auto_is_torch_on_a_cpu(emulated):
    backend.use("auto", torch.device("cpu"))
    assert not backend.takes(X)
    assert torch.equal(layer_norm(X, W, None, 1e-5), torch.nn.functional.layer_norm(X, (32,), W))
