"""The engine: one pipeline rank walks its list of actions; pp = 1 is a list of one stage.

F runs a stage on one microbatch and sends its output on; B (or I, with W later) runs it back; R
starts what is left of the stage's gradient reduction. The order is the Schedule's alone. Next:
schedule/action.py for what an action is, buckets.py for what R reduces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from megalite.core.call import Call, run_jobs
from megalite.core.mesh import Mesh
from megalite.parallel.p2p import Pipes, free_storage
from megalite.schedule.action import (
    Action,
    Message,
    Op,
    Schedule,
    at_first_backward,
    forward_only,
    received,
    sent,
)

# r rows of the residual stream on this rank, b micro batch, h hidden


class Stage(Protocol):
    """What the engine asks of a stage: models/gpt.py has ours."""

    def __call__(self, x: Tensor | None, call: Call, /) -> Tensor:
        """[r, b, h], or None on the first stage -> [r, b, h].

        The last stage gives the summed loss, or logits where the call has no labels.
        """

    def boundary_shape(self, call: Call, /) -> tuple[int, ...]:
        """Shape of what enters this stage, and of what leaves it unless it is the last."""


class Pipeline:
    """Runs the stages that live here.

    `schedule_for(n)` orders n microbatches; `enter(microbatch)` is called before what makes
    gradients, and R calls `reduce(stage)`.
    """

    def __init__(
        self,
        schedule_for: Callable[[int], Schedule],
        stages: Mapping[int, Stage],
        mesh: Mesh,
        *,
        dtype: torch.dtype,
        device: torch.device,
        enter: Callable[[int], None],
        reduce: Callable[[int], None],
    ):
        self.schedule_for, self.stages, self.mesh, self.reduce = schedule_for, stages, mesh, reduce
        self.dtype, self.device, self.enter = dtype, device, enter
        self.schedule = schedule_for(1)
        self.last = self.schedule.num_stages - 1
        self.pipes = Pipes(mesh, self.schedule)
        self._run: dict[Op, Callable[[Action, Any], None]] = {
            Op.F: self._forward,
            Op.B: self._backward,
            Op.I: self._backward,
            Op.W: self._weights,
            Op.R: self._reduce,
        }

    @property
    def has_loss(self) -> bool:
        """Whether the last stage lives on this rank."""
        return self.last in self.stages

    def run(
        self, calls: Sequence[Call], *, seed: Tensor, stands: Callable[[], bool] | None = None
    ) -> Tensor:
        """Forward and backward of one step's microbatches; gradients are added up in `.grad`.

        `seed` (scalar) is what the loss sum's gradient starts from. Gives the loss sum of this
        rank's microbatches, zero where the last stage is elsewhere. All ranks of the mesh call it
        together. `stands` is asked when this rank is about to begin its first backward: unless its
        forwards so far stand, on all ranks alike, all run theirs again.
        """
        self.seed = seed
        losses = self._walk(self.schedule_for(len(calls)), calls, stands)
        return (
            torch.stack(losses).sum()
            if losses
            else torch.zeros((), dtype=seed.dtype, device=self.device)
        )

    @torch.no_grad()
    def evaluate(self, calls: Sequence[Call]) -> list[Tensor]:
        """Forward alone: what the last stage gave for each call, nothing where it is elsewhere.

        Without what is there for training only: dropout, and what is added to the cross entropy.
        """
        calls = [call.evaluating() for call in calls]
        return self._walk(forward_only(self.schedule_for(len(calls))), calls)

    def _walk(
        self,
        schedule: Schedule,
        calls: Sequence[Call],
        stands: Callable[[], bool] | None = None,
    ) -> list[Tensor]:
        self._begin(schedule, calls)
        rest = schedule
        if stands is not None:
            warmup, rest = at_first_backward(schedule)
            self._do(warmup)
            if not stands():
                self.mesh.log.doing("forwards again")
                self.pipes.drop()
                self._begin(schedule, calls)
                self._do(warmup)
        self._do(rest)
        self.mesh.log.doing("send the rest")
        self.pipes.end()
        assert not self.kept and not self.at_hand and not any(self.later.values())
        return [self.results[m] for m in sorted(self.results)]

    def _begin(self, schedule: Schedule, calls: Sequence[Call]) -> None:
        self.schedule, self.calls, self.split = schedule, calls, schedule.splits_backward
        self.later: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self.kept: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self.at_hand: dict[Message, Tensor] = {}
        self.results: dict[int, Tensor] = {}
        self.pipes.begin(schedule, self._buffer)

    def _do(self, schedule: Schedule) -> None:
        self.pipes.expect(schedule)
        log = self.mesh.log
        for action in schedule.actions[self.mesh.coords["pp"]]:
            log.doing("wait", action)
            given = self._take(action)
            log.doing("act", action)
            self._run[action.op](action, given)

    def _forward(self, action: Action, x: Tensor | None) -> None:
        _, stage, microbatch = action
        call = self.calls[microbatch]
        if self.split:
            call = call.deferring(self.later.setdefault((stage, microbatch), []))
        grad = torch.is_grad_enabled()
        if x is not None and grad:
            x.requires_grad_()
        y = self.stages[stage](x, call)
        if grad:
            self.kept[stage, microbatch] = (x, y)
        if stage == self.last:
            self.results[microbatch] = y.detach()
        else:
            self._pass_on(action, y)

    def _backward(self, action: Action, dy: Tensor | None) -> None:
        _, stage, microbatch = action
        x, y = self.kept.pop((stage, microbatch))
        self.enter(microbatch)
        torch.autograd.backward(y, self.seed if stage == self.last else dy)
        if x is not None:
            assert x.grad is not None
            self._pass_on(action, x.grad)

    @torch.no_grad()
    def _weights(self, action: Action, nothing: None) -> None:
        self.enter(action.microbatch)
        run_jobs(self.later.pop((action.stage, action.microbatch)))

    def _reduce(self, action: Action, nothing: None) -> None:
        self.reduce(action.stage)

    def _take(self, action: Action) -> Tensor | None:
        """What the stages beside this one have made for `action`; None at the ends, and for W."""
        coming = received(action, self.schedule)
        if coming is not None:
            return self.pipes.take(*coming)
        kind = "act" if action.op is Op.F else "grad"
        return self.at_hand.pop(Message(kind, action.stage, action.microbatch), None)

    def _pass_on(self, action: Action, tensor: Tensor) -> None:
        going = sent(action, self.schedule)
        if going is not None:
            self.pipes.send(going[0], tensor.detach(), lambda: free_storage(tensor))
        elif action.op is Op.F:
            # A fresh leaf of the same numbers: each stage's graph ends at its own border.
            self.at_hand[Message("act", action.stage + 1, action.microbatch)] = tensor.detach()
        else:
            self.at_hand[Message("grad", action.stage - 1, action.microbatch)] = tensor

    def _buffer(self, message: Message) -> Tensor:
        shape = self.stages[message.stage].boundary_shape(self.calls[message.microbatch])
        return torch.empty(shape, dtype=self.dtype, device=self.device)
