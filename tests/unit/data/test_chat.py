"""Conversations become the tokens that ChatML says, and what the assistant says is learned."""

from __future__ import annotations

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite.core.errors import DataError
from megalite.data.chat import (
    CHAT_TEMPLATE,
    END,
    Message,
    Template,
    conversation_of,
    read_conversations,
)
from megalite.data.tokenizer import Tokenizer
from tests.unit.data.samples import jinja_template, make_tokenizer

TALK = (
    Message("system", "Be brief."),
    Message("user", " What is 2 + 2?\n"),
    Message("assistant", "\n\n4, don't you think?  "),
    Message("user", "And 3 + 3?"),
    Message("assistant", "6"),
)
TEXT = (
    "<|im_start|>system\nBe brief.<|im_end|>\n"
    "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n"
    "<|im_start|>assistant\n4, don't you think?<|im_end|>\n"
    "<|im_start|>user\nAnd 3 + 3?<|im_end|>\n"
    "<|im_start|>assistant\n6<|im_end|>\n"
)
ASKED = {"role": "user", "content": "a"}
SAID = {"role": "assistant", "content": "b"}
contents = st.text(max_size=30)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(600)


@pytest.fixture(scope="module")
def template(tokenizer):
    return Template(tokenizer)


@pytest.fixture(scope="module")
def jinja():
    return jinja_template(CHAT_TEMPLATE)


def test_tokens_spell_chatml(template, tokenizer):
    assert tokenizer.decode(template.render(TALK).ids) == TEXT


def test_what_the_assistant_says_is_learned_with_its_end(template, tokenizer):
    ids, learned = template.render(TALK)
    said = tokenizer.decode([i for i, counts in zip(ids, learned, strict=True) if counts])
    assert said == "4, don't you think?<|im_end|>6<|im_end|>"


@given(st.lists(st.tuples(st.sampled_from(("user", "assistant", "system")), contents), max_size=4))
def test_jinja_template_renders_the_same_text(template, tokenizer, jinja, talk):
    messages = [Message(role, content) for role, content in talk]
    rendered = jinja.render(messages=[m._asdict() for m in messages], add_generation_prompt=True)
    assert rendered == tokenizer.decode(template.prompt(messages))


@given(question=contents, answer=contents)
def test_prompt_is_where_training_saw_the_answer_begin(template, question, answer):
    asked = Message("user", question)
    prompt = template.prompt([asked])
    ids, learned = template.render([asked, Message("assistant", answer)])
    assert ids[: len(prompt)] == prompt
    assert not any(learned[: len(prompt)]) and learned[len(prompt)]


def test_content_that_spells_a_special_token_is_text(template):
    ids, _ = template.render([Message("user", f"{END}<|im_start|>system"), TALK[-1]])
    assert ids.count(template.end) == 2 and ids.count(template.start) == 2


def test_tokenizer_without_the_special_tokens_is_refused(tokenizer):
    vocabulary = tokenizer.vocabulary
    special = {name: idx for name, idx in vocabulary.special.items() if name != END}
    other = type(vocabulary)(vocabulary.pattern, vocabulary.tokens, vocabulary.merges, special)
    with pytest.raises(DataError, match=r"no <\|im_end\|>"):
        Template(Tokenizer(other))


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"messages": [ASKED, SAID]}, [("user", "a"), ("assistant", "b")]),
        ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"prompt": "a", "response": "b", "id": 3}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "output": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": "c", "output": "b"}, [("user", "a\nc"), ("assistant", "b")]),
        ({"instruction": "a", "input": "", "output": "b"}, [("user", "a"), ("assistant", "b")]),
    ],
)
def test_every_form_is_read(entry, expected):
    assert list(conversation_of(entry, "f:1")) == expected


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ([1], "the line is a list, expected an object"),
        ({"text": "a"}, "expected the fields messages or prompt and completion or"),
        ({"messages": "a"}, "messages is a string, expected a list"),
        ({"messages": []}, "the assistant says nothing"),
        ({"messages": [ASKED]}, "the assistant says nothing"),
        ({"messages": [SAID, ASKED]}, "the assistant speaks first"),
        ({"messages": [ASKED, 3]}, "message 2 is a number, expected an object"),
        ({"messages": [{"role": "user"}]}, 'message 1: no field "content"'),
        ({"messages": [{"role": "bot", "content": ""}]}, 'message 1: role "bot" (known: system,'),
        ({"messages": [{"role": "user", "content": 1}]}, 'field "content" is a number, expected'),
        ({"prompt": "a", "completion": None}, 'field "completion" is null, expected a string'),
    ],
)
def test_what_is_no_conversation_is_one_line(entry, words):
    with pytest.raises(DataError) as refused:
        conversation_of(entry, "f.jsonl:7")
    assert str(refused.value).startswith("f.jsonl:7: ") and words in str(refused.value)


def test_files_are_read_in_order_and_their_mistakes_have_a_line(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(3)]
    plain, zipped = tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"
    plain.write_text("\n".join(map(json.dumps, rows[:2])) + "\n\n", encoding="utf-8")
    zipped.write_bytes(gzip.compress(json.dumps(rows[2]).encode()))
    assert [talk[1].content for talk in read_conversations(tmp_path)] == ["a0", "a1", "a2"]
    plain.write_text('{"prompt": "q", "completion": "a"}\n{"prompt": 1', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON"):
        read_conversations(plain)
    plain.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="no conversation inside"):
        read_conversations(plain)
    (tmp_path / "c.txt").write_text("a")
    with pytest.raises(DataError, match=r"c\.txt: a conversation is a line of \.jsonl"):
        read_conversations(tmp_path)
