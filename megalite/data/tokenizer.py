"""Text to token ids and back: byte-level BPE.

A pattern cuts text into words, and inside each word the pair with the earliest merge joins first,
the leftmost of equals first, until no pair has a merge. Any bytes encode and decode to themselves;
text that spells a special token is plain text. The file format stands in vocabulary.py, training in
bpe.py, many processes in workers.py.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain, pairwise

import regex

from megalite.core.config import PathText
from megalite.core.errors import DataError
from megalite.data.atomic import write_atomic
from megalite.data.vocabulary import EOD, PATTERNS, Vocabulary, dump_vocabulary, load_vocabulary

# Bounds of the cache: words as people write them are short, and so many of them are most.
CACHED_WORDS = 1 << 17
CACHED_LENGTH = 64
# Above this many bytes a search for the best pair at every merge costs more than a queue.
SHORT_WORD = 24
# A foreign pattern may take this long, and 10 microseconds a character more.
PATTERN_SECONDS = 5.0


class Tokenizer:
    """Encodes and decodes by one `Vocabulary`."""

    def __init__(self, vocabulary: Vocabulary):
        self.vocabulary = vocabulary
        self.pattern: str = vocabulary.pattern
        self.token_bytes: list[bytes] = vocabulary.tokens
        self.special: dict[str, int] = vocabulary.special
        self.vocab_size: int = len(vocabulary.tokens)
        self.eod: int = vocabulary.special[EOD]
        self._cut = _word_cutter(vocabulary.pattern)
        self._words = _WordIds(_Merger(vocabulary))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Tokenizer:
        """The tokenizer of a `tokenizer.json`. Raises DataError naming what is wrong in it."""
        return Tokenizer(load_vocabulary(path))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a `tokenizer.json` that Hugging Face `tokenizers` loads."""
        with write_atomic(path) as file:
            file.write(dump_vocabulary(self.vocabulary))

    @cached_property
    def sha256(self) -> str:
        """Of the file that `save` writes: the name of this tokenizer in metadata."""
        return hashlib.sha256(dump_vocabulary(self.vocabulary)).hexdigest()

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text, without any special token.

        Bytes need not be UTF-8. A str with half a surrogate pair, which no bytes can hold, has
        U+FFFD there.
        """
        if isinstance(text, bytes):
            # What is not UTF-8 passes the pattern as lone surrogates: no letter, number or space.
            text = text.decode("utf-8", "surrogateescape")
        else:
            text = replace_surrogates(text)
        return list(chain.from_iterable(map(self._words.__getitem__, self._cut(text))))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes `ids` spell; a special token is its text. Raises DataError on a wrong id."""
        ids = list(ids)
        if ids and (min(ids) < 0 or max(ids) >= self.vocab_size):
            wrong = next(idx for idx in ids if idx < 0 or idx >= self.vocab_size)
            raise DataError(
                f"token id {wrong} is not in the vocabulary (0 to {self.vocab_size - 1})"
            )
        return b"".join(map(self.token_bytes.__getitem__, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """The text that `ids` spell, with U+FFFD for bytes that are not UTF-8."""
        return self.decode_bytes(ids).decode("utf-8", "replace")


def replace_surrogates(text: str) -> str:
    """The text with surrogate pairs joined and lone halves replaced, so that it has UTF-8 bytes."""
    if text.isascii():
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _word_cutter(pattern: str) -> Callable[[str], list[str]]:
    compiled = regex.compile(pattern)
    # Ours are linear and leave no gap; of another's pattern neither is known.
    return compiled.findall if pattern in PATTERNS.values() else partial(_cut_guarded, compiled)


def _cut_guarded(pattern: regex.Pattern[str], text: str) -> list[str]:
    """The matches and what lies between them, under a time limit."""
    words = []
    end = 0
    try:
        for match in pattern.finditer(text, timeout=PATTERN_SECONDS + len(text) / 100_000):
            words += [text[end : match.start()], match.group()]
            end = match.end()
    except TimeoutError:
        rule = f"takes too long on a text of {len(text):,} characters (is it exponential?)"
        raise DataError(f"tokenizer pattern {pattern.pattern!r:.80} {rule}") from None
    words.append(text[end:])
    return [word for word in words if word]


class _WordIds(dict[str, tuple[int, ...]]):
    """Word to ids, computed when first asked for, and forgotten all at once when full."""

    def __init__(self, merger: _Merger):
        super().__init__()
        self._merger = merger

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(self._merger.merge(word.encode("utf-8", "surrogateescape")))
        if len(word) <= CACHED_LENGTH:
            if len(self) >= CACHED_WORDS:
                self.clear()
            self[word] = ids
        return ids


class _Merger:
    """Joins the bytes of one word. `steps` counts places looked at, for tests of linear time."""

    def __init__(self, vocabulary: Vocabulary):
        control = set(vocabulary.special.values())
        plain = {t: idx for idx, t in enumerate(vocabulary.tokens) if idx not in control}
        self._byte_ids = [plain[bytes([byte])] for byte in range(256)]
        self._widths = [len(token) for token in vocabulary.tokens]
        self._merges = vocabulary.merges
        self._ranks = {(a, b): rank for rank, (a, b, _) in enumerate(vocabulary.merges)}
        self.steps = 0

    def merge(self, word: bytes) -> list[int]:
        ids = [self._byte_ids[byte] for byte in word]
        return self._merge_short(ids) if len(ids) <= SHORT_WORD else self._merge_long(ids)

    def _merge_short(self, ids: list[int]) -> list[int]:
        """The smallest rank again and again: quadratic, and the fastest for words people write."""
        rank_of, merges = self._ranks.get, self._merges
        never = len(merges)
        ranks = [rank_of(pair, never) for pair in pairwise(ids)]
        while ranks:
            rank = min(ranks)
            if rank == never:
                break
            i = ranks.index(rank)
            ids[i : i + 2] = [merges[rank][2]]
            del ranks[i]
            if i:
                ranks[i - 1] = rank_of((ids[i - 1], ids[i]), never)
            if i < len(ranks):
                ranks[i] = rank_of((ids[i], ids[i + 1]), never)
        return ids

    def _merge_long(self, cells: list[int]) -> list[int]:
        """The same ids in near linear time, from a queue of ranks and the places of each.

        A token stands in its first and its last cell, so both neighbours are found without links:
        the next begins where this one ends, the previous ends one cell before. All other cells are
        -1. A place whose cells no longer hold the pair is stale, and skipped.
        """
        rank_of, widths = self._ranks.get, self._widths
        end = len(cells)
        cells.append(-1)  # the right neighbour of the last token: no pair has a merge with it
        places: dict[int, list[int]] = {}
        for i, pair in enumerate(pairwise(cells)):
            if (rank := rank_of(pair)) is not None:
                places.setdefault(rank, []).append(i)
        queue = list(places)
        heapq.heapify(queue)
        while queue:
            rank = queue[0]
            left, right, made = self._merges[rank]
            left_width, width = widths[left], widths[made]
            todo = places[rank]
            todo.sort(reverse=True)
            # A merge that opens a pair of an earlier rank stops this loop: that rank goes first.
            # (Where each token is made in one way only, as in our training, none ever does.)
            while todo and queue[0] == rank:
                i = todo.pop()
                self.steps += 1
                middle, after = i + left_width, i + width
                if cells[i] != left or cells[middle] != right:
                    continue
                cells[middle - 1] = cells[middle] = -1
                cells[i] = cells[after - 1] = made
                before = cells[i - 1] if i else -1
                neighbours = ((made, cells[after]), i), ((before, made), i - widths[before])
                for pair, place in neighbours:
                    if (opened := rank_of(pair)) is not None:
                        if opened not in places:
                            places[opened] = []
                            heapq.heappush(queue, opened)
                        places[opened].append(place)
            if queue[0] == rank:
                del places[heapq.heappop(queue)]
        ids = []
        i = 0
        while i < end:
            ids.append(cells[i])
            i += widths[cells[i]]
        return ids


@dataclass(frozen=True, kw_only=True)
class TokenizerShowArgs:
    """What a tokenizer knows, and how it cuts a text."""

    path: PathText = "tokenizer.json"
    """The tokenizer file."""
    text: str = ""
    """A text to cut into tokens (empty: none)."""


def show_tokenizer(args: TokenizerShowArgs) -> None:
    """Print the size, the longest tokens and the cut of `args.text`, a token a line."""
    tokenizer = Tokenizer.load(args.path)
    control = set(tokenizer.special.values())
    plain = [token for idx, token in enumerate(tokenizer.token_bytes) if idx not in control]
    longest = sorted(plain, key=lambda token: (-len(token), token))[:10]
    merges = len(tokenizer.vocabulary.merges)
    print(f"{args.path}: {tokenizer.vocab_size} tokens, {merges} merges, sha256 {tokenizer.sha256}")
    print("special ", ", ".join(f"{text} {idx}" for text, idx in tokenizer.special.items()))
    print("longest ", " ".join(_show_bytes(token) for token in longest))
    if args.text:
        ids = tokenizer.encode(args.text)
        print(f"{len(tokenizer.decode_bytes(ids))} bytes are {len(ids)} tokens:")
        for idx in ids:
            print(f"{idx:8d} {_show_bytes(tokenizer.token_bytes[idx])}")


def _show_bytes(token: bytes) -> str:
    """A token in quotes on one line, with bytes that are not UTF-8 as \\xNN."""
    return repr(token.decode("utf-8", "backslashreplace")).replace("\\\\x", "\\x")
