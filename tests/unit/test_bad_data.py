"""Damaged text, tokens and tokenizers at the front door: one line, exit code 3, nothing left.

Each row makes files, runs a command and names the whole line. What the functions behind it refuse
in detail is tested in tests/unit/data/.
"""

import gzip
import json
import signal

import numpy as np
import pytest

from megalite import __main__ as front
from megalite.data.indexed import HEADER, IndexedWriter
from tests.unit.data.samples import make_tokenizer

DATA = 3
VOCAB = 600


def preprocess(name):
    return f"preprocess --input {name} --tokenizer good.json --out out/data --workers 1"


def train(name):
    return f"tokenizer train --input {name} --out out/tokenizer.json --vocab-size 300"


def pretrain(prefix, more=""):
    return (
        f"pretrain --data {prefix} --out out --vocab-size {VOCAB} --seq-len 8 --device cpu "
        f"--hidden-size 8 --num-heads 1 --num-layers 1 {more}"
    )


# (file, its bytes, the line); each goes through preprocess and through tokenizer train.
TEXT = [
    ("absent.txt", None, "absent.txt: no such file or directory"),
    ("empty.txt", b"", "empty.txt: no text inside"),
    ("empty.jsonl", b"\n\n", "empty.jsonl: no text inside"),
    ("x.csv", b"a", "x.csv: cannot tell what it holds (name it .txt, .jsonl or .jsonl.gz)"),
    ("x.txt", b"ab\nc\xff", "x.txt:2: byte 0xff at column 2 is not UTF-8 (use --errors replace)"),
    ("x.txt", b"\xff\xfea\0", "x.txt:1: byte 0x00 at offset 3 is not text (UTF-16, or binary?)"),
    ("x.txt", gzip.compress(b"ab"), "x.txt: is gzip data (decompress it first)"),
    ("x.jsonl", gzip.compress(b"ab"), "x.jsonl: is gzip data (name it .jsonl.gz)"),
    ("x.jsonl", b"\x28\xb5\x2f\xfdab", "x.jsonl: is zstd data (decompress it first)"),
    ("x.jsonl.gz", b"{}", "x.jsonl.gz: is not gzip data (name it .jsonl if it is plain text)"),
    ("x.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:-12], "x.jsonl.gz: gzip data is damaged "
     "or cut short (Compressed file ended before the end-of-stream marker was reached)"),
    ("x.jsonl", b'{"text": "a"}\n{"text": 3}',
     'x.jsonl:2: field "text" is a number, expected a string'),
    ("x.jsonl", b'{"text": null}', 'x.jsonl:1: field "text" is null, expected a string'),
    ("x.jsonl", b'{"body": "a"}',
     'x.jsonl:1: no field "text" (fields: "body"; choose one with --json-key)'),
    ("x.jsonl", b'["a"]', 'x.jsonl:1: the line is a list, expected an object with field "text"'),
    ("x.jsonl", b'{"text": "a"', "x.jsonl:1: not JSON: Expecting ',' delimiter at column 13"),
    ("x.jsonl", b'{"text": "\\ud800"}',
     'x.jsonl:1: field "text" has half a surrogate pair (use --errors replace)'),
    ("x.jsonl", b'{"text": "a\xff"}',
     "x.jsonl:1: byte 0xff at column 12 is not UTF-8 (use --errors replace)"),
]  # fmt: skip


def edit(change):
    """The good tokenizer with one change."""

    def made(tree):
        change(tree)
        return json.dumps(tree)

    return made


def drop_id(tree):
    del tree["model"]["vocab"][next(t for t, i in tree["model"]["vocab"].items() if i == 400)]


# (how tokenizer.json is made from the good one, the line)
TOKENIZERS = [
    (lambda tree: "", "bad.json:1: not JSON: Expecting value at column 1"),
    (lambda tree: "[]", "bad.json: model: not found (is this a tokenizer.json?)"),
    (edit(lambda t: t["model"].update(type="Unigram")),
     'bad.json: model.type: "Unigram" is not supported (only BPE)'),
    (edit(lambda t: t["model"]["merges"].insert(0, ["a", "qqq"])),
     'bad.json: model.merges[0]: "a qqq" joins "qqq", which is not in the vocabulary'),
    (edit(lambda t: t["model"]["merges"].insert(0, ["a", "~"])),
     'bad.json: model.merges[0]: "a ~" produces "a~", which is not in the vocabulary'),
    (edit(drop_id),
     "bad.json: model.vocab: no token has id 400 (ids of 599 tokens must be 0 to 598)"),
    (edit(lambda t: t["model"]["vocab"].update(a=True)),
     'bad.json: model.vocab: id true of "a" is not a whole number'),
    (edit(lambda t: t.update(normalizer={"type": "NFC"})),
     "bad.json: normalizer: is not supported (only null: it would change the text)"),
    (edit(lambda t: t.update(added_tokens=[])),
     "bad.json: added_tokens: <|endoftext|> is missing (it ends every document)"),
    (edit(lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(")),
     "bad.json: pre_tokenizer: pattern is not a regular expression (missing ) at position 1)"),
]  # fmt: skip

HEAD = HEADER.size

# (how (.idx, .bin) are made from good ones, the line)
INDEXES = [
    (lambda i, b: (b"NOTANIDX" + i[8:], b),
     "bad.idx: is not an index of token ids (it does not begin with MMIDIDX)"),
    (lambda i, b: (i[:20], b), "bad.idx: 20 bytes is less than a header of 34 (truncated copy?)"),
    (lambda i, b: (i[:-8], b), "bad.idx: 4 sequences and 4 documents need 122 bytes but it has 114 "
     "(truncated copy?)"),
    (lambda i, b: (i[:9] + b"\x02" + i[10:], b),
     "bad.idx: version 2, expected 1 (written by another program?)"),
    (lambda i, b: (i[:17] + b"\x07" + i[18:], b), "bad.idx: dtype code 7 is not one of token ids "
     "(1 uint8, 2 int8, 3 int16, 4 int32, 5 int64, 8 uint16)"),
    (lambda i, b: (i, b[:-2]), "bad.idx: needs 80 bytes of tokens but bad.bin has 78 "
     "(truncated copy?)"),
    (lambda i, b: (i, b + b"\0\0"),
     "bad.idx: needs 80 bytes of tokens but bad.bin has 82 (index of another .bin?)"),
    (lambda i, b: (i[:HEAD] + b"\xff\xff\xff\xff" + i[HEAD + 4 :], b),
     "bad.idx: length -1 of sequence 0 is negative"),
    (lambda i, b: (i[: HEAD + 16] + b"\x01" + i[HEAD + 17 :], b), "bad.idx: offset 1 of sequence 0 "
     "should be 0 by the lengths (damaged, or another program's file?)"),
    (lambda i, b: (i[:-8] + b"\x03" + i[-7:], b),
     "bad.idx: document indices do not rise from 0 to 4 (damaged?)"),
    (lambda i, b: (i, b[:20] + b"\xff\xff" + b[22:]),
     "bad.bin: token 65535 at offset 10 >= vocab 600 (other tokenizer?)"),
]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with good.json, good.txt and good.bin/.idx of 4 documents of 10 tokens."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    make_tokenizer(VOCAB).save("good.json")
    (tmp_path / "good.txt").write_text("def a(b): return b\n" * 20)
    with IndexedWriter("good", VOCAB) as writer:
        for first in range(4):
            writer.add_document(np.arange(10) + first)
    # A pretraining run takes the signals over; they are pytest's again afterwards.
    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)


def refused(command, line, here, capfd, code=DATA):
    before = sorted(here.rglob("*"))
    assert front.main(command.split()) == code
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"megalite: error: {line}\n")
    assert sorted(p for p in here.rglob("*") if p.is_file()) == [p for p in before if p.is_file()]


@pytest.mark.parametrize("command", [preprocess, train])
@pytest.mark.parametrize("name, data, line", TEXT, ids=range(len(TEXT)))
def test_bad_text_is_one_line(name, data, line, command, here, capfd):
    if data is not None:
        (here / name).write_bytes(data)
    refused(command(name), line, here, capfd)


def test_directory_without_text_is_one_line(here, capfd):
    (here / "empty").mkdir()
    line = "empty: no .txt, .jsonl or .jsonl.gz file inside"
    refused(preprocess("empty"), line, here, capfd)


@pytest.mark.parametrize("made, line", TOKENIZERS, ids=range(len(TOKENIZERS)))
@pytest.mark.parametrize(
    "command",
    [
        "preprocess --input good.txt --tokenizer bad.json --out out/data",
        "tokenizer show --path bad.json",
        pretrain("good", "--tokenizer bad.json"),
    ],
    ids=["preprocess", "show", "pretrain"],
)
def test_bad_tokenizer_is_one_line(made, line, command, here, capfd):
    tree = json.loads((here / "good.json").read_text())
    (here / "bad.json").write_text(made(tree))
    refused(command, line, here, capfd)


@pytest.mark.parametrize("made, line", INDEXES, ids=range(len(INDEXES)))
def test_bad_tokens_are_one_line(made, line, here, capfd):
    idx, tokens = made((here / "good.idx").read_bytes(), (here / "good.bin").read_bytes())
    (here / "bad.idx").write_bytes(idx)
    (here / "bad.bin").write_bytes(tokens)
    refused(pretrain("bad"), line, here, capfd)


def test_too_little_data_is_one_line(here, capfd):
    line = "good.bin: 40 tokens, one sample needs --seq-len + 1 = 65"
    refused(pretrain("good", "--seq-len 64").replace("--seq-len 8 ", ""), line, here, capfd)


def test_data_of_another_tokenizer_is_one_line(here, capfd):
    ours = make_tokenizer(VOCAB).sha256[:8]
    (here / "good.json").rename(here / "run.json")
    (here / "good.json").write_text(json.dumps({"tokenizer_sha256": "0123456789"}))
    line = (
        f"good: made with tokenizer 01234567, --tokenizer run.json is {ours} "
        "(preprocess the text again with this one)"
    )
    refused(pretrain("good", "--tokenizer run.json"), line, here, capfd)


def test_damaged_facts_beside_the_data_are_one_line(here, capfd):
    (here / "good.json").rename(here / "run.json")
    (here / "good.json").write_text('{"tokenizer_sha256"')
    line = "good.json:1: not JSON: Expecting ':' delimiter at column 20"
    refused(pretrain("good", "--tokenizer run.json"), line, here, capfd)


def test_tokenizer_larger_than_the_model_is_one_line(here, capfd):
    line = "good.json: 600 ids, --vocab-size is 500 (use --vocab-size 600)"
    command = pretrain("synthetic", "--tokenizer good.json").replace("600", "500")
    refused(command, line, here, capfd, code=2)
