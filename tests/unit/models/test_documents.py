"""Documents packed into one sample give the loss and the gradients that each gives alone."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megalite.core.call import IGNORE, Call, make_call
from megalite.core.config import ModelConfig
from megalite.core.mesh import Mesh
from megalite.core.params import initialize
from megalite.models.build import build_stages
from megalite.models.gpt import GPT

TOL = 1e-10
S = 12
LENGTHS = ((5, 1, 6), (12,), (1, 1, 3, 7))

LEARNED = ModelConfig(
    num_layers=2, hidden_size=24, num_heads=4, vocab_size=37, seq_len=S, init_std=0.3
)
ROPE = replace(LEARNED, position="rope", norm="rmsnorm", num_kv_heads=2)
FORMS = {
    "learned": LEARNED,
    "rope": ROPE,
    "window": replace(LEARNED, sliding_window=3),
    "rope, window": replace(ROPE, sliding_window=3),
    "soft cap": replace(LEARNED, attention_soft_cap=1.5),
    "rope, soft cap, window, q and k norms": replace(
        ROPE, attention_soft_cap=1.5, sliding_window=4, qk_norm=True
    ),
}


def model_of(cfg: ModelConfig) -> GPT:
    stages = build_stages(
        cfg, Mesh({}), placement=(0,), layers=None, sequence_parallel=True, seed=1
    )
    initialize(made := stages[0].double(), 1)
    return made


def gradients(cfg: ModelConfig, calls: list[Call]) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss and gradients of a new model, run on one call after another."""
    made = model_of(cfg)
    loss = torch.zeros((), dtype=torch.float64)
    for call in calls:
        each = made(None, call)
        each.backward()
        loss += each.detach()
    return loss.item(), {name: p.grad for name, p in made.named_parameters()}


def assert_equal(ours, theirs):
    (loss, grads), (want, want_grads) = ours, theirs
    assert loss == pytest.approx(want, rel=TOL)
    assert grads.keys() == want_grads.keys()
    for name, grad in grads.items():
        error = (grad - want_grads[name]).abs().max() / want_grads[name].abs().max().clamp(min=1e-3)
        assert error <= TOL, name


def packed() -> Call:
    """Samples of documents of LENGTHS; some labels do not count."""
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, LEARNED.vocab_size, (S + 1, len(LENGTHS)), generator=draw)
    masked = torch.rand(S, len(LENGTHS), generator=draw) < 0.15
    starts = [[sum(row[:i])] * n for row in LENGTHS for i, n in enumerate(row)]
    columns = torch.tensor([at for run in starts for at in run]).view(len(LENGTHS), S).T
    labels = tokens[1:].masked_fill(masked, IGNORE)
    samples = torch.arange(len(LENGTHS)) + 7
    return make_call(tokens[:-1], labels, samples, seq_cut=None, starts=columns)


def alone(call: Call, *, in_place: bool) -> list[Call]:
    """Each document as a call of its own: from position 0, or where it stands in its sample."""
    calls = []
    spans = [(i, sum(row[:k]), n) for i, row in enumerate(LENGTHS) for k, n in enumerate(row)]
    for sample, first, length in spans:
        end = first + length
        at, column = slice(first, end), slice(sample, sample + 1)
        part = Call(
            call.tokens[at, column],
            call.labels[at, column],
            torch.arange(length),
            call.samples[column],
        )
        if in_place:
            starts = torch.full((end, 1), first)
            part = replace(part, positions=call.positions[at], starts=starts)
        calls.append(part)
    return calls


@pytest.mark.parametrize("form", FORMS)
def test_packed_sample_equals_its_documents_one_by_one(form):
    call, cfg = packed(), FORMS[form]
    assert_equal(gradients(cfg, [call]), gradients(cfg, alone(call, in_place=False)))


@pytest.mark.parametrize("base", [LEARNED, ROPE], ids=["learned", "rope"])
def test_packed_sample_with_dropout_equals_its_documents_at_their_places(base):
    # The names of dropout's numbers have the position in the sample, so each document keeps its.
    call, cfg = packed(), replace(base, attention_dropout=0.3, dropout=0.2)
    found = gradients(cfg, [call])
    assert_equal(found, gradients(cfg, alone(call, in_place=True)))
    assert found[0] != pytest.approx(gradients(cfg, alone(call, in_place=False))[0], rel=1e-3)


def test_starts_that_are_all_zero_are_one_document():
    call = packed()
    whole = replace(call, starts=torch.zeros(S, len(LENGTHS), dtype=torch.int64))
    one = gradients(LEARNED, [replace(call, starts=None)])
    assert_equal(gradients(LEARNED, [whole]), one)
    assert gradients(LEARNED, [call])[0] != pytest.approx(one[0], rel=1e-3)


def test_attention_of_the_example_sees_its_own_document_alone():
    path = Path(__file__).parents[3] / "examples" / "my_attention.py"
    call, cfg = packed(), replace(LEARNED, attention=f"{path}:MyAttention")
    assert_equal(gradients(cfg, [call]), gradients(cfg, alone(call, in_place=False)))


@pytest.mark.parametrize("form", ["learned", "rope", "soft cap"])
def test_no_document_feels_a_change_in_another(form):
    call = packed()
    changed = call.tokens.clone()
    changed[5, 0] = (changed[5, 0] + 1) % LEARNED.vocab_size  # the document of one token
    made = model_of(FORMS[form])
    with torch.no_grad():
        before, after = (
            made(None, replace(call, tokens=tokens, labels=None))
            for tokens in (call.tokens, changed)
        )
    moved = (before != after).any(-1)
    assert moved.nonzero().tolist() == [[5, 0]]
