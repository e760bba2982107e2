"""Presets are the published shapes: their parameters add up to the published totals."""

from dataclasses import replace

import pytest

from megalite.core.config import Config, ModelConfig
from megalite.models.presets import PRESETS, num_parameters

EXACT = {  # counted in the released weights
    "gpt2-124m": 124_439_808,
    "gpt2-1.5b": 1_557_611_200,
    "llama-1b": 1_235_814_400,
    "llama-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
}
STATED = {  # rounded in the papers
    "gpt3-1.3b": 1.3e9,
    "gpt3-6.7b": 6.7e9,
    "gpt3-175b": 175e9,
    "gpt-1t": 1008e9,
}


@pytest.mark.parametrize("name", EXACT)
def test_parameters_meet_the_released_weights(name):
    assert num_parameters(ModelConfig(**PRESETS[name])) == EXACT[name]


@pytest.mark.parametrize("name", STATED)
def test_parameters_meet_the_paper(name):
    assert num_parameters(ModelConfig(**PRESETS[name])) == pytest.approx(STATED[name], rel=0.015)


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_a_legal_model(name):
    Config(model=ModelConfig(**PRESETS[name])).check(1)


def test_optional_parts_are_counted():
    plain = ModelConfig(num_layers=2, hidden_size=8, num_heads=2, vocab_size=10, seq_len=6)
    # Per layer: qkv 8x24+24, out 8x8+8, mlp 8x32+32 and 32x8+8, two norms of 16.
    total = 2 * (216 + 72 + 288 + 264 + 32) + 16 + 80 + 48
    assert num_parameters(plain) == total
    assert num_parameters(replace(plain, tie_embeddings=False)) == total + 80
    assert num_parameters(replace(plain, qk_norm=True)) == total + 2 * (2 * 4 * 2)
    assert num_parameters(replace(plain, norm="rmsnorm")) == total - (2 * 16 + 8)
