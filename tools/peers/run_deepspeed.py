"""DeepSpeed's ZeRO-3 over gloo, training the plain GPT with torch's AdamW."""

from __future__ import annotations

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import logging

import deepspeed
from gpt import cross_entropy, whole_gpt
from harness import Case, adamw, chatter_to_stderr, microbatches, open_case, serve


def build(case: Case) -> None:
    w = case.workload
    count = w.global_batch_size // w.micro_batch_size // case.world
    config = {
        "train_batch_size": w.global_batch_size,
        "train_micro_batch_size_per_gpu": w.micro_batch_size,
        "gradient_accumulation_steps": count,
        "zero_optimization": {"stage": int(case.layout[-1]), "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # left out, it would be 1.0
        "steps_per_print": 10**9,
    }
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with chatter_to_stderr():
        deepspeed.init_distributed(dist_backend="gloo")
        model = whole_gpt(case)
        optimizer = adamw(model.parameters(), case)
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(number: int) -> float:
        total = 0.0
        for x, y in microbatches(case, number, case.rank, case.world):
            loss = cross_entropy(engine(x), y)
            engine.backward(loss)  # it divides by the number of microbatches itself
            engine.step()  # which updates after the last of them
            total += loss.item() / count
        return total

    serve(step)


if __name__ == "__main__":
    build(open_case())
