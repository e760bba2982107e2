"""What one rank keeps of the requests that run: keys and values, or, without a cache, their tokens.

A Step is what all ranks run together next: some tokens of some requests, each in a slot of its own.
Decoding is a step of one token a request, reading a prompt one of many; there is no other kind.
Next: share.py, which runs steps, and engine.py, which makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megalite.core.call import Cached, Call

# s tokens of the longest part, b requests, w logits that are wanted, m kv heads and d head_dim here


@dataclass(frozen=True)
class Part:
    """Some tokens of one request."""

    slot: int
    before: int
    """Tokens of it that were there already; 0 says that the slot has a new request."""
    tokens: tuple[int, ...]
    wanted: int
    """Of how many of the last of these tokens the logits of what follows are wanted."""


@dataclass(frozen=True)
class Step:
    """Parts of requests, one a request, that are run together."""

    parts: tuple[Part, ...]

    @property
    def longest(self) -> int:
        return max(len(part.tokens) for part in self.parts)

    def numbers(self) -> list[int]:
        """The step as whole numbers, which can be sent."""
        found = []
        for part in self.parts:
            found += [part.slot, part.before, part.wanted, len(part.tokens), *part.tokens]
        return found

    @staticmethod
    def of(numbers: list[int]) -> Step:
        """The step that these are the numbers of."""
        return Step(tuple(_parts(iter(numbers))))

    def tokens(self, device: torch.device) -> Tensor:
        """[s, b], with zeros behind the shorter parts."""
        rows = [[*p.tokens, *[0] * (self.longest - len(p.tokens))] for p in self.parts]
        return torch.tensor(rows, dtype=torch.int64, device=device).T.contiguous()


def _parts(numbers: Iterator[int]) -> Iterator[Part]:
    for slot in numbers:
        before, wanted, count = next(numbers), next(numbers), next(numbers)
        yield Part(slot, before, tuple(next(numbers) for _ in range(count)), wanted)


class Memory(Protocol):
    """What the ranks remember of requests between steps."""

    def call(self, step: Step) -> Call:
        """What the stages are to run; its logits are those wanted, part by part."""


class KeyValues:
    """Keys and values of `slots` texts of up to `seq_len` tokens in the layers of this rank.

    One place more takes what nobody reads. Memory is taken as it is written to, and all that is
    known of one place lies together: texts that go on side by side read it in one sweep. `heads`
    gives each layer's kv heads and head size here.
    """

    def __init__(
        self,
        heads: Mapping[int, tuple[int, int]],
        *,
        slots: int,
        seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.slots, self.seq_len, self.device = slots, seq_len, device
        self.layers = {}
        for layer, (m, d) in heads.items():
            both = torch.empty((2, seq_len + 1, slots, m, d), dtype=dtype, device=device)
            keys, values = both.permute(0, 2, 3, 1, 4)  # [slots, m, length, d]
            self.layers[layer] = keys, values

    def call(self, step: Step) -> Call:
        parts, length, device = step.parts, step.longest, self.device
        before = torch.tensor([part.before for part in parts], device=device)
        positions = torch.arange(length, device=device)
        return Call(
            step.tokens(device),
            None,
            positions,
            torch.zeros(len(parts), dtype=torch.int64, device=device),
            training=False,
            cache=Cached(
                self.layers,
                slots=tuple(part.slot for part in parts),
                before=tuple(part.before for part in parts),
                rows=tuple(len(part.tokens) for part in parts),
            ),
            # Padding may lie beyond the last place of all.
            counted=(positions[:, None] + before).clamp(max=self.seq_len - 1),
            wanted=_wanted(step, len(parts), device),
        )


class Texts:
    """The tokens of `slots` texts, which every step runs again from their beginning."""

    def __init__(self, *, slots: int, seq_len: int, device: torch.device):
        self.device = device
        self.tokens = torch.zeros((seq_len, slots), dtype=torch.int64, device=device)

    def call(self, step: Step) -> Call:
        parts, device = step.parts, self.device
        for part in parts:
            end = part.before + len(part.tokens)
            self.tokens[part.before : end, part.slot] = torch.tensor(part.tokens, device=device)
        longest = max(part.before + len(part.tokens) for part in parts)
        return Call(
            self.tokens[:longest, [part.slot for part in parts]],
            None,
            torch.arange(longest, device=device),
            torch.zeros(len(parts), dtype=torch.int64, device=device),
            training=False,
            wanted=_wanted(step, len(parts), device, from_start=True),
        )


def _wanted(step: Step, b: int, device: torch.device, *, from_start: bool = False) -> Tensor:
    """[w]: rows of [s b] in which the wanted tokens stand."""
    found = []
    for i, part in enumerate(step.parts):
        end = len(part.tokens) + (part.before if from_start else 0)
        found += [row * b + i for row in range(end - part.wanted, end)]
    return torch.tensor(found, dtype=torch.int64, device=device)
