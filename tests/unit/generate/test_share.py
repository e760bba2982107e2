"""What attends while a share runs. Shares of several ranks: tests/ranks/test_generate.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megalite.core.config import ModelConfig
from megalite.generate import share as share_module
from megalite.generate.cache import Part, Step
from megalite.generate.load import Place, untrained_share
from megalite.generate.share import without_plans

MODEL = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, vocab_size=11, seq_len=8)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_generation_on_a_gpu_never_asks_for_attention_that_plans(monkeypatch, device):
    place = Place(slots=1, dtype=torch.float32, device=torch.device("cpu"))
    share, attend, seen = untrained_share(MODEL, place, seed=1), F.scaled_dot_product_attention, []

    def watched(*args, **settings):
        cuda = torch.backends.cuda
        seen.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()))
        return attend(*args, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    pretended = without_plans(torch.device(device))
    monkeypatch.setattr(share_module, "without_plans", lambda _: pretended)
    share.run(Step((Part(slot=0, tokens=(1, 2, 3), before=0, wanted=1),)))
    assert seen == [(device == "cpu", True, True)] * MODEL.num_layers
    assert torch.backends.cuda.cudnn_sdp_enabled()
