"""Who this process is among the ranks that torchrun started, before any process group exists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megalite.core.errors import UserError

COUNTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
RENDEZVOUS = ("MASTER_ADDR", "MASTER_PORT")
WAY_OUT = "start ranks with examples/launch.sh or torchrun"


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among all: one of `size` ranks, `local_size` of them on this host."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launched: bool = False
    """Started by torchrun, which set the rendezvous too."""

    @staticmethod
    def from_environment(environment: Mapping[str, str]) -> World:
        """The world that torchrun's variables describe; one process if there are none.

        Raises UserError if some are missing, no number, or contradict each other.
        """
        present = [name for name in COUNTS if name in environment]
        if not present:
            return World()
        for name in (*COUNTS, *RENDEZVOUS):
            if name not in environment:
                raise UserError(f"launch: {present[0]} is set but {name} is not ({WAY_OUT})")
        values = {}
        for name in COUNTS:
            text = environment[name]
            if not (text.isascii() and text.isdigit() and len(text) < 10):
                raise UserError(f"launch: {name}={text!r} is not a count ({WAY_OUT})")
            values[name] = int(text)
        for rank, size in (COUNTS[:2], COUNTS[2:], ("LOCAL_WORLD_SIZE", "WORLD_SIZE")):
            limit = values[size] + (rank == "LOCAL_WORLD_SIZE")
            if values[rank] >= limit:
                found = f"{rank}={values[rank]} does not fit in {size}={values[size]}"
                raise UserError(f"launch: {found} ({WAY_OUT})")
        return World(
            rank=values["RANK"],
            size=values["WORLD_SIZE"],
            local_rank=values["LOCAL_RANK"],
            local_size=values["LOCAL_WORLD_SIZE"],
            launched=True,
        )
