"""A model that answers, in this process or on ranks of its own: tokens as they come, as text.

Next: generate.py and chat.py, which print it; server.py, which has ranks of its own always.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megalite.core.errors import RunError, UserError
from megalite.core.precision import dtype_of
from megalite.data.tokenizer import Tokenizer
from megalite.generate.engine import Generation, Request
from megalite.generate.load import Place, Saved, check_layout, load_share, open_checkpoint
from megalite.generate.remote import FOR_EVER, Remote, Serving
from megalite.generate.sample import Sampling
from megalite.generate.text import TextStream
from megalite.serve.talk_args import Drawing, Placing
from megalite.train.ranks import Ranks, last_words

GRACE = 1.0
"""Seconds that the ranks of a model outlive one that failed."""


@dataclass(frozen=True)
class Model:
    """A checkpoint that generates."""

    saved: Saved
    tokenizer: Tokenizer
    generation: Generation | Remote

    def texts(
        self, tokens: Sequence[int], how: Drawing, *, end: int, count: int = 1
    ) -> Iterator[tuple[int, str]]:
        """`count` texts after `tokens`, each up to token `end`: pieces, with the number of theirs.

        Closing it ends the requests.
        """
        texts = {}
        for number in range(count):
            request = Request(
                tokens=tokens,
                how=sampling(how),
                max_tokens=how.max_tokens,
                stop=frozenset([end]),
                number=number,
            )
            text = TextStream(self.tokenizer, [how.stop] if how.stop else [])
            texts[self.generation.submit(request)] = number, text
        try:
            while self.generation.has_work:
                for event in self.generation.step():
                    number, text = texts[event.request]
                    yield number, text.add(event.tokens)
                    if event.ended:
                        yield number, text.finish()
                    elif text.stopped:
                        self.generation.cancel(event.request)
        finally:
            for mine in texts:
                self.generation.cancel(mine)


def sampling(how: Drawing) -> Sampling:
    """What the engine needs of it."""
    return Sampling(
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        min_p=how.min_p,
        repetition_penalty=how.repetition_penalty,
        seed=how.seed,
    )


def find(path: Path, where: Placing, *, slots: int) -> tuple[Saved, Serving]:
    """The checkpoint of a run directory or step directory, and how its ranks are to be.

    Raises UserError if it cannot run there.
    """
    saved = open_checkpoint(path)
    check_layout(saved.model, tp=where.tp, pp=where.pp)
    device = pick_device(where)
    serving = Serving(
        tp=where.tp, pp=where.pp, device=device, precision=where.precision, slots=slots
    )
    return saved, serving


@contextmanager
def opened(path: Path, where: Placing, *, slots: int) -> Iterator[Model]:
    """The model of a run directory or step directory, ready to answer."""
    saved, how = find(path, where, slots=slots)
    tokenizer = saved.tokenizer()
    if where.tp * where.pp == 1:
        at = torch.device(how.device)
        place = Place(slots=slots, dtype=dtype_of(where.precision, at), device=at)
        yield Model(saved, tokenizer, Generation(load_share(saved, place)))
        return
    with remote(saved, how) as ranks:
        yield Model(saved, tokenizer, ranks)


@contextmanager
def remote(saved: Saved, how: Serving) -> Iterator[Remote]:
    """The model on ranks of its own, which end with this context."""
    with Ranks(how.device) as ranks:

        def start(target: str, world: int, kwargs: dict[str, Any]) -> None:
            try:
                ranks.run(target, world, kwargs=kwargs, timeout=FOR_EVER, grace=GRACE)
            except RunError as error:
                raise RunError(last_words(str(error))) from None

        made = Remote(saved.directory, saved.model, how, start)
        try:
            yield made
        finally:
            made.close()


def pick_device(where: Placing) -> str:
    """`cpu` or `cuda`. Raises UserError where --device cuda cannot be had."""
    gpus = torch.cuda.device_count() if where.device != "cpu" and torch.cuda.is_available() else 0
    if where.device == "cuda" and gpus == 0:
        raise UserError("--device cuda: no GPU is visible to torch (use --device cpu)")
    return "cuda" if gpus else "cpu"
