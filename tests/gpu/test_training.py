"""Whole steps on a GPU: they wait for it nowhere, and both backends train alike."""

from __future__ import annotations

import pytest
import torch

from megalite.core import matmul
from megalite.core.config import Config, ModelConfig, OptimConfig, TrainConfig
from megalite.core.mesh import Mesh
from megalite.data.loader import Synthetic
from megalite.ops import backend
from megalite.train.arrival import Arrival
from megalite.train.build import Engine, build_engine, build_loader
from megalite.train.loop import forward_backward, train_step, update

LLAMA = {"norm": "rmsnorm", "activation": "swiglu", "position": "rope", "bias": False}
GPT = {"dropout": 0.1}
STEPS = 20
LR = 3e-4
"""At 1e-3 the first steps jump about, and a rounding grows to several percent of the loss."""


@pytest.fixture(autouse=True)
def torch_s_own_ops_after():
    yield
    backend.use_library(None)


def engine_of(form: dict, ops_backend: str, precision: torch.dtype = torch.bfloat16) -> Engine:
    """One process, four layers, on the first GPU."""
    sizes = {"num_layers": 4, "hidden_size": 256, "num_heads": 8, "seq_len": 256}
    config = Config(
        model=ModelConfig(**sizes, vocab_size=1000, **form),
        optim=OptimConfig(lr=LR),
        train=TrainConfig(micro_batch_size=4, global_batch_size=8, ops_backend=ops_backend),
    )
    config.check(1)
    device = torch.device("cuda", 0)
    mesh = Mesh({"tp": 1, "pp": 1, "dp": 1, "cp": 1}, rank=0, kind="single")
    return build_engine(config, mesh, device=device, dtype=precision)


def losses(engine: Engine, steps: int = STEPS) -> torch.Tensor:
    """Of so many steps on a Markov chain."""
    model = engine.config.model
    loader = build_loader(engine, Synthetic(model.vocab_size, model.seq_len, seed=1))
    batch = engine.config.train.global_batch_size
    found = [train_step(engine, loader.step(n * batch), lr=LR).loss for n in range(steps)]
    return torch.stack(found).cpu()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_gradients_add_up_in_float32(dtype):
    dy, x = torch.randn(512, 96, device="cuda"), torch.randn(512, 64, device="cuda")
    dy, x = dy.to(dtype), x.to(dtype)
    total = torch.full((96, 64), 100.0, device="cuda")
    matmul.add_product(total, dy, x)
    wanted = 100.0 + dy.double().t() @ x.double()
    # A product that was rounded to the narrow type would be off by up to 0.1.
    assert ((total - wanted).abs() <= 1e-3).all()


@pytest.mark.parametrize("form", [GPT, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("ops_backend", ["torch", "fused"])
def test_step_waits_for_the_gpu_nowhere(form, ops_backend):
    engine = engine_of(form, ops_backend)
    losses(engine, 2)
    model = engine.config.model
    loader = build_loader(engine, Synthetic(model.vocab_size, model.seq_len, seed=1))
    calls = loader.step(0)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = train_step(engine, calls, lr=LR)
        arrival = Arrival(found, engine.device, prefers=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    numbers = arrival.read()
    assert found.loss.isfinite() and arrival.tokens == found.tokens.item() > 0
    assert numbers["loss"] == found.loss.item() and numbers["norm"] == found.norm.item()


@pytest.mark.parametrize("form", [GPT, LLAMA], ids=["gpt", "llama"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_backends_train_alike(form, precision):
    bound = {torch.float32: 1e-5, torch.bfloat16: 2e-3}[precision]
    ours, torchs = (losses(engine_of(form, name, precision)) for name in ("fused", "torch"))
    assert torchs[-1] < torchs[0] - 0.1
    assert ((ours - torchs).abs() <= bound * torchs).all()


def test_captured_steps_are_eager_ones_with_any_learning_rate():
    """Forward and backward replayed from a CUDA graph; the optimizer's rate changes each step."""
    eager, replayed = (engine_of(LLAMA, "fused", torch.float32) for _ in range(2))
    model = eager.config.model
    loader = build_loader(eager, Synthetic(model.vocab_size, model.seq_len, seed=1))
    batch = eager.config.train.global_batch_size
    calls = loader.step(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward_backward(replayed, calls)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        captured = forward_backward(replayed, calls)
    for step in range(10):
        lr, fresh = LR / (step + 1), loader.step(step * batch)
        for static, given in zip(calls, fresh, strict=True):
            static.tokens.copy_(given.tokens)
            static.labels.copy_(given.labels)
            static.samples.copy_(given.samples)
        graph.replay()
        update(replayed, captured, lr=lr)
        found = train_step(eager, fresh, lr=lr)
        torch.testing.assert_close(captured.loss, found.loss, rtol=1e-5, atol=0)
        torch.testing.assert_close(captured.norm, found.norm, rtol=1e-4, atol=0)
    for ours, theirs in zip(replayed.zero.buckets, eager.zero.buckets, strict=True):
        torch.testing.assert_close(ours.weights, theirs.weights, rtol=1e-4, atol=1e-6)
