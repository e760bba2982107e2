"""Generation around any model: what it sees at each step, where it ends, and who shares a batch."""

import pytest
import torch

from megalite.core.config import ModelConfig
from megalite.core.errors import UserError
from megalite.core.mesh import Mesh
from megalite.core.params import initialize
from megalite.generate.engine import generate, logits_of
from megalite.generate.sample import Sampling
from megalite.models.build import build_stages

VOCAB = 10
GREEDY = Sampling(temperature=0.0)


def counting(tokens, last):
    """The next token is the last one plus 1, modulo 10; padding behind it plays no part."""
    newest = tokens[last, torch.arange(tokens.shape[1])]
    return torch.nn.functional.one_hot((newest + 1) % VOCAB, VOCAB).double()


def run(prompts, next_logits=counting, how=GREEDY, **kwargs):
    return generate(next_logits, prompts, how, **{"max_tokens": 5, "seq_len": 8, **kwargs})


def test_tokens_follow_the_prompt():
    assert run([[3]]) == [[4, 5, 6, 7, 8]]


def test_prompts_of_any_length_share_a_batch():
    prompts = [[1], [5, 5, 5, 2], [0] * 12]
    assert run(prompts) == [run([p])[0] for p in prompts]


def test_stop_token_ends_a_request_and_is_left_out():
    assert run([[3], [5], [0]], stop=7) == [[4, 5, 6], [6], [1, 2, 3, 4, 5]]
    assert run([[6]], stop=7) == [[]]


def test_ended_requests_leave_the_batch():
    sizes = []

    def counted(tokens, last):
        sizes.append(tokens.shape[1])
        return counting(tokens, last)

    run([[3], [5], [0]], counted, stop=7)
    assert sizes == [3, 3, 2, 2, 1]
    sizes.clear()
    run([[5], [6]], counted, stop=7)
    assert sizes == [2, 1]


def test_context_is_the_last_seq_len_tokens():
    seen = []

    def watched(tokens, last):
        seen.append(tokens.T.tolist())
        return counting(tokens, last)

    run([[1, 2, 3]], watched, seq_len=4, max_tokens=3)
    assert seen == [[[1, 2, 3]], [[1, 2, 3, 4]], [[2, 3, 4, 5]]]
    seen.clear()
    run([[9, 8, 7, 6, 5, 4]], watched, seq_len=4, max_tokens=1)
    assert seen == [[[7, 6, 5, 4]]]


def test_empty_prompt_is_refused():
    with pytest.raises(UserError, match="the prompt is empty"):
        run([[1], []])


def flat(tokens, last):
    return torch.zeros(tokens.shape[1], VOCAB)


def test_request_draws_the_same_alone():
    how = Sampling(temperature=1.0, seed=5)
    prompts = [[1], [2, 2], [1]]
    together = run(prompts, flat, how)
    alone = [run([p], flat, how, first_request=i)[0] for i, p in enumerate(prompts)]
    assert together == alone
    assert together[0] != together[2]  # two samples of one prompt are two requests


def test_real_model_sees_no_padding_and_no_future():
    config = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, vocab_size=13, seq_len=8)
    model = build_stages(
        config, Mesh({}), placement=(0,), layers=None, sequence_parallel=False, seed=1
    )[0]
    initialize(model, 1)
    next_logits = logits_of(model)
    text = torch.tensor([3, 1, 4, 1, 5])
    alone = next_logits(text[:, None], torch.tensor([4]))
    padded = torch.stack([torch.cat([text, torch.zeros(3, dtype=torch.long)]), torch.arange(8)], 1)
    assert alone.shape == (1, 13)
    together = next_logits(padded, torch.tensor([4, 7]))
    torch.testing.assert_close(together[:1], alone, rtol=0, atol=1e-6)
