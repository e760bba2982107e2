"""The default corpus: Python source and language reference, which every machine with Python has.

Made at run time and never shipped, so it needs no network. It differs between Python versions;
`corpus.json` says which one it was. One document is one source file or one topic, a long one in
pieces of 64 kB; the held-out part is chosen by document, by a hash of its name, so that no document
is on both sides.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megalite.core.config import PathText
from megalite.core.errors import DataError, UserError
from megalite.data.atomic import write_atomic, write_json

# Tests differ between builds of Python, tables teach nothing, and the rest is not always installed.
SKIPPED_DIRECTORIES = {
    *("test", "tests", "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip"),
    *("encodings", "pydoc_data", "site-packages", "dist-packages", "__pycache__"),
}
PIECE_BYTES = 64_000
VALID_SHARE = 0.04
SMALL_BYTES = 2_000_000

Document = tuple[str, str]  # name, text


@dataclass(frozen=True, kw_only=True)
class CorpusArgs:
    """Build the default corpus from this machine's Python."""

    out: PathText = "runs/corpus"
    """Directory for train.jsonl, valid.jsonl and corpus.json."""
    stdlib: PathText = ""
    """Directory of Python source to read (empty: this Python's standard library)."""


def build_corpus(args: CorpusArgs) -> None:
    """Write the corpus and print one line. The caller resolves an empty `args.stdlib`."""
    if not args.out or not args.stdlib:
        raise UserError(f"--{'stdlib' if args.out else 'out'}: is empty (name a directory)")
    root, out = Path(args.stdlib), Path(args.out)
    skipped: Counter[str] = Counter()
    sources = list(read_sources(root, skipped))
    size = sum(len(text.encode()) for _, text in sources)
    if size < SMALL_BYTES:
        found = f"only {size / 1e6:.1f} MB of Python source under {root} (zipped or stripped?)"
        print(f"corpus: {found}, going on with it and the language reference")
    documents = list(_drop_useless([*sources, *read_topics()], skipped))
    if len(documents) < 2:
        raise DataError(f"--stdlib {root}: too few documents ({len(documents)}) to hold one out")
    held_out = choose_held_out([name for name, _ in documents])
    train, valid = (
        _write_jsonl(
            out / f"{part}.jsonl", [d for d in documents if (d[0] in held_out) == (part == "valid")]
        )
        for part in ("train", "valid")
    )
    digest = hashlib.sha256(train["sha256"].encode() + valid["sha256"].encode()).hexdigest()
    meta = {
        "sha256": digest,
        "python": platform.python_version(),
        "files": len(sources),
        "documents": len(documents),
        "bytes": train["bytes"] + valid["bytes"],
        "train": train,
        "valid": valid,
        "skipped": dict(sorted(skipped.items())),
    }
    write_json(out / "corpus.json", meta)
    share = f"{len(documents)} documents, {meta['bytes'] / 1e6:.2f} MB, {len(held_out)} held out"
    print(f"{out}: {share}, Python {meta['python']}, sha256 {digest[:12]}")


def read_sources(root: Path, skipped: Counter[str]) -> Iterator[Document]:
    """Every .py file under `root` that is UTF-8, by its path from there, sorted."""
    paths = []
    for directory, below, files in os.walk(root):
        below[:] = [name for name in below if name not in SKIPPED_DIRECTORIES]
        paths += [Path(directory, name) for name in files if name.endswith(".py")]
    by_name = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    for name, path in tqdm(by_name, desc="corpus", unit="file", disable=None, leave=False):
        try:
            yield name, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            skipped["unreadable"] += 1


def read_topics() -> list[Document]:
    """The language reference by topic, as `help()` shows it; none if Python was stripped of it."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return []
    return [(f"topics/{name}", text) for name, text in sorted(topics.items())]


def choose_held_out(names: Iterable[str]) -> set[str]:
    """About VALID_SHARE of the names, each chosen whatever the others are; at least one."""
    draws = {
        name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
        for name in names
    }
    return {name for name, draw in draws.items() if draw < VALID_SHARE} or {
        min(draws, key=draws.__getitem__)
    }


def split_document(text: str, limit: int = PIECE_BYTES) -> Iterator[str]:
    """Pieces of at most `limit` bytes, cut at line ends; a longer line is a piece of its own."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        width = len(line.encode())
        if piece and size + width > limit:
            yield "".join(piece)
            piece, size = [], 0
        piece.append(line)
        size += width
    if piece:
        yield "".join(piece)


def _drop_useless(documents: Iterable[Document], skipped: Counter[str]) -> Iterator[Document]:
    seen: set[bytes] = set()
    for name, text in documents:
        digest = hashlib.sha256(text.encode()).digest()
        if not text.strip():
            skipped["empty"] += 1
        elif digest in seen:
            skipped["duplicate"] += 1
        else:
            seen.add(digest)
            yield name, text


def _write_jsonl(path: Path, documents: list[Document]) -> dict[str, Any]:
    digest = hashlib.sha256()
    size = pieces = 0
    with write_atomic(path) as file:
        for name, text in documents:
            for piece in split_document(text):
                line = (
                    json.dumps({"text": piece, "source": name}, ensure_ascii=False) + "\n"
                ).encode()
                file.write(line)
                digest.update(line)
                size += len(piece.encode())
                pieces += 1
    return {
        "documents": len(documents),
        "pieces": pieces,
        "bytes": size,
        "sha256": digest.hexdigest(),
    }
