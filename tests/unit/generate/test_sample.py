"""The distribution that the next token is drawn from, and the drawing."""

import math

import pytest
import torch

from megalite.generate.sample import Draw, Sampling, likelihood, pick, probabilities

INF = float("inf")
# Probabilities 0.5, 0.25, 0.125, 0.125 at temperature 1, out of order.
P = torch.tensor([0.125, 0.5, 0.125, 0.25])
LOGITS = P.log()


def shares(logits=LOGITS, text=(), **how):
    return probabilities(logits, Sampling(temperature=how.pop("temperature", 1.0), **how), text)


def test_temperature_one_is_the_softmax():
    assert torch.allclose(shares(), P.double())


def test_temperature_zero_is_the_most_likely_and_the_first_of_equals():
    assert shares(temperature=0.0).tolist() == [0, 1, 0, 0]
    assert shares(torch.tensor([1.0, 3.0, 3.0]), temperature=0.0).tolist() == [0, 1, 0]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    want = torch.softmax(LOGITS.double() / temperature, -1)
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
    exact = torch.tensor([0.125, 0.5, 0.125, 0.25], dtype=torch.float64).log()
    assert shares(exact, top_p=p).tolist() == pytest.approx(want)


def test_top_k_and_top_p_hold_together():
    assert shares(top_k=2, top_p=0.4).tolist() == [0, 1, 0, 0]
    assert shares(top_k=1, top_p=0.9).tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-9, 0.7, 1e9])
@pytest.mark.parametrize("how", [{}, {"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.9}])
def test_shares_sum_to_one_and_masked_tokens_have_none(temperature, how):
    for row in ([-INF, 300.0, -INF, 299.0, -300.0], [0.0, -INF, -INF, -INF, -INF]):
        logits = torch.tensor(row)
        found = shares(logits, temperature=temperature, **how)
        assert torch.isfinite(found).all() and (found >= 0).all()
        assert found.sum().item() == pytest.approx(1)
        assert (found[logits == -INF] == 0).all()


def test_min_p_keeps_what_is_likely_beside_the_most_likely():
    assert shares(min_p=0.49).tolist() == pytest.approx([0, 2 / 3, 0, 1 / 3])
    assert shares(min_p=0.51).tolist() == [0, 1, 0, 0]
    assert shares(min_p=1.0).tolist() == [0, 1, 0, 0]


def test_repetition_penalty_divides_logits_above_0_and_multiplies_those_below():
    logits = torch.tensor([2.0, -1.0, 2.0, -1.0])
    want = torch.softmax(torch.tensor([1.0, -2.0, 2.0, -1.0], dtype=torch.float64), -1)
    assert torch.allclose(shares(logits, text=[0, 1, 0], repetition_penalty=2.0), want)
    # The most likely token is the most likely after the penalty.
    how = Sampling(temperature=0.0, repetition_penalty=2.0)
    assert pick(logits[None], [Draw(how, [0, 1])]) == [2]


@pytest.mark.parametrize("how", [{"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.05}, {"top_p": 0.999}])
def test_candidates_lose_nothing_of_a_full_sort(how):
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(2)).double() * 3
    p = torch.softmax(logits, -1)
    ranked, order = p.sort(descending=True, stable=True)
    keep = (ranked.cumsum(-1) - ranked < how.get("top_p", 1.0)) & (
        ranked >= how.get("min_p", 0.0) * ranked[0]
    )
    keep[how.get("top_k", len(p)) :] = False
    want = torch.zeros_like(p).scatter(0, order, ranked * keep / (ranked * keep).sum())
    assert ((shares(logits, **how) - want).abs() <= 1e-12).all()


def test_likelihood_is_the_softmax_at_temperature_one():
    (told,) = likelihood(LOGITS[None], [3], 2)
    assert told.token == 3 and told.logprob == pytest.approx(math.log(0.25))
    assert [i for i, _ in told.rivals] == [1, 3]
    assert [p for _, p in told.rivals] == pytest.approx([math.log(0.5), math.log(0.25)])
    assert likelihood(LOGITS[None], [0], 99)[0].rivals[-1][1] == pytest.approx(math.log(0.125))


def draw(how, requests, positions, logits=LOGITS):
    asked = zip(requests, positions, strict=True)
    draws = [Draw(how, [0] * place, number) for number, place in asked]
    return pick(logits.expand(len(draws), -1), draws)


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
    draws = 4_000
    logits = torch.linspace(-2, 1, 7)
    sampling = Sampling(**{"temperature": 1.0, "seed": 11, **how})
    want = probabilities(logits, sampling) * draws
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
