"""From logits to the next token: what may be drawn, and a random number that has a name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megalite.core import rng

# b requests, v vocabulary


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; core/check.py has the range of each number.

    The logits of repeated tokens are lowered, and all are divided by the temperature; of what the
    softmax makes of them the k most likely tokens stay, of these the nucleus, of these what is
    likely enough beside the most likely.
    """

    temperature: float = 0.8
    """Spread of the choice; 0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens (0: all)."""
    top_p: float = 1.0
    """Only the most likely tokens that together reach this probability (Holtzman et al. 2019, arXiv
    1904.09751)."""
    min_p: float = 0.0
    """Only tokens at least this likely, as a share of the most likely one (Nguyen et al. 2024,
    arXiv 2407.01082)."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0 of tokens that were there before, and multiplies those below
    (Keskar et al. 2019, arXiv 1909.05858)."""
    seed: int = 1234


@dataclass(frozen=True, eq=False)
class Draw:
    """The next token of one request: how it is drawn, and what names its random number."""

    how: Sampling
    text: Sequence[int]
    """Its tokens so far: there are as many as the place of the next one."""
    number: int = 0
    """Which of the texts that are drawn with this seed it belongs to."""


def pick(logits: Tensor, draws: Sequence[Draw]) -> list[int]:
    """The next token of each request: a function of its row of logits [b, v] and its Draw alone.

    So a request draws the same tokens whatever else is in its batch.
    """
    plain = [d.how.temperature == 0 and d.how.repetition_penalty == 1 for d in draws]
    likeliest = _likeliest(logits) if any(plain) else []
    rows = zip(logits, draws, plain, strict=True)
    return [likeliest[i] if p else drawn(row, draw) for i, (row, draw, p) in enumerate(rows)]


def _likeliest(logits: Tensor) -> list[int]:
    """The most likely token by each row of logits [b, v], the first of those that tie."""
    if logits.device.type == "cpu" and logits.dtype == torch.float32:
        return logits.numpy().argmax(-1).tolist()  # a sixth of the time that torch takes
    return logits.argmax(-1).tolist()


def drawn(logits: Tensor, draw: Draw) -> int:
    """A token from the distribution of [v] logits, by the one random number that is `draw`'s."""
    total = probabilities(logits, draw.how, draw.text).cumsum(-1)
    key = rng.key(draw.how.seed, "sample")
    named = torch.tensor([draw.number, len(draw.text)], device=logits.device)
    chance = rng.uniform(rng.rows(key, named[0], named[1])) * total[-1]
    found = torch.searchsorted(total, chance, right=True)
    return min(int(found), len(logits) - 1)


def probabilities(logits: Tensor, how: Sampling, text: Sequence[int] = ()) -> Tensor:
    """[v] logits after `text` to the float64 distribution [v] that is drawn from.

    Of equally likely tokens those with the smaller ids come first.
    """
    wide = logits.double()
    if how.repetition_penalty != 1 and text:
        seen = torch.tensor(sorted(set(text)), device=wide.device)
        old, factor = wide[seen], how.repetition_penalty
        wide = wide.index_put((seen,), torch.where(old > 0, old / factor, old * factor))
    if how.temperature == 0:
        return torch.nn.functional.one_hot(wide.argmax(-1), wide.shape[-1]).double()
    # The largest becomes 0 first: a temperature near 0 must not make infinities of it.
    p = torch.softmax((wide - wide.max()) / how.temperature, dim=-1)
    if how.top_k == 0 and how.top_p == 1 and how.min_p == 0:
        return p
    ids = (p >= _least(p, how)).nonzero().squeeze(-1)
    ranked, order = p[ids].sort(descending=True, stable=True)
    ranked = ranked[: how.top_k or None]
    whole = ranked.sum() if how.top_k else p.sum()
    # A token stays if the ones before it have not reached top_p yet: the first always does.
    before = (ranked.cumsum(-1) - ranked) / whole
    ranked = ranked[(before < how.top_p) & (ranked >= how.min_p * ranked[0])]
    return torch.zeros_like(p).index_put((ids[order[: len(ranked)]],), ranked / ranked.sum())


def _least(p: Tensor, how: Sampling) -> Tensor:
    """A probability below which no token is kept: to sort all that are above takes less time."""
    if how.top_k > 0:
        return p.topk(min(how.top_k, len(p))).values[-1]
    # All tokens lighter than this are together lighter than what the nucleus leaves out.
    light = 0.5 * (1 - how.top_p) / len(p)
    return (how.min_p * p.max()).clamp(min=light)


@dataclass(frozen=True)
class Likely:
    """A token and what the model itself, at temperature 1, thinks of it in its place."""

    token: int
    logprob: float
    """Natural logarithm of its probability."""
    rivals: tuple[tuple[int, float], ...]
    """The most likely tokens there, the likeliest first, with theirs."""


def likelihood(logits: Tensor, tokens: Sequence[int], rivals: int) -> list[Likely]:
    """Of each token of `tokens` [b] under its row of [b, v] logits."""
    logs = torch.log_softmax(logits.double(), -1)
    own = logs.gather(-1, torch.tensor(tokens, device=logs.device)[:, None]).squeeze(-1).tolist()
    best, ids = logs.topk(min(rivals, logs.shape[-1]))
    named = zip(ids.tolist(), best.tolist(), strict=True)
    lists = [tuple(zip(i, b, strict=True)) for i, b in named]
    return [Likely(*row) for row in zip(tokens, own, lists, strict=True)]
