"""Continuous batching: requests come and go while the others run, and each gets what it would get
alone.

A step either reads the prompts of new requests, a chunk of each at a time, or gives every running
request its next token; the two take turns, so that a long prompt holds up nobody for longer than
one chunk. Yu et al. 2022 (Orca, OSDI); Agrawal et al. 2023 (arXiv 2308.16369). Tokens in, tokens
out: text.py makes text of them. Next: share.py, which runs the steps.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Protocol

import torch
from torch import Tensor

from megalite.core.config import ModelConfig
from megalite.core.errors import UserError
from megalite.generate.cache import Part, Step
from megalite.generate.sample import Draw, Likely, Sampling, likelihood, pick

CHUNK = 512
"""Tokens of prompts that one step reads, unless told otherwise."""
STOP, LENGTH = "stop", "length"
"""Why a request ended: by a token of its own `stop`, or by its limit."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of a model."""

    tokens: Sequence[int]
    """The prompt."""
    how: Sampling = field(default_factory=Sampling)
    max_tokens: int
    """New tokens at most; a text as long as the model's context ends before."""
    stop: frozenset[int] = frozenset()
    """Tokens that end the text and are no part of it."""
    number: int = 0
    """Which of the texts drawn with one seed this is."""
    rivals: int | None = None
    """How many of the most likely tokens are told with each new one; None: no probabilities."""
    echo: bool = False
    """With `rivals`: tell them of the prompt's tokens, too."""


@dataclass(frozen=True)
class Event:
    """What a step made of one request."""

    request: int
    """The number that `submit` gave."""
    tokens: tuple[int, ...] = ()
    """New ones."""
    likely: tuple[Likely, ...] = ()
    """Of each new token, where asked for, and of the one that ended the text."""
    echoed: tuple[Likely, ...] = ()
    """Of tokens of the prompt, from its second one on, as they are read."""
    ended: str = ""
    """STOP or LENGTH with the last event of a request."""


class Runs(Protocol):
    """What runs steps: a Share, or the Leader of many."""

    @property
    def model(self) -> ModelConfig:
        """The shape of the model."""

    @property
    def slots(self) -> int:
        """Requests that can run at once."""

    def run(self, step: Step) -> Tensor:
        """The wanted logits [w, v], part by part."""


@dataclass(eq=False)
class _Text:
    """A request that has a slot."""

    id: int
    request: Request
    slot: int
    tokens: list[int]
    read: int = 0
    """Tokens that the model has seen."""

    @property
    def made(self) -> int:
        return len(self.tokens) - len(self.request.tokens)


class Generation:
    """Runs any number of requests, at most `share.slots` at a time, in the order they came."""

    def __init__(self, share: Runs, *, chunk: int = CHUNK):
        self.share, self.chunk = share, chunk
        self._numbers = count()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._free = list(range(share.slots))
        self._reading: list[_Text] = []
        self._running: list[_Text] = []
        self._read_last = False

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._reading or self._running)

    @property
    def waiting(self) -> int:
        """Requests that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that have one."""
        return len(self._reading) + len(self._running)

    def submit(self, request: Request) -> int:
        """Take a request: its number. Raises UserError if the model cannot run it."""
        check_request(request, self.share.model)
        number = next(self._numbers)
        self._waiting.append((number, request))
        return number

    def cancel(self, number: int) -> None:
        """Forget a request; nothing if it has ended."""
        self._waiting = deque(w for w in self._waiting if w[0] != number)
        for texts in (self._reading, self._running):
            for text in [t for t in texts if t.id == number]:
                self._leave(text, texts)

    def step(self) -> list[Event]:
        """Run one step, if there is work, and tell what it made."""
        while self._waiting and self._free:
            number, request = self._waiting.popleft()
            slot = heapq.heappop(self._free)
            self._reading.append(_Text(number, request, slot, list(request.tokens)))
        self._read_last = bool(self._reading) and not (self._read_last and self._running)
        if self._read_last:
            return self._read()
        return self._go_on() if self._running else []

    def _read(self) -> list[Event]:
        """The next chunk of as many new requests as fit into one."""
        texts: list[_Text] = []
        parts: list[Part] = []
        for text in self._reading:
            # A request's chunks do not depend on what is read beside it.
            tokens = tuple(text.tokens[text.read : text.read + self.chunk])
            longest = max(len(tokens), *(len(part.tokens) for part in parts), 1)
            if parts and longest * (len(parts) + 1) > self.chunk:
                break
            all_read = text.read + len(tokens) == len(text.tokens)
            wanted = len(tokens) if _echoes(text.request) else int(all_read)
            texts.append(text)
            parts.append(Part(text.slot, text.read, tokens, wanted))
        logits = self.share.run(Step(tuple(parts))).split([part.wanted for part in parts])
        events, ready, last = [], [], []
        for text, part, found in zip(texts, parts, logits, strict=True):
            text.read += len(part.tokens)
            if _echoes(text.request):
                following = text.tokens[part.before + 1 : text.read + 1]
                asked = text.request.rivals or 0
                told = likelihood(found[: len(following)], following, asked)
                events.append(Event(text.id, echoed=tuple(told)))
            if text.read < len(text.tokens):
                continue
            if self._is_full(text):  # a prompt of the context's length, or no new token asked for
                self._leave(text, self._reading)
                events.append(Event(text.id, ended=LENGTH))
                continue
            self._reading.remove(text)
            self._running.append(text)
            ready.append(text)
            last.append(found[-1])
        return events + (self._add(ready, torch.stack(last)) if ready else [])

    def _go_on(self) -> list[Event]:
        """One token more for all that run."""
        texts = list(self._running)
        parts = [Part(t.slot, t.read, (t.tokens[-1],), 1) for t in texts]
        logits = self.share.run(Step(tuple(parts)))
        for text in texts:
            text.read += 1
        return self._add(texts, logits)

    def _add(self, texts: list[_Text], logits: Tensor) -> list[Event]:
        """Draw the next token of each text from its row of logits [b, v]."""
        tokens = pick(logits, [Draw(t.request.how, t.tokens, t.request.number) for t in texts])
        events = [self._next(*drawn) for drawn in zip(texts, logits, tokens, strict=True)]
        for text, event in zip(texts, events, strict=True):
            if event.ended:
                self._leave(text, self._running)
        return events

    def _next(self, text: _Text, logits: Tensor, token: int) -> Event:
        request = text.request
        told: list[Likely] = []
        if request.rivals is not None:
            told = likelihood(logits[None], [token], request.rivals)
        if token in request.stop:
            return Event(text.id, likely=tuple(told), ended=STOP)
        text.tokens.append(token)
        ended = LENGTH if self._is_full(text) else ""
        return Event(text.id, tokens=(token,), likely=tuple(told), ended=ended)

    def _is_full(self, text: _Text) -> bool:
        longest = self.share.model.seq_len
        return text.made >= text.request.max_tokens or len(text.tokens) >= longest

    def _leave(self, text: _Text, texts: list[_Text]) -> None:
        texts.remove(text)
        heapq.heappush(self._free, text.slot)


def _echoes(request: Request) -> bool:
    return request.echo and request.rivals is not None


def check_request(request: Request, model: ModelConfig) -> None:
    """Raises UserError for a prompt that is empty, too long or of other tokens."""
    tokens, longest, known = request.tokens, model.seq_len, model.vocab_size
    if not tokens:
        raise UserError("the prompt is empty (give at least one token)")
    if len(tokens) > longest:
        raise UserError(
            f"the prompt has {len(tokens)} tokens, and the model's context is {longest}"
        )
    wrong = next((t for t in tokens if not 0 <= t < known), None)
    if wrong is not None:
        raise UserError(f"token {wrong} of the prompt is not in the vocabulary (0 to {known - 1})")
    if request.how.top_k > known:
        raise UserError(f"--top-k {request.how.top_k}: the model knows {known} tokens")


def complete(share: Runs, requests: Sequence[Request]) -> list[list[int]]:
    """The new tokens of each request, when all have ended."""
    generation = Generation(share)
    place = {generation.submit(request): i for i, request in enumerate(requests)}
    made: list[list[int]] = [[] for _ in requests]
    while generation.has_work:
        for event in generation.step():
            made[place[event.request]] += event.tokens
    return made
