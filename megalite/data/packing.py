"""Conversations as training samples: several in one window, or one each.

Those of one window do not see each other. A window's conversations, and the order of the windows,
follow from the file alone, so that no layout changes them; which of them a step takes is the
loader's business.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np

from megalite.core.errors import DataError
from megalite.data.chat import Rendered
from megalite.data.loader import TokenSource

# s sequence


class Conversations(TokenSource):
    """Windows of at most s + 1 tokens of conversations; what is longer is cut at its end.

    Packed, windows have s + 1 tokens, filled by best fit, the longest conversation first. Otherwise
    a window is one conversation, the longest first, so that neighbours are of a length. Raises
    DataError where nothing is left to learn.
    """

    def __init__(self, rendered: Sequence[Rendered], seq_len: int, *, pack: bool):
        self.seq_len = seq_len
        self.cut = sum(len(one.ids) > seq_len + 1 for one in rendered)
        """Conversations that are longer than a window."""
        kept = [Rendered(r.ids[: seq_len + 1], r.learned[: seq_len + 1]) for r in rendered]
        # The first token is predicted by none.
        self.conversations = [one for one in kept if any(one.learned[1:])]
        self.dropped = len(kept) - len(self.conversations)
        """Of those the ones whose answer begins beyond it."""
        if not self.conversations:
            raise DataError(
                f"no conversation has an answer within --seq-len {seq_len} tokens (raise it)"
            )
        sizes = [len(one.ids) for one in self.conversations]
        order = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
        self.windows = best_fit(sizes, order, seq_len + 1) if pack else [[i] for i in order]
        self.lengths = None if pack else np.array([sizes[i] - 1 for i in order])

    def __len__(self) -> int:
        return len(self.windows)

    @property
    def learned_share(self) -> float:
        """Of all tokens of the conversations."""
        learned = sum(sum(one.learned) for one in self.conversations)
        return learned / sum(len(one.ids) for one in self.conversations)

    def window(self, idx: int) -> np.ndarray:
        """Tokens [s + 1] of window `idx`; zeros after the last conversation."""
        return self._filled([self.conversations[i].ids for i in self.windows[idx]], np.int64)

    def starts(self, idx: int) -> np.ndarray:
        """Start of the conversation of each input [s]; what fills up is one of its own."""
        sizes = [len(self.conversations[i].ids) for i in self.windows[idx]]
        length = self.length_of(idx)
        ends = np.cumsum([0, *sizes])
        starts = np.repeat(ends, [*sizes, max(0, length + 1 - ends[-1])])
        return starts[:length]

    def learned(self, idx: int) -> np.ndarray:
        """Which of the s labels the assistant says."""
        return self._filled([self.conversations[i].learned for i in self.windows[idx]], bool)[1:]

    def _filled(self, parts: Sequence[Sequence[int]], dtype: type) -> np.ndarray:
        said: np.ndarray = np.concatenate(parts).astype(dtype)
        room = 0 if self.lengths is not None else self.seq_len + 1 - len(said)
        return np.pad(said, (0, room))


def best_fit(sizes: Sequence[int], order: Sequence[int], room: int) -> list[list[int]]:
    """Puts `order`'s items, each into the fullest box of `room` that still takes it."""
    boxes: list[list[int]] = []
    free: list[tuple[int, int]] = []  # what a box still takes, and which it is; sorted
    for item in order:
        at = bisect_left(free, (sizes[item], -1))
        if at < len(free):
            left, box = free.pop(at)
        else:
            left, box = room, len(boxes)
            boxes.append([])
        boxes[box].append(item)
        insort(free, (left - sizes[item], box))
    return boxes
