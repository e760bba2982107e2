"""Documents from files: .txt (one each), .jsonl and .jsonl.gz (one a line), or a directory of them.

Streams: at most one document is in memory. Whatever is wrong with a file is a DataError that names
the file, the line and the column.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal

from megalite.core.errors import DataError
from megalite.data.strict_json import kind_of, parse_json, quote
from megalite.data.tokenizer import replace_surrogates

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
MAX_DOCUMENT_BYTES = 1 << 30
BOM = b"\xef\xbb\xbf"
NEWLINE = b"\n"
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"BZh": "bzip2",
}

Errors = Literal["strict", "replace"]


def find_inputs(path: str | os.PathLike[str]) -> list[Path]:
    """The files to read, sorted by path. Raises DataError when there is none."""
    if not str(path):
        raise DataError("--input is empty (name a file or directory)")
    root = Path(path)
    if not os.path.exists(root):
        raise DataError(f"{path}: no such file or directory")
    if root.is_dir():
        texts = (file for file in root.rglob("*") if file.name.endswith(SUFFIXES))
        found = sorted(file for file in texts if file.is_file())
        if not found:
            raise DataError(f"{path}: no .txt, .jsonl or .jsonl.gz file inside")
        return found
    if not root.is_file():
        raise DataError(f"{path}: is not a regular file")
    if not root.name.endswith(SUFFIXES):
        raise DataError(f"{path}: cannot tell what it holds (name it .txt, .jsonl or .jsonl.gz)")
    return [root]


def read_documents(
    files: Sequence[Path],
    *,
    json_key: str = "text",
    errors: Errors = "strict",
    advance: Callable[[int], object] | None = None,
    max_bytes: int = MAX_DOCUMENT_BYTES,
) -> Iterator[str]:
    """The texts of `files` in order, empty ones left out; every text has UTF-8 bytes.

    `advance` is told how many more bytes of the files have been read. Raises DataError on the first
    thing wrong, and at the end when there was no text at all.
    """
    count = 0
    for path in files:
        told = 0
        with _open(path) as raw:
            before = os.fstat(raw.fileno())
            for text in _read_file(path, raw, json_key, errors, max_bytes):
                if advance is not None:
                    advance(raw.tell() - told)
                    told = raw.tell()
                if text:
                    count += 1
                    yield text
            after = os.fstat(raw.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            fix = "run again when its writer is done"
            raise DataError(f"{path}: changed while it was read ({fix})")
    if not count:
        others = f" and {len(files) - 1} more" if len(files) > 1 else ""
        raise DataError(f"{files[0]}{others}: no text inside")


def _open(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def read_objects(files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    """The JSON values of .jsonl and .jsonl.gz `files`, a line each, and where it stands.

    Raises DataError on the first line that is not JSON.
    """
    for path in files:
        with _open(path) as raw:
            _check_compression(path, raw)
            for number, entry in _json_lines(path, raw, "strict", MAX_DOCUMENT_BYTES):
                yield f"{path}:{number}", entry


def _read_file(
    path: Path, raw: IO[bytes], json_key: str, errors: Errors, max_bytes: int
) -> Iterator[str]:
    _check_compression(path, raw)
    if path.suffix == ".txt":
        data = raw.read(max_bytes + 1).removeprefix(BOM)
        _check_size(str(path), len(data), max_bytes)
        yield _decode_plain(path, data, errors)
        return
    for number, entry in _json_lines(path, raw, errors, max_bytes):
        yield _text_of(f"{path}:{number}", entry, json_key, errors)


def _check_compression(path: Path, raw: IO[bytes]) -> None:
    """Raise DataError if the file's name does not say how it is compressed."""
    zipped = path.name.endswith(".gz")
    start = raw.read(4)
    raw.seek(0)
    for magic, kind in COMPRESSED.items():
        if start.startswith(magic) and not (zipped and kind == "gzip"):
            named = kind == "gzip" and path.suffix == ".jsonl"
            fix = "name it .jsonl.gz" if named else "decompress it first"
            raise DataError(f"{path}: is {kind} data ({fix})")
    if zipped and start and not start.startswith(b"\x1f\x8b"):
        raise DataError(f"{path}: is not gzip data (name it .jsonl if it is plain text)")


def _json_lines(
    path: Path, raw: IO[bytes], errors: Errors, max_bytes: int
) -> Iterator[tuple[int, Any]]:
    """The number and the JSON value of each line that is not empty."""
    zipped = path.name.endswith(".gz")
    stream: IO[bytes] = gzip.GzipFile(fileobj=raw) if zipped else raw  # type: ignore[assignment]
    for number, line in enumerate(_read_lines(path, stream, max_bytes), start=1):
        where = f"{path}:{number}"
        _check_size(where, len(line), max_bytes)
        if number == 1:
            line = line.removeprefix(BOM)
        if line.strip():
            yield number, parse_json(_decode(where, line, errors), str(path), number)


def _read_lines(path: Path, stream: IO[bytes], max_bytes: int) -> Iterator[bytes]:
    """Lines, and of a line that is too long its first `max_bytes` + 1 bytes."""
    try:
        while line := stream.readline(max_bytes + 1):
            yield line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: gzip data is damaged or cut short ({error})") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _check_size(where: str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise DataError(f"{where}: a document of more than {max_bytes:,} bytes (split it)")


def _decode(where: str, data: bytes, errors: Errors) -> str:
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        wrong = f"byte 0x{data[error.start]:02x} at column {error.start + 1}"
        raise DataError(f"{where}: {wrong} is not UTF-8 (use --errors replace)") from None


def _decode_plain(path: Path, data: bytes, errors: Errors) -> str:
    """The text of a .txt file; its lines are looked at one by one only to say where it is wrong."""
    if (at := data.find(b"\0")) >= 0:
        where = f"{path}:{data.count(NEWLINE, 0, at) + 1}"
        raise DataError(f"{where}: byte 0x00 at offset {at} is not text (UTF-16, or binary?)")
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        begin = data.rfind(NEWLINE, 0, error.start) + 1
        where = f"{path}:{data.count(NEWLINE, 0, begin) + 1}"
        return _decode(where, data[begin:].split(NEWLINE, 1)[0], errors)


def _text_of(where: str, entry: Any, json_key: str, errors: Errors) -> str:
    """The text of one line's object."""
    if not isinstance(entry, dict):
        rule = f'expected an object with field "{json_key}"'
        raise DataError(f"{where}: the line is {kind_of(entry)}, {rule}")
    if json_key not in entry:
        has = ", ".join(quote(key) for key in list(entry)[:5]) or "none"
        fix = f"fields: {has}; choose one with --json-key"
        raise DataError(f'{where}: no field "{json_key}" ({fix})')
    text = entry[json_key]
    if not isinstance(text, str):
        rule = f"is {kind_of(text)}, expected a string"
        raise DataError(f'{where}: field "{json_key}" {rule}')
    clean = replace_surrogates(text)
    if clean != text and errors == "strict":
        rule = "has half a surrogate pair (use --errors replace)"
        raise DataError(f'{where}: field "{json_key}" {rule}')
    return clean
