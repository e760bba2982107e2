"""One rank's share of a model that generates: its stages, and what they remember of requests.

All ranks of a pipeline run the same steps and get the same logits. Either each makes its own (they
are the same on all), or one rank leads, and the others follow it. Next: engine.py, which makes
steps; load.py for a share of a checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megalite.core import comm
from megalite.core.call import Call
from megalite.core.config import ModelConfig
from megalite.generate.cache import KeyValues, Memory, Step, Texts
from megalite.generate.record import Recorded, can_record
from megalite.models.gpt import GPT
from megalite.parallel.pipeline import Pipeline

# w logits that are wanted, v vocabulary

WITHOUT_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All but cuDNN's attention: that plans anew for each length, and here each step has its own."""


@dataclass(frozen=True, eq=False)
class Share:
    """This rank's stages in a pipeline, and their memory of requests."""

    model: ModelConfig
    pipeline: Pipeline
    memory: Memory
    slots: int
    """Requests that can run at once."""
    recorded: Recorded | None = None
    """What runs steps of one token a request, where a GPU can replay them."""

    @torch.inference_mode()
    def run(self, step: Step) -> Tensor:
        """The wanted logits [w, v], the same on all ranks of the pipeline, who call it together."""
        if self.recorded is not None and step.longest == 1:
            return self.recorded.run(step, self.logits)
        return self.logits(self.memory.call(step))

    def idle(self) -> None:
        """Take part in what other ranks run, with nothing of one's own."""
        nothing = torch.zeros(1, dtype=torch.int64, device=self.pipeline.device)
        call = Call(nothing[:, None], None, nothing, nothing, training=False, wanted=nothing)
        self.logits(call)

    def logits(self, call: Call) -> Tensor:
        """The wanted logits [w, v] of a call."""
        pipeline, mesh, vocab = self.pipeline, self.pipeline.mesh, self.model.vocab_size
        assert call.wanted is not None
        with without_plans(pipeline.device):
            made = pipeline.evaluate([call])
        if not len(call.wanted):
            return torch.empty((0, vocab), dtype=pipeline.dtype, device=pipeline.device)
        if made:
            mine = made[0].squeeze(1).contiguous()  # [w, v/tp]
            logits = comm.all_gather(mine, mesh.axis("tp"), dim=-1)[:, :vocab].contiguous()
        else:
            shape = (len(call.wanted), vocab)
            logits = torch.empty(shape, dtype=pipeline.dtype, device=pipeline.device)
        last = pipeline.schedule.placement[-1]
        return comm.broadcast(logits, mesh.axis("pp"), src=last)


def without_plans(device: torch.device) -> AbstractContextManager[None]:
    """Within it, what attends on a GPU has nothing to plan for a length that is new."""
    return sdpa_kernel(WITHOUT_PLANS) if device.type == "cuda" else nullcontext()


def make_share(
    model: ModelConfig,
    stages: Mapping[int, GPT],
    pipeline: Pipeline,
    *,
    slots: int,
    record: bool = False,
) -> Share:
    """A share with the stages of this rank; without a cache if some attention keeps no keys.

    `record`: replay steps of one token a request where that can be done; parameters must then stay
    where they are.
    """
    attention: dict[int, Any] = {  # a fork's own, or ours
        int(number): layer.attention
        for stage in stages.values()
        for number, layer in stage.layers.items()
    }
    memory: Memory = Texts(slots=slots, seq_len=model.seq_len, device=pipeline.device)
    if all(getattr(a, "keeps_keys", False) for a in attention.values()):
        memory = KeyValues(
            {number: (a.kv_heads, a.head_dim) for number, a in attention.items()},
            slots=slots,
            seq_len=model.seq_len,
            dtype=pipeline.dtype,
            device=pipeline.device,
        )
    recorded = None
    if record and isinstance(memory, KeyValues) and can_record(pipeline):
        recorded = Recorded(memory)
    return Share(model, pipeline, memory, slots, recorded)


class Leader:
    """The share of the first rank, which the others follow."""

    def __init__(self, share: Share):
        self.share, self.model, self.slots = share, share.model, share.slots
        self._world, self._device = share.pipeline.mesh.world, share.pipeline.device

    def run(self, step: Step) -> Tensor:
        """Run `step` on all ranks: its wanted logits [w, v]."""
        self._tell(step.numbers())
        return self.share.run(step)

    def dismiss(self) -> None:
        """Let the others go."""
        self._tell([_THE_END])

    def _tell(self, numbers: list[int]) -> None:
        for sent in ([len(numbers)], numbers):
            comm.broadcast(torch.tensor(sent, device=self._device), self._world)


_THE_END = -1


def follow(share: Share) -> None:
    """Run what the first rank says until it lets this one go."""
    world, device = share.pipeline.mesh.world, share.pipeline.device
    while True:
        count = comm.broadcast(torch.zeros(1, dtype=torch.int64, device=device), world)
        told = torch.zeros(int(count), dtype=torch.int64, device=device)
        numbers = comm.broadcast(told, world).tolist()
        if numbers == [_THE_END]:
            return
        share.run(Step.of(numbers))
