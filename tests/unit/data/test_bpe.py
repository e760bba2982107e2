"""Training, against counting every pair anew before every merge."""

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest

from megalite.core.errors import UserError
from megalite.data import bpe
from megalite.data.bpe import TokenizerTrainArgs, count_words, train, train_tokenizer
from megalite.data.tokenizer import Tokenizer
from megalite.data.vocabulary import PATTERNS, SPECIAL
from tests.unit.data.samples import make_text

TEXTS = [make_text(seed, num_lines=15) for seed in range(4)]


def merges_by_definition(counts: dict[bytes, int], num_merges: int) -> list[bytes]:
    """Tokens in the order of learning: most frequent pair, smallest ids among equals."""
    tokens = [bytes([byte]) for byte in range(256)]
    words = [(list(word), count) for word, count in counts.items()]
    while len(tokens) < 256 + num_merges:
        pairs: Counter[tuple[int, int]] = Counter()
        for word, count in words:
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        for word, _ in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens[256:]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_training_learns_the_merges_of_the_definition(pattern: str) -> None:
    tokenizer = train(TEXTS, 400, pattern=pattern)
    counts = count_words(TEXTS, PATTERNS[pattern])
    assert tokenizer.token_bytes[256:397] == merges_by_definition(counts, 141)


def test_training_on_overlapping_pairs_learns_the_merges_of_the_definition() -> None:
    draw = random.Random(3)
    texts = [" ".join("".join(draw.choices("ab", k=draw.randint(1, 20))) for _ in range(200))]
    tokenizer = train(texts, 339)
    counts = count_words(texts, PATTERNS["gpt4"])
    assert tokenizer.token_bytes[256:336] == merges_by_definition(counts, 80)
    assert len(set(tokenizer.token_bytes)) == tokenizer.vocab_size


def test_vocabulary_is_bytes_then_merges_then_special_tokens() -> None:
    tokenizer = train(TEXTS, 400)
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == 400
    assert tokenizer.token_bytes[:256] == [bytes([byte]) for byte in range(256)]
    assert tokenizer.special == {text: 397 + k for k, text in enumerate(SPECIAL)}
    assert tokenizer.eod == 397
    assert len(set(tokenizer.token_bytes)) == 400


def test_training_does_not_depend_on_the_order_of_texts() -> None:
    assert train(TEXTS, 400).sha256 == train(TEXTS[::-1], 400).sha256


def test_long_words_are_counted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpe, "COUNTED_LENGTH", 4)
    assert count_words(["abcdabcdab abcd"], PATTERNS["gpt4"]) == {
        b"abcd": 2,
        b"ab": 1,
        b" abc": 1,
        b"d": 1,
    }


def test_too_small_a_text_names_the_size_it_can_give() -> None:
    with pytest.raises(UserError, match=r"--vocab-size 300: the text yields only 261 .use --voc"):
        train(["abc abc"], 300)
    assert train(["abc abc"], 261).token_bytes[256:258] == [b"ab", b"abc"]


@pytest.mark.parametrize(
    "size, pattern, line",
    [
        (258, "gpt4", "--vocab-size 258: must be at least 259 (256 bytes and 3 special tokens)"),
        (300, "gpt5", "--pattern gpt5: unknown (use one of gpt4, gpt2)"),
    ],
)
def test_training_refuses_with_one_line(size: int, pattern: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        train(TEXTS, size, pattern=pattern)
    assert str(caught.value) == line


def test_train_command_reads_a_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k, text in enumerate(TEXTS):
        (tmp_path / f"{k}.txt").write_bytes(text.encode())
    out = str(tmp_path / "made" / "tokenizer.json")
    train_tokenizer(TokenizerTrainArgs(input=str(tmp_path), vocab_size=400, out=out))
    assert Tokenizer.load(out).sha256 == train(TEXTS, 400).sha256
    assert capsys.readouterr().out == f"{out}: 400 tokens from 0.0 MB of text\n"
