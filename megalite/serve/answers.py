"""From what a client asks to what the engine runs, and back: answers as they grow, and when whole.

Next: protocol.py for the words of both, desk.py for what runs them, server.py for who calls this.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import Request

from megalite.core.config import run_directory
from megalite.core.errors import UserError
from megalite.data.chat import END, START
from megalite.data.tokenizer import Tokenizer
from megalite.generate import engine
from megalite.generate.load import Saved
from megalite.generate.sample import Likely
from megalite.generate.text import TextStream
from megalite.serve import protocol
from megalite.serve.desk import Desk
from megalite.serve.protocol import ChatAsked, TextAsked, Wrong


@dataclass(eq=False)
class Served:
    """A model as clients see it."""

    saved: Saved
    tokenizer: Tokenizer
    desk: Desk
    seconds: float
    began: float = field(default_factory=time.time)
    tokens: Counter[str] = field(default_factory=Counter)
    """Read and made."""

    @property
    def name(self) -> str:
        return run_directory(self.saved.directory).resolve().name

    @property
    def context(self) -> int:
        return self.saved.model.seq_len

    @property
    def chats(self) -> bool:
        """Whether its tokenizer knows conversations."""
        return {START, END} <= self.tokenizer.special.keys()


# -- answers -----------------------------------------------------------------------------------


@dataclass(eq=False)
class Choice:
    """One answer as it grows."""

    index: int
    prompt: Sequence[int]
    text: TextStream
    said: str = ""
    told: list[Likely] = field(default_factory=list)
    echoed: list[Likely] = field(default_factory=list)
    made: int = 0
    reason: str = engine.LENGTH
    ended: bool = False


@dataclass(frozen=True)
class Piece:
    """What was added to a choice."""

    choice: Choice
    text: str
    told: Sequence[Likely]
    ended: bool


async def pieces(
    served: Served, requests: list[engine.Request], asked: protocol.Asked, http: Request
) -> AsyncIterator[Piece]:
    """The answers to `requests` as they grow."""
    choices = [
        Choice(i, request.tokens, TextStream(served.tokenizer, asked.stops))
        for i, request in enumerate(requests)
    ]
    served.tokens["read"] += sum(len(request.tokens) for request in requests)
    running = served.desk.run(requests, seconds=served.seconds, gone=partial(_gone, http))
    try:
        async for place, event in running:
            choice = choices[place]
            if choice.ended:
                continue
            choice.echoed += event.echoed
            choice.made += len(event.tokens)
            served.tokens["made"] += len(event.tokens)
            text = choice.text.add(event.tokens)
            choice.ended = bool(event.ended) or choice.text.stopped
            if choice.ended:
                text += choice.text.finish()
                choice.reason = engine.STOP if choice.text.stopped else event.ended
            choice.said += text
            choice.told += event.likely
            # Not of the token that ended it.
            yield Piece(choice, text, event.likely[: len(event.tokens)], choice.ended)
            if all(each.ended for each in choices):
                return
        for choice in choices:  # whose time is up
            if not choice.ended:
                choice.ended = True
                yield Piece(choice, choice.text.finish(), (), True)
    finally:
        await running.aclose()  # type: ignore[attr-defined]


async def _gone(http: Request) -> None:
    """Until the client has left. Its body has been read, so nothing else can come."""
    while (await http.receive())["type"] != "http.disconnect":
        pass


def requests_of(
    served: Served, asked: protocol.Asked, prompts: list[list[int]], most: int | None, **how: Any
) -> list[engine.Request]:
    """What is asked of the engine: each prompt, as often as asked. Raises Wrong."""
    if asked.model is not None and asked.model != served.name:
        text = f"model {asked.model!r} is not here (this is {served.name!r})"
        raise Wrong(404, text, code="model_not_found", param="model")
    found = []
    for prompt in prompts:
        left = served.context - len(prompt)
        if most is not None and most > left:
            raise Wrong(
                400,
                f"prompt {len(prompt)} + max_tokens {most} > context {served.context}",
                code="context_length_exceeded",
                param="max_tokens",
            )
        if left < 0 or (left == 0 and most is None):
            raise Wrong(
                400,
                f"the prompt has {len(prompt)} tokens, and the model's context is {served.context}",
                code="context_length_exceeded",
            )
        sampling = asked.sampling()
        for number in range(asked.copies):
            request = engine.Request(
                tokens=prompt,
                how=sampling,
                max_tokens=left if most is None else most,
                number=number,
                **how,
            )
            try:
                engine.check_request(request, served.saved.model)
            except UserError as error:
                raise Wrong(400, str(error)) from None
            found.append(request)
    return found


def usage(choices: Sequence[Choice], copies: int) -> dict[str, int]:
    """Tokens read and made."""
    read = sum(len(choice.prompt) for choice in choices[::copies])
    made = sum(choice.made for choice in choices)
    return {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}


class Shape(ABC):
    """How one kind of completion is told: whole, and in the parts of a stream."""

    kind: str
    chunk: str

    def __init__(self, served: Served, asked: Any, prefix: str):
        self.served, self.asked = served, asked
        self.head = {
            "id": f"{prefix}-{time.time_ns():x}",
            "created": int(time.time()),
            "model": served.name,
        }

    @abstractmethod
    def whole(self, choice: Choice) -> dict[str, Any]:
        """A choice that has ended."""

    @abstractmethod
    def opening(self, index: int) -> dict[str, Any]:
        """A choice of a stream before it says anything."""

    @abstractmethod
    def part(self, piece: Piece) -> dict[str, Any]:
        """A choice of a stream, with what was added."""

    def closing(self, choice: Choice) -> dict[str, Any]:
        """A choice of a stream that has ended."""
        return {**self.opening(choice.index), "finish_reason": choice.reason}


class ChatShape(Shape):
    """/v1/chat/completions."""

    kind, chunk = "chat.completion", "chat.completion.chunk"

    def __init__(self, served: Served, asked: ChatAsked):
        super().__init__(served, asked, "chatcmpl")

    def whole(self, choice: Choice) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.said},
            "logprobs": self._logprobs(choice.told[: choice.made]),
            "finish_reason": choice.reason,
        }

    def opening(self, index: int) -> dict[str, Any]:
        return self._delta(index, {"role": "assistant", "content": ""}, None)

    def part(self, piece: Piece) -> dict[str, Any]:
        told = self._logprobs(piece.told)
        return self._delta(piece.choice.index, {"content": piece.text}, told)

    def closing(self, choice: Choice) -> dict[str, Any]:
        return {**self._delta(choice.index, {}, None), "finish_reason": choice.reason}

    def _delta(self, index: int, delta: dict[str, str], logprobs: Any) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}

    def _logprobs(self, told: Sequence[Likely]) -> dict[str, Any] | None:
        if not self.asked.logprobs:
            return None
        return {"content": [protocol.chat_logprob(self.served.tokenizer, each) for each in told]}


class TextShape(Shape):
    """/v1/completions."""

    kind = chunk = "text_completion"

    def __init__(self, served: Served, asked: TextAsked):
        super().__init__(served, asked, "cmpl")

    def whole(self, choice: Choice) -> dict[str, Any]:
        decode, echo = self.served.tokenizer.decode, self.asked.echo
        told = [*choice.echoed, *choice.told]
        return {
            "index": choice.index,
            "text": decode(choice.prompt) + choice.said if echo else choice.said,
            "logprobs": self._logprobs(choice.prompt[0] if echo else None, told, 0),
            "finish_reason": choice.reason,
        }

    def opening(self, index: int) -> dict[str, Any]:
        return {"index": index, "text": "", "logprobs": None, "finish_reason": None}

    def part(self, piece: Piece) -> dict[str, Any]:
        before = len(piece.choice.said) - len(piece.text)
        told = self._logprobs(None, piece.told, before)
        return {**self.opening(piece.choice.index), "text": piece.text, "logprobs": told}

    def _logprobs(
        self, first: int | None, told: Sequence[Likely], offset: int
    ) -> dict[str, Any] | None:
        if self.asked.logprobs is None:
            return None
        return protocol.text_logprobs(self.served.tokenizer, first, told, offset)
