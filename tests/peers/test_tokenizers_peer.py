"""Hugging Face `tokenizers` loads our file and gives our ids."""

import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from megalite.data.tokenizer import Tokenizer
from megalite.data.vocabulary import PATTERNS, SPECIAL
from tests.unit.data.samples import make_text, make_tokenizer

peer = pytest.importorskip("tokenizers", reason="tokenizers is not installed (make test-peers)")
pytestmark = pytest.mark.peers

NUM_STRINGS = 2000
# Characters old enough that both libraries' Unicode tables have them.
ALPHABETS = (
    "etaoin shrdlu",
    "ABCdef",
    "\u00e9\u00fc\u00df\u0130\u0131\u017f\u212a\u01c5",
    "\u0430\u0431\u0436 \u0416",
    "\u05d0\u05d1 \u05b0",
    "\u0627\u0644 \u0664\u0665",
    "\u0915\u094d\u0937 \u0967",
    "\u4f60\u597d\u3002\u3000",
    "\ud55c\uae00 \u3042\u30a2",
    "e\u0301\u0323 a\u0308",
    "0123456789",
    "\u00b2\u00bd\u2167\u0be7",
    " \t\n\r\f\v\u00a0\u2028\u3000\u0085",
    "\x00\x1c\x1f\u200b\u180e\ufeff",
    "\U0001f469\u200d\U0001f467\ufe0f\U0001f3fd",
    ".,;:!?()[]{}<>|=+-*/\\'\"#_",
    "\ufffd\ue000\U0010ffff",
)
PHRASES = (
    *("don't", "WE'LL", "they've", "I'm", "he'd", "it's", "x're", "'\u017f", "'Ll ", "'vE"),
    *("\r\n", "\n\n", "    ", "\t\t", " \n ", "  def", "self.", "__init__", "==", "...", "100000"),
)
CODE = '''
class Shelf(dict):
    """Keeps what it is given; it doesn't ask why."""

    def __init__(self, *args, **kwargs):\r
        super().__init__(*args, **kwargs)
        self._seen = {k: 0 for k in range(1_000)}   \n\n
\tdef __getitem__(self, key: str) -> "int | None":
        return (self.get(key) or 0x1F) ** 2  # 12345.6789e-10
'''


def random_string(draw: random.Random) -> str:
    parts = []
    for _ in range(draw.randint(1, 12)):
        if draw.random() < 0.3:
            parts.append(draw.choice(PHRASES))
        else:
            parts += draw.choices(draw.choice(ALPHABETS), k=draw.randint(1, 12))
    return "".join(parts)


@pytest.fixture(params=PATTERNS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Tokenizer, Any]:
    """Our tokenizer, and theirs from our file."""
    ours = make_tokenizer(pattern=request.param)
    ours.save(tmp_path / "tokenizer.json")
    return ours, peer.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


def test_ids_are_equal_on_random_strings(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    draw = random.Random(0)
    for _ in range(NUM_STRINGS):
        text = random_string(draw)
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


def test_ids_are_equal_on_code_and_prose(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    for text in (CODE, CODE * 50, *(make_text(seed) for seed in range(200, 210))):
        assert ours.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("unit", ["e", "to", " ", "=", "\t\n", "katorimunesolbanderfigu"])
def test_ids_are_equal_on_long_words(pair: tuple[Tokenizer, Any], unit: str) -> None:
    ours, theirs = pair
    for size in (20, 30, 1000, 5000):
        text = unit * size
        assert ours.encode(text) == theirs.encode(text).ids


def test_vocabulary_and_special_tokens_are_equal(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    assert theirs.get_vocab_size() == ours.vocab_size
    assert [theirs.token_to_id(text) for text in SPECIAL] == list(ours.special.values())
    # What a chat template writes becomes control ids there; in our users' text it never does.
    assert theirs.encode("a<|im_end|>").ids[-1] == ours.special["<|im_end|>"]
    assert ours.special["<|im_end|>"] not in ours.encode("a<|im_end|>")


def test_decoded_text_is_equal(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    draw = random.Random(1)
    for _ in range(200):
        ids = ours.encode(random_string(draw))
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
        cut = ids[: draw.randint(0, len(ids))]
        assert ours.decode(cut) == theirs.decode(cut, skip_special_tokens=False)


def test_their_own_file_loads_and_gives_their_ids(tmp_path: Path) -> None:
    theirs = peer.Tokenizer(peer.models.BPE())
    theirs.pre_tokenizer = peer.pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = peer.decoders.ByteLevel()
    trainer = peer.trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=list(SPECIAL),
        initial_alphabet=peer.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    theirs.train_from_iterator([make_text(seed) for seed in range(20)], trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.load(tmp_path / "tokenizer.json")
    assert ours.special == {text: k for k, text in enumerate(SPECIAL)}
    draw = random.Random(2)
    for text in itertools.chain((CODE,), (random_string(draw) for _ in range(300))):
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)
