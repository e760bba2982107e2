"""Pairs of answers: which lines are read, what is learned of them, and how they become windows."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.core.errors import DataError
from megalite.data.chat import Message, Rendered, Template
from megalite.data.preferences import Pairs, read_preferences, render_pair
from tests.unit.data.samples import make_tokenizer

ASKED = {"role": "user", "content": "why"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("so", "no"))
FORMS = [
    {"prompt": "why", "chosen": "so", "rejected": "no"},
    {"prompt": [ASKED], "chosen": [GOOD], "rejected": [BAD]},
    {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    {"prompt": "why", "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    {"prompt": [ASKED], "chosen": "so", "rejected": [BAD]},
]


def written(path, entry):
    path.write_text(json.dumps(entry) + "\n")
    return path


@pytest.mark.parametrize("entry", FORMS)
def test_every_form_is_the_same_pair(tmp_path, entry):
    (pair,) = read_preferences(written(tmp_path / "x.jsonl", entry))
    asked = Message("user", "why")
    assert pair.chosen == (asked, Message("assistant", "so"))
    assert pair.rejected == (asked, Message("assistant", "no"))
    assert pair.common == (asked,)


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ([], "the line is a list, expected an object"),
        ({"prompt": "why", "chosen": "so"}, 'no field "rejected" (it has: "prompt", "chosen")'),
        ({"prompt": "why", "chosen": "so", "rejected": "so"}, "are the same"),
        ({"chosen": "so", "rejected": "no"}, "chosen: answers nothing (give a prompt"),
        ({"prompt": "why", "chosen": 3, "rejected": "no"}, "chosen: messages is a number"),
        ({"prompt": 3, "chosen": "so", "rejected": "no"}, "prompt: messages is a number"),
        ({"prompt": [GOOD], "chosen": "so", "rejected": "no"}, "the assistant speaks first"),
        ({"prompt": "why", "chosen": [], "rejected": "no"}, "the assistant says nothing"),
        (
            {"chosen": [{**ASKED, "content": "how"}, GOOD], "rejected": [ASKED, BAD]},
            "do not answer the same question",
        ),
        ({"prompt": "why", "chosen": [{"role": "x", "content": ""}], "rejected": "n"}, "role"),
    ],
)
def test_mistake_is_told_with_its_line(tmp_path, entry, words):
    path = written(tmp_path / "x.jsonl", entry)
    with pytest.raises(DataError) as raised:
        read_preferences(path)
    assert f"{path}:1: " in str(raised.value) and words in str(raised.value)


def test_nothing_inside_is_a_mistake(tmp_path):
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(DataError, match="no pair of answers inside"):
        read_preferences(tmp_path / "x.jsonl")


def test_what_is_in_both_is_not_learned(tmp_path):
    """An answer that both conversations hold says nothing of which is better."""
    begin = [ASKED, GOOD, {"role": "user", "content": "and"}]
    entry = {"chosen": [*begin, GOOD], "rejected": [*begin, BAD]}
    (pair,) = read_preferences(written(tmp_path / "x.jsonl", entry))
    assert len(pair.common) == 3
    tokenizer = make_tokenizer(300)
    for rendered, text in zip(render_pair(Template(tokenizer), pair), ("so", "no"), strict=True):
        at = [i for i, is_learned in enumerate(rendered.learned) if is_learned]
        assert tokenizer.decode([rendered.ids[i] for i in at]) == f"{text}<|im_end|>"
        assert (
            rendered.ids
            == Template(tokenizer).render(pair.chosen if text == "so" else pair.rejected).ids
        )


RENDERED = st.lists(st.booleans(), min_size=2, max_size=12).map(
    lambda learned: Rendered(list(range(1, len(learned) + 1)), [False, *learned[1:]])
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(RENDERED, RENDERED), min_size=1, max_size=8), st.integers(4, 24))
def test_windows_hold_both_answers_apart(rendered, seq_len):
    fits = [(a, b) for a, b in rendered if len(a.ids) + len(b.ids) <= seq_len + 1]
    if not fits:
        with pytest.raises(DataError, match="no pair of answers"):
            Pairs(rendered, seq_len)
        return
    pairs = Pairs(rendered, seq_len)
    assert len(pairs) == len(fits) and pairs.dropped == len(rendered) - len(fits)
    assert (np.diff(pairs.lengths) <= 0).all() and pairs.lengths.max() <= seq_len
    for idx, (a, b) in enumerate(pairs.pairs):
        assert pairs.window(idx).tolist() == [*a.ids, *b.ids]
        assert pairs.learned(idx).tolist() == [*a.learned[1:], *b.learned]
        starts = pairs.starts(idx)
        assert len(starts) == pairs.length_of(idx) == len(pairs.learned(idx))
        assert starts.tolist() == ([0] * len(a.ids) + [len(a.ids)] * len(b.ids))[:-1]
    assert sorted(map(repr, pairs.pairs)) == sorted(map(repr, fits))


def test_digest_knows_tokens_and_what_is_learned():
    one, other = Rendered([1, 2], [False, True]), Rendered([1, 3], [False, True])
    unlearned = Rendered([1, 2], [False, False])
    made = [Pairs([pair], 9).sha256 for pair in ((one, other), (other, one), (unlearned, other))]
    assert len(set(made)) == 3 and Pairs([(one, other)], 30).sha256 == made[0]
