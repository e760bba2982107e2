"""Generation by any model that gives next-token logits, in one process or over a pipeline.

Requests of different lengths share a batch: rows are padded at their end, which causal attention
never looks at. When a request is as long as the model's context, its oldest tokens fall out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megalite.core.call import Call
from megalite.core.errors import UserError
from megalite.generate.sample import Sampling, pick
from megalite.models.gpt import GPT

# s sequence, b requests, v vocabulary

NextLogits = Callable[[Tensor, Tensor], Tensor]
"""(tokens [s, b], place of each request's last token [b]) -> logits [b, v]."""


def inference_call(tokens: Tensor) -> Call:
    """A call without labels, sequence parallelism or dropout: [s, b] tokens from position 0."""
    positions = torch.arange(tokens.shape[0], device=tokens.device)
    samples = torch.zeros(tokens.shape[1], dtype=torch.int64, device=tokens.device)
    return Call(tokens, None, positions, samples, training=False)


def logits_of(model: GPT) -> NextLogits:
    """The next-token logits of a whole model in this process."""

    @torch.no_grad()
    def next_logits(tokens: Tensor, last: Tensor) -> Tensor:
        logits = model(None, inference_call(tokens))
        return at_last(logits, last)[:, : model.cfg.vocab_size]

    return next_logits


def at_last(logits: Tensor, last: Tensor) -> Tensor:
    """[s, b, v] to each request's own row: [b, v]."""
    return logits[last, torch.arange(logits.shape[1], device=logits.device)]


def generate(
    next_logits: NextLogits,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    *,
    max_tokens: int,
    seq_len: int,
    stop: int | None = None,
    device: torch.device | None = None,
    first_request: int = 0,
    any_running: Callable[[bool], bool] = bool,
) -> list[list[int]]:
    """New tokens of each prompt, without the prompt; ends at token `stop`, which is left out.

    Where ranks have prompts of their own and a model that all of them must run together,
    `any_running` says, of whether this one has something left, whether any has. Raises UserError
    for an empty prompt.
    """
    if any(len(p) == 0 for p in prompts):
        raise UserError("the prompt is empty (give at least one token)")
    texts = [list(p) for p in prompts]
    running = list(range(len(texts)))
    for _ in range(max_tokens):
        if not any_running(bool(running)):
            break
        if not running:
            nothing = torch.zeros((1, 1), dtype=torch.int64, device=device)
            next_logits(nothing, nothing[0])
            continue
        windows = [texts[i][-seq_len:] for i in running]
        longest = max(map(len, windows))
        rows = [w + [0] * (longest - len(w)) for w in windows]
        tokens = torch.tensor(rows, dtype=torch.int64, device=device).T.contiguous()
        last = torch.tensor([len(w) - 1 for w in windows], device=device)
        requests = torch.tensor(running, device=device) + first_request
        position = torch.tensor([len(texts[i]) for i in running], device=device)
        new = pick(next_logits(tokens, last), how, requests=requests, position=position).tolist()
        for i, token in zip(running, new, strict=True):
            texts[i].append(token)
        running = [i for i in running if stop is None or texts[i][-1] != stop]
    made = [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
    return [m[:-1] if stop is not None and m and m[-1] == stop else m for m in made]
