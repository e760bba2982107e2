"""Hugging Face's own renderer makes of CHAT_TEMPLATE the tokens and the mask that ours makes."""

import random

import pytest

from megalite.data.chat import CHAT_TEMPLATE, ROLES, Message, Template
from megalite.data.tokenizer import Tokenizer
from megalite.data.vocabulary import PATTERNS
from tests.peers.test_tokenizers_peer import ALPHABETS, PHRASES
from tests.unit.data.samples import make_text, make_tokenizer

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (make test-peers)"
)
pytestmark = pytest.mark.peers
COUNT = 300


def contents(draw: random.Random) -> str:
    """A text with line ends and spaces at its ends, of many scripts."""
    pieces = [*PHRASES, *ALPHABETS, *make_text(draw.randint(0, 9), 3).splitlines(), "", " ", "\n"]
    return "".join(draw.choices(pieces, k=draw.randint(0, 6)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tokens_and_mask_are_hugging_face_s(pattern, tmp_path):
    ours = make_tokenizer(700, pattern=pattern)
    assert isinstance(ours, Tokenizer)
    ours.save(tmp_path / "tokenizer.json")
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    template, draw = Template(ours), random.Random(5)
    for _ in range(COUNT):
        roles = ["user", *draw.choices(ROLES, k=draw.randint(0, 3)), "assistant"]
        talk = [Message(role, contents(draw)) for role in roles]
        messages = [message._asdict() for message in talk]
        rendered = theirs.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, learned = template.render(talk)
        assert rendered["input_ids"] == ids, talk
        assert [bool(m) for m in rendered["assistant_masks"]] == learned, talk
        asked = theirs.apply_chat_template(
            messages[:-1], add_generation_prompt=True, return_dict=True
        )
        assert asked["input_ids"] == template.prompt(talk[:-1])
