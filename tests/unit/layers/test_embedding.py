"""Lookups and their hand-made gradient, against F.embedding."""

import torch
import torch.nn.functional as F

from megalite.core.call import make_call
from megalite.core.config import ModelConfig
from megalite.core.mesh import Axis
from megalite.core.params import initialize
from megalite.layers.embedding import Embedding, Positions

CFG = ModelConfig(hidden_size=4, num_heads=2, vocab_size=7, seq_len=6)
ONE = Axis("tp")
TOKENS = torch.tensor([[0, 6], [3, 3], [6, 1]])


def test_lookup_and_gradient_equal_torch_with_repeated_ids():
    table = Embedding(CFG, ONE, uses=1, tied=None)
    initialize(table, seed=1)
    call = make_call(TOKENS, None, torch.arange(2), seq_cut=None)
    weight = table.weight.detach().clone().requires_grad_()
    dy = torch.randn(3, 2, 4)
    F.embedding(TOKENS, weight).backward(dy)
    later = []
    for how in (call, call.deferring(later)):
        table.weight.grad = None
        x = table(how)
        assert torch.equal(x, weight[TOKENS])
        x.backward(dy)
        for job in later:
            job()
        torch.testing.assert_close(table.weight.grad, weight.grad)
    assert len(later) == 1


def test_positions_of_a_cut_call_are_those_of_its_rows():
    table = Positions(CFG, ONE, row_sum=())
    initialize(table, seed=1)
    tokens = torch.zeros(6, 2, dtype=torch.int64)
    call = make_call(tokens, None, torch.arange(2), seq_cut=Axis("tp", 3, 2))
    x = table(torch.zeros(2, 2, 4), call)
    assert torch.equal(x[:, 1], table.weight[4:])
