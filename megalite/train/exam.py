"""What a model in training answers to held-out questions, at whatever layout the run has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalite.core import comm
from megalite.data.chat import Conversation, Template
from megalite.generate.engine import STOP, Generation, Request
from megalite.generate.sample import Sampling
from megalite.generate.share import make_share
from megalite.train import console
from megalite.train.build import Engine
from megalite.train.evaluate import Found

AT_ONCE = 64
"""Questions that one data rank answers together."""
SHOWN_ANSWERS = 3


@dataclass(frozen=True)
class Answered:
    """One held-out conversation up to the assistant's last words, and what the model says there."""

    question: str
    expected: str
    given: str
    ended: bool
    """Whether the model said that this is all."""

    @property
    def is_right(self) -> bool:
        return self.ended and self.given.strip() == self.expected.strip()


@dataclass(frozen=True)
class Asked:
    """A held-out conversation as it is asked."""

    prompt: list[int]
    """Its tokens up to where the assistant speaks last."""
    room: int
    """Tokens of the right answer and its end: a longer one is wrong whatever else it says."""
    question: str
    expected: str


class Exam:
    """Held-out conversations, in the order in which they are asked."""

    def __init__(self, conversations: Sequence[Conversation], template: Template, *, seq_len: int):
        self.template = template
        self.asked: list[Asked] = []
        for conversation in conversations:
            last = max(i for i, m in enumerate(conversation) if m.role == "assistant")
            prompt = template.prompt(conversation[:last])
            expected = conversation[last].content
            room = len(template.tokenizer.encode(expected.strip())) + 1
            # What the model cannot see whole, it cannot answer.
            if len(prompt) + room <= seq_len:
                self.asked.append(Asked(prompt, room, conversation[last - 1].content, expected))

    def take(self, engine: Engine, *, last: bool) -> Found:
        """How many questions are answered word for word, and a few of the answers."""
        count = len(self.asked) if last else min(len(self.asked), engine.config.train.eval_samples)
        right, answers = self.ask(engine, count)
        share = right / max(1, count)
        lines = [f"  held-out exact match {share:.2f} ({right} of {count})"]
        shown = SHOWN_ANSWERS if last else 1
        for answered in answers[:: max(1, len(answers) // shown)][:shown]:
            lines += console.answered(answered.question, answered.given)
        return Found(lines, {"val_exact_match": share})

    def ask(self, engine: Engine, count: int) -> tuple[int, list[Answered]]:
        """How many of the first `count` are answered word for word, and this rank's answers.

        Greedily. All ranks call it together; each data rank answers its share.
        """
        dp, decode = engine.mesh.axis("dp"), self.template.tokenizer.decode
        share = make_share(engine.config.model, engine.stages, engine.pipeline, slots=AT_ONCE)
        generation = Generation(share)
        mine = self.asked[:count][dp.idx :: dp.size]
        asked = {generation.submit(self._request(each)): each for each in mine}
        said: dict[int, list[int]] = {number: [] for number in asked}
        ended: dict[int, str] = {}
        # A data rank that has no questions left takes part in what the others' answers need.
        while comm.any_true(generation.has_work, dp):
            if not generation.has_work:
                share.idle()
                continue
            for event in generation.step():
                said[event.request] += event.tokens
                ended[event.request] = event.ended
        answers = [
            Answered(a.question, a.expected, decode(said[number]), ended[number] == STOP)
            for number, a in asked.items()
        ]
        right = torch.tensor([sum(a.is_right for a in answers)], dtype=torch.float64)
        total = comm.all_reduce(right.to(engine.device), dp)
        return int(total.item()), answers

    def _request(self, asked: Asked) -> Request:
        return Request(
            tokens=asked.prompt,
            how=Sampling(temperature=0),
            max_tokens=asked.room,
            stop=frozenset([self.template.end]),
        )
