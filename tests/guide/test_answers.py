"""The answers to the exercises of the guide, a test each."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from megalite.core.call import make_call
from megalite.core.config import ModelConfig
from megalite.core.mesh import Mesh
from megalite.core.params import initialize
from megalite.data import bpe
from megalite.data.chat import Rendered
from megalite.data.corpus import choose_held_out
from megalite.data.packing import Conversations
from megalite.generate.cache import Texts
from megalite.generate.engine import Request, complete
from megalite.generate.load import Place, untrained_share
from megalite.generate.sample import Sampling, probabilities
from megalite.layers.attention import Attention
from megalite.models.build import build_stages
from megalite.models.presets import PRESETS
from megalite.ops.rope import rope, rope_angles
from megalite.schedule.generators import one_f_one_b
from megalite.schedule.simulate import bubble, simulate

SMALL = ModelConfig(
    num_layers=2, hidden_size=32, num_heads=4, vocab_size=61, seq_len=24, init_std=0.2
)


@pytest.fixture(autouse=True)
def in_float64():
    """Differences are then those of the idea, and not of rounding."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


def small_model(**changes):
    """A whole model in this process."""
    model = replace(SMALL, **changes)
    stages = build_stages(
        model, Mesh({}), placement=(0,), layers=None, sequence_parallel=False, seed=1
    )
    initialize(stages[0], 1)
    return stages[0]


def call_of(tokens, labels=None, **more):
    """A call over token ids [s, b]."""
    samples = torch.arange(tokens.shape[1])
    return make_call(tokens, labels, samples, seq_cut=None, **more)


def test_a_new_document_moves_no_other():
    names = [f"module{i}" for i in range(500)]
    before, after = choose_held_out(names), choose_held_out([*names, "a_new_one"])
    assert after - {"a_new_one"} == before


def test_the_merges_of_banana():
    """`an` and `na` occur twice. Once `an` is one token, no pair occurs twice in `b an an a`."""
    tokens = [bytes([i]) for i in range(256)]
    learner = bpe._Learner(Counter({b"banana": 1}), tokens)
    learner.learn(9)
    assert tokens[256:] == [b"an"] and learner.words == [[ord("b"), 256, 256, ord("a")]]


def test_rotary_products_depend_on_distance_alone():
    q, k = torch.randn(8), torch.randn(8)

    def product(q_at: int, k_at: int) -> torch.Tensor:
        places = torch.tensor([q_at, k_at])[:, None]
        cos, sin = rope_angles(places, 8, 10000.0, torch.float64)
        turned = rope(torch.stack((q, k))[:, None, None], cos, sin)[:, 0, 0]
        return turned[0] @ turned[1]

    assert torch.isclose(product(5, 2), product(905, 902))
    assert not torch.isclose(product(5, 2), product(5, 3))


def test_attention_never_looks_ahead():
    attention = Attention(SMALL, Mesh({}), layer=0, seed=1, row_sum=())
    initialize(attention, 1)
    x = torch.randn(9, 1, SMALL.hidden_size)
    call = call_of(torch.zeros(9, 1, dtype=torch.int64))
    changed = x.clone()
    changed[-1] += 1
    with torch.no_grad():
        before, after = attention(x, call), attention(changed, call)
    assert torch.equal(before[:-1], after[:-1]) and not torch.equal(before[-1], after[-1])


def test_gpt2_has_as_many_parameters_as_it_says():
    model = ModelConfig(**PRESETS["gpt2-124m"])
    h, v, s = model.hidden_size, model.vocab_size, model.seq_len
    norm = 2 * h
    attention = (h * 3 * h + 3 * h) + (h * h + h)
    mlp = (h * 4 * h + 4 * h) + (4 * h * h + h)
    by_hand = v * h + s * h + model.num_layers * (2 * norm + attention + mlp) + norm
    with torch.device("meta"):
        stages = build_stages(
            model, Mesh({}), placement=(0,), layers=None, sequence_parallel=False, seed=1
        )
    table = stages[0].embedding.weight
    padding = (table.shape[0] - v) * h
    counted = sum(param.numel() for param in stages[0].parameters()) - padding
    assert counted == by_hand and round(counted / 1e6) == 124


def test_a_lower_temperature_keeps_no_more_tokens():
    for _ in range(50):
        logits = 3 * torch.randn(40)
        kept = [
            int((probabilities(logits, Sampling(temperature=t, top_p=0.8)) > 0).sum())
            for t in (0.3, 0.7, 1.0)
        ]
        assert kept == sorted(kept)


def test_loss_does_not_depend_on_microbatches():
    model = small_model()
    tokens = torch.randint(61, (10, 4))
    labels = torch.randint(61, (10, 4))
    labels[2:, 3] = -1  # most of one sample is masked
    cut = list(zip(tokens.split(1, 1), labels.split(1, 1), strict=True))
    with torch.no_grad():
        whole = model(None, call_of(tokens, labels))
        parts = [model(None, call_of(t, y)) for t, y in cut]
    count = (labels >= 0).sum()
    assert torch.isclose(sum(parts) / count, whole / count, rtol=1e-12)
    means = [part / (y >= 0).sum() for part, (_, y) in zip(parts, cut, strict=True)]
    mean_of_means = torch.stack(means).mean()
    assert not torch.isclose(mean_of_means, whole / count, rtol=1e-3)


def test_columns_then_rows_need_one_sum():
    ranks, x = 4, torch.randn(3, 8)
    first, second = torch.randn(16, 8), torch.randn(8, 16)
    whole = torch.relu(x @ first.T) @ second.T
    parts = [
        torch.relu(x @ columns.T) @ rows.T
        for columns, rows in zip(first.chunk(ranks, 0), second.chunk(ranks, 1), strict=True)
    ]
    assert torch.allclose(sum(parts), whole, rtol=1e-12)


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 32), (8, 8)])
def test_the_bubble_of_1f1b(ranks, microbatches):
    timeline = simulate(one_f_one_b(ranks, microbatches))
    assert bubble(timeline) == pytest.approx((ranks - 1) / (microbatches + ranks - 1))


def test_packed_conversations_do_not_see_each_other():
    said = [Rendered([7, 8, 9, 10, 11], [False, False, True, True, True])]
    said.append(Rendered([20, 21, 22, 23], [False, True, True, True]))
    model = small_model(position="rope")

    def loss(conversations) -> torch.Tensor:
        made = Conversations(conversations, 9, pack=True)
        window, learned = made.window(0), made.learned(0)
        labels = torch.from_numpy(window[1:]).where(torch.from_numpy(learned), -1)
        tokens, starts = torch.from_numpy(window[:-1]), torch.from_numpy(made.starts(0))
        with torch.no_grad():
            return model(None, call_of(tokens[:, None], labels[:, None], starts=starts[:, None]))

    together = loss(said)
    assert torch.isclose(together, loss(said[:1]) + loss(said[1:]), rtol=1e-12)


def test_a_cache_changes_nothing():
    place = Place(slots=1, dtype=torch.float64, device=torch.device("cpu"))
    cached = untrained_share(SMALL, place, seed=1)
    anew = replace(cached, memory=Texts(slots=1, seq_len=SMALL.seq_len, device=torch.device("cpu")))
    asked = [Request(tokens=[3, 1, 4], how=Sampling(temperature=1.0), max_tokens=15)]
    assert complete(cached, asked) == complete(anew, asked)
