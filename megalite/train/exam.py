"""What a model in training answers to held-out questions, at whatever layout the run has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megalite.core import comm
from megalite.data.chat import Conversation, Template
from megalite.generate.engine import generate
from megalite.generate.sample import Sampling
from megalite.train.build import Engine
from megalite.train.evaluate import pipeline_logits

AT_ONCE = 64
"""Questions that one data rank answers together."""


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


class Exam:
    """Held-out conversations, in the order in which they are asked."""

    def __init__(self, conversations: Sequence[Conversation], template: Template, *, seq_len: int):
        self.template = template
        self.asked = []
        for conversation in conversations:
            last = max(i for i, m in enumerate(conversation) if m.role == "assistant")
            prompt = template.prompt(conversation[:last])
            expected = conversation[last].content
            room = len(template.tokenizer.encode(expected.strip())) + 1
            # What the model cannot see whole, it cannot answer.
            if len(prompt) + room <= seq_len:
                self.asked.append((prompt, room, conversation[last - 1].content, expected))

    def take(self, engine: Engine, count: int) -> tuple[int, list[Answered]]:
        """How many of the first `count` are answered word for word, and this rank's answers.

        Greedily. All ranks call it together; each data rank answers its share.
        """
        dp, tokenizer = engine.mesh.axis("dp"), self.template.tokenizer
        answers = []
        for first in range(0, min(count, len(self.asked)), AT_ONCE * dp.size):
            batch = self.asked[first : min(count, first + AT_ONCE * dp.size)]
            mine = batch[dp.idx :: dp.size]
            # A longer answer is wrong whatever else it says.
            longest = max(room for _, room, _, _ in batch)
            made = generate(
                pipeline_logits(engine),
                [prompt for prompt, _, _, _ in mine],
                Sampling(temperature=0),
                max_tokens=longest,
                seq_len=engine.config.model.seq_len,
                stop=self.template.end,
                device=engine.device,
                any_running=lambda running: comm.any_true(running, dp),
            )
            for (_, _, question, expected), ids in zip(mine, made, strict=True):
                ended = len(ids) < longest  # the end was among them, and is left out
                answers.append(Answered(question, expected, tokenizer.decode(ids), ended))
        right = torch.tensor([sum(a.is_right for a in answers)], dtype=torch.float64)
        total = comm.all_reduce(right.to(engine.device), dp)
        return int(total.item()), answers
