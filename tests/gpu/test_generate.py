"""Generation on a GPU: what is replayed says what the same steps say, launched one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megalite.core.config import ModelConfig
from megalite.generate import record
from megalite.generate.engine import Generation, Request, complete
from megalite.generate.load import Place, untrained_share
from megalite.generate.sample import Sampling

MODELS = {
    "gpt2": {"position": "learned"},
    "llama": {
        "position": "rope", "norm": "rmsnorm", "activation": "swiglu", "bias": False,
        "num_kv_heads": 2, "tie_embeddings": False,
    },
    "caps": {"position": "rope", "attention_soft_cap": 3.0, "sliding_window": 9},
}  # fmt: skip
SLOTS, NEW = 5, 40


def share_of(form: dict, dtype: torch.dtype):
    sizes = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "vocab_size": 301, "seq_len": 64}
    model = ModelConfig(**sizes, init_std=0.2, **form)
    place = Place(slots=SLOTS, dtype=dtype, device=torch.device("cuda", 0))
    return untrained_share(model, place, seed=1)


def requests(temperature: float) -> list[Request]:
    how = Sampling(temperature=temperature, top_k=20, seed=3)
    asked = [[(7 * i + j) % 301 for j in range(1 + 3 * i)] for i in range(2 * SLOTS)]
    return [Request(tokens=a, how=how, max_tokens=NEW, number=i) for i, a in enumerate(asked)]


@pytest.mark.parametrize("form", MODELS.values(), ids=MODELS)
def test_replayed_text_is_that_of_launched_steps(form, monkeypatch):
    monkeypatch.setattr(record, "SPAN", 16)
    share = share_of(form, torch.float64)
    assert share.recorded is not None
    plain = replace(share, recorded=None)
    for temperature in (0.0, 1.0):
        assert complete(share, requests(temperature)) == complete(plain, requests(temperature))
    assert set(share.recorded.graphs) == {16, 32, 64}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_of_a_request_does_not_depend_on_its_batch(dtype):
    """Each reads its prompt alone: what is replayed has one shape, whatever runs."""
    share = share_of(MODELS["llama"], dtype)
    asked = requests(1.0)[:SLOTS]
    alone = [complete(share, [request])[0] for request in asked]
    generation = Generation(share)
    said: dict[int, list[int]] = {}
    for request in asked:
        said[generation.submit(request)] = []
        for event in generation.step():
            said[event.request] += event.tokens
    while generation.has_work:
        for event in generation.step():
            said[event.request] += event.tokens
    assert list(said.values()) == alone
