"""A whole model by the CUDA bodies under the emulator, against the same model by torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megalite.core.call import make_call
from megalite.core.config import ModelConfig
from megalite.core.mesh import Mesh
from megalite.core.params import initialize
from megalite.core.unit import recomputing
from megalite.models.build import build_stages
from megalite.ops import backend

TOL = 1e-5
S, B = 12, 3

GPT2 = ModelConfig(
    num_layers=2, hidden_size=24, num_heads=4, vocab_size=37, seq_len=S, init_std=0.3, dropout=0.2
)
LLAMA = replace(
    GPT2, norm="rmsnorm", activation="swiglu", position="rope", bias=False, num_kv_heads=2,
    dropout=0.0,
)  # fmt: skip
MODELS = {"gpt2": GPT2, "gpt2 tanh": replace(GPT2, activation="gelu-tanh"), "llama": LLAMA}
each_model = pytest.mark.parametrize("cfg", MODELS.values(), ids=MODELS)


def gradients(
    cfg: ModelConfig, how: str = "none", modules: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """Loss and gradients of a new model."""
    made = build_stages(cfg, Mesh({}), placement=(0,), layers=None, sequence_parallel=True, seed=1)[
        0
    ]
    initialize(made, 1)
    made.run_unit = recomputing(made, how, modules=modules, layers=None)
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, cfg.vocab_size, (S + 1, B), generator=draw)
    loss = made(None, make_call(tokens[:-1], tokens[1:], torch.arange(B) + 7, seq_cut=None))
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in made.named_parameters()}}


@each_model
def test_model_by_kernels_is_the_model(emulated, cfg):
    ours = gradients(cfg)
    launched = Counter(emulated.names)
    backend.use_library(None)
    theirs = gradients(cfg)
    for name, number in theirs.items():
        error = (ours[name] - number).abs().max() / number.abs().max().clamp(min=1e-3)
        assert error <= TOL, name
    layers, gated = cfg.num_layers, cfg.activation == "swiglu"
    expected = {
        "norm_forward": 2 * layers + 1,  # one more is the head's
        "swiglu" if gated else "gelu": layers,
        "rope": 2 * layers if cfg.position == "rope" else 0,  # queries, and keys
        "dropout": 2 * layers + 1 if cfg.dropout else 0,  # one more is the embedding's
    }
    backward = {f"{name.removesuffix('_forward')}_backward": n for name, n in expected.items()}
    for name in ("rope", "dropout"):  # their own backwards
        expected[name] += backward.pop(f"{name}_backward")
    for name, number in (expected | backward).items():
        assert launched[name] == number, name


@each_model
@pytest.mark.parametrize("modules", [None, ("norm",), ("activation",)])
def test_what_is_run_again_has_the_same_bits(emulated, cfg, modules):
    """Though the second norm is in one pass with the addition only where it is kept."""
    plain, again = gradients(cfg), gradients(cfg, "selective", modules)
    assert emulated.count and all(torch.equal(plain[name], again[name]) for name in plain)
