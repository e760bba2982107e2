"""Training of the tokenizer: the pair seen most often becomes a token, again and again.

Words are counted once; each merge then touches only the words that hold its pair, and a queue of
counts finds the next. Ties go to the smaller pair of ids, so the same text gives the same tokenizer
on every machine (Sennrich et al. 2016, arXiv 1508.07909; on bytes as in GPT-2). Encoding stands in
tokenizer.py.
"""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import regex
from tqdm import tqdm

from megalite.core.config import PathText
from megalite.core.errors import UserError
from megalite.data.documents import find_inputs, read_documents
from megalite.data.tokenizer import Tokenizer, replace_surrogates
from megalite.data.vocabulary import PATTERNS, SPECIAL, Vocabulary

# A longer word (base64, a minified line) is counted in pieces: statistics lose nothing, and time
# stays linear.
COUNTED_LENGTH = 256

Pair = tuple[int, int]


def train(
    texts: Iterable[str],
    vocab_size: int,
    *,
    pattern: str = "gpt4",
    special: Sequence[str] = SPECIAL,
) -> Tokenizer:
    """A tokenizer of `vocab_size` ids in all: 256 bytes, merges, then `special`.

    Raises UserError where the text is too small to give that many.
    """
    if pattern not in PATTERNS:
        raise UserError(f"--pattern {pattern}: unknown (use one of {', '.join(PATTERNS)})")
    smallest = 256 + len(special)
    if vocab_size < smallest:
        rule = f"must be at least {smallest} (256 bytes and {len(special)} special tokens)"
        raise UserError(f"--vocab-size {vocab_size}: {rule}")
    counts = count_words(texts, PATTERNS[pattern])
    tokens = [bytes([byte]) for byte in range(256)]
    merges = _Learner(counts, tokens).learn(vocab_size - smallest)
    if len(merges) < vocab_size - smallest:
        most = smallest + len(merges)
        fix = f"use --vocab-size {most}, or more text"
        raise UserError(f"--vocab-size {vocab_size}: the text yields only {most} ({fix})")
    control = {text: len(tokens) + k for k, text in enumerate(special)}
    return Tokenizer(
        Vocabulary(
            pattern=PATTERNS[pattern],
            tokens=tokens + [text.encode() for text in special],
            merges=merges,
            special=control,
        )
    )


def count_words(texts: Iterable[str], pattern: str) -> dict[bytes, int]:
    """How often each word occurs, in the order of first occurrence."""
    cut = regex.compile(pattern).findall
    seen: Counter[str] = Counter()
    for text in texts:
        seen.update(cut(replace_surrogates(text)))
    counts: dict[bytes, int] = defaultdict(int)
    for word, count in seen.items():
        data = word.encode()
        for start in range(0, len(data), COUNTED_LENGTH):
            counts[data[start : start + COUNTED_LENGTH]] += count
    return counts


class _Learner:
    """Words as lists of ids, and for each pair its count and the words that (may) hold it."""

    def __init__(self, counts: dict[bytes, int], tokens: list[bytes]):
        self.tokens = tokens
        self.words = [list(word) for word in counts]
        self.weights = list(counts.values())
        self.count: dict[Pair, int] = defaultdict(int)
        self.holders: dict[Pair, list[int]] = defaultdict(list)
        for holder, (word, weight) in enumerate(zip(self.words, self.weights, strict=True)):
            for pair in pairwise(word):
                self.count[pair] += weight
                self.holders[pair].append(holder)

    def learn(self, num_merges: int) -> list[tuple[int, int, int]]:
        """Up to `num_merges` merges, fewer when no pair occurs twice; their tokens are appended."""
        merges: list[tuple[int, int, int]] = []
        queue = [(-count, pair) for pair, count in self.count.items()]
        heapq.heapify(queue)
        progress = tqdm(total=num_merges, desc="merges", unit="", disable=None, leave=False)
        while queue and len(merges) < num_merges:
            negative, pair = heapq.heappop(queue)
            count = self.count[pair]
            if count != -negative:
                # Counts only fall after a pair is queued, so a stale entry comes up too early,
                # never too late.
                heapq.heappush(queue, (-count, pair))
                continue
            if count < 2:
                break
            # New bytes every time: a merge joins its pair everywhere, so equal bytes are cut alike.
            made = len(self.tokens)
            self.tokens.append(self.tokens[pair[0]] + self.tokens[pair[1]])
            merges.append((*pair, made))
            for opened in self._merge(pair, made):
                heapq.heappush(queue, (-self.count[opened], opened))
            progress.update()
        progress.close()
        return merges

    def _merge(self, pair: Pair, made: int) -> set[Pair]:
        """Join `pair` in every word; returns the pairs this opened."""
        opened: set[Pair] = set()
        for holder in set(self.holders.pop(pair)):
            word, weight = self.words[holder], self.weights[holder]
            joined = _join(word, pair, made)
            if len(joined) == len(word):
                continue
            for old in pairwise(word):
                self.count[old] -= weight
            for new in pairwise(joined):
                self.count[new] += weight
                if made in new:
                    self.holders[new].append(holder)
                    opened.add(new)
            self.words[holder] = joined
        return opened


def _join(word: list[int], pair: Pair, made: int) -> list[int]:
    left, right = pair
    joined = []
    i, last = 0, len(word) - 1
    while i <= last:
        if word[i] == left and i < last and word[i + 1] == right:
            joined.append(made)
            i += 2
        else:
            joined.append(word[i])
            i += 1
    return joined


@dataclass(frozen=True, kw_only=True)
class TokenizerTrainArgs:
    """Train a tokenizer on text."""

    input: PathText = "runs/corpus/train.jsonl"
    """A .txt, .jsonl or .jsonl.gz file, or a directory of those."""
    vocab_size: int = 2048
    """Token ids in all: 256 bytes, merges and 3 special tokens."""
    pattern: Literal["gpt4", "gpt2"] = "gpt4"
    """How text is cut into words before merging."""
    out: PathText = "tokenizer.json"
    """The file to write, in the format of Hugging Face tokenizers."""
    json_key: str = "text"
    """Field of a .jsonl line that holds the text."""
    errors: Literal["strict", "replace"] = "strict"
    """Refuse bytes that are not UTF-8, or put U+FFFD in their place."""


def train_tokenizer(args: TokenizerTrainArgs) -> None:
    """Train on `args.input`, write `args.out` and print one line."""
    files = find_inputs(args.input)
    size = 0

    def measured() -> Iterable[str]:
        nonlocal size
        for text in read_documents(files, json_key=args.json_key, errors=args.errors):
            size += len(text.encode())
            yield text

    tokenizer = train(measured(), args.vocab_size, pattern=args.pattern)
    tokenizer.save(args.out)
    print(f"{args.out}: {tokenizer.vocab_size} tokens from {size / 1e6:.1f} MB of text")
