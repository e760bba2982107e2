"""Encoding and decoding, against the definition of BPE one merge at a time."""

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.core.errors import DataError
from megalite.data import tokenizer as tokenizer_file
from megalite.data.tokenizer import Tokenizer, TokenizerShowArgs, show_tokenizer
from megalite.data.vocabulary import PATTERNS, SPECIAL, Vocabulary
from tests.unit.data.samples import make_text, make_tokenizer


def merge_by_definition(vocabulary: Vocabulary, word: bytes) -> list[int]:
    """The pair of the earliest merge, the leftmost of equals, until there is none."""
    ranks = {(left, right): rank for rank, (left, right, _) in enumerate(vocabulary.merges)}
    ids = [vocabulary.tokens.index(bytes([byte])) for byte in word]
    while True:
        found = [
            (ranks[pair], i) for i, pair in enumerate(itertools.pairwise(ids)) if pair in ranks
        ]
        if not found:
            return ids
        rank, i = min(found)
        ids[i : i + 2] = [vocabulary.merges[rank][2]]


def random_vocabulary(seed: int, num_merges: int) -> Vocabulary:
    """Merges of a, b and c in an order no training gives, some making one token in two ways."""
    draw = random.Random(seed)
    tokens = [bytes([byte]) for byte in range(256)]
    ids = {token: idx for idx, token in enumerate(tokens)}
    letters = [b"a", b"b", b"c"]
    pairs: dict[tuple[int, int], int] = {}
    while len(pairs) < num_merges:
        left, right = draw.choice(letters), draw.choice(letters)
        if left + right not in ids:
            ids[left + right] = len(tokens)
            tokens.append(left + right)
            letters.append(left + right)
        pairs[ids[left], ids[right]] = ids[left + right]
    merges = [(left, right, made) for (left, right), made in pairs.items()]
    draw.shuffle(merges)
    special = {SPECIAL[0]: len(tokens)}
    return Vocabulary(PATTERNS["gpt2"], [*tokens, SPECIAL[0].encode()], merges, special)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(deadline=None)
@given(text=st.text())
def test_decode_returns_any_text(pattern: str, text: str) -> None:
    tokenizer = make_tokenizer(pattern=pattern)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(deadline=None)
@given(data=st.binary())
def test_decode_bytes_returns_any_bytes(pattern: str, data: bytes) -> None:
    tokenizer = make_tokenizer(pattern=pattern)
    assert tokenizer.decode_bytes(tokenizer.encode(data)) == data


@settings(deadline=None)
@given(text=st.text())
def test_text_and_its_bytes_have_equal_ids(text: str) -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.encode(text) == tokenizer.encode(text.encode())


@settings(deadline=None, max_examples=200)
@given(seed=st.integers(0, 999), word=st.text("abc", min_size=1, max_size=90))
def test_long_and_short_words_merge_by_the_definition(seed: int, word: str) -> None:
    vocabulary = random_vocabulary(seed, num_merges=12)
    merger = tokenizer_file._Merger(vocabulary)
    expected = merge_by_definition(vocabulary, word.encode())
    assert merger._merge_short(list(word.encode())) == expected
    assert merger._merge_long(list(word.encode())) == expected


def test_encode_joins_what_training_learned() -> None:
    tokenizer = make_tokenizer()
    text = make_text(seed=1000)
    ids = tokenizer.encode(text)
    assert len(text.encode()) / len(ids) > 2
    words = tokenizer._cut(text)
    expected = [merge_by_definition(tokenizer.vocabulary, word.encode()) for word in words]
    assert ids == list(itertools.chain.from_iterable(expected))


@pytest.mark.parametrize("special", SPECIAL)
def test_special_text_in_input_is_plain_text(special: str) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.encode(f"a{special} {special}\n")
    assert not set(ids) & set(tokenizer.special.values())
    assert tokenizer.decode(ids) == f"a{special} {special}\n"
    assert tokenizer.decode([tokenizer.special[special]]) == special


def test_half_surrogates_become_the_replacement_character() -> None:
    tokenizer = make_tokenizer()
    assert tokenizer.decode(tokenizer.encode("a\ud83d b\udc80")) == "a\ufffd b\ufffd"
    assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "\U0001f600"


def test_decode_replaces_half_a_character() -> None:
    tokenizer = make_tokenizer(vocab_size=259)
    ids = tokenizer.encode("\u00e9")
    assert tokenizer.decode(ids[:1]) == "\ufffd"


@pytest.mark.parametrize("wrong", [-1, 600])
def test_decode_refuses_ids_outside(wrong: int) -> None:
    with pytest.raises(DataError, match=f"token id {wrong} is not in the vocabulary .0 to 599"):
        make_tokenizer().decode([0, wrong])


def test_cache_is_bounded_and_changes_no_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    text = make_text(seed=7, num_lines=200)
    fresh = Tokenizer(make_tokenizer().vocabulary)
    expected = fresh.encode(text)
    monkeypatch.setattr(tokenizer_file, "CACHED_WORDS", 5)
    small = Tokenizer(make_tokenizer().vocabulary)
    assert small.encode(text + "x" * 100)[: len(expected) - 5] == expected[:-5]
    assert 0 < len(small._words) <= 5
    assert max(map(len, small._words)) <= tokenizer_file.CACHED_LENGTH


HOSTILE = {
    "one letter": "e",
    "known pair": "to",
    "one sign": "=",
    "spaces": " ",
    "tab and newline": "\t\n",
    "indented": " " * 40 + "x",
    "digits": "7",
    "emoji joined": "\U0001f469\u200d\U0001f467",
    "combining marks": "e\u0301\u0323",
    "NUL": "\0",
    "letters": "katorimunesolbanderfigu",
}


@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE)
def test_merging_looks_at_each_place_a_bounded_number_of_times(unit: str) -> None:
    tokenizer = Tokenizer(make_tokenizer().vocabulary)
    text = unit * (20_000 // len(unit.encode()))
    tokenizer.encode(text)
    # Every byte opens one place, every merge closes one token and opens at most two.
    assert tokenizer._words._merger.steps <= 3 * len(text.encode())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("unit", HOSTILE.values(), ids=HOSTILE)
def test_cutting_time_grows_with_the_text_not_its_square(pattern: str, unit: str) -> None:
    cut = make_tokenizer(pattern=pattern)._cut
    text = unit * (40_000 // len(unit))

    def seconds(text: str) -> float:
        begin = time.process_time()
        cut(text)
        return time.process_time() - begin

    # A quadratic cut takes 256 times as long for 16 times the text.
    assert seconds(text * 16) < 64 * max(min(seconds(text) for _ in range(3)), 1e-3)


def test_foreign_pattern_loses_no_text_between_its_matches() -> None:
    vocabulary = make_tokenizer().vocabulary
    tokenizer = Tokenizer(
        Vocabulary(r"(\p{L})\p{L}*", vocabulary.tokens, vocabulary.merges, vocabulary.special)
    )
    assert tokenizer._cut("..ab 12 cd!") == ["..", "ab", " 12 ", "cd", "!"]
    assert tokenizer.decode(tokenizer.encode("..ab 12 cd!")) == "..ab 12 cd!"


def test_exponential_pattern_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_file, "PATTERN_SECONDS", 0.2)
    vocabulary = make_tokenizer().vocabulary
    tokenizer = Tokenizer(
        Vocabulary(r"(?:a|aa|a\w?)+b", vocabulary.tokens, vocabulary.merges, vocabulary.special)
    )
    with pytest.raises(DataError, match="takes too long on a text of 60 characters"):
        tokenizer.encode("a" * 60)


def test_show_prints_size_and_cut(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tokenizer().save(tmp_path / "tokenizer.json")
    path = str(tmp_path / "tokenizer.json")
    show_tokenizer(TokenizerShowArgs(path=path, text="def \u4f60\n"))
    out = capsys.readouterr().out
    assert out.startswith(f"{path}: 600 tokens, 341 merges, sha256 {make_tokenizer().sha256}\n")
    assert "<|endoftext|> 597, <|im_start|> 598, <|im_end|> 599" in out
    assert "'def'\n" in out and "'\\n'\n" in out
