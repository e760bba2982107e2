"""The answers to the exercises of the guide, a test each."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from megalite.core import rng
from megalite.core.call import make_call
from megalite.core.config import ModelConfig
from megalite.core.mesh import Axis, Mesh
from megalite.core.params import initialize
from megalite.data import bpe
from megalite.data.chat import Rendered
from megalite.data.corpus import choose_held_out, split_document
from megalite.data.loader import permuted
from megalite.data.packing import Conversations
from megalite.generate.cache import Texts
from megalite.generate.engine import Request, complete
from megalite.generate.load import Place, untrained_share
from megalite.generate.sample import Draw, Sampling, drawn, probabilities
from megalite.layers.attention import Attention
from megalite.layers.context import merged
from megalite.layers.core_attention import CoreAttention
from megalite.layers.embedding import _local_rows
from megalite.models.build import build_stages
from megalite.models.presets import PRESETS
from megalite.ops.norm import rms_norm
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


def test_pieces_are_the_document():
    lines = [i % 7 * "word " + "\n" for i in range(200)] + ["x" * 150 + "\n", "the end"]
    text = "".join(lines)
    pieces = list(split_document(text, limit=100))
    assert "".join(pieces) == text
    too_long = [piece for piece in pieces if len(piece.encode()) > 100]
    assert too_long == ["x" * 150 + "\n"]


def test_the_merges_of_banana():
    """`an` and `na` occur twice. Once `an` is one token, no pair occurs twice in `b an an a`."""
    tokens = [bytes([i]) for i in range(256)]
    learner = bpe._Learner(Counter({b"banana": 1}), tokens)
    learner.learn(9)
    assert tokens[256:] == [b"an"] and learner.words == [[ord("b"), 256, 256, ord("a")]]


def test_any_bytes_come_back():
    tokenizer = bpe.train(["to be or not to be, that is the question"] * 3, 270)
    for data in (bytes(range(256)), b"\xff\xfe<|im_end|>", "\u00e9\u4e16\U0001f30d".encode()):
        ids = tokenizer.encode(data)
        assert tokenizer.decode_bytes(ids) == data
        assert not set(ids) & set(tokenizer.special.values())


def test_rotary_products_depend_on_distance_alone():
    q, k = torch.randn(8), torch.randn(8)

    def product(q_at: int, k_at: int) -> torch.Tensor:
        places = torch.tensor([q_at, k_at])[:, None]
        cos, sin = rope_angles(places, 8, 10000.0, torch.float64)
        turned = rope(torch.stack((q, k))[:, None, None], cos, sin)[:, 0, 0]
        return turned[0] @ turned[1]

    assert torch.isclose(product(5, 2), product(905, 902))
    assert not torch.isclose(product(5, 2), product(5, 3))


def test_a_cut_table_gives_the_same_rows():
    table, ids, ranks = torch.randn(16, 5), torch.randint(16, (7, 2)), 4
    whole = torch.zeros(7, 2, 5)
    for idx, part in enumerate(table.chunk(ranks)):
        local, elsewhere = _local_rows(ids, part, Axis("tp", size=ranks, idx=idx))
        whole += part[local].masked_fill(elsewhere.unsqueeze(-1), 0.0)
    assert torch.equal(whole, table[ids])


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


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_attention_without_positions_knows_no_order(position):
    model = replace(SMALL, position=position)  # learned ones are added before the first layer
    attention = Attention(model, Mesh({}), layer=0, seed=1, row_sum=())
    initialize(attention, 1)
    x = torch.randn(9, 1, SMALL.hidden_size)
    swapped = x[[0, 1, 5, 3, 4, 2, 6, 7, 8]]
    call = call_of(torch.zeros(9, 1, dtype=torch.int64))
    with torch.no_grad():
        before, after = attention(x, call)[-1], attention(swapped, call)[-1]
    assert torch.allclose(before, after, rtol=1e-12) == (position == "learned")


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


def test_a_norm_forgets_length():
    x, weight = torch.randn(4, 32), torch.randn(32)
    assert torch.allclose(rms_norm(10 * x, weight, 0.0), rms_norm(x, weight, 0.0), rtol=1e-12)
    lengths = rms_norm(x, torch.ones(32), 0.0).norm(dim=-1)
    assert torch.allclose(lengths, torch.full((4,), 32.0).sqrt(), rtol=1e-12)


def test_a_lower_temperature_keeps_no_more_tokens():
    for _ in range(50):
        logits = 3 * torch.randn(40)
        kept = [
            int((probabilities(logits, Sampling(temperature=t, top_p=0.8)) > 0).sum())
            for t in (0.3, 0.7, 1.0)
        ]
        assert kept == sorted(kept)


def test_draws_follow_the_probabilities():
    logits, how, draws = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0]), Sampling(temperature=1.0), 4000
    expected = probabilities(logits, how)
    found = Counter(drawn(logits, Draw(how, [3, 1], number)) for number in range(draws))
    for token, p in enumerate(expected.tolist()):
        spread = (p * (1 - p) / draws) ** 0.5
        assert abs(found[token] / draws - p) < 4 * spread


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


def test_an_epoch_takes_every_window_once():
    n = 1000
    epochs = [[permuted(i, n, rng.key(7, "epoch", epoch)) for i in range(n)] for epoch in (0, 1)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != list(range(n))
    # Sample 600 is found without the 600 before it.
    assert permuted(600, n, rng.key(7, "epoch", 0)) == epochs[0][600]


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


def test_two_halves_of_the_keys_are_the_whole():
    core = CoreAttention(
        window=None, soft_cap=None, scale=0.5, p=0.0, key=0, samples=torch.zeros(1), first_head=0,
        layer=0,
    )  # fmt: skip
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    at = torch.arange(8)
    first, second = (
        core.partial(q, k[:, :, half], v[:, :, half], at, at[half])
        for half in (slice(0, 4), slice(4, 8))
    )
    assert torch.allclose(merged(*first, *second)[0], core.attend(q, k, v, at, at), rtol=1e-10)


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


def test_new_adapters_change_nothing():
    plain, adapted = small_model(), small_model(lora_rank=2)
    assert any("lora" in name for name, _ in adapted.named_parameters())
    call = call_of(torch.randint(61, (10, 2)))
    with torch.no_grad():
        assert torch.equal(plain(None, call), adapted(None, call))


def test_a_cache_changes_nothing():
    place = Place(slots=1, dtype=torch.float64, device=torch.device("cpu"))
    cached = untrained_share(SMALL, place, seed=1)
    anew = replace(cached, memory=Texts(slots=1, seq_len=SMALL.seq_len, device=torch.device("cpu")))
    asked = [Request(tokens=[3, 1, 4], how=Sampling(temperature=1.0), max_tokens=15)]
    assert complete(cached, asked) == complete(anew, asked)


def test_a_request_does_not_see_its_batch():
    place = Place(slots=4, dtype=torch.float64, device=torch.device("cpu"))
    share = untrained_share(SMALL, place, seed=1)
    prompts = ([3], [5, 1, 4, 4, 2, 9], [7, 7], [60, 2, 8])
    asked = [
        Request(tokens=prompt, how=Sampling(temperature=1.0), max_tokens=9 + i)
        for i, prompt in enumerate(prompts)
    ]
    assert complete(share, asked) == [complete(share, [one])[0] for one in asked]
