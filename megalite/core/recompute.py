"""What backward computes again in place of keeping it.

`again(fn, x)` keeps the inputs of `fn` and nothing else: backward runs it a second time, then back.
Parts does that for the named parts of a layer, and watches what autograd saves while the layer
runs: where that is the output of a part, as when a linear saves its input, how to make it is saved
instead. So a norm's output is gone once the linear has read it; the linear's backward has it made
again, and the norm's own backward takes the same second run. A linear that leaves its weight
gradient to W holds the tensor made again until then.

Dropout masks have names, so there is no generator state to put back. Who runs what again: unit.py.
Chen et al. 2016 (arXiv 1604.06174); by part, Korthikanti et al. 2022 (arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef


class Run:
    """One run of a function, which can be repeated as long as someone holds this."""

    def __init__(self, fn: Callable[..., Tensor], inputs: tuple[Saved, ...], needs: list[bool]):
        self.fn, self._inputs, self._needs = fn, inputs, needs
        self._versions = [_version(saved) for saved in inputs]
        self._second: tuple[Tensor, list[Tensor]] | None = None

    def second(self) -> tuple[Tensor, list[Tensor]]:
        """The output of a second run, its graph behind it, and that graph's inputs."""
        if self._second is None:
            # Autograd checks this of what it saves itself.
            assert [_version(saved) for saved in self._inputs] == self._versions, (
                "an input of what is run again has been written to since it was run"
            )
            inputs = [
                unpack(saved).detach().requires_grad_(need)
                for saved, need in zip(self._inputs, self._needs, strict=True)
            ]
            with torch.enable_grad():
                self._second = self.fn(*inputs), inputs
        return self._second

    def forget(self) -> None:
        """Let go of the second run; another would be a third."""
        self._second = None


@dataclass(frozen=True, eq=False)
class Remade:
    """A view of a run's output, by how to make it."""

    run: Run
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


Saved = Tensor | Remade


def _version(saved: Saved) -> int:
    """How often a tensor, or its views, have been written to in place."""
    return saved._version if isinstance(saved, Tensor) else 0


def unpack(saved: Saved) -> Tensor:
    """The tensor, made again if need be."""
    if isinstance(saved, Tensor):
        return saved
    output = saved.run.second()[0].detach()
    return output.as_strided(saved.size, saved.stride, saved.offset)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, *inputs):
        ctx.run = run
        return run.fn(*inputs)

    @staticmethod
    def backward(ctx, grad):
        # The run then lives no longer than those who saved its output in its place.
        run, ctx.run = ctx.run, None
        y, inputs = run.second()
        run.forget()
        edge = get_gradient_edge(y)
        del y  # the second run's own backward does not need its output to be there
        # Into the inputs made for it, and into parameters, whose hooks see it: this is the only
        # backward that reaches them.
        torch.autograd.backward(edge, grad)
        return None, *(x.grad for x in inputs)


def again(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`fn(x)`, of which `x` alone is kept; `x` must require a gradient."""
    assert x.requires_grad, "no backward would reach the parameters that fn uses"
    return _Again.apply(Run(fn, (x.detach(),), [True]), x)


class Parts:
    """The parts `names` of a layer are run again; a context manager around the layer's forward."""

    def __init__(self, names: Iterable[str]):
        self.names = frozenset(names)
        # A weak reference keeps a storage's address from being used again, but not its memory.
        self._made: dict[StorageWeakRef, tuple[Run, int]] = {}
        self._hooks = saved_tensors_hooks(self._pack, unpack)

    def __enter__(self) -> Parts:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        # Autograd holds `_pack`, and so this, as long as the graph.
        self._made.clear()

    def run(self, name: str, fn: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        """`fn(*inputs)`, kept or not as `name` says; `fn` must not write to its inputs."""
        needs = [x.requires_grad for x in inputs]
        if name not in self.names or not torch.is_grad_enabled() or not any(needs):
            return fn(*inputs)
        run = Run(fn, tuple(self._pack(x.detach()) for x in inputs), needs)
        y = _Again.apply(run, *inputs)
        self._made[StorageWeakRef(y.untyped_storage())] = run, y._version
        return y

    def _pack(self, x: Tensor) -> Saved:
        run, version = self._made.get(StorageWeakRef(x.untyped_storage()), (None, 0))
        # Written to since, it is no longer what a second run makes.
        if run is None or x._version != version:
            return x
        return Remade(run, tuple(x.shape), x.stride(), int(x.storage_offset()))
