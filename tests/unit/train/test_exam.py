"""Answers are graded word for word, each by what the model says after its own question."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megalite.core.config import ModelConfig
from megalite.core.mesh import Mesh
from megalite.data.chat import Message, Template
from megalite.train import exam as module
from megalite.train.exam import AT_ONCE, Exam
from tests.unit.data.samples import make_tokenizer

COUNT = AT_ONCE + 9


@pytest.fixture(scope="module")
def template():
    return Template(make_tokenizer(600))


def talk(i: int) -> tuple[Message, ...]:
    return (
        Message("user", f"first {i}"),
        Message("assistant", "yes"),
        Message("user", f"say {i}"),
        Message("assistant", f" number {i}\n"),
    )


class Scripted:
    """A model whose texts are all known: it says what comes next in the one that begins so."""

    def __init__(self, texts, model, slots):
        self.texts, self.model, self.slots = texts, model, slots
        self.said = {}

    def run(self, step):
        rows = []
        for part in step.parts:
            text = [] if part.before == 0 else self.said[part.slot]
            self.said[part.slot] = text = [*text, *part.tokens]
            if part.wanted:
                whole = next(t for t in self.texts if t[: len(text)] == text)
                logits = torch.zeros(self.model.vocab_size)
                logits[whole[len(text)]] = 1.0
                rows.append(logits)
        return torch.stack(rows) if rows else torch.zeros(0, self.model.vocab_size)


@pytest.fixture
def says(template, monkeypatch):
    """Puts a model in place that answers as the given function of the question's number does."""

    def put(answer_of):
        texts = []
        for i in range(COUNT):
            answer = [*template.tokenizer.encode(answer_of(i)), template.end]
            texts.append([*template.prompt(talk(i)[:-1]), *answer])
        monkeypatch.setattr(
            module,
            "make_share",
            lambda model, stages, pipeline, slots: Scripted(texts, model, slots),
        )

    return put


@pytest.fixture
def engine(template):
    model = ModelConfig(seq_len=256, vocab_size=template.tokenizer.vocab_size)
    return SimpleNamespace(
        mesh=Mesh({"dp": 1}),
        config=SimpleNamespace(model=model),
        device=torch.device("cpu"),
        stages={},
        pipeline=None,
    )


def test_right_answers_are_counted(template, says, engine):
    exam = Exam([talk(i) for i in range(COUNT)], template, seq_len=256)
    says(lambda i: f"number {i}" if i % 3 else f"number {i} or so")
    right, answers = exam.ask(engine, COUNT)
    assert right == sum(i % 3 > 0 for i in range(COUNT)) and len(answers) == COUNT
    assert [a.is_right for a in answers] == [i % 3 > 0 for i in range(COUNT)]
    assert answers[1].question == "say 1" and answers[1].given == "number 1"
    # An answer is cut where a right one would have ended.
    assert answers[0].given.startswith("number 0")
    few, answers = exam.ask(engine, 5)
    assert few == 3 and len(answers) == 5


def test_question_that_the_model_cannot_see_whole_is_not_asked(template):
    talks = [talk(0), (Message("user", "x " * 300), Message("assistant", "y"))]
    assert len(Exam(talks, template, seq_len=256).asked) == 1
