"""What tools/bench_train.py trains on a GPU fits in one of 141 GB, by the plan."""

import pytest
import torch

from megalite.core.config import Config, ModelConfig, TrainConfig
from megalite.plan.memory import stage_memory
from tools.bench_train import WORKLOADS

GIB = 2**30


@pytest.mark.parametrize("name", ["gpt2-124m", "gpt3-1.3b", "llama-7b-wide"])
def test_workloads_for_a_gpu_leave_a_fifth_of_it_free(name):
    batch = ("micro_batch_size", "global_batch_size")
    sizes = {key: value for key, value in WORKLOADS[name].items() if key not in batch}
    train = TrainConfig(**{key: WORKLOADS[name][key] for key in batch}, device="cuda")
    config = Config(model=ModelConfig(**sizes), train=train)
    config.check(1)
    assert stage_memory(config, 1, 0, torch.bfloat16).total < 110 * GIB
    logits = train.micro_batch_size * config.model.seq_len * config.model.vocab_size
    assert logits < 2**31
