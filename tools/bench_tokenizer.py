"""How fast the tokenizer trains and encodes, beside Hugging Face `tokenizers` where installed.

CPU seconds of one process, the best of the rounds; MB are 1e6 bytes of UTF-8. `cold` is a new
tokenizer with nothing cached. The hostile texts are those on which byte-pair encoders turn
quadratic; `growth` is the time of twice the text over the time of the text: 2 is linear.
"""

from __future__ import annotations

import argparse
import base64
import importlib.util
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megalite.data.atomic import write_json
from megalite.data.bpe import train
from megalite.data.documents import find_inputs, read_documents
from megalite.data.tokenizer import Tokenizer

VOCAB_SIZE = 2048
HOSTILE_BYTES = 1_000_000


def main() -> None:
    """Print a row a measurement, and write them to --json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help=".txt, .jsonl, .jsonl.gz or a directory")
    parser.add_argument("--json", default="", help="file for the rows")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    texts = list(read_documents(find_inputs(args.input)))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        path = str(Path(scratch, "tokenizer.json"))
        _report(rows, "megalite", f"train {VOCAB_SIZE}", _time_training(texts, path))
        _report(rows, "megalite", "encode cold", _time_ours(texts, path, args.rounds, cold=True))
        _report(rows, "megalite", "encode warm", _time_ours(texts, path, args.rounds, cold=False))
        _report(rows, "tokenizers", "encode cold", _time_peer(texts, path, args.rounds))
        for name, make in HOSTILE.items():
            _report(rows, "megalite", f"hostile {name}", _time_hostile(make, path, args.rounds))
    if args.json:
        write_json(args.json, rows)


def _report(rows: list[dict[str, Any]], system: str, workload: str, found: dict[str, Any]) -> None:
    row = {"system": system, "layout": "1 process", "workload": workload, "world": 1, **found}
    rows.append(row)
    shown = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in row.values()]
    print("  ".join(shown), flush=True)


def _time_training(texts: list[str], path: str) -> dict[str, Any]:
    begin = time.process_time()
    train(texts, VOCAB_SIZE).save(path)
    return {"seconds": time.process_time() - begin, "mb": _megabytes(texts)}


def _time_ours(texts: list[str], path: str, rounds: int, *, cold: bool) -> dict[str, Any]:
    tokenizer = Tokenizer.load(path)
    if not cold:
        _encode_all(tokenizer.encode, texts)
    seconds = []
    for _ in range(rounds):
        tokenizer = Tokenizer.load(path) if cold else tokenizer
        seconds.append(_encode_all(tokenizer.encode, texts))
    return _speed(texts, seconds)


def _time_peer(texts: list[str], path: str, rounds: int) -> dict[str, Any]:
    if importlib.util.find_spec("tokenizers") is None:
        return {"not_run": "tokenizers is not installed (make test-peers sets it up)"}
    peer = importlib.import_module("tokenizers").Tokenizer
    seconds = []
    for _ in range(rounds):
        tokenizer = peer.from_file(path)
        seconds.append(_encode_all(tokenizer.encode, texts))
    return _speed(texts, seconds)


def _time_hostile(make: Callable[[int], str | bytes], path: str, rounds: int) -> dict[str, Any]:
    once, twice = (
        min(_encode_all(Tokenizer.load(path).encode, [make(size)]) for _ in range(rounds))
        for size in (HOSTILE_BYTES, 2 * HOSTILE_BYTES)
    )
    return {"mb_per_s": HOSTILE_BYTES / 1e6 / once, "growth": twice / once, "rounds": rounds}


def _encode_all(encode: Callable[[Any], list[int]], texts: Iterable[str | bytes]) -> float:
    begin = time.process_time()
    for text in texts:
        encode(text)
    return time.process_time() - begin


def _speed(texts: list[str], seconds: list[float]) -> dict[str, Any]:
    return {"mb_per_s": _megabytes(texts) / min(seconds), "rounds": len(seconds)}


def _megabytes(texts: Iterable[str]) -> float:
    return sum(len(text.encode()) for text in texts) / 1e6


def _fill(unit: str) -> Callable[[int], str]:
    return lambda size: unit * (size // len(unit.encode()))


def _letters(size: int) -> str:
    return "".join(random.Random(size).choices("etaoinshrdlucmfwypvbgkjqxz", k=size))


HOSTILE: dict[str, Callable[[int], str | bytes]] = {
    "one letter": _fill("e"),
    "one sign": _fill("="),
    "alternating": _fill("st"),
    "spaces": _fill(" "),
    "spaces then word": lambda size: " " * (size - 4) + "word",
    "tabs and newlines": _fill("\t\n"),
    "deep indentation": _fill(" " * 999 + "x"),
    "digits": _fill("7"),
    "emoji joined": _fill("\U0001f469\u200d\U0001f469\u200d\U0001f467"),
    "combining marks": _fill("e\u0301\u0323"),
    "NUL": _fill("\0"),
    "random letters": _letters,
    "base64": lambda size: base64.b64encode(random.Random(size).randbytes(size * 3 // 4)).decode(),
    "not UTF-8": lambda size: random.Random(size).randbytes(size),
    "half surrogates": lambda size: "\ud83d" * (size // 3),
}


if __name__ == "__main__":
    main()
