"""Who I am, and in which group: the mesh of ranks with its axes pp, dp, cp, tp.

A Mesh is real (process groups), single (one rank, no groups) or fake (any rank of any world in one
process: communication is logged and answered with empty tensors). Layers get an Axis, blocks get
the Mesh; there is no default mesh to fall back on. Rank order: tp fastest, then cp, dp, pp, so that
tensor parallel ranks are neighbours on one machine. Next: comm.py, which moves tensors over an
Axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import product
from math import prod
from pathlib import Path

import torch
import torch.distributed as dist

from megalite.core import host_group
from megalite.core.log import CollectiveLog

AXES = ("pp", "dp", "cp", "tp")


@dataclass(frozen=True, eq=False)
class Axis:
    """One line of ranks through the mesh, and my place on it; one rank is as good as any."""

    name: str
    size: int = 1
    idx: int = 0
    ranks: tuple[int, ...] = (0,)
    """Global ranks on this line, in order."""
    log: CollectiveLog = field(default_factory=CollectiveLog)
    group: dist.ProcessGroup | None = None
    """None where there is nothing to talk to: a single or a fake axis."""
    factors: tuple[Axis, ...] = ()
    """The axes this one was factored into, outer first."""

    @property
    def is_fake(self) -> bool:
        return self.size > 1 and self.group is None

    def at(self, idx: int) -> Axis:
        """This axis and its factors as the rank at place `idx` of it sees them."""
        factors, rest = [], idx
        for factor in reversed(self.factors):
            rest, place = divmod(rest, factor.size)
            factors.append(replace(factor, idx=place))
        return replace(self, idx=idx, factors=tuple(reversed(factors)))

    @property
    def named(self) -> dict[str, Axis]:
        """This axis and its factors by name: what a Shard asks for sizes and places."""
        return {a.name: a for a in (self, *self.factors)}


class Mesh:
    """The ranks of a run as a grid.

    All ranks build it together: it makes every process group, in one order. `factors` maps an axis
    to the size of its outer factor: `{"tp": 2}` at tp 4 gives `tp.kv` (2 ranks, outer) and `tp.rep`
    (2 ranks, inner), for key and value heads fewer than tp.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        *,
        rank: int = 0,
        kind: str = "single",
        factors: Mapping[str, int] | None = None,
        timeout: timedelta = timedelta(minutes=10),
    ):
        assert kind in ("real", "single", "fake") and set(sizes) <= set(AXES)
        self.sizes = {name: sizes.get(name, 1) for name in AXES}
        self.world_size = prod(self.sizes.values())
        assert 0 <= rank < self.world_size and (kind != "single" or self.world_size == 1)
        self.rank, self.kind = rank, kind
        self.log = CollectiveLog()
        self.coords = self._coords_of(rank)
        self._groups: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        self._timeout = timeout
        self._axes: dict[tuple[str, ...], Axis] = {}
        for names in (("tp",), ("cp",), ("dp",), ("pp",), ("dp", "cp"), AXES):
            self._axes[names] = self._make_axis(
                "*".join(names) if names != AXES else "world", names
            )
        for name, outer in (factors or {}).items():
            self._factor(name, outer)
        self.tie = self._make_pair("tie", 0, self.sizes["pp"] - 1)

    def axis(self, *names: str) -> Axis:
        """The axis of that name, or of those names combined, the first outermost.

        Raises KeyError for a combination that was not made when the mesh was built.
        """
        return self._axes[names]

    @property
    def world(self) -> Axis:
        return self._axes[AXES]

    @property
    def axes(self) -> dict[str, Axis]:
        """Every single axis and factor by name."""
        return {
            n: a
            for names, axis in self._axes.items()
            if len(names) == 1
            for n, a in axis.named.items()
        }

    def pipeline_rank(self, pp_idx: int) -> int:
        """Global rank at that place of my pipeline."""
        return self._rank_of({**self.coords, "pp": pp_idx})

    def new_group(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        """A process group of its own for `ranks`; every rank calls this, in one order."""
        if self.kind != "real":
            return None
        return dist.new_group(list(ranks), timeout=self._timeout)

    def lines(self, *names: str) -> list[tuple[int, ...]]:
        """All lines of ranks along the combined axis, in one order that every rank agrees on."""
        rest = [n for n in AXES if n not in names]
        lines = []
        for fixed in product(*(range(self.sizes[n]) for n in rest)):
            at = dict(zip(rest, fixed, strict=True))
            moving = product(*(range(self.sizes[n]) for n in names))
            lines.append(
                tuple(self._rank_of({**at, **dict(zip(names, m, strict=True))}) for m in moving)
            )
        return lines

    def _coords_of(self, rank: int) -> dict[str, int]:
        coords = {}
        for name in reversed(AXES):
            rank, coords[name] = divmod(rank, self.sizes[name])
        return {name: coords[name] for name in AXES}

    def _rank_of(self, coords: Mapping[str, int]) -> int:
        rank = 0
        for name in AXES:
            rank = rank * self.sizes[name] + coords[name]
        return rank

    def _group_of(self, lines: list[tuple[int, ...]]) -> tuple[int, ...]:
        """Make the groups of these lines (once per set of ranks) and return the line I am on."""
        mine: tuple[int, ...] = (self.rank,)
        for ranks in lines:
            if self.rank in ranks:
                mine = ranks
            if self.kind == "real" and len(ranks) > 1 and ranks not in self._groups:
                is_world = ranks == tuple(range(self.world_size))
                self._groups[ranks] = dist.group.WORLD if is_world else self.new_group(ranks)
        return mine

    def _axis_on(self, name: str, ranks: tuple[int, ...], factors: tuple[Axis, ...] = ()) -> Axis:
        group = self._groups.get(ranks)
        return Axis(name, len(ranks), ranks.index(self.rank), ranks, self.log, group, factors)

    def _make_axis(self, label: str, names: tuple[str, ...]) -> Axis:
        if self.kind == "fake":  # a fake world may be huge: only my own line is worth listing
            moving = product(*(range(self.sizes[n]) for n in names))
            mine = tuple(
                self._rank_of({**self.coords, **dict(zip(names, m, strict=True))}) for m in moving
            )
            return self._axis_on(label, mine)
        return self._axis_on(label, self._group_of(self.lines(*names)))

    def _factor(self, name: str, outer: int) -> None:
        whole = self._axes[(name,)]
        assert whole.size % outer == 0, f"{name} {whole.size} has no factor {outer}"
        inner = whole.size // outer
        lines = self.lines(name) if self.kind != "fake" else [whole.ranks]
        parts = (
            ("kv", [line[i::inner] for line in lines for i in range(inner)]),
            ("rep", [line[o * inner : (o + 1) * inner] for line in lines for o in range(outer)]),
        )
        made = tuple(self._axis_on(f"{name}.{tag}", self._group_of(part)) for tag, part in parts)
        self._axes[(name,)] = self._axis_on(name, whole.ranks, made)

    def _make_pair(self, label: str, first: int, last: int) -> Axis | None:
        """The two-rank axis between two pipeline places, or None on ranks that stand at neither."""
        if first == last:
            return Axis(label, ranks=(self.rank,), log=self.log)
        lines = self.lines("pp") if self.kind != "fake" else [self.axis("pp").ranks]
        mine = self._group_of([(line[first], line[last]) for line in lines])
        return self._axis_on(label, mine) if len(mine) == 2 else None


def connect(
    *,
    rank: int,
    world_size: int,
    backend: str,
    timeout: timedelta,
    device: torch.device,
    meet_at: Path | None = None,
) -> None:
    """Join the process group that torchrun described; a world of one rank joins nothing.

    `backend` is gloo, nccl, or `host`: gloo through the host's memory, where ranks share a GPU.
    `meet_at` is a new file that ranks of this host find each other by, in place of torchrun.
    """
    if backend == host_group.BACKEND:
        host_group.register()
    if world_size > 1 and not dist.is_initialized():
        bound = device if backend == "nccl" else None
        store = dist.FileStore(str(meet_at), world_size) if meet_at is not None else None
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=bound,
        )


def disconnect(*, together: bool = False) -> None:
    """Leave the process group, if there is one.

    `together`: once all ranks are here, since one that leaves early breaks connections that the
    others still use.
    """
    if dist.is_initialized():
        if together:
            dist.barrier()
        dist.destroy_process_group()
