"""Cross entropy against torch's; cut over real ranks: tests/ranks/test_collectives.py."""

import pytest
import torch
import torch.nn.functional as F

from megalite.core.call import IGNORE, Preference, make_call
from megalite.core.mesh import Axis
from megalite.layers.loss import cross_entropy, log_ratios, preference_loss

ONE = Axis("tp")
TOL = {torch.float64: 1e-12, torch.float32: 1e-5}


def case(dtype, tokens=11, vocab=13, width=16):
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[::3] = IGNORE
    return logits.to(dtype), labels, vocab


@pytest.mark.parametrize("dtype", TOL, ids=str)
def test_loss_and_gradient_equal_torch_with_padding_and_masks(dtype):
    logits, labels, vocab = case(dtype)
    expected = logits.clone().requires_grad_()
    wanted = F.cross_entropy(expected[:, :vocab], labels, ignore_index=IGNORE, reduction="sum")
    (0.3 * wanted).backward()
    ours = logits.clone().requires_grad_()
    loss = cross_entropy(ours * 1, labels, vocab, ONE).sum()
    (0.3 * loss).backward()
    torch.testing.assert_close(loss, wanted, rtol=TOL[dtype], atol=TOL[dtype])
    torch.testing.assert_close(ours.grad, expected.grad, rtol=TOL[dtype], atol=TOL[dtype])
    assert (ours.grad[:, vocab:] == 0).all() and (ours.grad[::3] == 0).all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("dtype", TOL, ids=str)
def test_smoothing_and_z_loss_are_of_the_known_vocabulary(dtype, smoothing, z_loss):
    logits, labels, vocab = case(dtype)
    expected = logits.clone().requires_grad_()
    known = expected[:, :vocab]
    how = {"ignore_index": IGNORE, "reduction": "sum", "label_smoothing": smoothing}
    wanted = F.cross_entropy(known, labels, **how)
    wanted = wanted + z_loss * (known.logsumexp(-1)[labels != IGNORE] ** 2).sum()
    (0.3 * wanted).backward()
    ours = logits.clone().requires_grad_()
    loss = cross_entropy(ours * 1, labels, vocab, ONE, smoothing=smoothing, z_loss=z_loss).sum()
    (0.3 * loss).backward()
    torch.testing.assert_close(loss, wanted, rtol=TOL[dtype], atol=TOL[dtype])
    torch.testing.assert_close(ours.grad, expected.grad, rtol=TOL[dtype], atol=TOL[dtype])
    assert (ours.grad[:, vocab:] == 0).all() and (ours.grad[::3] == 0).all()


def test_loss_of_nothing_but_masked_labels_is_zero():
    logits, labels, vocab = case(torch.float64)
    x = logits.requires_grad_()
    loss = cross_entropy(x * 1, labels.fill_(IGNORE), vocab, ONE).sum()
    loss.backward()
    assert loss.item() == 0 and (x.grad == 0).all()


def test_huge_logits_do_not_overflow():
    logits = torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]])
    assert cross_entropy(logits, torch.tensor([0, 1]), 2, ONE).sum().item() == 0


def test_bfloat16_logits_give_a_float32_loss_without_bfloat16_sums():
    # 20000 equal logits: a bfloat16 sum of their exponentials would be off by up to 0.4 %
    tokens, vocab = 300, 20011
    logits = torch.zeros(tokens, vocab, dtype=torch.bfloat16).requires_grad_()
    loss = cross_entropy(logits * 1, torch.arange(tokens), vocab, ONE).sum()
    assert loss.dtype == torch.float32
    wanted = tokens * torch.tensor(float(vocab)).log()
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)
    loss.backward()
    assert logits.grad.dtype == torch.bfloat16
    label_grad = logits.grad[torch.arange(tokens), torch.arange(tokens)]
    torch.testing.assert_close(label_grad.double(), torch.full((tokens,), -1.0).double())


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_preference_loss_is_the_published_formula(beta):
    """Against log-probabilities of the two answers taken apart, by torch alone."""
    torch.manual_seed(3)
    length, pairs, vocab = 9, 3, 7
    logits = torch.randn(length, pairs, vocab, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(vocab, (length, pairs))
    labels[torch.rand(length, pairs) < 0.3] = IGNORE
    seconds, reference = [2, 5, 8], torch.randn(pairs, dtype=torch.float64)
    places = torch.arange(length)[:, None]
    starts = torch.where(places < torch.tensor(seconds), 0, torch.tensor(seconds))
    counts = torch.tensor([True, True, False])
    call = make_call(
        labels.clamp(min=0),
        labels,
        torch.arange(pairs),
        seq_cut=None,
        starts=starts,
        preference=Preference(reference, counts, beta),
    )
    losses = cross_entropy(logits.flatten(0, 1) * 1, labels.flatten(), vocab, ONE)
    ratios = log_ratios(losses.view(length, pairs), call)
    (grad,) = torch.autograd.grad(preference_loss(ratios, call), logits)

    each = []
    for column, second in enumerate(seconds):
        log_p = [
            -F.cross_entropy(
                logits[part, column], labels[part, column], ignore_index=IGNORE, reduction="sum"
            )
            for part in (slice(0, second), slice(second, length))
        ]
        each.append(log_p[0] - log_p[1])
    want = torch.stack(each)
    torch.testing.assert_close(ratios, want, rtol=1e-12, atol=1e-12)
    loss = -F.logsigmoid(beta * (want - reference))[counts].sum()
    torch.testing.assert_close(preference_loss(ratios, call), loss, rtol=1e-12, atol=1e-12)
    (theirs,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grad, theirs, rtol=1e-12, atol=1e-12)
    gains = beta * (want - reference)
    assert call.preference is not None and len(call.preference.gains) == 1
    torch.testing.assert_close(call.preference.gains[0], gains, rtol=1e-12, atol=1e-12)
    assert call.terms == 2 and call.tokens_learned == (labels >= 0).sum()
