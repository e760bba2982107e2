"""Which tokens a rank trains on: a pure function of (seed, number of the sample).

The loader's whole state is one integer, the samples consumed so far; a step takes the next ones of
a shuffled order that does not depend on any layout. An epoch's order is a keyed permutation,
computed per sample: there is no shuffle index to build or to store. Not here: the file format
(indexed.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

import numpy as np
import torch

from megalite.core import rng
from megalite.core.call import IGNORE, Call, Context, Preference, make_call
from megalite.core.errors import DataError
from megalite.core.mesh import Mesh

# s sequence, b micro batch

ROUNDS = 6
"""Of the permutation; at 4 a range of a few hundred is still a little ordered."""


class TokenSource(Protocol):
    """Something that gives training windows by number."""

    seq_len: int
    lengths: np.ndarray | None = None
    """Inputs of each window, at most seq_len; None where all have seq_len."""
    reference: np.ndarray | None = None
    """Of windows that are pairs of answers, Preference.reference of each; None: they are text."""

    def __len__(self) -> int: ...

    def window(self, idx: int) -> np.ndarray:
        """Tokens [s + 1] of window `idx`."""
        ...

    def starts(self, idx: int) -> np.ndarray:
        """Where in window `idx` the document of each of its s inputs starts: [s].

        0 for the first one's, which may have begun before the window.
        """
        ...

    def length_of(self, idx: int) -> int:
        """Inputs of window `idx`."""
        return self.seq_len if self.lengths is None else int(self.lengths[idx])

    def learned(self, idx: int) -> np.ndarray | None:
        """Which of window `idx`'s s labels count, as booleans [s]; None for all of them."""
        return None


@dataclass(frozen=True)
class Windows(TokenSource):
    """Windows of s + 1 tokens over one flat stream, each starting at the last one's last label."""

    tokens: np.ndarray
    seq_len: int
    document_starts: Callable[[int, int], np.ndarray] | None = None
    """Gives the places in a range of `tokens` at which documents start."""

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.seq_len

    def window(self, idx: int) -> np.ndarray:
        """Tokens [s + 1] of window `idx`."""
        start = idx * self.seq_len
        return self.tokens[start : start + self.seq_len + 1]

    def starts(self, idx: int) -> np.ndarray:
        """Start of the document of each input [s] of window `idx`."""
        assert self.document_starts is not None
        first = idx * self.seq_len
        begins = np.zeros(self.seq_len, dtype=bool)
        begins[self.document_starts(first, first + self.seq_len) - first] = True
        return _last_begun(begins)


def _last_begun(begins: np.ndarray) -> np.ndarray:
    """For each place the last one, up to it, where `begins` holds; 0 where there is none."""
    return np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))


class Synthetic(TokenSource):
    """An endless seeded Markov chain with a few likely successors per state: speed without files.

    256 states scattered over the vocabulary; its entropy rate is about 0.8 nats. A document starts
    anywhere with the same chance, so lengths vary from 1 on; the chain goes on across.
    """

    _STEPS = np.cumsum([0.7, 0.2, 0.08])
    _DOCUMENTS = 4
    """Starts in a window, on average."""

    def __init__(self, vocab_size: int, seq_len: int, seed: int, length: int = 1 << 40):
        made = np.random.default_rng(seed)
        self.seq_len, self.seed, self.length = seq_len, seed, length
        self.states = made.permutation(vocab_size)[:256]
        # Plain lists: the walk is a Python loop, and indexing an array costs it ten times as much.
        self._successors = made.integers(0, len(self.states), (len(self.states), 4)).tolist()

    def __len__(self) -> int:
        return self.length

    def window(self, idx: int) -> np.ndarray:
        """Tokens [s + 1] of window `idx`."""
        made = np.random.default_rng([self.seed, idx])
        branches = np.searchsorted(self._STEPS, made.random(self.seq_len), side="right").tolist()
        start = int(made.integers(len(self.states)))
        successors = self._successors
        path = accumulate(branches, lambda state, branch: successors[state][branch], initial=start)
        return self.states[np.fromiter(path, dtype=np.int64, count=self.seq_len + 1)]

    def starts(self, idx: int) -> np.ndarray:
        """Start of the document of each input [s] of window `idx`."""
        made = np.random.default_rng([self.seed, idx, 1])
        return _last_begun(made.random(self.seq_len) * self.seq_len < self._DOCUMENTS)


class Loader:
    """Gives this rank's microbatches of any step: its samples, and its part of each sequence."""

    def __init__(
        self,
        source: TokenSource,
        mesh: Mesh,
        *,
        seed: int,
        micro_batch_size: int,
        num_microbatches: int,
        device: torch.device,
        sequence_parallel: bool,
        cp_form: str = "ring",
        reset_attention_mask: bool = False,
        dpo_beta: float = 0.0,
    ):
        if len(source) == 0:
            raise DataError(
                "the data holds fewer tokens than one sample needs (use a shorter --seq-len)"
            )
        self.source, self.mesh, self.seed, self.device = source, mesh, seed, device
        self.micro_batch_size, self.num_microbatches = micro_batch_size, num_microbatches
        self.seq_cut = mesh.axis("tp") if sequence_parallel else None
        self.context = Context(mesh.axis("cp"), cp_form)
        self.reset_attention_mask, self.dpo_beta = reset_attention_mask, dpo_beta

    def step(self, consumed: int, num_microbatches: int | None = None) -> list[Call]:
        """This rank's microbatches of the step that starts after `consumed` samples.

        Samples are dealt out microbatch by microbatch, and within one rank by rank; the longest
        first where lengths differ, so that a microbatch is padded little. Which samples a step has
        does not depend on that. `num_microbatches`: of this step (None: as of every other).
        """
        size, dp, lengths = self.micro_batch_size, self.mesh.axis("dp"), self.source.lengths
        count = self.num_microbatches if num_microbatches is None else num_microbatches
        numbers: Sequence[int] = range(consumed, consumed + count * dp.size * size)
        if lengths is not None:
            numbers = sorted(numbers, key=lambda k: -lengths[self._window_of(k)])
        starts = [(m * dp.size + dp.idx) * size for m in range(count)]
        return [self._call(numbers[start : start + size]) for start in starts]

    def ordered(self, first: int, count: int) -> list[Call]:
        """Microbatches over windows [first, first + count) as they stand, for evaluation.

        This rank's share of one pass; numbers past the end of the data are there as masked samples.
        """
        size, dp = self.micro_batch_size, self.mesh.axis("dp")
        starts = [first + (m * dp.size + dp.idx) * size for m in range(self.num_microbatches)]
        stop = min(first + count, len(self.source))
        return [self._plain_call(start, size, stop) for start in starts]

    def _window_of(self, number: int) -> int:
        """The window that is sample `number` of the run."""
        n = len(self.source)
        return permuted(number % n, n, rng.key(self.seed, "epoch", number // n))

    def _call(self, numbers: Sequence[int]) -> Call:
        return self._make([self._window_of(k) for k in numbers], numbers)

    def _plain_call(self, start: int, size: int, stop: int) -> Call:
        numbers = range(start, start + size)
        return self._make([k if k < stop else None for k in numbers], numbers)

    def _make(self, windows: Sequence[int | None], numbers: Sequence[int]) -> Call:
        """The call of these windows; None is a sample that does not count."""
        rows = [self._sample(k) for k in windows]
        longest = max(len(inputs) for inputs, _, _ in rows)
        starts = None
        if self.reset_attention_mask:
            starts = self._columns([own for _, _, own in rows], longest, 0)
        return make_call(
            self._columns([inputs for inputs, _, _ in rows], longest, 0),
            self._columns([labels for _, labels, _ in rows], longest, IGNORE),
            self._to_device(torch.tensor(numbers, dtype=torch.int64)),
            seq_cut=self.seq_cut,
            context=self.context,
            starts=starts,
            preference=self._preference(windows),
        )

    def _preference(self, windows: Sequence[int | None]) -> Preference | None:
        of = self.source.reference
        if of is None:
            return None
        known = torch.tensor([0.0 if k is None else of[k] for k in windows], dtype=torch.float64)
        counts = torch.tensor([k is not None for k in windows])
        return Preference(self._to_device(known), self._to_device(counts), self.dpo_beta)

    def _sample(self, k: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, labels and where documents start, each [s], of window `k`."""
        window = self.source.window(0 if k is None else k)
        inputs, labels = window[:-1], window[1:].astype(np.int64)
        learned = None if k is None else self.source.learned(k)
        if k is None:
            labels[:] = IGNORE
        elif learned is not None:
            labels[~learned] = IGNORE
        if k is None or not self.reset_attention_mask:
            return inputs, labels, np.zeros(len(inputs))
        return inputs, labels, self.source.starts(k)

    def _columns(self, rows: Sequence[np.ndarray], length: int, end: int) -> torch.Tensor:
        """[length, b], rows that are shorter filled up with `end`."""
        made = np.full((length, len(rows)), end, dtype=np.int64)
        for column, row in enumerate(rows):
            made[: len(row), column] = row
        return self._to_device(torch.from_numpy(made))

    def _to_device(self, x: torch.Tensor) -> torch.Tensor:
        """A GPU takes what is pinned while the host goes on."""
        pinned = x.pin_memory() if self.device.type == "cuda" else x
        return pinned.to(self.device, non_blocking=True)


def permuted(idx: int, n: int, key: int) -> int:
    """Place `idx` of a keyed permutation of range(n): a Feistel network, walked until inside n.

    Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    # Each round needs a function of its own: with keys that differ in a bit or two, some orders of
    # a small range come out unshuffled.
    keys = [_scramble(key + turn) for turn in range(ROUNDS)]
    half = max(1, (max(1, n - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    at = idx
    while True:
        left, right = at >> half, at & mask
        for each in keys:
            left, right = right, left ^ (_scramble(right ^ each) & mask)
        at = (left << half) | right
        if at < n:
            return at


def _scramble(x: int) -> int:
    """SplitMix64's finaliser on plain integers: the same numbers as rng.mix."""
    x = (x * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
