"""The tokenizer's file: what is written is read back, and every damage has its one line."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megalite.core.errors import DataError, RunError
from megalite.data import vocabulary as vocabulary_file
from megalite.data.tokenizer import Tokenizer
from megalite.data.vocabulary import PATTERNS, byte_characters, dump_vocabulary, load_vocabulary
from tests.unit.data.samples import make_text, make_tokenizer

Tree = dict[str, Any]


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Relative, so that errors begin with `tokenizer.json`."""
    monkeypatch.chdir(tmp_path)
    return Path("tokenizer.json")


def good_tree() -> Tree:
    return json.loads(dump_vocabulary(make_tokenizer(vocab_size=300).vocabulary))


def changed(change: Callable[[Tree], object]) -> str:
    tree = copy.deepcopy(good_tree())
    change(tree)
    return json.dumps(tree)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_load_returns_what_save_wrote(path: Path, pattern: str) -> None:
    tokenizer = make_tokenizer(pattern=pattern)
    tokenizer.save(path)
    again = Tokenizer.load(path)
    assert again.vocabulary == tokenizer.vocabulary
    assert again.sha256 == tokenizer.sha256
    assert path.read_bytes() == dump_vocabulary(tokenizer.vocabulary)


def test_byte_characters_are_those_of_gpt2() -> None:
    table = byte_characters()
    assert len(set(table)) == 256
    assert (table[ord(" ")], table[ord("\n")], table[ord("A")]) == ("\u0120", "\u010a", "A")
    assert (table[0], table[0x7F], table[0xA0], table[0xAD], table[0xFF]) == tuple(
        "\u0100\u0121\u0142\u0143\u00ff"
    )


def test_file_has_the_keys_of_hugging_face(path: Path) -> None:
    tree = good_tree()
    assert list(tree) == [
        *("version", "truncation", "padding", "added_tokens", "normalizer"),
        *("pre_tokenizer", "post_processor", "decoder", "model"),
    ]
    split, byte_level = tree["pre_tokenizer"]["pretokenizers"]
    assert split["pattern"] == {"Regex": PATTERNS["gpt4"]} and split["behavior"] == "Isolated"
    assert byte_level["use_regex"] is False and byte_level["add_prefix_space"] is False
    assert tree["decoder"]["type"] == "ByteLevel"
    assert tree["added_tokens"][0] == {
        **{"id": 297, "content": "<|endoftext|>", "single_word": False, "lstrip": False},
        **{"rstrip": False, "normalized": False, "special": True},
    }


def test_merges_may_be_spelled_as_one_text(path: Path) -> None:
    def spell(tree: Tree) -> None:
        tree["model"]["merges"] = [" ".join(pair) for pair in tree["model"]["merges"]]

    path.write_text(changed(spell))
    assert load_vocabulary(path) == make_tokenizer(vocab_size=300).vocabulary


def test_lone_byte_level_means_the_pattern_of_gpt2(path: Path) -> None:
    node = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    path.write_text(changed(lambda tree: tree.update(pre_tokenizer=node)))
    assert load_vocabulary(path).pattern == PATTERNS["gpt2"]


def test_special_tokens_may_come_first_and_ids_in_any_order(path: Path) -> None:
    tokenizer = make_tokenizer(vocab_size=300)

    def turn(tree: Tree) -> None:
        vocab = tree["model"]["vocab"]
        tree["model"]["vocab"] = {text: 299 - idx for text, idx in vocab.items()}
        for entry in tree["added_tokens"]:
            entry["id"] = 299 - entry["id"]
            del tree["model"]["vocab"][entry["content"]]

    path.write_text(changed(turn))
    turned = Tokenizer.load(path)
    assert turned.eod == 2
    text = make_text(seed=50)
    assert turned.encode(text) == [299 - idx for idx in tokenizer.encode(text)]
    turned.save(path)
    assert Tokenizer.load(path).sha256 == turned.sha256


def drop_token(tree: Tree, text: str) -> None:
    del tree["model"]["vocab"][text]


def rename_token(tree: Tree, old: str, new: str) -> None:
    tree["model"]["vocab"][new] = tree["model"]["vocab"].pop(old)


MERGE = good_tree()["model"]["merges"][12]
EXPECTED_SPLIT = (
    "pre_tokenizer: expected Split by one Regex, isolated, then ByteLevel without a prefix space"
)
BAD_TREES: dict[str, tuple[Callable[[Tree], object], str]] = {
    "no model": (lambda t: t.pop("model"), "model: not found (is this a tokenizer.json?)"),
    "other model": (
        lambda t: t["model"].update(type="Unigram"),
        'model.type: "Unigram" is not supported (only BPE)',
    ),
    "type is a list": (
        lambda t: t["model"].update(type=["BPE"]),
        "model.type: a list is not supported (only BPE)",
    ),
    "dropout": (
        lambda t: t["model"].update(dropout=0.1),
        "model.dropout: 0.1 is not supported (only null)",
    ),
    "byte fallback": (
        lambda t: t["model"].update(byte_fallback=True),
        "model.byte_fallback: true is not supported (only false)",
    ),
    "normalizer": (
        lambda t: t.update(normalizer={"type": "NFC"}),
        "normalizer: is not supported (only null: it would change the text)",
    ),
    "added tokens a number": (
        lambda t: t.update(added_tokens=3),
        "added_tokens: is missing or not a list",
    ),
    "added token a text": (
        lambda t: t["added_tokens"].insert(1, "x"),
        "added_tokens[1]: is a string, expected an object",
    ),
    "added token without text": (
        lambda t: t["added_tokens"][2].update(content=""),
        'added_tokens[2].content: "" is not a text',
    ),
    "added token of half a surrogate": (
        lambda t: t["added_tokens"][2].update(content="\ud83d"),
        'added_tokens[2].content: "\\ud83d" is not a text',
    ),
    "added id negative": (
        lambda t: t["added_tokens"][0].update(id=-1),
        "added_tokens[0].id: -1 is not a whole number from 0 on",
    ),
    "added id true": (
        lambda t: t["added_tokens"][0].update(id=True),
        "added_tokens[0].id: true is not a whole number from 0 on",
    ),
    "added twice": (
        lambda t: t["added_tokens"].append(t["added_tokens"][1]),
        'added_tokens[3].content: "<|im_start|>" stands twice',
    ),
    "no end of document": (
        lambda t: t["added_tokens"].pop(0),
        "added_tokens: <|endoftext|> is missing (it ends every document)",
    ),
    "vocab a list": (
        lambda t: t["model"].update(vocab=[]),
        "model.vocab: is missing or not an object",
    ),
    "id a text": (
        lambda t: t["model"]["vocab"].update(A="65"),
        'model.vocab: id "65" of "A" is not a whole number',
    ),
    "id not whole": (
        lambda t: t["model"]["vocab"].update(A=65.0),
        'model.vocab: id 65.0 of "A" is not a whole number',
    ),
    "two ids": (
        lambda t: t["model"]["vocab"].update({"<|im_end|>": 3}),
        'model.vocab: "<|im_end|>" has id 3, but 299 in added_tokens',
    ),
    "duplicate id": (
        lambda t: t["model"]["vocab"].update(A=66),
        'model.vocab: id 66 belongs to "A" and to "B"',
    ),
    "hole": (
        lambda t: t["model"]["vocab"].update(A=300),
        "model.vocab: no token has id 65 (ids of 300 tokens must be 0 to 299)",
    ),
    "not spelled in bytes": (
        lambda t: rename_token(t, "A", "\u4f60"),
        'model.vocab: "\\u4f60" is not spelled in byte-level characters',
    ),
    "no token for a byte": (
        lambda t: rename_token(t, "A", "AAAAA"),
        "model.vocab: no token for byte 0x41",
    ),
    "merges missing": (
        lambda t: t["model"].pop("merges"),
        "model.merges: is missing or not a list",
    ),
    "merge of three": (
        lambda t: t["model"]["merges"].insert(12, ["a", "b", "c"]),
        "model.merges[12]: a list is not a pair of tokens",
    ),
    "merge as one word": (
        lambda t: t["model"]["merges"].insert(12, "ab"),
        'model.merges[12]: "ab" is not a pair of tokens',
    ),
    "merge of numbers": (
        lambda t: t["model"]["merges"].insert(12, [1, 2]),
        "model.merges[12]: a list is not a pair of tokens",
    ),
    "merge of an unknown token": (
        lambda t: t["model"]["merges"].insert(12, ["ab", "cd"]),
        'model.merges[12]: "ab cd" joins "ab", which is not in the vocabulary',
    ),
    "merge of a special token": (
        lambda t: t["model"]["merges"].insert(12, ["<|im_end|>", "a"]),
        'model.merges[12]: "<|im_end|> a" joins "<|im_end|>", which is not in the vocabulary',
    ),
    "merge to an unknown token": (
        lambda t: t["model"]["merges"].insert(12, ["Z", "Z"]),
        'model.merges[12]: "Z Z" produces "ZZ", which is not in the vocabulary',
    ),
    "merge twice": (
        lambda t: t["model"]["merges"].append(MERGE),
        f"model.merges[41]: {json.dumps(' '.join(MERGE))} stands twice",
    ),
    "no pre-tokenizer": (
        lambda t: t.update(pre_tokenizer=None),
        "pre_tokenizer: is missing or damaged",
    ),
    "other pre-tokenizer": (
        lambda t: t.update(pre_tokenizer={"type": "Whitespace"}),
        EXPECTED_SPLIT,
    ),
    "prefix space": (
        lambda t: t["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
        EXPECTED_SPLIT,
    ),
    "bad pattern": (
        lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="(a"),
        "pre_tokenizer: pattern is not a regular expression (missing ) at position 2)",
    ),
    "long pattern": (
        lambda t: t["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex="a" * 5000),
        "pre_tokenizer: 5,000 characters, a pattern has 4,096 at most",
    ),
}


@pytest.mark.parametrize("change, line", BAD_TREES.values(), ids=BAD_TREES)
def test_damaged_tree_has_its_line(path: Path, change: Callable[[Tree], object], line: str) -> None:
    path.write_text(changed(change))
    with pytest.raises(DataError) as caught:
        load_vocabulary(path)
    assert str(caught.value) == f"tokenizer.json: {line}"


BAD_BYTES = {
    "empty": (b"", ":1: not JSON: Expecting value at column 1"),
    "cut": (
        dump_vocabulary(make_tokenizer(vocab_size=300).vocabulary)[:100],
        ":7: not JSON: Expecting value at column 12",
    ),
    "list": (b"[]", ": model: not found (is this a tokenizer.json?)"),
    "not UTF-8": (b'{"a": "\xff"}', ": byte 0xff at offset 7 is not UTF-8"),
    "key twice": (b'{"a": 1, "a": 2}', ': bad JSON: "a" stands twice in one object'),
    "NaN": (b'{"a": NaN}', ": bad JSON: NaN is not a number"),
    "deep": (
        b"[" * 100_000,
        ": bad JSON: nested too deep, or a number too long",
    ),
    "long number": (
        b"[" + b"7" * 5000 + b"]",
        ": bad JSON: nested too deep, or a number too long",
    ),
}


@pytest.mark.parametrize("data, line", BAD_BYTES.values(), ids=BAD_BYTES)
def test_damaged_bytes_have_their_line(path: Path, data: bytes, line: str) -> None:
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_vocabulary(path)
    assert str(caught.value) == f"tokenizer.json{line}"


def test_absent_file_directory_and_huge_file_have_their_line(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="^tokenizer.json: no such file .make one with"):
        load_vocabulary(path)
    with pytest.raises(DataError, match="^[.]: is not a file .give the path"):
        load_vocabulary(".")
    make_tokenizer().save(path)
    monkeypatch.setattr(vocabulary_file, "MAX_FILE_BYTES", 1000)
    with pytest.raises(DataError, match="bytes, a tokenizer has 1,000 at most"):
        load_vocabulary(path)


def test_save_leaves_the_old_file_when_it_cannot_write(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path.write_text("old")

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megalite.data.atomic.os.fsync", full)
    with pytest.raises(RunError, match="cannot be written .No space left on device"):
        make_tokenizer().save(path)
    assert [(file.name, file.read_text()) for file in Path().iterdir()] == [(path.name, "old")]


@pytest.mark.parametrize("target", ["file/tokenizer.json", "directory"])
def test_save_to_an_impossible_place_has_a_line(path: Path, target: str) -> None:
    Path("file").write_text("")
    Path("directory").mkdir()
    with pytest.raises(RunError, match=f"^{target}: "):
        make_tokenizer().save(target)
    assert sorted(file.name for file in Path().rglob("*")) == ["directory", "file"]
