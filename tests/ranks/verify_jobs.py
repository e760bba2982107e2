"""Ranks with one fault each, which `compare` must find: a wrong Shard, a collective left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from megalite.core import comm
from megalite.core.call import Call
from megalite.core.mesh import Axis
from megalite.core.params import give_traits, named_parameters, traits_of
from megalite.core.shard import Block
from megalite.layers.attention import Attention
from megalite.parallel import zero
from megalite.train import verify
from megalite.train.loop import Reduced
from megalite.train.steps import Steps


def with_blocks(param: nn.Parameter, *blocks: Block) -> None:
    """Give a parameter a Shard that says another cut than the one its layer computes with."""
    traits = traits_of(param)
    give_traits(param, replace(traits, shard=replace(traits.shard, blocks=blocks)))


class NoGradSum(Attention):
    """The q norm's gradient is said to be whole on every rank, and is partial over tp."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        (block,) = traits_of(self.q_norm.weight).shard.blocks
        with_blocks(self.q_norm.weight, replace(block, grad_sum=()))


class CutAsOneBlock(Attention):
    """q, k and v are said to be one block: each rank's rows are then other rows of the whole."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        rows = traits_of(self.qkv.weight).shard.shape[0]
        with_blocks(self.qkv.weight, Block(rows, ("tp", None)))


class CutTheOtherWay(Attention):
    """The output weight is said to be cut by rows, so that its local shape is another."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        with_blocks(self.out.weight, Block(traits_of(self.out.weight).shard.shape[0], ("tp", None)))


class SeesAcrossDocuments(Attention):
    """Documents are forgotten where sequences are cut."""

    def forward(self, x: Tensor, call: Call) -> Tensor:
        return super().forward(x, replace(call, starts=None) if call.context else call)


FAULTY = (NoGradSum, CutAsOneBlock, CutTheOtherWay, SeesAcrossDocuments)
ATTENTIONS = {a.__name__: a for a in (Attention, *FAULTY)}


def compare(rank: int, world: int, attention: str, **kwargs: Any) -> dict:
    """The library's comparison with one of these attentions."""
    return verify.compare(rank, world, attention=ATTENTIONS[attention], **kwargs)


def with_nearly_right_gradient(rank: int, world: int, in_bits: bool, **kwargs: Any) -> dict:
    """One gradient is too large by a part in 10^13, in the bucket of every rank."""
    right = Steps.forward_backward

    def wrong(steps: Steps, calls: list[Call], **kwargs: bool) -> Reduced:
        found = right(steps, calls, **kwargs)
        for stage in steps.engine.stages.values():
            for name, param in named_parameters(stage):
                if name == "layers.1.mlp.up.weight":
                    param.grad.mul_(1 + 1e-13)
        return found

    Steps.forward_backward = wrong  # type: ignore[method-assign]
    compare = verify.compare_in_fixed_order if in_bits else verify.compare
    return compare(rank, world, **kwargs)


def without_partial_sums(rank: int, world: int, **kwargs: Any) -> dict:
    """The sum of gradients that are partial over tp is left out of every bucket."""

    class NoSum:
        def __getattr__(self, name: str) -> Any:
            return getattr(comm, name)

        def all_reduce(self, x: Tensor, axis: Axis) -> Tensor:
            return x

    zero.comm = NoSum()
    return verify.compare(rank, world, **kwargs)


def without_data_sums(rank: int, world: int, **kwargs: Any) -> dict:
    """Each data parallel rank keeps the gradients of its own samples."""

    class NoSum:
        def __getattr__(self, name: str) -> Any:
            return getattr(comm, name)

        def all_reduce_start(self, x: Tensor, axis: Axis, **kwargs: Any) -> comm.Pending:
            return comm.Pending((), None, lambda: x)

    zero.comm = NoSum()
    return verify.compare(rank, world, **kwargs)
