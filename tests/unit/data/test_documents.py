"""What counts as a document, and the line of each file that is not one."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megalite.core.errors import DataError
from megalite.data.documents import find_inputs, read_documents
from megalite.data.strict_json import parse_json


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths, so that errors begin with the file's name."""
    monkeypatch.chdir(tmp_path)


def read(path: str, **options: object) -> list[str]:
    return list(read_documents(find_inputs(path), **options))


def test_txt_is_one_document_as_it_stands() -> None:
    Path("x.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo \xc3\xa9")
    assert read("x.txt") == ["one\r\n\r\ntwo \u00e9"]


LINES = b'{"text": "one"}\r\n\n  \n{"id": 7, "text": "two\\nlines"}\n{"text": ""}\n{"text": "end"}'


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "BOM"])
def test_jsonl_is_a_document_a_line(start: bytes) -> None:
    Path("x.jsonl").write_bytes(start + LINES)
    Path("x.jsonl.gz").write_bytes(gzip.compress(start + LINES))
    assert read("x.jsonl") == read("x.jsonl.gz") == ["one", "two\nlines", "end"]


def test_other_field_by_json_key() -> None:
    Path("x.jsonl").write_text('{"text": 3, "body": "here"}')
    assert read("x.jsonl", json_key="body") == ["here"]


def test_directory_is_read_in_order_of_paths() -> None:
    Path("d/b").mkdir(parents=True)
    Path("d/b/a.txt").write_text("third")
    Path("d/a.txt").write_text("first")
    Path("d/a.jsonl").write_text('{"text": "zeroth"}')
    Path("d/b.md").write_text("not read")
    assert read("d") == ["zeroth", "first", "third"]


def test_bytes_of_the_files_are_told() -> None:
    Path("x.jsonl").write_bytes(LINES)
    Path("y.txt").write_bytes(b"12345")
    told: list[int] = []
    list(read_documents([Path("x.jsonl"), Path("y.txt")], advance=told.append))
    assert told == [17, 36, 13, 15, 5] and sum(told) == len(LINES) + 5


@settings(deadline=None)
@given(texts=st.lists(st.text(min_size=1), min_size=1))
def test_any_texts_come_back(texts: list[str]) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=len(text) % 2 == 0) for text in texts]
    Path("x.jsonl").write_bytes("\n".join(lines).encode())
    assert read("x.jsonl") == texts


def test_errors_replace_takes_damaged_text() -> None:
    Path("x.txt").write_bytes(b"a\xffb")
    Path("x.jsonl").write_bytes(b'{"text": "a\xffb"}\n{"text": "a\\ud83db"}')
    assert read("x.txt", errors="replace") == ["a\ufffdb"]
    assert read("x.jsonl", errors="replace") == ["a\ufffdb", "a\ufffdb"]


def jsonl(data: bytes) -> Callable[[], object]:
    return lambda: Path("x.jsonl").write_bytes(b'{"text": "fine"}\n' + data)


def file(name: str, data: bytes) -> Callable[[], object]:
    return lambda: Path(name).write_bytes(data)


BAD: dict[str, tuple[str, Callable[[], object], str]] = {
    "missing": ("x.txt", lambda: None, "x.txt: no such file or directory"),
    "empty name": ("", lambda: None, "--input is empty (name a file or directory)"),
    "other suffix": (
        "x.csv",
        file("x.csv", b"a,b"),
        "x.csv: cannot tell what it holds (name it .txt, .jsonl or .jsonl.gz)",
    ),
    "directory without": (
        "d",
        lambda: Path("d").mkdir(),
        "d: no .txt, .jsonl or .jsonl.gz file inside",
    ),
    "pipe": ("x.txt", lambda: os.mkfifo("x.txt"), "x.txt: is not a regular file"),
    "empty txt": ("x.txt", file("x.txt", b""), "x.txt: no text inside"),
    "empty jsonl": ("x.jsonl", file("x.jsonl", b"\n \n"), "x.jsonl: no text inside"),
    "empty gz": ("x.jsonl.gz", file("x.jsonl.gz", b""), "x.jsonl.gz: no text inside"),
    "gz named txt": (
        "x.txt",
        file("x.txt", gzip.compress(b"text")),
        "x.txt: is gzip data (decompress it first)",
    ),
    "gz named jsonl": (
        "x.jsonl",
        file("x.jsonl", gzip.compress(LINES)),
        "x.jsonl: is gzip data (name it .jsonl.gz)",
    ),
    "zstd named txt": (
        "x.txt",
        file("x.txt", b"\x28\xb5\x2f\xfd\0\0"),
        "x.txt: is zstd data (decompress it first)",
    ),
    "text named gz": (
        "x.jsonl.gz",
        file("x.jsonl.gz", LINES),
        "x.jsonl.gz: is not gzip data (name it .jsonl if it is plain text)",
    ),
    "cut gz": (
        "x.jsonl.gz",
        file("x.jsonl.gz", gzip.compress(LINES)[:-9]),
        "x.jsonl.gz: gzip data is damaged or cut short "
        "(Compressed file ended before the end-of-stream marker was reached)",
    ),
    "damaged gz": (
        "x.jsonl.gz",
        file("x.jsonl.gz", gzip.compress(LINES)[:-8] + bytes(8)),
        "x.jsonl.gz: gzip data is damaged or cut short (CRC check failed 0x0 != ",
    ),
    "NUL in txt": (
        "x.txt",
        file("x.txt", "one\ntwo".encode("utf-16-le")),
        "x.txt:1: byte 0x00 at offset 1 is not text (UTF-16, or binary?)",
    ),
    "txt not UTF-8": (
        "x.txt",
        file("x.txt", b"one\ntwo \xe2\x82\nthree"),
        "x.txt:2: byte 0xe2 at column 5 is not UTF-8 (use --errors replace)",
    ),
    "jsonl not UTF-8": (
        "x.jsonl",
        jsonl(b'{"text": "ab\xff"}'),
        "x.jsonl:2: byte 0xff at column 13 is not UTF-8 (use --errors replace)",
    ),
    "bad JSON": (
        "x.jsonl",
        jsonl(b'{"text" "a"}'),
        "x.jsonl:2: not JSON: Expecting ':' delimiter at column 9",
    ),
    "cut line": (
        "x.jsonl",
        jsonl(b'{"text": "a'),
        "x.jsonl:2: not JSON: Unterminated string starting at at column 10",
    ),
    "raw NUL": (
        "x.jsonl",
        jsonl(b'{"text": "a\0"}'),
        "x.jsonl:2: not JSON: Invalid control character at at column 12",
    ),
    "NaN": (
        "x.jsonl",
        jsonl(b'{"text": "a", "score": NaN}'),
        "x.jsonl:2: bad JSON: NaN is not a number",
    ),
    "field twice": (
        "x.jsonl",
        jsonl(b'{"text": "a", "text": "b"}'),
        'x.jsonl:2: bad JSON: "text" stands twice in one object',
    ),
    "deep": (
        "x.jsonl",
        jsonl(b"[" * 200_000),
        "x.jsonl:2: bad JSON: nested too deep, or a number too long",
    ),
    "long number": (
        "x.jsonl",
        jsonl(b'{"text": ' + b"9" * 5000 + b"}"),
        "x.jsonl:2: bad JSON: nested too deep, or a number too long",
    ),
    "a list": (
        "x.jsonl",
        jsonl(b'["text"]'),
        'x.jsonl:2: the line is a list, expected an object with field "text"',
    ),
    "null": (
        "x.jsonl",
        jsonl(b"null"),
        'x.jsonl:2: the line is null, expected an object with field "text"',
    ),
    "no field": (
        "x.jsonl",
        jsonl(b'{"id": 1, "body": "a"}'),
        'x.jsonl:2: no field "text" (fields: "id", "body"; choose one with --json-key)',
    ),
    "a number": (
        "x.jsonl",
        jsonl(b'{"text": 7}'),
        'x.jsonl:2: field "text" is a number, expected a string',
    ),
    "half a surrogate": (
        "x.jsonl",
        jsonl(b'{"text": "a\\ud83d"}'),
        'x.jsonl:2: field "text" has half a surrogate pair (use --errors replace)',
    ),
    "long line": (
        "x.jsonl",
        jsonl(b'{"text": "' + b"a" * 300_000 + b'"}'),
        "x.jsonl:2: a document of more than 250,000 bytes (split it)",
    ),
    "long txt": (
        "x.txt",
        file("x.txt", b"a" * 250_001),
        "x.txt: a document of more than 250,000 bytes (split it)",
    ),
}


@pytest.mark.parametrize("path, make, line", BAD.values(), ids=BAD)
def test_bad_input_has_its_line(path: str, make: Callable[[], object], line: str) -> None:
    make()
    with pytest.raises(DataError) as caught:
        read(path, max_bytes=250_000)
    text = str(caught.value)
    assert text.startswith(line) if line.endswith("!= ") else text == line
    assert "\n" not in text


def test_file_that_grows_while_it_is_read_is_refused() -> None:
    Path("x.jsonl").write_bytes(LINES)
    texts = read_documents(find_inputs("x.jsonl"))
    assert next(texts) == "one"
    with open("x.jsonl", "ab") as more:
        more.write(b'\n{"text": "late"}')
    with pytest.raises(DataError, match="^x.jsonl: changed while it was read"):
        list(texts)


def test_unreadable_file_has_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    Path("x.txt").write_text("a")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="^x.txt: cannot be read .Permission denied.$"):
        read("x.txt")


@settings(deadline=None)
@given(text=st.text('{}[]",:0123456789.-+eEaltrufsn\\\n \ud83d'))
def test_parse_json_gives_a_value_or_one_line(text: str) -> None:
    try:
        value = parse_json(text, "x.json")
    except DataError as error:
        assert str(error).startswith("x.json:") and "\n" not in str(error)
    else:
        assert value == json.loads(text)
