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
from megalite.core.call import IGNORE, Call, Context, make_call
from megalite.core.errors import DataError
from megalite.core.mesh import Mesh

# s sequence, b micro batch

ROUNDS = 6
"""Of the permutation; at 4 a range of a few hundred is still a little ordered."""


class TokenSource(Protocol):
    """Something that gives training windows by number."""

    def __len__(self) -> int: ...

    def window(self, idx: int) -> np.ndarray:
        """Tokens [s + 1] of window `idx`."""
        ...

    def starts(self, idx: int) -> np.ndarray:
        """Where in window `idx` the document of each of its s inputs starts: [s].

        0 for the first one's, which may have begun before the window.
        """
        ...


@dataclass(frozen=True)
class Windows:
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


class Synthetic:
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
    ):
        if len(source) == 0:
            raise DataError(
                "the data holds fewer tokens than one sample needs (use a shorter --seq-len)"
            )
        self.source, self.mesh, self.seed, self.device = source, mesh, seed, device
        self.micro_batch_size, self.num_microbatches = micro_batch_size, num_microbatches
        self.seq_cut = mesh.axis("tp") if sequence_parallel else None
        self.context = Context(mesh.axis("cp"), cp_form)
        self.reset_attention_mask = reset_attention_mask

    def step(self, consumed: int, num_microbatches: int | None = None) -> list[Call]:
        """This rank's microbatches of the step that starts after `consumed` samples.

        Samples are dealt out microbatch by microbatch, and within one rank by rank.
        `num_microbatches`: of this step (None: as of every other).
        """
        size, dp = self.micro_batch_size, self.mesh.axis("dp")
        count = self.num_microbatches if num_microbatches is None else num_microbatches
        starts = [consumed + (m * dp.size + dp.idx) * size for m in range(count)]
        return [self._call(range(start, start + size)) for start in starts]

    def ordered(self, first: int, count: int) -> list[Call]:
        """Microbatches over windows [first, first + count) as they stand, for evaluation.

        This rank's share of one pass; numbers past the end of the data are there as masked samples.
        """
        size, dp = self.micro_batch_size, self.mesh.axis("dp")
        starts = [first + (m * dp.size + dp.idx) * size for m in range(self.num_microbatches)]
        stop = min(first + count, len(self.source))
        return [self._plain_call(start, size, stop) for start in starts]

    def _call(self, numbers: range) -> Call:
        n = len(self.source)
        windows = [permuted(k % n, n, rng.key(self.seed, "epoch", k // n)) for k in numbers]
        return self._make(windows, numbers)

    def _plain_call(self, start: int, size: int, stop: int) -> Call:
        numbers = range(start, start + size)
        return self._make([k if k < stop else None for k in numbers], numbers)

    def _make(self, windows: Sequence[int | None], numbers: range) -> Call:
        """The call of these windows; None is a sample that does not count."""
        both = self._columns([self._window(k) for k in windows])  # [s + 1, b]
        starts = None
        if self.reset_attention_mask:
            one = np.zeros(len(both) - 1)
            starts = self._columns([one if k is None else self.source.starts(k) for k in windows])
        samples = self._to_device(torch.tensor(numbers, dtype=torch.int64))
        return make_call(
            both[:-1].clamp(min=0),
            both[1:].contiguous(),
            samples,
            seq_cut=self.seq_cut,
            context=self.context,
            starts=starts,
        )

    def _window(self, k: int | None) -> np.ndarray:
        return np.full(len(self.source.window(0)), IGNORE) if k is None else self.source.window(k)

    def _columns(self, rows: Sequence[np.ndarray]) -> torch.Tensor:
        return self._to_device(torch.from_numpy(np.stack(rows).astype(np.int64).T.copy()))

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
