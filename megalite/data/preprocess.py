"""Text to token ids on disk: documents.py reads, workers.py encodes, indexed.py writes.

`{prefix}.bin` and `.idx` hold the ids, `{prefix}.json` what a training run needs to know about them
(bits per byte need the bytes of text; gzip's size is the yardstick beside),
`{prefix}.tokenizer.json` the tokenizer itself.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from megalite.core.config import PathText
from megalite.core.errors import UserError
from megalite.data.atomic import write_json
from megalite.data.documents import find_inputs, read_documents
from megalite.data.indexed import IndexedWriter
from megalite.data.tokenizer import Tokenizer
from megalite.data.workers import encode_many


@dataclass(frozen=True, kw_only=True)
class PreprocessArgs:
    """Turn text into token ids for training."""

    input: PathText = "runs/corpus/train.jsonl"
    """A .txt, .jsonl or .jsonl.gz file, or a directory of those."""
    tokenizer: PathText = "tokenizer.json"
    """The tokenizer to encode with."""
    out: PathText = "runs/data/train"
    """Prefix of the files to write: .bin, .idx, .json and .tokenizer.json."""
    json_key: str = "text"
    """Field of a .jsonl line that holds the text."""
    append_eod: bool = True
    """End each document with <|endoftext|>."""
    errors: Literal["strict", "replace"] = "strict"
    """Refuse bytes that are not UTF-8, or put U+FFFD in their place."""
    workers: int = 0
    """Processes that encode (0: one a core)."""


def preprocess(args: PreprocessArgs) -> None:
    """Encode `args.input` into the files of prefix `args.out` and print one line."""
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: must be 0 (one a core) or more")
    if not args.out or args.out.endswith("/") or Path(args.out).is_dir():
        fix = f"a prefix such as {Path(args.out) / 'train'}"
        raise UserError(f"--out {args.out}: is a directory, expected {fix}")
    tokenizer = Tokenizer.load(args.tokenizer)
    files = find_inputs(args.input)
    progress = tqdm(desc="preprocess", unit="B", unit_scale=True, disable=None, leave=False)
    progress.total = sum(file.stat().st_size for file in files)
    read = partial(read_documents, json_key=args.json_key, errors=args.errors)
    texts = _Measured(read(files, advance=progress.update))
    encoded = encode_many(tokenizer, texts, args.workers or count_cores())
    tokens = 0
    with progress, IndexedWriter(args.out, tokenizer.vocab_size) as writer, closing(encoded):
        for ids in encoded:
            document = np.append(ids, np.int32(tokenizer.eod)) if args.append_eod else ids
            writer.add_document(document)
            tokens += len(document)
        meta = {
            "source": args.input,
            "documents": texts.documents,
            "tokens": tokens,
            "text_bytes": texts.text_bytes,
            "gzip_bytes": texts.gzip_bytes(),
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": tokenizer.sha256,
            "append_eod": args.append_eod,
        }
        # An older index goes first: a run killed from here on leaves no mixture that loads.
        writer.idx_path.unlink(missing_ok=True)
        tokenizer.save(f"{args.out}.tokenizer.json")
        write_json(f"{args.out}.json", meta)
    ratio = f"{texts.text_bytes / tokens:.2f} bytes a token"
    print(f"{args.out}: {texts.documents:,} documents, {tokens:,} tokens, {ratio}")


def count_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _Measured:
    """Passes texts on and measures them, as bytes and as gzip -9 would write them in one piece."""

    def __init__(self, texts: Iterable[str]):
        self._texts = texts
        self._gzip = zlib.compressobj(9, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
        self._compressed = 0
        self.documents = 0
        self.text_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        for text in self._texts:
            data = text.encode()
            self.documents += 1
            self.text_bytes += len(data)
            self._compressed += len(self._gzip.compress(data))
            yield data

    def gzip_bytes(self) -> int:
        """Size of all texts so far, compressed; to be asked once, at the end."""
        return self._compressed + len(self._gzip.flush())
