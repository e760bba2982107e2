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

import torch

from megalite.core.errors import UserError
from megalite.data.indexed import IndexedDataset
from megalite.data.tokenizer import Tokenizer
from megalite.generate.engine import Request, complete
from megalite.generate.load import Place, load_share, open_checkpoint, untrained_share
from megalite.generate.sample import Sampling
from megalite.generate.share import Share

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


def samples(model: Share, tokenizer: Tokenizer, prompt: str, number: int, size: int) -> list[str]:
    """Seeded texts of the model."""
    ids = tokenizer.encode(prompt)
    how, stop = Sampling(temperature=0.8, seed=1), frozenset([tokenizer.eod])
    requests = [
        Request(tokens=ids, how=how, max_tokens=size, stop=stop, number=i) for i in range(number)
    ]
    return [tokenizer.decode(ids + new) for new in complete(model, requests)]


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
        saved = open_checkpoint(Path(args.run))
        tokenizer = saved.tokenizer()
    except UserError as e:
        print(f"sample_report: error: {e}", file=sys.stderr)
        return e.exit_code
    config, at = saved.config, Place(slots=16, dtype=torch.float32, device=torch.device("cpu"))
    model, fresh = load_share(saved, at), untrained_share(saved.model, at, seed=config.train.seed)
    prompt = config.train.sample_prompt
    trained = share(samples(model, tokenizer, prompt, args.samples, args.tokens), cut_off=True)
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
