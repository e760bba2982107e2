"""The two softmax paths of attention agree, and rotary positions are relative."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megalite.core.call import make_call
from megalite.core.config import ModelConfig
from megalite.core.mesh import Mesh
from megalite.core.params import initialize
from megalite.layers.attention import Attention
from megalite.layers.rope import Rope
from megalite.ops.softmax import attention_mask, scaled_softmax

CFG = ModelConfig(hidden_size=16, num_heads=4, num_kv_heads=2, seq_len=8, init_std=0.5)


def attention_of(cfg):
    made = Attention(cfg, Mesh({}), layer=0, seed=1, row_sum=()).double()
    initialize(made, seed=1)
    return made


def call_of(length=8, batch=2):
    tokens = torch.zeros(length, batch, dtype=torch.int64)
    return make_call(tokens, None, torch.arange(batch), seq_cut=None)


@pytest.mark.parametrize("window", [None, 3])
def test_written_out_softmax_equals_sdpa(window):
    x = torch.randn(8, 2, 16, dtype=torch.float64)
    plain = attention_of(replace(CFG, sliding_window=window))
    # A cap far above every score changes nothing but the path.
    written = attention_of(replace(CFG, sliding_window=window, attention_soft_cap=1e6))
    torch.testing.assert_close(written(x, call_of()), plain(x, call_of()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [None, 3])
def test_a_token_sees_no_later_one_and_none_beyond_the_window(window):
    attention, reach = attention_of(replace(CFG, sliding_window=window)), window or 8
    x = torch.randn(8, 2, 16, dtype=torch.float64)
    before = attention(x, call_of())
    x[2] += 1
    changed = (attention(x, call_of()) - before).abs().amax((1, 2)) > 1e-12
    assert changed.tolist() == [2 <= query < 2 + reach for query in range(8)]


def test_attention_dropout_is_off_in_evaluation():
    attention, call = attention_of(replace(CFG, attention_dropout=0.5)), call_of()
    x = torch.randn(8, 2, 16, dtype=torch.float64)
    still = replace(call, training=False)
    plain = attention_of(CFG)(x, call)
    torch.testing.assert_close(attention(x, still), plain, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(attention(x, call), plain)


@pytest.mark.parametrize("heads", [(12, 1, 64), (2, 3, 20), (1, 8, 16)], ids=str)
@pytest.mark.parametrize("cap", [None, 4.0])
def test_queries_over_all_keys_have_the_same_bits_in_any_batch(heads, cap):
    m, queries, d = heads
    core = attention_of(replace(CFG, attention_soft_cap=cap)).core(call_of())
    q = torch.randn(6, m, queries, d)
    k, v = torch.randn(2, 6, m, 131, d)
    assert core.can_batch(q) and not core.can_batch(q.bfloat16())
    for end in (1, 2, 7, 16, 33, 64, 130):
        y = core.attend_all(q, k[:, :, :end], v[:, :, :end])
        for first, count in ((0, 1), (5, 1), (1, 2), (2, 3), (1, 5)):
            some = slice(first, first + count)
            found = core.attend_all(q[some].clone(), k[some, :, :end], v[some, :, :end])
            assert torch.equal(found, y[some])


class Cats(TorchDispatchMode):
    """Counts what copies tensors into one."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.cat.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", [{}, {"position": "rope"}, {"qk_norm": True}], ids=str)
def test_gradient_of_the_projection_is_put_together_once(form):
    attention, call = attention_of(replace(CFG, **form)), call_of()
    fused = torch.randn(8, 2, 32, dtype=torch.float64, requires_grad=True)
    attention.heads(call, fused)  # from here on the call knows its angles
    with Cats() as forward:
        parts = attention.heads(call, fused)
    with Cats() as backward:
        torch.autograd.grad(parts, fused, [torch.randn_like(x) for x in parts])
    assert forward.count == 0 and backward.count == 1


def test_softmax_of_a_row_with_no_key_is_zero():
    seen = torch.tensor([[True, False, True], [False] * 3])
    weights = scaled_softmax(torch.randn(1, 1, 2, 3), mask=seen)
    assert weights[0, 0, 1].tolist() == [0, 0, 0]
    torch.testing.assert_close(weights[0, 0, 0].sum(), torch.tensor(1.0))


def test_attention_mask_is_causal_and_windowed_by_position():
    mask = attention_mask(torch.tensor([5, 6]), torch.tensor([3, 4, 5, 6]), 2)
    assert mask.tolist() == [[False, True, True, False], [False, False, True, True]]


def test_attention_mask_ends_at_the_start_of_the_querys_document():
    starts = torch.tensor([[0, 0], [0, 0], [2, 0], [2, 3]])
    q, k = torch.tensor([3, 2]), torch.tensor([0, 1, 2, 3])
    mask = attention_mask(q, k, None, starts)
    assert mask.shape == (2, 1, 2, 4)
    assert mask[0, 0].int().tolist() == [[0, 0, 1, 1], [0, 0, 1, 0]]
    assert mask[1, 0].int().tolist() == [[0, 0, 0, 1], [1, 1, 1, 0]]
    assert attention_mask(q, k, 2, starts)[1, 0].int().tolist() == [[0, 0, 0, 1], [0, 1, 1, 0]]


def test_rope_makes_scores_depend_on_distance_alone():
    rope = Rope(replace(CFG, position="rope"))
    q, k = torch.randn(2, 1, 1, 1, 4, dtype=torch.float64)
    call = call_of(8, 1)
    turned_q, turned_k = (rope(x.expand(8, 1, 1, 4), call)[:, 0, 0] for x in (q, k))
    scores = turned_q @ turned_k.T
    for distance in range(-7, 8):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[0].expand_as(diagonal))


def test_rope_restarts_at_each_document():
    # No score shows it, since scores go by distance: the rotation itself has to be compared.
    rope = Rope(replace(CFG, position="rope"))
    x = torch.randn(8, 2, 1, 4, dtype=torch.float64)
    alone = rope(x[3:], call_of(5))
    starts = torch.tensor([[0, 0]] * 3 + [[3, 0]] * 5)
    packed = rope(x, replace(call_of(8), starts=starts))
    assert torch.equal(packed[3:, 0], alone[:, 0])
    assert torch.equal(packed[:, 1], rope(x, call_of(8))[:, 1])


def test_rope_follows_the_positions_of_each_call():
    rope = Rope(replace(CFG, position="rope"))
    x = torch.randn(8, 1, 1, 4)
    call = call_of(8, 1)
    first = rope(x, call)
    later = rope(x, replace(call, positions=call.positions + 5))
    assert not torch.allclose(first, later)
    assert torch.equal(rope(x, call), first)
    assert rope(x.double(), call).dtype == torch.float64
