"""--ops-backend apex: the right package and no other, called as its functions want to be called.

A stand-in has the functions and arguments of NVIDIA's package, in torch, and is strict about types
as its C++ is. Where the real one is installed and a GPU is there, the same tests run on it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megalite.ops import apex as ours
from megalite.ops import backend
from megalite.ops.adamw import adamw_
from megalite.ops.library import NoKernels
from megalite.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
CUDA, EPS = torch.device("cuda"), 1e-5
HOW = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}

STAND_IN = {
    "apex/__init__.py": "",
    "apex/optimizers/fused_adam.py": "",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": """
import torch
calls = []
def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6,
                            memory_efficient=False):
    calls.append("layer_norm")
    assert input.dtype == weight.dtype == bias.dtype and isinstance(eps, float)
    return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    calls.append("rms_norm")
    assert input.dtype == weight.dtype and isinstance(eps, float)
    return torch.nn.functional.rms_norm(input, normalized_shape, weight, eps)
""",
    "apex/multi_tensor_apply/__init__.py": """
def multi_tensor_applier(op, noop_flag_buffer, tensor_lists, *args):
    return op(2048 * 32, noop_flag_buffer, tensor_lists, *args)
""",
    "fused_layer_norm_cuda.py": "",
    "amp_C.py": """
import torch
def multi_tensor_adam(chunk_size, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode,
                      bias_correction, weight_decay):
    for number in (lr, beta1, beta2, epsilon, weight_decay):
        assert type(number) is float
    for number in (step, mode, bias_correction):
        assert type(number) is int
    assert noop_flag.dtype == torch.int32 and noop_flag.numel() == 1
    assert mode == 1 and bias_correction == 1, "AdamW, unbiased"
    for g, p, m, v in zip(*tensor_lists, strict=True):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        spread = (v / (1 - beta2**step)).sqrt() + epsilon
        p.sub_(lr * (m / (1 - beta1**step) / spread + weight_decay * p))
""",
}


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs files as packages, for one test, in front of all others."""

    def forget():
        for name in [n for n in sys.modules if n.split(".")[0] in ("apex", *ours.EXTENSIONS)]:
            del sys.modules[name]

    def install(files: dict[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        forget()
        return tmp_path

    yield install
    forget()


@pytest.fixture(params=["stand-in", "real"])
def device(request, installed):
    """Where Apex computes; the ops ask it."""
    if request.param == "real" and not torch.cuda.is_available():
        pytest.skip("unmeasured: the real Apex needs a GPU, and torch sees none")
    if request.param == "stand-in":
        installed(STAND_IN)
    try:
        apex = ours.Apex()
    except NoKernels as reason:
        pytest.skip(f"unmeasured: {reason}")
    apex.device = "cpu" if request.param == "stand-in" else "cuda"
    before = backend.use_apex(apex)
    yield apex.device
    backend.use_apex(before)


def norms(x, residual, weight, bias):
    """Results of the four norms and gradients of all that went in."""
    leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias)]
    x, residual, weight, bias = leaves
    sums, ys = zip(
        add_layer_norm(x, residual, weight, bias, EPS),
        add_rms_norm(x, residual, weight, EPS),
        strict=True,
    )
    ys = (*ys, layer_norm(x, weight, bias, EPS), rms_norm(x, weight, EPS))
    weights = torch.arange(1.0, 1 + x[0].numel(), device=x.device).view(x[0].shape)
    sum((t.double() * weights).sum() / weights.sum() for t in (*sums, *ys)).backward()
    return [*sums, *ys, *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_norms_of_apex_are_torch_s(device, dtype):
    source = torch.Generator().manual_seed(0)
    shapes = ((3, 5, 64), (3, 5, 64), (64,), (64,))
    given = [torch.randn(s, generator=source).to(device, dtype) for s in shapes]
    by_apex = norms(*given)
    backend.use_apex(None)
    for one, other in zip(by_apex, norms(*given), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_each_norm_is_computed_by_apex(installed):
    installed(STAND_IN)
    apex = ours.Apex()
    apex.device = "cpu"
    before = backend.use_apex(apex)
    norms(*torch.randn(2, 4, 8), *torch.randn(2, 8))
    backend.use_apex(before)
    calls = sys.modules["apex.normalization.fused_layer_norm"].calls
    assert calls == ["layer_norm", "rms_norm"] * 2


def test_steps_of_apex_are_torch_s(device):
    def stepped():
        source = torch.Generator().manual_seed(1)
        numbers = torch.randn(4, 1001, generator=source).to(device)
        param, averages = numbers[0].clone(), torch.zeros(2, 1001, device=device)
        for step in (1, 2, 3):
            adamw_(param, numbers[step], *averages, step=step, **HOW)
        return [param, *averages]

    by_apex = stepped()
    backend.use_apex(None)
    torch.testing.assert_close(by_apex, stepped(), rtol=1e-5, atol=1e-6)


def test_what_apex_lacks_is_computed_by_the_others(device):
    """A norm without bias, and weights of another type than the rows."""
    x, weight = torch.randn(4, 8, device=device), torch.ones(8, device=device)
    assert backend.apex_for(x, weight, None) is None
    assert backend.apex_for(x.bfloat16(), weight) is None
    wanted = torch.nn.functional.layer_norm(x, (8,), weight, None, EPS)
    torch.testing.assert_close(layer_norm(x, weight, None, EPS), wanted)


def test_the_web_toolkit_is_refused_by_name_and_never_run(installed):
    place = installed(
        {
            "apex/__init__.py": "raise SystemExit('the wrong package was run')",
            "apex-0.9.10.dev0.dist-info/METADATA": "Metadata-Version: 2.1\nName: apex\n"
            "Version: 0.9.10.dev0\n",
        }
    )
    with pytest.raises(NoKernels) as refused:
        backend.use("apex", CUDA)
    line = str(refused.value)
    assert f"apex 0.9.10.dev0 at {place / 'apex' / '__init__.py'} is not NVIDIA's" in line
    assert "build NVIDIA/apex from its source" in line and "\n" not in line


def test_apex_without_its_cuda_extensions_is_refused(installed, monkeypatch):
    installed(STAND_IN)
    monkeypatch.setattr(ours, "EXTENSIONS", ("amp_C", "never_built"))
    with pytest.raises(NoKernels, match=r"was built without never_built \(build"):
        backend.use("apex", CUDA)


def test_apex_that_does_not_load_says_why(installed):
    installed({**STAND_IN, "amp_C.py": "raise ImportError('undefined symbol: _ZN3c10')"})
    with pytest.raises(NoKernels, match=r"does not load \(undefined symbol: _ZN3c10\)"):
        backend.use("apex", CUDA)


def test_no_apex_at_all_is_said(monkeypatch):
    monkeypatch.setattr(ours, "find_spec", lambda name: None)
    with pytest.raises(NoKernels, match="no package apex is installed"):
        backend.use("apex", CUDA)


def test_backends_after_apex_are_without_it(installed, monkeypatch):
    installed(STAND_IN)
    monkeypatch.setattr(backend, "BUILT", Path("none.so"))
    before = backend.use_apex(None)
    backend.use("apex", CUDA)
    assert backend.use_apex(None) is not None
    backend.use("apex", CUDA)
    backend.use("torch", CUDA)
    assert backend.use_apex(before) is None
