"""fairscale's OSS, the first open ZeRO-1, with torch's DDP on the plain GPT."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.distributed as dist
from fairscale.optim.oss import OSS
from gpt import whole_gpt
from harness import BETAS, EPS, LR, Case, decay_groups, open_case, serve
from run_torch import accumulated


def build(case: Case) -> None:
    dist.init_process_group("gloo")
    model = whole_gpt(case)
    wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    chosen = {"fused": True} if case.fused else {}
    groups = decay_groups(model.parameters())
    optimizer = OSS(groups, optim=torch.optim.AdamW, lr=LR, betas=BETAS, eps=EPS, **chosen)
    step = accumulated(
        case,
        wrapped,
        optimizer,
        dp=case.world,
        syncing=lambda is_last: nullcontext() if is_last else wrapped.no_sync(),
    )
    serve(step)


if __name__ == "__main__":
    build(open_case())
