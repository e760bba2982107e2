"""A step's scalars on their way to the host, so that what writes them down keeps no GPU waiting.

loop.py leaves them as tensors. Who reads one of a GPU waits for all that was launched until then:
for the next step, too, if that has begun. Here a copy is asked for right behind the step's own
work, and who reads it waits for that alone.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from megalite.train.loop import Reduced

NAMES = ("loss", "norm", "stop", "tokens")
OF_PAIRS = ("preferred", "margin")
"""Of preference tuning."""


class Arrival:
    """The numbers of one step by the names that Reduced has for them.

    `at` is when the step had ended, on the monotonic clock; on a GPU, when `read` first knew.
    """

    def __init__(self, found: Reduced, device: torch.device, *, prefers: bool):
        self._found, self._names = found, NAMES + (OF_PAIRS if prefers else ())
        self._copy: Tensor | None = None
        self.at: float | None = None
        if device.type == "cuda":
            self._copy = torch.empty(len(self._names), dtype=torch.float64, pin_memory=True)
            self._copy.copy_(self._numbers(), non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            found.tokens.item()  # the step has ended; its other sums may be under way for longer
            self.at = time.monotonic()

    @property
    def tokens(self) -> int:
        """Unmasked ones; on a CPU known before the rest."""
        return int(self._found.tokens.item() if self._copy is None else self.read()["tokens"])

    def read(self) -> dict[str, float]:
        """All of them, once they are there."""
        numbers = self._copy
        if numbers is None:
            numbers = self._numbers()
        else:
            self._copied.synchronize()
            self.at = self.at or time.monotonic()
        return dict(zip(self._names, numbers.tolist(), strict=True))

    def _numbers(self) -> Tensor:
        return torch.stack([getattr(self._found, name).double() for name in self._names])
