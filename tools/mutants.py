"""What the ranks of mutate.py do: train with one fault, and compare with one process."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megalite.core import comm
from megalite.core.mesh import Axis, Mesh
from megalite.core.params import give_traits, named_parameters, traits_of
from megalite.core.shard import Block, Shard
from megalite.parallel.p2p import Pipes
from megalite.schedule.action import Message
from megalite.train import build, verify

CHANGES = ("drop", "double", "wrong axis", "stale")
STARTS = ("all_reduce_start", "all_gather_start", "reduce_scatter_start", "shift_start")
SUMS = ("all_reduce", "reduce_scatter")
PACKAGE = "megalite"
PLUMBING = ("core/comm.py", "parallel/p2p.py", "autograd/function.py", "tools/mutants.py")


class Door:
    """Stands in for the collectives of core/comm.py: notes each site, and changes one."""

    def __init__(self, where: str = "", change: str = ""):
        self.where, self.change = where, change
        self.sites: dict[tuple[str, str], None] = {}
        self.mesh: Mesh | None = None
        self.last: dict[tuple, Tensor] = {}
        for name in STARTS:
            setattr(comm, name, self._wrapped(name.removesuffix("_start"), getattr(comm, name)))
        exchange = self._wrapped("all_to_all", lambda x, axis: _ended(real_exchange(x, axis)))
        real_exchange = comm._exchange
        comm._exchange = lambda x, axis: exchange(x, axis).wait()
        self.take = Pipes.take
        Pipes.take = lambda pipes, src, message: self._taken(pipes, src, message)  # type: ignore[method-assign]

    def _wrapped(self, op: str, start: Callable[..., comm.Pending]) -> Callable[..., comm.Pending]:
        def changed(x: Tensor, axis: Axis, *args: Any, **kwargs: Any) -> comm.Pending:
            if axis.size == 1 or not self._is_here(_site(), _name(op, args, kwargs)):
                return start(x, axis, *args, **kwargs)
            if self.change == "drop":
                return _ended(_left_out(op, x, axis, kwargs.get("out")))
            if self.change == "wrong axis":
                axis = self._another(axis)
            if self.change == "double" and op not in SUMS:
                x = start(x, axis, *args, **kwargs).wait().clone()
            pending = start(x, axis, *args, **kwargs)
            if self.change == "double" and op in SUMS:
                return _ended(pending.wait().mul_(2))
            if self.change == "stale":
                return _ended(self._older(op, pending.wait()))
            return pending

        return changed

    def _taken(self, pipes: Pipes, src: int, message: Message) -> Tensor:
        got = self.take(pipes, src, message)
        if not self._is_here(f"{_site()} {message.kind}", "transfer"):
            return got
        if self.change == "drop":
            return torch.zeros_like(got)
        return got * 2 if self.change == "double" else self._older(message.kind, got)

    def _is_here(self, where: str, op: str) -> bool:
        self.sites[where, op] = None
        return bool(self.change) and where == self.where

    def _older(self, op: str, got: Tensor) -> Tensor:
        """Put what came the last time in place of `got`."""
        key = (op, tuple(got.shape))
        before = self.last.get(key)
        self.last[key] = got.detach().clone()
        with torch.no_grad():
            return got.zero_() if before is None else got.copy_(before)

    def _another(self, axis: Axis) -> Axis:
        """Another axis, of the same size if there is one; else over this rank alone."""
        assert self.mesh is not None
        others = [a for n, a in self.mesh.axes.items() if n in ("tp", "cp", "dp", "pp")]
        others = [a for a in others if a.size > 1 and a.ranks != axis.ranks]
        others.sort(key=lambda a: a.size != axis.size)
        return others[0] if others else Axis("none")


def _site() -> str:
    """file:line function of whoever asked: of comm itself, where that is one of its backwards."""
    frame = asked = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(PLUMBING):
        if frame.f_code.co_filename.endswith("core/comm.py"):
            asked = frame
        frame = frame.f_back
    if f"{PACKAGE}/" in frame.f_code.co_filename:
        asked = frame
    path = asked.f_code.co_filename.rpartition(f"{PACKAGE}/")[2]
    return f"{path}:{asked.f_lineno} {asked.f_code.co_name}"


def _name(op: str, args: tuple, kwargs: dict) -> str:
    kind = args[0] if args else kwargs.get("op", "sum")
    return op if kind == "sum" else f"{op} {kind}"


def _ended(x: Tensor) -> comm.Pending:
    return comm.Pending((), None, lambda: x)


def _left_out(op: str, x: Tensor, axis: Axis, out: Tensor | None) -> Tensor:
    """The result where nothing came from anyone else."""
    if op == "all_gather":
        return torch.cat([x] * axis.size) if out is None else out
    if op == "reduce_scatter":
        mine = x.chunk(axis.size)[axis.idx].clone()
        return mine if out is None else out.copy_(mine)
    return x if op == "all_reduce" else x.clone()


# -- shards ------------------------------------------------------------------------------------


def _blocks(change: Callable[[Block], Block]) -> Callable[[Shard], Shard]:
    return lambda shard: replace(shard, blocks=tuple(change(b) for b in shard.blocks))


def _cut(dim: int, axis: str | None) -> Callable[[Block], Block]:
    return lambda block: replace(
        block, cut=tuple(axis if d == dim else old for d, old in enumerate(block.cut))
    )


def _longer(shard: Shard) -> Shard:
    first = replace(shard.blocks[0], size=shard.blocks[0].size + 1)
    return Shard((shard.shape[0] + 1, *shard.shape[1:]), (first, *shard.blocks[1:]), shard.tied)


def _wider(shard: Shard) -> Shard:
    return replace(shard, shape=(*shard.shape[:-1], shard.shape[-1] + 1))


def _border_moved(shard: Shard) -> Shard:
    first, second, *rest = shard.blocks
    moved = (replace(first, size=first.size + 1), replace(second, size=second.size - 1))
    return replace(shard, blocks=(*moved, *rest))


def _in_one(shard: Shard) -> Shard:
    return replace(shard, blocks=(replace(shard.blocks[0], size=shard.shape[0]),))


def _other_order(shard: Shard) -> Shard:
    return replace(shard, blocks=shard.blocks[::-1])


SHARD_CHANGES: dict[str, tuple[Callable[[Shard], bool], Callable[[Shard], Shard]]] = {
    "shape: a row more": (lambda s: True, _longer),
    "shape: a column more": (lambda s: len(s.shape) > 1, _wider),
    "blocks: a border moved": (lambda s: len(s.blocks) > 1, _border_moved),
    "blocks: all in one": (lambda s: len(s.blocks) > 1, _in_one),
    "blocks: in another order": (lambda s: s.blocks[::-1] != s.blocks, _other_order),
    "cut: rows whole": (
        lambda s: any(b.cut[0] for b in s.blocks), _blocks(_cut(0, None))),
    "cut: rows over tp": (
        lambda s: all(b.cut[0] is None for b in s.blocks), _blocks(_cut(0, "tp"))),
    "cut: columns whole": (
        lambda s: len(s.shape) > 1 and bool(s.blocks[0].cut[1]), _blocks(_cut(1, None))),
    "cut: columns over tp": (
        lambda s: len(s.shape) > 1 and not s.blocks[0].cut[1], _blocks(_cut(1, "tp"))),
    "grad_sum: none": (
        lambda s: any(b.grad_sum for b in s.blocks),
        _blocks(lambda b: replace(b, grad_sum=()))),
    "grad_sum: over tp, too": (
        lambda s: any("tp" not in b.grad_sum for b in s.blocks),
        _blocks(lambda b: replace(b, grad_sum=("tp",)))),
    "tied: not": (lambda s: s.tied is not None, lambda s: replace(s, tied=None)),
    "tied: over both stages": (lambda s: s.tied is None, lambda s: replace(s, tied=(0, 1))),
}  # fmt: skip
"""What is changed -> (where it can be, how)."""


def _kind_of(name: str) -> str:
    """A parameter's name for all layers."""
    return re.sub(r"\.\d+\.", ".N.", name)


def _changeable(mesh: Mesh, name: str, shard: Shard, change: str) -> bool:
    if change.startswith("tied") and mesh.sizes["pp"] == 1:
        return False
    if change.startswith(("cut", "grad_sum", "blocks", "shape")) and mesh.sizes["tp"] == 1:
        return False
    return SHARD_CHANGES[change][0](shard)


def _change_shards(stages: dict[int, Any], where: str, change: str) -> None:
    """Have the parameters of that name say, and be shaped by, another Shard."""
    for stage in stages.values():
        for name, param in named_parameters(stage):
            if _kind_of(name) == where:
                _change_shard(param, change)


def _change_shard(param: nn.Parameter, change: str) -> None:
    traits = traits_of(param)
    shard = SHARD_CHANGES[change][1](traits.shard)
    param.data = torch.empty(shard.local_shape(traits.axes))
    give_traits(param, replace(traits, shard=shard))


# -- jobs --------------------------------------------------------------------------------------


def _with_stages(seen: Callable[[Mesh, dict[int, Any]], None]) -> None:
    """Have `seen` called with a run's mesh and stages before anything else uses them."""
    real = build.build_stages

    def made(cfg: Any, mesh: Mesh, **kwargs: Any) -> dict[int, Any]:
        stages = real(cfg, mesh, **kwargs)
        seen(mesh, stages)
        return stages

    build.build_stages = made


def _compare(rank: int, world: int, kwargs: dict) -> dict:
    return verify.compare(rank, world, precision="fp64", varying=False, **kwargs)


def sites(rank: int, world: int, **kwargs: Any) -> dict:
    """Every place of a right run that asks for a collective or takes what another stage sent."""
    door = Door()
    found = _compare(rank, world, kwargs)
    assert found["first"] is None, found["first"]
    return {"sites": list(door.sites)}


def shards(rank: int, world: int, **kwargs: Any) -> dict:
    """Every parameter of this rank, layers taken together, with each change of its Shard."""
    found: dict[tuple[str, str], None] = {}

    def note(mesh: Mesh, stages: dict[int, Any]) -> None:
        for stage in stages.values():
            for name, param in named_parameters(stage):
                for change in SHARD_CHANGES:
                    if _changeable(mesh, name, traits_of(param).shard, change):
                        found[_kind_of(name), change] = None

    _with_stages(note)
    _compare(rank, world, kwargs)
    return {"shards": list(found)}


def comm_mutant(rank: int, world: int, where: str, change: str, **kwargs: Any) -> dict:
    """The comparison with one collective changed."""
    door = Door(where, change)
    _with_stages(lambda mesh, stages: setattr(door, "mesh", mesh))
    return _compare(rank, world, kwargs)


def shard_mutant(rank: int, world: int, where: str, change: str, **kwargs: Any) -> dict:
    """The comparison with one Shard changed."""
    _with_stages(lambda mesh, stages: _change_shards(stages, where, change))
    return _compare(rank, world, kwargs)
