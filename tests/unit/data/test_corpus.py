"""The corpus of a small made-up standard library."""

import json
import platform
from collections import Counter
from pathlib import Path

import pytest

from megalite.core.errors import DataError, UserError
from megalite.data import corpus
from megalite.data.corpus import CorpusArgs, build_corpus, choose_held_out, split_document
from tests.unit.data.samples import make_text

FILES = {f"pack/m{k:02d}.py": make_text(seed=k) for k in range(40)}


@pytest.fixture(autouse=True)
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """lib/ with 40 good files, and what must be left out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "SMALL_BYTES", 1000)
    monkeypatch.setattr(corpus, "read_topics", lambda: [("topics/if", "The if statement.\n")])
    others = {
        "copy.py": FILES["pack/m00.py"],
        "blank.py": " \n",
        "notes.txt": "no source",
        "test/a.py": "skipped = 1",
        "pack/tests/b.py": "skipped = 2",
        "site-packages/c.py": "skipped = 3",
    }
    for name, text in {**FILES, **others}.items():
        path = Path("lib", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    Path("lib/latin.py").write_bytes(b"# \xe9")


def read(part: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in Path("out", f"{part}.jsonl").read_text().splitlines()]


def test_corpus_holds_each_source_once(capsys: pytest.CaptureFixture[str]) -> None:
    build_corpus(CorpusArgs(out="out", stdlib="lib"))
    train, valid = read("train"), read("valid")
    texts = {entry["source"]: entry["text"] for entry in train + valid}
    # copy.py comes before its twin, which is the one that is dropped.
    expected = {"copy.py" if name == "pack/m00.py" else name: text for name, text in FILES.items()}
    # Reading source as Python does turns \r\n into \n.
    assert texts == {
        "topics/if": "The if statement.\n",
        **{name: text.replace("\r\n", "\n") for name, text in expected.items()},
    }
    meta = json.loads(Path("out/corpus.json").read_text())
    assert meta["skipped"] == {"duplicate": 1, "empty": 1, "unreadable": 1}
    assert (meta["files"], meta["documents"]) == (42, 41)
    assert meta["bytes"] == sum(len(text.encode()) for text in texts.values())
    assert meta["python"] == platform.python_version()
    assert meta["train"]["documents"] == len(train) and meta["valid"]["documents"] == len(valid)
    assert capsys.readouterr().out == (
        f"out: 41 documents, {meta['bytes'] / 1e6:.2f} MB, {len(valid)} held out, "
        f"Python {meta['python']}, sha256 {meta['sha256'][:12]}\n"
    )


def test_corpus_is_the_same_bytes_every_time() -> None:
    build_corpus(CorpusArgs(out="out", stdlib="lib"))
    first = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    build_corpus(CorpusArgs(out="out", stdlib="lib"))
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == first
    assert sorted(first) == ["corpus.json", "train.jsonl", "valid.jsonl"]


def test_all_pieces_of_a_document_are_on_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "PIECE_BYTES", 200)
    monkeypatch.setattr(split_document, "__defaults__", (200,))
    build_corpus(CorpusArgs(out="out", stdlib="lib"))
    train, valid = ({entry["source"] for entry in read(part)} for part in ("train", "valid"))
    assert valid and not train & valid
    assert max(Counter(entry["source"] for entry in read("train")).values()) > 5


def test_held_out_is_four_percent_and_stable() -> None:
    names = [f"m{k}.py" for k in range(5000)]
    held_out = choose_held_out(names)
    assert 0.03 < len(held_out) / len(names) < 0.05
    assert choose_held_out(names[:2500]) == held_out & set(names[:2500])
    assert len(choose_held_out(["a", "b"])) == 1


@pytest.mark.parametrize("limit", [1, 10, 50, 10_000])
def test_split_keeps_the_text_and_the_lines(limit: int) -> None:
    text = make_text(seed=3)
    pieces = list(split_document(text, limit))
    assert "".join(pieces) == text
    lines = text.splitlines(keepends=True)
    longest = max(len(line.encode()) for line in lines)
    assert all(len(piece.encode()) <= max(limit, longest) for piece in pieces)
    assert all(piece.splitlines(keepends=True)[0] in lines for piece in pieces)


def test_absent_library_is_told_and_topics_stand_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    topics = [(f"topics/{k}", make_text(seed=k)) for k in range(30)]
    monkeypatch.setattr(corpus, "read_topics", lambda: topics)
    build_corpus(CorpusArgs(out="out", stdlib="python311.zip"))
    assert len(read("train")) + len(read("valid")) == 30
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        "corpus: only 0.0 MB of Python source under python311.zip (zipped or stripped?), "
        "going on with it and the language reference"
    )


@pytest.mark.parametrize(
    "args, kind, line",
    [
        (CorpusArgs(out="out"), UserError, "--stdlib: is empty (name a directory)"),
        (CorpusArgs(out="", stdlib="lib"), UserError, "--out: is empty (name a directory)"),
        (
            CorpusArgs(out="out", stdlib="lib/test"),
            DataError,
            "--stdlib lib/test: too few documents (1) to hold one out",
        ),
    ],
)
def test_bad_arguments_have_their_line(
    monkeypatch: pytest.MonkeyPatch, args: CorpusArgs, kind: type[UserError], line: str
) -> None:
    monkeypatch.setattr(corpus, "read_topics", lambda: [])
    with pytest.raises(kind) as caught:
        build_corpus(args)
    assert str(caught.value) == line
    assert not Path("out").exists()
