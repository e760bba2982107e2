"""The plain data of a tokenizer, and its file: Hugging Face's `tokenizer.json`.

The file spells bytes as characters (GPT-2's table: space is U+0120, newline U+010A), lists the
merges in precedence, and holds the pattern that cuts text into words. Here: the record, the writer,
and a reader that refuses a damaged file with one line. How text becomes ids stands in tokenizer.py.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard

import regex

from megalite.core.errors import DataError
from megalite.data.strict_json import kind_of, parse_json, quote

# No word of either pattern can match in two ways, so matching never goes back more than one
# character.
PATTERNS = {
    "gpt4": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}
EOD = "<|endoftext|>"
SPECIAL = (EOD, "<|im_start|>", "<|im_end|>")

MAX_FILE_BYTES = 64 << 20
MAX_PATTERN = 4096
NOT_KNOWN = "which is not in the vocabulary"
MODEL_OPTIONS = {  # what our merging does; a file that asks for anything else means other ids
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


@dataclass(frozen=True)
class Vocabulary:
    """Everything that decides which ids a text becomes."""

    pattern: str
    """Regular expression whose matches are the words."""
    tokens: list[bytes]
    """By id; of a special token its text."""
    merges: list[tuple[int, int, int]]
    """(left, right, made) ids; an earlier merge goes first."""
    special: dict[str, int]
    """Control tokens, which no text encodes to."""


@cache
def byte_characters() -> str:
    """The character that spells each byte: a printable one itself, the others from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


def dump_vocabulary(vocabulary: Vocabulary) -> bytes:
    """The canonical bytes of the file."""
    control = set(vocabulary.special.values())
    spelled = [
        token.decode() if idx in control else token.decode("latin-1").translate(byte_characters())
        for idx, token in enumerate(vocabulary.tokens)
    ]
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": vocabulary.pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    tree = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": idx, "content": text, **flags}
            for text, idx in sorted(vocabulary.special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            **MODEL_OPTIONS,
            "vocab": {text: idx for idx, text in enumerate(spelled)},
            "merges": [[spelled[left], spelled[right]] for left, right, _ in vocabulary.merges],
        },
    }
    return (json.dumps(tree, ensure_ascii=False, indent=2) + "\n").encode()


def load_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary in `path`. Raises DataError naming the file and the field that is wrong."""
    name = str(path)
    tree = parse_json(_read_text(Path(path)), name)
    try:
        return _parse(tree)
    except _Problem as problem:
        raise DataError(f"{name}: {problem}") from None


class _Problem(Exception):
    """What is wrong in the file, as `field: text`."""


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file():
            raise DataError(f"{path}: is not a file (give the path of a tokenizer.json)")
        if (size := path.stat().st_size) > MAX_FILE_BYTES:
            raise DataError(f"{path}: {size:,} bytes, a tokenizer has {MAX_FILE_BYTES:,} at most")
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        fix = "make one with `megalite tokenizer train`"
        raise DataError(f"{path}: no such file ({fix})") from None
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise DataError(f"{path}: {byte} is not UTF-8") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(tree: Any) -> Vocabulary:
    if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
        raise _Problem("model: not found (is this a tokenizer.json?)")
    model = tree["model"]
    if model.get("type") != "BPE":
        raise _Problem(f"model.type: {quote(model.get('type'))} is not supported (only BPE)")
    for option, ours in MODEL_OPTIONS.items():
        # An empty affix is an absent one: older files of GPT-2 have "".
        if (asked := model.get(option) or ours) != ours:
            rule = f"is not supported (only {json.dumps(ours)})"
            raise _Problem(f"model.{option}: {quote(asked)} {rule}")
    if tree.get("normalizer") is not None:
        raise _Problem("normalizer: is not supported (only null: it would change the text)")
    special = _parse_special(tree.get("added_tokens"))
    ids = _parse_ids(model.get("vocab"), special)
    tokens = _parse_tokens(ids, special)
    plain = {text: idx for text, idx in ids.items() if text not in special}
    return Vocabulary(
        pattern=_parse_pattern(tree.get("pre_tokenizer")),
        tokens=tokens,
        merges=_parse_merges(model.get("merges"), plain),
        special=special,
    )


def _parse_special(added: Any) -> dict[str, int]:
    if not isinstance(added, list):
        raise _Problem("added_tokens: is missing or not a list")
    special: dict[str, int] = {}
    for k, entry in enumerate(added):
        where = f"added_tokens[{k}]"
        if not isinstance(entry, dict):
            raise _Problem(f"{where}: is {kind_of(entry)}, expected an object")
        text, idx = entry.get("content"), entry.get("id")
        if not isinstance(text, str) or not text or not _has_bytes(text):
            raise _Problem(f"{where}.content: {quote(text)} is not a text")
        if not _is_id(idx):
            raise _Problem(f"{where}.id: {quote(idx)} is not a whole number from 0 on")
        if text in special:
            raise _Problem(f"{where}.content: {quote(text)} stands twice")
        special[text] = idx
    if EOD not in special:
        raise _Problem(f"added_tokens: {EOD} is missing (it ends every document)")
    return special


def _parse_ids(vocab: Any, special: dict[str, int]) -> dict[str, int]:
    """The id of every token by its spelling; together they are 0, 1, 2 ... each once."""
    if not isinstance(vocab, dict):
        raise _Problem("model.vocab: is missing or not an object")
    for text, idx in vocab.items():
        if not _is_id(idx):
            raise _Problem(f"model.vocab: id {quote(idx)} of {quote(text)} is not a whole number")
        if special.get(text, idx) != idx:
            rule = f"has id {idx}, but {special[text]} in added_tokens"
            raise _Problem(f"model.vocab: {quote(text)} {rule}")
    ids = {**vocab, **special}
    owners: dict[int, str] = {}
    for text, idx in ids.items():
        if idx in owners:
            both = f"{quote(owners[idx])} and to {quote(text)}"
            raise _Problem(f"model.vocab: id {idx} belongs to {both}")
        owners[idx] = text
    for idx in range(len(owners)):
        if idx not in owners:
            rule = f"ids of {len(owners)} tokens must be 0 to {len(owners) - 1}"
            raise _Problem(f"model.vocab: no token has id {idx} ({rule})")
    return ids


def _parse_tokens(ids: dict[str, int], special: dict[str, int]) -> list[bytes]:
    byte_of = {character: byte for byte, character in enumerate(byte_characters())}
    tokens = [b""] * len(ids)
    for text, idx in ids.items():
        if text in special:
            tokens[idx] = text.encode()
        elif text and all(character in byte_of for character in text):
            tokens[idx] = bytes(byte_of[character] for character in text)
        else:
            rule = "is not spelled in byte-level characters"
            raise _Problem(f"model.vocab: {quote(text)} {rule}")
    for byte, character in enumerate(byte_characters()):
        if character not in ids or character in special:
            raise _Problem(f"model.vocab: no token for byte 0x{byte:02x}")
    return tokens


def _parse_merges(merges: Any, plain: dict[str, int]) -> list[tuple[int, int, int]]:
    """Merges as ids; `plain` are the ids of the tokens that text encodes to."""
    if not isinstance(merges, list):
        raise _Problem("model.merges: is missing or not a list")
    made: dict[tuple[int, int], int] = {}
    for k, entry in enumerate(merges):
        where = f"model.merges[{k}]"
        pair = entry.split(" ") if isinstance(entry, str) else entry
        if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
            raise _Problem(f"{where}: {quote(entry)} is not a pair of tokens")
        shown = quote(" ".join(pair))
        for part in pair:
            if part not in plain:
                raise _Problem(f"{where}: {shown} joins {quote(part)}, {NOT_KNOWN}")
        if (whole := pair[0] + pair[1]) not in plain:
            raise _Problem(f"{where}: {shown} produces {quote(whole)}, {NOT_KNOWN}")
        ids = plain[pair[0]], plain[pair[1]]
        if ids in made:
            raise _Problem(f"{where}: {shown} stands twice")
        made[ids] = plain[whole]
    return [(*ids, idx) for ids, idx in made.items()]


def _parse_pattern(node: Any) -> str:
    """The pattern of Split + ByteLevel, or GPT-2's, which a lone ByteLevel means."""
    is_sequence = isinstance(node, dict) and node.get("type") == "Sequence"
    parts = node.get("pretokenizers") if is_sequence else [node]
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise _Problem("pre_tokenizer: is missing or damaged")
    if len(parts) == 1 and _is_byte_level(parts[0], use_regex=True):
        return PATTERNS["gpt2"]
    if len(parts) != 2 or not _is_split(parts[0]) or not _is_byte_level(parts[1], use_regex=False):
        rule = "expected Split by one Regex, isolated, then ByteLevel without a prefix space"
        raise _Problem(f"pre_tokenizer: {rule}")
    pattern = parts[0]["pattern"]["Regex"]
    if len(pattern) > MAX_PATTERN:
        rule = f"{len(pattern):,} characters, a pattern has {MAX_PATTERN:,} at most"
        raise _Problem(f"pre_tokenizer: {rule}")
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, ValueError) as error:
        raise _Problem(f"pre_tokenizer: pattern is not a regular expression ({error})") from None
    return pattern


def _is_byte_level(node: dict[str, Any], *, use_regex: bool) -> bool:
    return (
        node.get("type") == "ByteLevel"
        and node.get("add_prefix_space") is False
        and node.get("use_regex", True) is use_regex
    )


def _is_split(node: dict[str, Any]) -> bool:
    pattern = node.get("pattern")
    return (
        node.get("type") == "Split"
        and isinstance(pattern, dict)
        and isinstance(pattern.get("Regex"), str)
        and node.get("behavior") == "Isolated"
        and node.get("invert") is False
    )


def _is_id(value: Any) -> TypeGuard[int]:
    return type(value) is int and value >= 0


def _has_bytes(text: str) -> bool:
    """False for half a surrogate pair, which JSON can spell and UTF-8 cannot."""
    return not any(0xD800 <= ord(character) < 0xE000 for character in text)
