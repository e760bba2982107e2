"""Text comes in whole characters and ends before its stop string, wherever tokens are cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megalite.generate.text import TextStream
from tests.unit.data.samples import make_tokenizer


class Bytes:
    """Every byte is a token."""

    def decode_bytes(self, ids):
        return bytes(ids)


def pieces_of(data, cuts, stop=()):
    stream, pieces, at = TextStream(Bytes(), stop), [], 0
    for end in [*sorted(cuts), len(data)]:
        pieces.append(stream.add(data[at:end]))
        at = end
    return [*pieces, stream.finish()], stream.stopped


@given(st.text(max_size=30), st.lists(st.integers(0, 120), max_size=8))
def test_pieces_add_up_to_the_text_and_cut_no_character(text, cuts):
    data = text.encode("utf-8", "replace")
    pieces, stopped = pieces_of(data, [cut for cut in cuts if cut < len(data)])
    assert "".join(pieces) == data.decode() and not stopped
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


@given(
    st.text("ab\u00e9", max_size=20),
    st.lists(st.text("ab\u00e9", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 40), max_size=8),
)
def test_text_ends_before_the_first_stop_string_however_it_is_cut(text, stop, cuts):
    data = text.encode()
    pieces, stopped = pieces_of(data, [cut for cut in cuts if cut < len(data)], stop)
    at = [text.find(s) for s in stop if s in text]
    assert stopped == bool(at)
    if len(cuts) == 0:
        assert "".join(pieces) == (text[: min(at)] if at else text)
    else:
        # Cut up, the stop string that is complete first wins, of those that begin anywhere.
        ends = [text.find(s) + len(s) for s in stop if s in text]
        made = "".join(pieces)
        assert text.startswith(made)
        assert len(made) <= min(ends, default=len(text))
        assert not any(s in made for s in stop)


def test_nothing_is_held_back_that_can_no_longer_be_a_stop_string():
    stream = TextStream(Bytes(), ["END"])
    assert [stream.add(b) for b in (b"xE", b"N", b"x", b"EN", b"D tail", b"more")] == [
        "x", "", "ENx", "", "", "",
    ]  # fmt: skip
    assert stream.stopped and stream.finish() == ""


def test_character_that_is_never_completed_is_told_at_the_end():
    stream = TextStream(Bytes())
    assert [stream.add(b"a\xf0\x9f"), stream.finish()] == ["a", "\ufffd"]


@pytest.mark.parametrize(
    "text", ["na\u00efve caf\u00e9", "\U0001f600\U0001f680 ok", "\u6f22\u5b57"]
)
def test_tokens_of_a_real_vocabulary_come_as_their_text(text):
    tokenizer = make_tokenizer(600)
    stream = TextStream(tokenizer)
    pieces = [stream.add([token]) for token in tokenizer.encode(text)]
    assert "".join([*pieces, stream.finish()]) == text
    assert all("\ufffd" not in piece for piece in pieces)
