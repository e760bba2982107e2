"""Do all ranks run the same thing? Asked once, before anything else is exchanged."""

from __future__ import annotations

import hashlib
import json
import socket

import torch

import megalite
from megalite.core import comm
from megalite.core.config import Config
from megalite.core.errors import UserError
from megalite.core.mesh import Mesh


def check_agreement(config: Config, mesh: Mesh, device: torch.device) -> None:
    """Raise UserError, alike on every rank, if two ranks have different configs or versions.

    All ranks call it together.
    """
    mine = _facts(config)
    text = json.dumps(mine, sort_keys=True).encode()
    digest = int.from_bytes(hashlib.sha256(text).digest()[:7], "little")
    bounds = torch.tensor([digest, -digest, len(text)], dtype=torch.int64, device=device)
    high, low, longest = comm.all_reduce(bounds, mesh.world, op="max").tolist()
    if high == -low:
        return
    padded = torch.tensor(list(text.ljust(longest)), dtype=torch.uint8, device=device)
    everyone = comm.all_gather(padded, mesh.world).view(mesh.world_size, longest).cpu()
    facts = [json.loads(bytes(row.tolist())) for row in everyone]
    for rank, other in enumerate(facts):
        for name, value in other.items():
            if name != "host" and value != facts[0][name]:
                raise UserError(
                    f"config differs between ranks: rank {rank} ({other['host']}) has {name}={value}, "
                    f"rank 0 has {facts[0][name]} (start every rank with the same command and version)"
                )


def _facts(config: Config) -> dict[str, object]:
    fields = {k: v for group in config.to_dict().values() for k, v in group.items()}
    host = socket.gethostname()
    return {"host": host, "megalite": megalite.__version__, "torch": torch.__version__, **fields}
