"""Megatron-LM's bytes, and the line of each damage."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.core.errors import DataError, RunError
from megalite.data import indexed
from megalite.data.indexed import HEADER, MAGIC, IndexedDataset, IndexedWriter

# Documents [1, 2, 3] and [4, 5] as uint16.
GOLDEN_IDX = bytes.fromhex(
    "4d4d49444944580000"
    "0100000000000000"
    "08"
    "0200000000000000"
    "0300000000000000"
    "03000000"
    "02000000"
    "0000000000000000"
    "0600000000000000"
    "0000000000000000"
    "0100000000000000"
    "0200000000000000"
)
GOLDEN_BIN = bytes.fromhex("01000200030004000500")


@pytest.fixture
def golden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pair x.idx, x.bin in the working directory."""
    monkeypatch.chdir(tmp_path)
    Path("x.idx").write_bytes(GOLDEN_IDX)
    Path("x.bin").write_bytes(GOLDEN_BIN)
    return Path("x")


def test_writer_gives_megatrons_bytes(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", vocab_size=100) as writer:
        writer.add_document([1, 2, 3])
        writer.add_document(np.array([4, 5]))
    assert (tmp_path / "x.idx").read_bytes() == GOLDEN_IDX
    assert len(GOLDEN_IDX) == 82
    assert (tmp_path / "x.bin").read_bytes() == GOLDEN_BIN


def test_reader_takes_megatrons_bytes(golden: Path) -> None:
    data = IndexedDataset(golden)
    assert data.tokens.tolist() == [1, 2, 3, 4, 5]
    assert data.lengths.tolist() == [3, 2]
    assert data.document_indices.tolist() == [0, 1, 2]
    assert data.num_documents == 2


@pytest.mark.parametrize("code, dtype", indexed.DTYPES.items())
def test_reader_takes_every_dtype_of_ids(golden: Path, code: int, dtype: type) -> None:
    item = np.dtype(dtype).itemsize
    idx = bytearray(GOLDEN_IDX)
    idx[17] = code
    idx[50:58] = struct.pack("<q", 3 * item)
    golden.with_suffix(".idx").write_bytes(idx)
    np.array([1, 2, 3, 4, 5], dtype).tofile("x.bin")
    assert IndexedDataset(golden).tokens.tolist() == [1, 2, 3, 4, 5]


def test_documents_of_several_sequences_are_read(golden: Path) -> None:
    header = HEADER.pack(MAGIC, 1, 8, 2, 2)
    golden.with_suffix(".idx").write_bytes(header + GOLDEN_IDX[34:58] + struct.pack("<qq", 0, 2))
    data = IndexedDataset(golden)
    assert data.num_documents == 1 and data.lengths.tolist() == [3, 2]


def write_index(prefix: Path, lengths: list[int], documents: list[int]) -> list[int]:
    """A pair of these sequences and document indices; gives each document's first token."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype("<i8")
    header = HEADER.pack(MAGIC, 1, 4, len(lengths), len(documents))
    parts = (np.array(lengths, "<i4"), 4 * starts[:-1], np.array(documents, "<i8"))
    prefix.with_suffix(".idx").write_bytes(header + b"".join(part.tobytes() for part in parts))
    np.arange(starts[-1], dtype="<i4").tofile(prefix.with_suffix(".bin"))
    return [int(starts[sequence]) for sequence in documents[:-1]]


@pytest.mark.parametrize(
    "lengths, documents",
    [
        ([3, 1, 1, 7, 2], [0, 1, 2, 3, 4, 5]),  # as we write them
        ([3, 1, 1, 7, 2], [0, 2, 5]),  # several sequences a document
        ([0, 3, 0, 0, 4, 2, 0], [0, 1, 2, 3, 4, 5, 6, 7]),  # empty documents
        ([0, 3, 0, 4, 0, 2], [0, 2, 2, 4, 6, 6]),  # empty sequences, documents of none
    ],
)
def test_document_starts_of_any_range_are_those_of_the_index(
    tmp_path: Path, lengths: list[int], documents: list[int]
) -> None:
    total = sum(lengths)
    starts = write_index(tmp_path / "x", lengths, documents)
    data = IndexedDataset(tmp_path / "x")
    for first in range(total + 1):
        for stop in range(first, total + 1):
            found = data.document_starts(first, stop).tolist()
            assert found == sorted(found)
            assert set(found) == {at for at in starts if first <= at < stop}, (first, stop)


@pytest.mark.parametrize("vocab_size, dtype", [(65499, "uint16"), (65500, "int32")])
def test_vocabulary_decides_the_dtype(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    with IndexedWriter(tmp_path / "x", vocab_size) as writer:
        writer.add_document([vocab_size - 1])
    data = IndexedDataset(tmp_path / "x")
    assert (data.dtype.name, data.tokens.tolist()) == (dtype, [vocab_size - 1])


@settings(deadline=None, max_examples=20)
@given(documents=st.lists(st.lists(st.integers(0, 69_999), max_size=9), min_size=1, max_size=9))
def test_documents_come_back(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]]
) -> None:
    documents = [*documents, [7]]
    prefix = tmp_path_factory.mktemp("pair") / "x"
    with IndexedWriter(prefix, vocab_size=70_000) as writer:
        for ids in documents:
            writer.add_document(ids)
    data = IndexedDataset(prefix)
    ends = np.cumsum(data.lengths)
    assert [piece.tolist() for piece in np.split(data.tokens, ends[:-1])] == documents
    assert data.num_documents == len(documents)


@pytest.mark.parametrize("wrong", [-1, 100])
def test_writer_refuses_ids_outside_and_leaves_nothing(tmp_path: Path, wrong: int) -> None:
    refusal = pytest.raises(DataError, match=f"token {wrong} in document 1 is not in 0 to 99")
    with refusal, IndexedWriter(tmp_path / "x", vocab_size=100) as writer:
        writer.add_document([1, 2])
        writer.add_document([3, wrong])
    assert list(tmp_path.iterdir()) == []


def test_failed_writer_leaves_the_old_pair(golden: Path) -> None:
    with pytest.raises(ZeroDivisionError), IndexedWriter(golden, vocab_size=100) as writer:
        writer.add_document([9])
        raise ZeroDivisionError
    assert IndexedDataset(golden).tokens.tolist() == [1, 2, 3, 4, 5]
    assert sorted(file.name for file in Path().iterdir()) == ["x.bin", "x.idx"]


def test_full_disk_is_a_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megalite.data.indexed.os.fsync", full)
    refusal = pytest.raises(RunError, match="x.bin: cannot be written .No space left on device")
    with refusal, IndexedWriter(tmp_path / "x", vocab_size=100) as writer:
        writer.add_document([9])
    assert list(tmp_path.iterdir()) == []


def test_old_index_is_gone_before_the_new_tokens_come(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("megalite.data.indexed.os.replace", die)
    with pytest.raises(KeyboardInterrupt), IndexedWriter(golden, vocab_size=100) as writer:
        writer.add_document([9])
    assert [file.name for file in Path().iterdir()] == ["x.bin"]


def test_disk_that_fills_up_is_a_line_and_leaves_nothing(tmp_path: Path) -> None:
    class Full:
        def __init__(self, file: IO[bytes]):
            self.file = file

        def write(self, data: bytes) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            self.file.close()
            raise OSError(28, "No space left on device")

    refusal = pytest.raises(RunError, match="x.bin: cannot be written .No space left on device")
    with refusal, IndexedWriter(tmp_path / "x", vocab_size=100) as writer:
        writer._bin = Full(writer._bin)
        writer.add_document([9])
    assert list(tmp_path.iterdir()) == []


def test_check_ids_names_the_first_wrong_token(
    golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed, "CHECK_CHUNK", 2)
    data = IndexedDataset(golden)
    data.check_ids(6)
    with pytest.raises(DataError) as caught:
        data.check_ids(4)
    assert str(caught.value) == "x.bin: token 4 at offset 3 >= vocab 4 (other tokenizer?)"


def test_check_ids_names_a_negative_token(golden: Path) -> None:
    idx = bytearray(GOLDEN_IDX)
    idx[17] = 2
    idx[50:58] = struct.pack("<q", 3)
    golden.with_suffix(".idx").write_bytes(idx)
    np.array([1, 2, -3, 4, 5], np.int8).tofile("x.bin")
    with pytest.raises(DataError, match="^x.bin: token -3 at offset 2 < 0$"):
        IndexedDataset(golden).check_ids(100)


def put(at: int, data: bytes) -> Callable[[], object]:
    """Write `data` over the index at byte `at`."""
    return lambda: Path("x.idx").write_bytes(GOLDEN_IDX[:at] + data + GOLDEN_IDX[at + len(data) :])


def index(data: bytes) -> Callable[[], object]:
    return lambda: Path("x.idx").write_bytes(data)


def tokens(data: bytes) -> Callable[[], object]:
    return lambda: Path("x.bin").write_bytes(data)


EMPTY = HEADER.pack(MAGIC, 1, 8, 0, 1) + bytes(8)
DAMAGES: dict[str, tuple[Callable[[], object], str]] = {
    "no index": (
        lambda: Path("x.idx").unlink(),
        "x.idx: no such file (make it with `megalite preprocess`)",
    ),
    "no tokens file": (
        lambda: Path("x.bin").unlink(),
        "x.bin: no such file (make it with `megalite preprocess`)",
    ),
    "directory": (
        lambda: (Path("x.bin").unlink(), Path("x.bin").mkdir()),
        "x.bin: is a directory (make it with `megalite preprocess`)",
    ),
    "magic": (
        put(0, b"GGUF"),
        "x.idx: is not an index of token ids (it does not begin with MMIDIDX)",
    ),
    "nothing": (
        index(b""),
        "x.idx: is not an index of token ids (it does not begin with MMIDIDX)",
    ),
    "half a header": (
        index(GOLDEN_IDX[:20]),
        "x.idx: 20 bytes is less than a header of 34 (truncated copy?)",
    ),
    "version": (
        put(9, b"\2"),
        "x.idx: version 2, expected 1 (written by another program?)",
    ),
    "byte order": (
        put(9, struct.pack(">Q", 1)),
        f"x.idx: version {1 << 56}, expected 1 (big-endian file)",
    ),
    "float ids": (
        put(17, b"\7"),
        "x.idx: dtype code 7 is not one of token ids "
        "(1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16)",
    ),
    "truncated": (
        index(GOLDEN_IDX[:-1]),
        "x.idx: 2 sequences and 2 documents need 82 bytes but it has 81 (truncated copy?)",
    ),
    "longer": (
        index(GOLDEN_IDX + bytes(3)),
        "x.idx: 2 sequences and 2 documents need 82 bytes but it has 85 (damaged?)",
    ),
    "absurd count": (
        put(18, struct.pack("<Q", 1 << 60)),
        f"x.idx: {1 << 60:,} sequences and 2 documents need {34 + 12 * (1 << 60) + 24:,} bytes "
        "but it has 82 (truncated copy?)",
    ),
    "modes": (
        index(GOLDEN_IDX + b"\0\0"),
        "x.idx: has a mode for each sequence (multimodal data is not supported)",
    ),
    "no documents": (index(EMPTY), "x.idx: holds no documents"),
    "negative length": (
        put(34, struct.pack("<i", -3)),
        "x.idx: length -3 of sequence 0 is negative",
    ),
    "offset": (
        put(50, struct.pack("<q", 8)),
        "x.idx: offset 8 of sequence 1 should be 6 by the lengths "
        "(damaged, or another program's file?)",
    ),
    "documents unordered": (
        put(66, struct.pack("<q", 3)),
        "x.idx: document indices do not rise from 0 to 2 (damaged?)",
    ),
    "documents end early": (
        put(74, struct.pack("<q", 1)),
        "x.idx: document indices do not rise from 0 to 2 (damaged?)",
    ),
    "tokens truncated": (
        tokens(GOLDEN_BIN[:-2]),
        "x.idx: needs 10 bytes of tokens but x.bin has 8 (truncated copy?)",
    ),
    "index of another": (
        tokens(GOLDEN_BIN * 2),
        "x.idx: needs 10 bytes of tokens but x.bin has 20 (index of another .bin?)",
    ),
    "no tokens": (
        lambda: (
            tokens(b"")(),
            index(HEADER.pack(MAGIC, 1, 8, 1, 2) + bytes(12) + struct.pack("<qq", 0, 1))(),
        ),
        "x.bin: holds no tokens",
    ),
}


@pytest.mark.parametrize("damage, line", DAMAGES.values(), ids=DAMAGES)
def test_damage_has_its_line(golden: Path, damage: Callable[[], object], line: str) -> None:
    damage()
    with pytest.raises(DataError) as caught:
        IndexedDataset(golden)
    assert str(caught.value) == line


def test_prefix_with_a_suffix_is_explained(golden: Path) -> None:
    with pytest.raises(DataError, match=r"^x.bin.idx: no such file \(give the prefix x\)$"):
        IndexedDataset("x.bin")


@settings(deadline=None)
@given(at=st.integers(0, len(GOLDEN_IDX) - 1), byte=st.integers(0, 255))
def test_any_changed_byte_is_refused_or_changes_no_token(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    prefix = tmp_path_factory.mktemp("pair") / "x"
    changed = GOLDEN_IDX[:at] + bytes([byte]) + GOLDEN_IDX[at + 1 :]
    prefix.with_suffix(".idx").write_bytes(changed)
    prefix.with_suffix(".bin").write_bytes(GOLDEN_BIN)
    try:
        data = IndexedDataset(prefix)
    except DataError as error:
        assert "\n" not in str(error)
    else:
        # int16 for uint16, and an empty document in the middle: nothing else can look right.
        assert changed == GOLDEN_IDX or at in (17, 66)
        assert data.tokens.tolist() == [1, 2, 3, 4, 5]
