"""What test_twin.py runs in a forked process: our one-process engine beside the plain twin."""

from __future__ import annotations

import torch

from megalite.core.call import Call
from megalite.core.config import Config
from megalite.core.params import named_parameters
from megalite.train.loop import forward_backward, update
from tests import twin
from tests.ranks.jobs import calls_of, engine_of


def _parts(call: Call) -> list[torch.Tensor]:
    return [x for x in (call.tokens, call.labels, call.starts) if x is not None]


def compare_with_twin(rank: int, world: int, config: dict, steps: int) -> dict[str, float]:
    """The worst error of each kind, relative to the largest number of its tensor."""
    torch.set_default_dtype(torch.float64)
    engine = engine_of(Config.from_dict(config), rank, world, "float64")
    params = dict(named_parameters(engine.stages[0]))
    calls = [calls_of(engine, step, False) for step in range(steps)]
    batches = [
        tuple(
            torch.cat([part.T for part in parts]) for parts in zip(*map(_parts, step), strict=True)
        )
        for step in calls
    ]
    weights = {name: p.detach().clone() for name, p in params.items()}
    wanted = twin.train(engine.config.model, engine.config.optim, weights, batches)
    worst = dict.fromkeys(("loss", "norm", "grads", "weights"), 0.0)

    def see(kind: str, ours: torch.Tensor, theirs: torch.Tensor | float) -> None:
        theirs = torch.as_tensor(theirs)
        error = ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1e-3)).item()
        worst[kind] = max(worst[kind], error if error == error else float("inf"))

    for step, want in zip(calls, wanted, strict=True):
        found = forward_backward(engine, step)
        see("loss", found.loss, want["loss"])
        see("norm", found.norm, want["norm"])
        for name, param in params.items():
            see("grads", param.grad * found.correction, want["grads"][name])
        update(engine, found, lr=engine.config.optim.lr)
        for name, param in params.items():
            see("weights", param.detach(), want["weights"][name])
    return worst
