"""Token ids on disk: Megatron-LM's `.bin` and `.idx`, byte for byte.

`.bin` holds nothing but ids. `.idx`, little-endian: magic (9 bytes), version u64, dtype code u8,
number of sequences u64, number of document indices u64, then lengths i32, byte offsets i64,
document indices i64 (the sequence each document starts at, and the end). We write one sequence a
document; the reader takes any number. Which sample takes which tokens stands in loader.py.
"""

from __future__ import annotations

import os
import struct
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from megalite.core.errors import DataError, RunError
from megalite.data.atomic import temporary_path

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
# Codes 6 and 7 are floats here and other things in other programs' files; ids are never floats.
DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CHECK_CHUNK = 1 << 24


def dtype_code(vocab_size: int) -> int:
    """uint16 where the ids fit with Megatron-LM's margin, else int32."""
    return 8 if vocab_size < 65500 else 4


class IndexedWriter:
    """Writes `{prefix}.bin` and `.idx`: both when the `with` block ends well, else neither."""

    def __init__(self, prefix: str | os.PathLike[str], vocab_size: int):
        self.bin_path, self.idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self.vocab_size = vocab_size
        self._code = dtype_code(vocab_size)
        self._dtype = np.dtype(DTYPES[self._code]).newbyteorder("<")
        self._lengths = array("i")
        self._bin: IO[bytes]

    def __enter__(self) -> IndexedWriter:
        try:
            self.bin_path.parent.mkdir(parents=True, exist_ok=True)
            self._bin = open(temporary_path(self.bin_path), "wb")
        except OSError as error:
            raise RunError(f"{self.bin_path}: cannot be written ({error.strerror})") from None
        return self

    def add_document(self, ids: Sequence[int] | np.ndarray) -> None:
        """Append one document. Raises DataError on an id outside the vocabulary."""
        tokens = np.asarray(ids)
        if tokens.size and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            wrong = tokens[(tokens < 0) | (tokens >= self.vocab_size)][0]
            place = f"token {wrong} in document {len(self._lengths)}"
            raise DataError(f"{self.bin_path}: {place} is not in 0 to {self.vocab_size - 1}")
        try:
            self._lengths.append(len(tokens))
            self._bin.write(tokens.astype(self._dtype).tobytes())
        except OverflowError:
            raise DataError(
                f"{self.bin_path}: a document of {len(tokens):,} tokens is too long (split it)"
            ) from None
        except OSError as error:
            raise RunError(f"{self.bin_path}: cannot be written ({error.strerror})") from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        temporaries = [temporary_path(self.bin_path), temporary_path(self.idx_path)]
        try:
            if kind is None:
                self._publish(*temporaries)
        except OSError as failure:
            raise RunError(f"{self.bin_path}: cannot be written ({failure.strerror})") from None
        finally:
            # On a full disk closing fails as well, and would hide the error and leave the file.
            with suppress(OSError):
                self._bin.close()
            for path in temporaries:
                path.unlink(missing_ok=True)

    def _publish(self, temporary_bin: Path, temporary_idx: Path) -> None:
        self._bin.flush()
        os.fsync(self._bin.fileno())
        lengths = (
            np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.zeros(0, np.int32)
        )
        with open(temporary_idx, "wb") as idx:
            idx.write(HEADER.pack(MAGIC, 1, self._code, len(lengths), len(lengths) + 1))
            idx.write(lengths.astype("<i4").tobytes())
            idx.write(_offsets(lengths, self._dtype.itemsize)[:-1].astype("<i8").tobytes())
            idx.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            idx.flush()
            os.fsync(idx.fileno())
        # An older index goes first: a run killed between the renames leaves a pair that is refused,
        # not a mixture.
        self.idx_path.unlink(missing_ok=True)
        os.replace(temporary_bin, self.bin_path)
        os.replace(temporary_idx, self.idx_path)


class IndexedDataset:
    """A `.bin/.idx` pair, validated and memory-mapped.

    `tokens` are all ids in one flat array, `lengths` the tokens of each sequence,
    `document_indices` the sequence at which each document starts, with the number of sequences at
    its end.
    """

    def __init__(self, prefix: str | os.PathLike[str]):
        self.prefix = str(prefix)
        self.idx_path, self.bin_path = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        idx_size, bin_size = (
            _file_size(self.idx_path, self.prefix),
            _file_size(self.bin_path, self.prefix),
        )
        code, num_sequences, num_indices = self._read_header(idx_size)
        self.dtype = np.dtype(DTYPES[code]).newbyteorder("<")
        index = np.memmap(self.idx_path, dtype=np.uint8, mode="r")
        begin = HEADER.size
        self.lengths: np.ndarray = np.frombuffer(index, "<i4", num_sequences, begin)
        begin += 4 * num_sequences
        self._pointers: np.ndarray = np.frombuffer(index, "<i8", num_sequences, begin)
        begin += 8 * num_sequences
        self.document_indices: np.ndarray = np.frombuffer(index, "<i8", num_indices, begin)
        self._check_index(self._pointers, bin_size)
        self.tokens: np.ndarray = np.memmap(self.bin_path, dtype=self.dtype, mode="r")

    @property
    def num_documents(self) -> int:
        return len(self.document_indices) - 1

    def document_starts(self, first: int, stop: int) -> np.ndarray:
        """Places in `tokens`, from `first` up to `stop`, at which a document starts, in order.

        An empty document starts where the next one does.
        """
        # Not numpy's search: it copies the whole index, which does not lie at a multiple of 8.
        low, high = (bisect_left(self._pointers, at * self.dtype.itemsize) for at in (first, stop))
        documents = self.document_indices
        here = documents[bisect_left(documents, low) : bisect_left(documents, high)]
        return self._pointers[here] // self.dtype.itemsize

    def check_ids(self, vocab_size: int) -> None:
        """Raise DataError naming the first token outside the vocabulary; reads all, in pieces."""
        for begin in range(0, len(self.tokens), CHECK_CHUNK):
            piece = self.tokens[begin : begin + CHECK_CHUNK]
            if piece.min() < 0 or piece.max() >= vocab_size:
                at = int(np.argmax((piece < 0) | (piece >= vocab_size)))
                rule = "< 0" if piece[at] < 0 else f">= vocab {vocab_size} (other tokenizer?)"
                raise DataError(f"{self.bin_path}: token {piece[at]} at offset {begin + at} {rule}")

    def _read_header(self, size: int) -> tuple[int, int, int]:
        """(dtype code, sequences, document indices), with the file's size proven to fit them."""
        try:
            with open(self.idx_path, "rb") as file:
                head = file.read(HEADER.size)
        except OSError as error:
            raise DataError(f"{self.idx_path}: cannot be read ({error.strerror})") from None
        if not head.startswith(MAGIC[: len(head)]) or len(head) < len(MAGIC):
            raise DataError(
                f"{self.idx_path}: is not an index of token ids (it does not begin with MMIDIDX)"
            )
        if len(head) < HEADER.size:
            rule = f"{size} bytes is less than a header of {HEADER.size}"
            raise DataError(f"{self.idx_path}: {rule} (truncated copy?)")
        _, version, code, num_sequences, num_indices = HEADER.unpack(head)
        if version != 1:
            hint = "big-endian file" if version == 1 << 56 else "written by another program?"
            raise DataError(f"{self.idx_path}: version {version}, expected 1 ({hint})")
        if code not in DTYPES:
            known = ", ".join(f"{code} {np.dtype(dtype)}" for code, dtype in DTYPES.items())
            raise DataError(f"{self.idx_path}: dtype code {code} is not one of token ids ({known})")
        needs = HEADER.size + 12 * num_sequences + 8 * num_indices
        if size == needs + num_sequences and num_sequences:
            raise DataError(
                f"{self.idx_path}: has a mode for each sequence (multimodal data is not supported)"
            )
        if size != needs:
            claim = f"{num_sequences:,} sequences and {num_indices - 1:,} documents"
            rule = f"{claim} need {needs:,} bytes but it has {size:,}"
            what = "truncated copy?" if size < needs else "damaged?"
            raise DataError(f"{self.idx_path}: {rule} ({what})")
        if not num_sequences or num_indices < 2:
            raise DataError(f"{self.idx_path}: holds no documents")
        return code, num_sequences, num_indices

    def _check_index(self, pointers: np.ndarray, bin_size: int) -> None:
        if (wrong := np.flatnonzero(self.lengths < 0)).size:
            k = wrong[0]
            raise DataError(
                f"{self.idx_path}: length {self.lengths[k]} of sequence {k} is negative"
            )
        offsets = _offsets(self.lengths, self.dtype.itemsize)
        if (wrong := np.flatnonzero(pointers != offsets[:-1])).size:
            k = wrong[0]
            rule = f"offset {pointers[k]} of sequence {k} should be {offsets[k]} by the lengths"
            raise DataError(f"{self.idx_path}: {rule} (damaged, or another program's file?)")
        if offsets[-1] != bin_size:
            what = "truncated copy?" if bin_size < offsets[-1] else "index of another .bin?"
            rule = f"needs {offsets[-1]:,} bytes of tokens but {self.bin_path} has {bin_size:,}"
            raise DataError(f"{self.idx_path}: {rule} ({what})")
        if not bin_size:
            raise DataError(f"{self.bin_path}: holds no tokens")
        starts = self.document_indices
        if starts[0] != 0 or starts[-1] != len(self.lengths) or (np.diff(starts) < 0).any():
            rule = f"document indices do not rise from 0 to {len(self.lengths)}"
            raise DataError(f"{self.idx_path}: {rule} (damaged?)")


def _offsets(lengths: np.ndarray, itemsize: int) -> np.ndarray:
    """Byte offset at which each sequence begins, and the end: one more than there are lengths."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, dtype=np.int64, out=offsets[1:])
    return offsets * itemsize


def _file_size(path: Path, prefix: str) -> int:
    if not os.path.isfile(path):
        hint = "is a directory" if path.is_dir() else "no such file"
        fix = (
            f"give the prefix {prefix[:-4]}"
            if prefix.endswith((".bin", ".idx"))
            else "make it with `megalite preprocess`"
        )
        raise DataError(f"{path}: {hint} ({fix})")
    return path.stat().st_size
