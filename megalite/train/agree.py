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
from megalite.train.own_files import own_files


def check_agreement(config: Config, mesh: Mesh, device: torch.device) -> None:
    """Raise UserError, alike on every rank, if two ranks have different configs or versions.

    All ranks call it together, over a mesh that does not follow from the config: ranks that
    disagree on the layout would make other groups each.
    """
    facts = json.dumps(_facts(config))
    digest = int.from_bytes(hashlib.sha256(facts.encode()).digest()[:7], "little")
    text = json.dumps([socket.gethostname(), json.loads(facts)]).encode()
    bounds = torch.tensor([digest, -digest, len(text)], dtype=torch.int64, device=device)
    high, low, longest = comm.all_reduce(bounds, mesh.world, op="max").tolist()
    if high == -low:
        return
    padded = torch.tensor(list(text.ljust(longest)), dtype=torch.uint8, device=device)
    everyone = comm.all_gather(padded, mesh.world).view(mesh.world_size, longest).cpu()
    (_, first), *others = [json.loads(bytes(row.tolist())) for row in everyone]
    for rank, (host, other) in enumerate(others, start=1):
        for name in first | other:
            mine, theirs = first.get(name, "nothing"), other.get(name, "nothing")
            if mine != theirs:
                raise UserError(
                    f"config differs between ranks: rank {rank} ({host}) has {name}={theirs}, "
                    f"rank 0 has {mine} (start every rank with the same command and version)"
                )


def _facts(config: Config) -> dict[str, object]:
    fields = {k: v for group in config.to_dict().values() for k, v in group.items()}
    files = {f"sha256 of --{name}": file["sha256"] for name, file in own_files(config).items()}
    return {"megalite": megalite.__version__, "torch": torch.__version__, **fields, **files}
