"""From logits to the next token: temperature, top-k, top-p, and a random number that has a name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.core import rng

# b requests, v vocabulary


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; core/check.py has the range of each number."""

    temperature: float = 0.8
    """Spread of the choice; 0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens (0: all)."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability."""
    seed: int = 1234


def probabilities(logits: Tensor, how: Sampling) -> Tensor:
    """[b, v] logits to the float64 distribution that is drawn from; ties are broken by token id."""
    wide = logits.double()
    if how.temperature == 0:
        return torch.nn.functional.one_hot(wide.argmax(-1), wide.shape[-1]).double()
    # The largest becomes 0 first: a temperature near 0 must not make infinities of it.
    p = torch.softmax((wide - wide.amax(-1, keepdim=True)) / how.temperature, dim=-1)
    order = p.argsort(dim=-1, descending=True, stable=True)
    ranked = p.gather(-1, order)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if how.top_k > 0:
        keep[:, how.top_k :] = False
    # A token stays if the ones before it have not reached top_p yet: the first always does.
    keep &= ranked.cumsum(-1) - ranked < how.top_p
    ranked = ranked * keep
    return torch.zeros_like(p).scatter(-1, order, ranked / ranked.sum(-1, keepdim=True))


def pick(logits: Tensor, how: Sampling, *, requests: Tensor, position: Tensor) -> Tensor:
    """The next token [b] of each request: a function of logits, seed, request and position.

    So a request draws the same tokens whatever else is in its batch.
    """
    total = probabilities(logits, how).cumsum(-1)
    chance = rng.uniform(rng.rows(rng.key(how.seed, "sample"), requests, position))
    chance = chance * total[:, -1]
    return (
        torch.searchsorted(total, chance[:, None], right=True)
        .squeeze(-1)
        .clamp(max=logits.shape[-1] - 1)
    )
