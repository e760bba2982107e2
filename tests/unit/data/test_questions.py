"""The default conversations: one answer a question, each way of asking on one side."""

from __future__ import annotations

import ast
import json
from collections import Counter

import pytest

from megalite import __main__ as front
from megalite.data import questions
from megalite.data.chat import conversation_of, read_conversations
from megalite.data.questions import (
    WAYS,
    every_question,
    first_sentence,
    mine_functions,
    split_by_module,
    split_by_way,
)


@pytest.fixture(scope="module")
def asked():
    return list(every_question())


def talks(entries):
    return [conversation_of(entry, "x:1") for entry in entries]


def test_every_kind_is_asked_about(asked):
    counts = Counter(question.kind for question in asked)
    assert set(counts) == set(WAYS) and len(asked) >= 200
    assert counts["builtin"] > 40 and counts["exception"] > 40


def test_each_wording_has_one_answer(asked):
    answers = {}
    for question, answer in (
        (talk[0].content, talk[1].content) for side in split_by_way(asked) for talk in talks(side)
    ):
        assert answers.setdefault(question, answer) == answer


def test_one_way_of_each_question_is_held_out_and_every_way_is_learned_from(asked):
    train, valid = (talks(side) for side in split_by_way(asked))
    assert len(valid) == len(asked)
    assert not {t[0].content for t in train} & {t[0].content for t in valid}
    # What is held out is asked in another way.
    assert {t[1].content for t in valid} <= {t[1].content for t in train}
    for kind, ways in WAYS.items():
        if kind != "self":
            some = next(q for q in asked if q.kind == kind)
            for way in ways:
                start = way.split("{0}")[0]
                assert any(t[0].content.startswith(start) for t in train), (some, way)


def test_first_sentence_is_one_or_none():
    assert first_sentence("Return all of it.  Or not.\n\nMore.") == "Return all of it."
    assert first_sentence('f(x) -> int\n\nReturn the "best" of x.') == "Return the best of x."
    assert first_sentence("no sentence here") is None
    assert first_sentence("f(x) -> something that is long enough.") is None
    assert first_sentence("A" * 200 + ".") is None


MODULE = '''
def add(a, b):
    """Return the sum of two numbers, whatever they are."""
    total = a + b
    return total


def stub(a):
    """Return what a subclass makes of the argument."""
    raise NotImplementedError("a subclass says what")


def bare(a):
    total = a + a
    return total
'''


def test_functions_are_mined_with_their_docstring_as_the_task(tmp_path):
    (tmp_path / "m.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "same.py").write_text(MODULE)
    (found,) = mine_functions(tmp_path)
    assert found[0] == "m.py"
    expected = "Write the Python function add(a, b): Return the sum of two numbers, whatever they"
    assert found[1].startswith(expected)
    assert ast.dump(ast.parse(found[2])) == ast.dump(
        ast.parse("def add(a, b):\n    total = a + b\n    return total")
    )


def test_functions_are_split_by_module():
    mined = [(f"m{i % 7}.py", f"task {i}", f"code {i}") for i in range(70)]
    module_of = {code: module for module, _, code in mined}
    train, valid = split_by_module(mined, 1000)
    sides = [{module_of[talk[1].content] for talk in talks(side)} for side in (train, valid)]
    assert len(train) + len(valid) == 70 and valid and not sides[0] & sides[1]
    fewer, _ = split_by_module(mined, 5)
    assert fewer == train[:5]
    assert split_by_module([], 5) == ([], [])


def test_command_writes_what_sft_reads(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    source = tmp_path / "lib"
    source.mkdir()
    (source / "m.py").write_text(MODULE)
    out = tmp_path / "out"
    assert front.main(["conversations", "--out", str(out), "--stdlib", str(source)]) == 0
    counts = json.loads((out / "conversations.json").read_text())["conversations"]
    said = capsys.readouterr().out
    assert f"{counts['valid']} held out, " in said
    assert len(read_conversations(out / "valid.jsonl")) == counts["valid"]
    assert len(read_conversations(out / "train.jsonl")) == counts["train"]
    # One module alone: it is held out.
    assert counts["valid-functions"] == 1
    assert front.main(["conversations", "--out", "", "--stdlib", str(source)]) == 2


def test_a_python_without_its_language_reference_still_asks(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(questions.importlib, "import_module", missing)
    kinds = {question.kind for question in every_question()}
    assert kinds == set(WAYS) - {"statement"}
