"""A fixed text of any size, and the tokenizers trained on it: what the tests of this room share."""

import random
from functools import cache

import jinja2
import jinja2.ext

from megalite.data.bpe import train
from megalite.data.tokenizer import Tokenizer

SYLLABLES = (
    "ka",
    "to",
    "ri",
    "mu",
    "ne",
    "sol",
    "ban",
    "der",
    "fi",
    "gu",
    "hap",
    "lo",
    "ex",
    "tra",
)


def make_text(seed: int, num_lines: int = 60) -> str:
    """Lines of made-up code and prose: indentation, numbers, signs, contractions, other scripts."""
    draw = random.Random(seed)
    names = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(80)]
    lines = []
    for _ in range(num_lines):
        indent = " " * 4 * draw.randint(0, 4)
        a, b, c = draw.choices(names, k=3)
        forms = (
            f"{indent}def {a}(self, {b}={draw.randint(0, 99999)}):",
            f"{indent}{a}.{b}[{c!r}] += {draw.random():.4f}  # don't {c}",
            f"{a.capitalize()} {b} isn't {c}, they've said; we'll see.",
            f"{indent}return '\u00e9\u00fc {a} \u4f60\u597d \U0001f469\u200d\U0001f467'\r",
            "",
        )
        lines.append(draw.choice(forms))
    return "\n".join(lines) + "\n"


@cache
def make_tokenizer(vocab_size: int = 600, pattern: str = "gpt4") -> Tokenizer:
    """Trained on the first thirty texts."""
    return train([make_text(seed) for seed in range(30)], vocab_size, pattern=pattern)


class _Generation(jinja2.ext.Extension):
    """The block in which Hugging Face marks what the assistant says: here, what is in it."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def jinja_template(text: str) -> jinja2.Template:
    """A chat template in an environment like Hugging Face's."""
    how = {"trim_blocks": True, "lstrip_blocks": True, "extensions": [_Generation]}
    return jinja2.Environment(**how).from_string(text)
