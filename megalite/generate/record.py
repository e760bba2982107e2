"""Decoding as a recording: on a GPU, one launch a step in place of some hundred.

A step of one token a request does little work in many kernels, and the host is too slow to launch
them. So the next token of *every* slot is computed, whether a request is in it or not: tensors then
have the same shapes and places in every step, and a CUDA graph, recorded once, does all of them.
Slots in which nothing runs write to the one place of the cache that nobody reads. How many places
attention looks at is in the shapes; it doubles as texts grow, and each has a recording of its own.
Next: core/call.py's EverySlot, and share.py, which asks for steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megalite.core import comm
from megalite.core.call import Call, EverySlot
from megalite.generate.cache import KeyValues, Step
from megalite.parallel.pipeline import Pipeline

SPAN = 256
"""Places that attention looks at, at least."""
WARM_UP = 2
"""Runs before a recording: libraries take memory and choose kernels in the first ones."""
Logits = Callable[[Call], Tensor]


def can_record(pipeline: Pipeline) -> bool:
    """Whether a GPU can replay what the pipeline runs: nothing of it passes through the host, as
    transfers between stages do.
    """
    mesh = pipeline.mesh
    on_gpu = pipeline.device.type == "cuda" and comm.stays_on_device(mesh.axis("tp"))
    return on_gpu and mesh.axis("pp").size == 1


class Recorded:
    """Runs steps of one token a request; `replay` is for tests, which want the steps without."""

    def __init__(self, memory: KeyValues, *, replay: bool = True):
        self.memory, self.replay = memory, replay
        device, slots = memory.device, memory.slots
        self.tokens = torch.zeros((1, slots), dtype=torch.int64, device=device)
        self.places = torch.full((slots,), memory.seq_len, dtype=torch.int64, device=device)
        for both in memory.layers.values():
            for each in both:
                each.zero_()  # places that nobody sees weigh 0, and 0 times no number is none
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def run(self, step: Step, logits: Logits) -> Tensor:
        """The logits [w, v] of the parts of `step` that are wanted; `logits` runs a call."""
        tokens, places = [0] * self.memory.slots, [self.memory.seq_len] * self.memory.slots
        for part in step.parts:
            tokens[part.slot], places[part.slot] = part.tokens[0], part.before
        self.tokens.copy_(torch.tensor([tokens]))
        self.places.copy_(torch.tensor(places))
        span = self._span(max(part.before for part in step.parts) + 1)
        found = self._replayed(span, logits) if self.replay else logits(self._call(span))
        wanted = [part.slot for part in step.parts if part.wanted]
        return found[torch.tensor(wanted, dtype=torch.int64, device=found.device)]

    def _span(self, needed: int) -> int:
        """Least SPAN, doubled, that is enough; no more than there is."""
        span = SPAN
        while span < needed:
            span *= 2
        return min(span, self.memory.seq_len)

    def _call(self, span: int) -> Call:
        """The next token of every slot, whichever it is."""
        device, slots = self.memory.device, self.memory.slots
        return Call(
            self.tokens,
            None,
            torch.zeros(1, dtype=torch.int64, device=device),
            torch.zeros(slots, dtype=torch.int64, device=device),
            training=False,
            cache=EverySlot(self.memory.layers, self.places, span),
            counted=self.places.clamp(max=self.memory.seq_len - 1)[None],
            wanted=torch.arange(slots, device=device),
        )

    def _replayed(self, span: int, logits: Logits) -> Tensor:
        if span not in self.graphs:
            self.graphs[span] = self._record(span, logits)
        graph, found = self.graphs[span]
        graph.replay()
        return found

    def _record(self, span: int, logits: Logits) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        aside = torch.cuda.Stream(self.memory.device)
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UP):
                logits(self._call(span))
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = logits(self._call(span))
        return graph, found
