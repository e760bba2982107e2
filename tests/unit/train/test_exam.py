"""Answers are graded word for word, each by what the model says after its own question."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

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


@pytest.fixture
def says(template, monkeypatch):
    """Puts a model in place that answers as the given function of the question's number does."""

    def put(answer_of):
        lines = {}
        for i in range(COUNT):
            prompt = template.prompt(talk(i)[:-1])
            lines[tuple(prompt)] = [*template.tokenizer.encode(answer_of(i)), template.end]

        def next_logits(tokens, last):
            logits = torch.zeros(tokens.shape[1], template.tokenizer.vocab_size)
            for b, at in enumerate(last.tolist()):
                ids = tokens[: at + 1, b].tolist()
                prompt = next(p for p in lines if list(p) == ids[: len(p)])
                logits[b, lines[prompt][len(ids) - len(prompt)]] = 1.0
            return logits

        monkeypatch.setattr(module, "pipeline_logits", lambda engine: next_logits)

    return put


@pytest.fixture
def engine():
    config = SimpleNamespace(model=SimpleNamespace(seq_len=256))
    return SimpleNamespace(mesh=Mesh({"dp": 1}), config=config, device=torch.device("cpu"))


def test_right_answers_are_counted(template, says, engine):
    exam = Exam([talk(i) for i in range(COUNT)], template, seq_len=256)
    says(lambda i: f"number {i}" if i % 3 else f"number {i} or so")
    right, answers = exam.take(engine, COUNT)
    assert right == sum(i % 3 > 0 for i in range(COUNT)) and len(answers) == COUNT
    assert [a.is_right for a in answers] == [i % 3 > 0 for i in range(COUNT)]
    assert answers[1].question == "say 1" and answers[1].given == "number 1"
    # An answer is cut where a right one would have ended.
    assert answers[0].given.startswith("number 0")
    few, answers = exam.take(engine, 5)
    assert few == 3 and len(answers) == 5


def test_question_that_the_model_cannot_see_whole_is_not_asked(template):
    talks = [talk(0), (Message("user", "x " * 300), Message("assistant", "y"))]
    assert len(Exam(talks, template, seq_len=256).asked) == 1
