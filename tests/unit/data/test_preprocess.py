"""Text in, a dataset of four files out."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megalite.core.errors import DataError, UserError
from megalite.data.indexed import IndexedDataset
from megalite.data.preprocess import PreprocessArgs, preprocess
from megalite.data.tokenizer import Tokenizer
from tests.unit.data.samples import make_text, make_tokenizer

TEXTS = [make_text(seed) for seed in range(100, 106)]


@pytest.fixture(autouse=True)
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_tokenizer().save("tokenizer.json")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    Path("x.jsonl").write_text("\n".join(lines))


def run(**changes: Any) -> IndexedDataset:
    preprocess(PreprocessArgs(**{"input": "x.jsonl", "out": "out/x", "workers": 1, **changes}))
    return IndexedDataset("out/x")


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_dataset_decodes_to_the_texts(num_workers: int) -> None:
    data = run(workers=num_workers)
    tokenizer = Tokenizer.load("out/x.tokenizer.json")
    text = tokenizer.decode(data.tokens.tolist())
    assert text == "".join(f"{text}<|endoftext|>" for text in TEXTS)
    assert data.num_documents == len(TEXTS)
    data.check_ids(tokenizer.vocab_size)


def test_documents_end_with_eod_unless_told_otherwise() -> None:
    tokenizer = make_tokenizer()
    ends = run().lengths.cumsum() - 1
    assert (IndexedDataset("out/x").tokens[ends] == tokenizer.eod).all()
    assert tokenizer.eod not in run(append_eod=False).tokens


def test_index_has_a_document_start_after_each_end_of_text() -> None:
    data = run()
    (ends,) = np.nonzero(data.tokens == make_tokenizer().eod)
    starts = data.document_starts(0, len(data.tokens))
    assert starts.tolist() == [0, *(ends[:-1] + 1)] and len(starts) == len(TEXTS)
    # Without the token the borders are the same texts'.
    plain = run(append_eod=False)
    expected = starts - np.arange(len(TEXTS))
    assert plain.document_starts(0, len(plain.tokens)).tolist() == expected.tolist()


def test_meta_says_what_training_needs(capsys: pytest.CaptureFixture[str]) -> None:
    data = run()
    meta = json.loads(Path("out/x.json").read_text())
    whole = "".join(TEXTS).encode()
    size = meta.pop("gzip_bytes")
    assert meta == {
        "source": "x.jsonl",
        "documents": 6,
        "tokens": len(data.tokens),
        "text_bytes": len(whole),
        "vocab_size": 600,
        "tokenizer_sha256": make_tokenizer().sha256,
        "append_eod": True,
    }
    assert abs(size - len(gzip.compress(whole, 9, mtime=0))) <= 0.01 * size
    ratio = len(whole) / len(data.tokens)
    line = f"out/x: 6 documents, {len(data.tokens):,} tokens, {ratio:.2f} bytes a token\n"
    assert capsys.readouterr().out == line


def test_tokenizer_beside_the_data_is_the_tokenizer() -> None:
    run()
    assert Path("out/x.tokenizer.json").read_bytes() == Path("tokenizer.json").read_bytes()


def test_bad_input_leaves_no_output() -> None:
    with Path("x.jsonl").open("a") as file:
        file.write('\n{"text": 7}')
    with pytest.raises(DataError, match='^x.jsonl:7: field "text" is a number'):
        run()
    assert list(Path("out").iterdir()) == []


def test_bad_input_leaves_the_old_output() -> None:
    run()
    before = {path: path.read_bytes() for path in Path("out").iterdir()}
    assert len(before) == 4
    with pytest.raises(DataError, match='^x.jsonl:1: no field "body"'):
        run(json_key="body")
    assert {path: path.read_bytes() for path in Path("out").iterdir()} == before


def test_failed_writer_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    fork = os.fork

    def record() -> int:
        started.append(fork())
        return started[-1]

    def fail(*args: object) -> None:
        raise DataError("full")

    monkeypatch.setattr("megalite.data.workers.os.fork", record)
    monkeypatch.setattr("megalite.data.preprocess.IndexedWriter.add_document", fail)
    with pytest.raises(DataError, match="full"):
        run(workers=2)
    assert len(started) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


@pytest.mark.parametrize(
    "change, line",
    [
        ({"workers": -1}, "--workers -1: must be 0 (one a core) or more"),
        ({"out": "."}, "--out .: is a directory, expected a prefix such as train"),
        ({"out": "new/"}, "--out new/: is a directory, expected a prefix such as new/train"),
        (
            {"tokenizer": "no.json"},
            "no.json: no such file (make one with `megalite tokenizer train`)",
        ),
    ],
)
def test_bad_arguments_have_their_line(change: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as caught:
        run(**change)
    assert str(caught.value) == line
