"""How much like Python a run's samples are: the share of lines that Python's own `tokenize`
accepts.

    python tools/sample_report.py runs/demo

Each line stands alone, without its indentation; blank lines and a last line that was cut off do not
count. The same share of the untrained model's samples and of the held-out text are the two ends of
the scale.
"""

from __future__ import annotations

import argparse
import io
import sys
import tokenize
from pathlib import Path

from megalite.core.config import run_directory
from megalite.core.errors import UserError
from megalite.data.indexed import IndexedDataset
from megalite.data.tokenizer import Tokenizer
from megalite.generate.command import load_model, load_tokenizer, untrained_model
from megalite.generate.engine import generate, logits_of
from megalite.generate.sample import Sampling
from megalite.models.gpt import GPT

HELD_OUT_TOKENS = 50_000


def accepted(line: str) -> bool:
    """Whether `tokenize` takes the line as it stands."""
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(line.strip() + "\n").readline))
    except (tokenize.TokenError, SyntaxError):
        return False
    return all(token.type != tokenize.ERRORTOKEN for token in tokens)


def share(texts: list[str], *, cut_off: bool) -> float:
    """Share of accepted lines; the last line of each text is left out where it is `cut_off`."""
    lines = [line for text in texts for line in text.split("\n")[: -1 if cut_off else None]]
    lines = [line for line in lines if line.strip()]
    return sum(map(accepted, lines)) / max(1, len(lines))


def samples(model: GPT, tokenizer: Tokenizer, prompt: str, number: int, tokens: int) -> list[str]:
    """Seeded texts of the model."""
    ids = tokenizer.encode(prompt)
    made = generate(
        logits_of(model),
        [ids] * number,
        Sampling(temperature=0.8, seed=1),
        max_tokens=tokens,
        seq_len=model.cfg.seq_len,
        stop=tokenizer.eod,
    )
    return [tokenizer.decode(ids + new) for new in made]


def main() -> int:
    """Print one line; give the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", help="run directory or one of its checkpoints/step-*")
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64, help="of each sample")
    args = parser.parse_args()
    try:
        model, config, _ = load_model(Path(args.run))
        tokenizer = load_tokenizer(run_directory(Path(args.run)))
    except UserError as e:
        print(f"sample_report: error: {e}", file=sys.stderr)
        return e.exit_code
    prompt = config.train.sample_prompt
    trained = share(samples(model, tokenizer, prompt, args.samples, args.tokens), cut_off=True)
    fresh = untrained_model(config)
    untrained = share(samples(fresh, tokenizer, prompt, args.samples, args.tokens), cut_off=True)
    text = f"lines of {args.samples} samples that Python's tokenize accepts: {trained:.0%}"
    text += f" (untrained model {untrained:.0%}"
    if config.data.valid_data:
        tokens = IndexedDataset(config.data.valid_data).tokens[:HELD_OUT_TOKENS]
        text += f", held-out text {share([tokenizer.decode(tokens.tolist())], cut_off=False):.0%}"
    print(f"python {text})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
