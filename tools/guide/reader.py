"""The reader's own runs, from which the pictures are drawn, opened as they are needed."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megalite.data.tokenizer import Tokenizer
from megalite.generate.cache import Part, Step
from megalite.generate.load import Place, Saved, load_share, open_checkpoint
from megalite.generate.share import Share

SIGNS = {" ": "\u2423", "\n": "\u23ce", "\t": "\u21e5"}
"""How white space is shown."""


class Reader:
    """The two runs of `make demo`, opened as they are needed."""

    def __init__(self, run: Path, chat: Path):
        self.run, self.chat = run, chat

    @cached_property
    def saved(self) -> Saved:
        return open_checkpoint(self.run)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return self.saved.tokenizer()

    @cached_property
    def share(self) -> Share:
        return share_of(self.saved)

    @cached_property
    def chat_share(self) -> Share:
        return share_of(open_checkpoint(self.chat))

    @property
    def layers(self) -> list[Any]:
        return list(self.share.pipeline.stages[0].layers.values())  # type: ignore[attr-defined]

    def piece(self, token: int) -> str:
        """A token as it is shown: spaces and line ends have signs."""
        text = self.tokenizer.decode([token])
        return "".join(SIGNS.get(c, c if c.isprintable() else f"x{ord(c):02x}") for c in text)

    def run_text(self, ids: list[int], share: Share | None = None) -> Tensor:
        """Logits [s, v] after each token of a text."""
        step = Step((Part(0, 0, tuple(ids), len(ids)),))
        return (share or self.share).run(step)


def share_of(saved: Saved) -> Share:
    place = Place(slots=1, dtype=torch.float32, device=torch.device("cpu"))
    return load_share(saved, place)
