"""Pairs of answers of which one is preferred: read from JSONL, and made into training samples.

A pair is one sample: the conversation with the preferred answer and then the one with the other, as
two documents that do not see each other. What is learned is what the assistant says after the two
part. Conversations and their template: chat.py. What is made of the pairs: layers/loss.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megalite.core.errors import DataError
from megalite.data.chat import (
    Conversation,
    Message,
    Rendered,
    Template,
    check_messages,
    messages_of,
    read_lines,
    text_of,
)
from megalite.data.loader import TokenSource
from megalite.data.strict_json import kind_of, quote

# s sequence


class Pair(NamedTuple):
    """Two conversations that begin alike."""

    chosen: Conversation
    rejected: Conversation

    @property
    def common(self) -> Conversation:
        """The messages with which both begin."""
        both = zip(self.chosen, self.rejected, strict=False)
        alike = [ours == theirs for ours, theirs in both]
        return self.chosen[: [*alike, False].index(False)]


def read_preferences(path: str | Path) -> list[Pair]:
    """The pairs of a .jsonl or .jsonl.gz file, or of a directory of them.

    A line is an object with `chosen` and `rejected`: two lists of messages, each a whole
    conversation, or with `prompt` beside them what is said after it; or three texts. Raises
    DataError, with file and line, for anything else.
    """
    return read_lines(path, _pair_of, what="pair of answers")


def _pair_of(entry: Any, where: str) -> Pair:
    if not isinstance(entry, dict):
        raise DataError(f"{where}: the line is {kind_of(entry)}, expected an object")
    missing = [name for name in ("chosen", "rejected") if name not in entry]
    if missing:
        has = ", ".join(quote(key) for key in list(entry)[:5]) or "none"
        raise DataError(f"{where}: no field {quote(missing[0])} (it has: {has})")
    pair = Pair(*(_whole(entry, name, where) for name in ("chosen", "rejected")))
    if pair.chosen == pair.rejected:
        raise DataError(f"{where}: chosen and rejected are the same")
    if not any(message.role == "user" for message in pair.common):
        raise DataError(f"{where}: chosen and rejected do not answer the same question")
    return pair


def _whole(entry: dict[str, Any], name: str, where: str) -> Conversation:
    """The conversation that ends with the answer `name`."""
    at = f"{where}: {name}"
    said = _said(entry, name, "assistant", where)
    if said and said[0].role != "assistant":
        return check_messages(said, at)
    if "prompt" not in entry:
        raise DataError(f"{at}: answers nothing (give a prompt, or whole conversations)")
    return check_messages((*_said(entry, "prompt", "user", where), *said), at)


def _said(entry: dict[str, Any], name: str, role: str, where: str) -> Conversation:
    """The messages in a field, or its text as one of `role`."""
    if isinstance(entry[name], str):
        return (Message(role, text_of(entry, name, where)),)
    return messages_of(entry[name], f"{where}: {name}")


def render_pair(template: Template, pair: Pair) -> tuple[Rendered, Rendered]:
    """Both conversations as tokens; what is in both is not learned."""
    begin = len(template.render(pair.common).ids)

    def rendered(conversation: Conversation) -> Rendered:
        ids, learned = template.render(conversation)
        return Rendered(ids, [i >= begin and is_learned for i, is_learned in enumerate(learned)])

    return rendered(pair.chosen), rendered(pair.rejected)


class Pairs(TokenSource):
    """A window for each pair that fits into s + 1 tokens, the longest first.

    Raises DataError where none is left.
    """

    def __init__(self, rendered: Sequence[tuple[Rendered, Rendered]], seq_len: int):
        self.seq_len = seq_len
        sizes = {i: len(a.ids) + len(b.ids) for i, (a, b) in enumerate(rendered)}
        order = sorted(sizes, key=lambda i: (-sizes[i], i))
        self.pairs = [rendered[i] for i in order if sizes[i] <= seq_len + 1]
        self.dropped = len(rendered) - len(self.pairs)
        """Pairs that are longer than a window."""
        if not self.pairs:
            raise DataError(
                f"no pair of answers has at most --seq-len {seq_len} tokens together (raise it)"
            )
        self.lengths = np.array([len(a.ids) + len(b.ids) - 1 for a, b in self.pairs])
        self.reference = np.zeros(len(self.pairs))

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def sha256(self) -> str:
        """Of all tokens and of which are learned, in order."""
        found = hashlib.sha256()
        for idx in range(len(self)):
            found.update(self.window(idx).tobytes() + b"/" + self.learned(idx).tobytes() + b"/")
        return found.hexdigest()

    def window(self, idx: int) -> np.ndarray:
        """Tokens [s + 1] of window `idx`, s its own length."""
        chosen, rejected = self.pairs[idx]
        return np.array([*chosen.ids, *rejected.ids], dtype=np.int64)

    def starts(self, idx: int) -> np.ndarray:
        """Start of the conversation of each input [s]."""
        second = len(self.pairs[idx][0].ids)
        return np.where(np.arange(self.length_of(idx)) < second, 0, second)

    def learned(self, idx: int) -> np.ndarray:
        """Which of the s labels tell the two answers apart."""
        chosen, rejected = self.pairs[idx]
        return np.array([*chosen.learned, *rejected.learned], dtype=bool)[1:]
