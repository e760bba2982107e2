"""The distribution that the next token is drawn from, and the drawing."""

import math

import pytest
import torch

from megalite.generate.sample import Sampling, pick, probabilities

INF = float("inf")
# Probabilities 0.5, 0.25, 0.125, 0.125 at temperature 1, out of order.
P = torch.tensor([[0.125, 0.5, 0.125, 0.25]])
LOGITS = P.log()


def shares(logits=LOGITS, **how):
    return probabilities(logits, Sampling(temperature=how.pop("temperature", 1.0), **how))[0]


def test_temperature_one_is_the_softmax():
    assert torch.allclose(shares(), P[0].double())


def test_temperature_zero_is_the_most_likely_and_the_first_of_equals():
    assert shares(temperature=0.0).tolist() == [0, 1, 0, 0]
    assert shares(torch.tensor([[1.0, 3.0, 3.0]]), temperature=0.0).tolist() == [0, 1, 0]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    want = torch.softmax(LOGITS.double() / temperature, -1)[0]
    assert torch.allclose(shares(temperature=temperature), want)


@pytest.mark.parametrize(
    "k, want",
    [
        (1, [0, 1, 0, 0]),
        (2, [0, 2 / 3, 0, 1 / 3]),
        (3, [1 / 7, 4 / 7, 0, 2 / 7]),  # of the two equal ones the first
        (4, [0.125, 0.5, 0.125, 0.25]),
        (9, [0.125, 0.5, 0.125, 0.25]),
    ],
)
def test_top_k_keeps_the_k_most_likely(k, want):
    assert shares(top_k=k).tolist() == pytest.approx(want)


@pytest.mark.parametrize(
    "p, want",
    [
        (0.01, [0, 1, 0, 0]),
        (0.5, [0, 1, 0, 0]),
        (0.51, [0, 2 / 3, 0, 1 / 3]),
        (0.75, [0, 2 / 3, 0, 1 / 3]),
        (0.76, [1 / 7, 4 / 7, 0, 2 / 7]),
        (1.0, [0.125, 0.5, 0.125, 0.25]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_p(p, want):
    exact = torch.tensor([[0.125, 0.5, 0.125, 0.25]], dtype=torch.float64).log()
    assert shares(exact, top_p=p).tolist() == pytest.approx(want)


def test_top_k_and_top_p_hold_together():
    assert shares(top_k=2, top_p=0.4).tolist() == [0, 1, 0, 0]
    assert shares(top_k=1, top_p=0.9).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-9, 0.7, 1e9])
@pytest.mark.parametrize("how", [{}, {"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.9}])
def test_shares_sum_to_one_and_masked_tokens_have_none(temperature, how):
    logits = torch.tensor([[-INF, 300.0, -INF, 299.0, -300.0], [0.0, -INF, -INF, -INF, -INF]])
    found = probabilities(logits, Sampling(temperature=temperature, **how))
    assert torch.isfinite(found).all() and (found >= 0).all()
    assert found.sum(-1).tolist() == pytest.approx([1, 1])
    assert (found[logits == -INF] == 0).all()


def draw(how, requests, positions, logits=LOGITS):
    rows = logits.expand(len(requests), -1)
    asked = {"requests": torch.tensor(requests), "position": torch.tensor(positions)}
    return pick(rows, how, **asked).tolist()


def test_draw_depends_on_seed_request_and_position_alone():
    how = Sampling(temperature=1.0, seed=3)
    requests, positions = [r for r in range(8) for _ in range(8)], list(range(8)) * 8
    together = draw(how, requests, positions)
    alone = [draw(how, [r], [p])[0] for r, p in zip(requests, positions, strict=True)]
    assert together == alone
    assert draw(how, requests[::-1], positions[::-1]) == together[::-1]
    assert draw(Sampling(temperature=1.0, seed=4), requests, positions) != together
    by_request = [together[i : i + 8] for i in range(0, 64, 8)]
    assert len(set(map(tuple, by_request))) > 4
    assert len(set(zip(*by_request, strict=True))) > 4


@pytest.mark.parametrize("how", [{}, {"temperature": 0.6}, {"top_k": 3}, {"top_p": 0.8}])
def test_frequencies_match_the_distribution(how):
    draws = 20_000
    logits = torch.linspace(-2, 1, 7)[None]
    sampling = Sampling(**{"temperature": 1.0, "seed": 11, **how})
    want = probabilities(logits, sampling)[0] * draws
    found = torch.bincount(
        torch.tensor(draw(sampling, [0] * draws, list(range(draws)), logits)), minlength=7
    )
    assert found[want == 0].sum() == 0
    kept = want > 0
    chi_squared = ((found - want)[kept] ** 2 / want[kept]).sum().item()
    freedom = int(kept.sum()) - 1
    # Wilson and Hilferty's bound, 4 standard deviations out: the seed is fixed, so this never
    # flickers.
    bound = freedom * (1 - 2 / (9 * freedom) + 4 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_squared < bound
