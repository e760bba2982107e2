"""What a run is evaluated by: held-out loss, bits per byte beside gzip's, and samples, at whatever
layout it has. More of the kind: exam.py, preference.py.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megalite.core import comm
from megalite.core.call import Call
from megalite.data.loader import Loader, Windows
from megalite.data.tokenizer import Tokenizer
from megalite.generate.engine import Request, complete
from megalite.generate.sample import Sampling
from megalite.generate.share import make_share
from megalite.train import console
from megalite.train.build import Engine

GZIP_LIMIT = 4 * 2**20
"""Held-out tokens beyond these are not compressed: gzip's ratio has settled by then."""
SAMPLE_TOKENS = 40


class Found(NamedTuple):
    """What an evaluation has found."""

    lines: Sequence[str]
    """As it is said on the screen."""
    numbers: Mapping[str, float | None] = {}
    """As it is written down in metrics.jsonl."""
    text: str = ""
    """A sample of the model's text."""


class Evaluation(Protocol):
    """One way of looking at a model in training."""

    def take(self, engine: Engine, *, last: bool) -> Found:
        """Look. All ranks call it together; `last`: at all there is."""
        ...


@dataclass(frozen=True)
class HeldOut:
    """Held-out text, and what it takes to state a loss in bits per byte of it."""

    loader: Loader
    bytes_of: np.ndarray | None
    """Bytes of each token id; None without a tokenizer."""
    gzip_bits_per_byte: float | None
    """What gzip -9 makes of the same text; rank 0 alone needs it and has it."""

    def take(self, engine: Engine, *, last: bool) -> Found:
        """Its loss."""
        count = len(self.loader.source) if last else engine.config.train.eval_samples
        loss, bits = evaluate(engine, self, count)
        reference = self.gzip_bits_per_byte
        numbers = {"val_loss": loss, "val_bits_per_byte": bits, "gzip_bits_per_byte": reference}
        return Found([f"  {console.held_out(loss, bits, reference)}"], numbers)


@dataclass(frozen=True)
class Sample:
    """A text that the model goes on with."""

    tokenizer: Tokenizer

    def take(self, engine: Engine, *, last: bool) -> Found:
        """From --sample-prompt, the same random numbers each time."""
        train, room = engine.config.train, engine.config.model.seq_len
        text = sample(
            engine,
            self.tokenizer,
            train.sample_prompt,
            max_tokens=min(SAMPLE_TOKENS, room),
            seed=train.seed,
        )
        line = f"  sample: {json.dumps(text)[1:-1][: console.WIDTH - 12]}"
        return Found([line], text=text)


def held_out(loader: Loader, tokenizer: Tokenizer | None) -> HeldOut:
    """Measure the held-out windows of `loader`."""
    if tokenizer is None:
        return HeldOut(loader, None, None)
    special = set(tokenizer.special.values())
    pieces = enumerate(tokenizer.token_bytes)
    sizes = np.array([0 if i in special else len(piece) for i, piece in pieces])
    # Of what the assistant says alone, gzip's figure would be of another kind.
    if loader.mesh.rank > 0 or not isinstance(loader.source, Windows):
        return HeldOut(loader, sizes, None)
    ids = [i for i in loader.source.tokens[1:GZIP_LIMIT].tolist() if i not in special]
    text = tokenizer.decode_bytes(ids)
    return HeldOut(loader, sizes, 8 * len(gzip.compress(text, 9)) / max(1, len(text)))


def evaluate(engine: Engine, data: HeldOut, samples: int) -> tuple[float, float | None]:
    """Mean loss and bits per byte of the first `samples` windows; all ranks call it together."""
    total = torch.zeros(3, dtype=torch.float64, device=engine.device)
    for calls, losses in passes(engine, data.loader, min(samples, len(data.loader.source))):
        if engine.counts_loss:
            labels = torch.cat([c.labels.flatten() for c in calls if c.labels is not None])
            total[0] += torch.stack(losses).sum()
            total[1] += (labels >= 0).sum()
            if data.bytes_of is not None:
                total[2] += int(data.bytes_of[labels[labels >= 0].cpu().numpy()].sum())
    loss, tokens, size = comm.all_reduce(total, engine.mesh.world).tolist()
    bits = loss / (size * math.log(2)) if size else None
    return loss / max(1.0, tokens), bits


def passes(
    engine: Engine, loader: Loader, samples: int
) -> Iterator[tuple[list[Call], list[Tensor]]]:
    """What the last stage makes of the first `samples` samples, a batch at a time, with the calls.

    All ranks call it together.
    """
    at_once = loader.micro_batch_size * loader.num_microbatches * engine.mesh.axis("dp").size
    for first in range(0, samples, at_once):
        calls = loader.ordered(first, min(at_once, samples - first))
        yield calls, engine.pipeline.evaluate(calls)


def sample(engine: Engine, tokenizer: Tokenizer, prompt: str, *, max_tokens: int, seed: int) -> str:
    """A text that goes on from `prompt`; all ranks call it together and get the same."""
    model = engine.config.model
    ids = tokenizer.encode(prompt)[-model.seq_len :]
    share = make_share(model, engine.stages, engine.pipeline, slots=1)
    how = Sampling(temperature=0.8, seed=seed)
    stop = frozenset([tokenizer.eod])
    request = Request(tokens=ids, how=how, max_tokens=max_tokens, stop=stop)
    return tokenizer.decode([*ids, *complete(share, [request])[0]])
