"""Megatron-Core's tensor parallelism over gloo: its GPTModel, DDP, schedule and optimizer.

It means to run on CUDA. The replacements at the top send its device names to the CPU; nothing of
what it computes or communicates is changed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from harness import BETAS, EPS, LR, WEIGHT_DECAY, Case, microbatches, open_case, serve
from torch import Tensor, nn


def _on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: object, **settings: object) -> Tensor:
        if str(settings.get("device", "")).startswith("cuda"):
            settings["device"] = "cpu"
        return make(*args, **settings)

    return made


for name in ("zeros", "ones", "empty", "full", "tensor"):
    setattr(torch, name, _on_cpu(getattr(torch, name)))
torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
torch.cuda.synchronize = torch.cuda.empty_cache = lambda *args, **settings: None
torch.Tensor.cuda = lambda self, *args, **settings: self  # type: ignore[method-assign]

from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig

# Attention's dropout is 0; its random state would need CUDA.
tensor_parallel.random.CudaRNGStatesTracker.fork = lambda *args: contextlib.nullcontext()

NAMES = {
    "embedding.word_embeddings": "embedding",
    "embedding.position_embeddings": "position",
    "decoder.final_layernorm": "final_norm",
    "decoder.layers.": "layers.",
    ".input_layernorm": ".attention_norm",
    ".pre_mlp_layernorm": ".mlp_norm",
    ".self_attention.linear_qkv": ".attention.qkv",
    ".self_attention.linear_proj": ".attention.out",
    ".mlp.linear_fc1": ".mlp.up",
    ".mlp.linear_fc2": ".mlp.down",
}
"""Parts of its parameters' names, and ours."""


@torch.no_grad()
def load(model: nn.Module, case: Case) -> None:
    """Fill each parameter with this rank's part, cut along the dimension that is shorter."""
    for name, param in model.named_parameters():
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        value = case.weights[name]
        if ".qkv." in name:  # rows of q, of k, of v -> those of each head together
            parts = value.unflatten(0, (3, case.workload.num_heads, -1))
            value = parts.transpose(0, 1).flatten(0, 2)
        for dim, (mine, all_of_it) in enumerate(zip(param.shape, value.shape, strict=True)):
            value = value.narrow(dim, case.rank * mine if mine < all_of_it else 0, mine)
        param.copy_(value)


def build_model(case: Case) -> DistributedDataParallel:
    """Its GPTModel with the case's weights, in its DDP."""
    w = case.workload
    config = TransformerConfig(
        num_layers=w.num_layers,
        hidden_size=w.hidden_size,
        num_attention_heads=w.num_heads,
        ffn_hidden_size=4 * w.hidden_size,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=case.world,
        sequence_parallel=case.layout.endswith("sp"),
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        finalize_model_grads_func=finalize_model_grads,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=w.vocab_size,
        max_sequence_length=w.seq_len,
        share_embeddings_and_output_weights=True,
    )
    load(model, case)
    settings = DistributedDataParallelConfig(use_distributed_optimizer=False)
    wrapped = DistributedDataParallel(config, settings, model)
    config.no_sync_func = wrapped.no_sync
    return wrapped


def build(case: Case) -> None:
    w = case.workload
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=case.world)
    model = build_model(case)
    settings = OptimizerConfig(
        optimizer="adam",
        lr=LR,
        min_lr=LR,
        weight_decay=WEIGHT_DECAY,
        adam_beta1=BETAS[0],
        adam_beta2=BETAS[1],
        adam_eps=EPS,
        clip_grad=0.0,
    )
    optimizer = get_megatron_optimizer(settings, [model])
    for group in optimizer.param_groups:  # as its scheduler would: norms and biases do not decay
        group["weight_decay"] = WEIGHT_DECAY * group["wd_mult"]
    positions = torch.arange(w.seq_len).expand(w.micro_batch_size, -1)
    mask = torch.triu(torch.ones(1, 1, w.seq_len, w.seq_len, dtype=torch.bool), 1)
    run = get_forward_backward_func()

    def forward(batches: Iterator[tuple[Tensor, Tensor]], model: nn.Module):
        x, y = next(batches)

        def mean(losses: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            loss = losses.mean()
            # Its schedule divides `loss` in place.
            return loss, {"loss": loss.detach().clone()}

        return model(x, positions, mask, labels=y), mean

    def step(number: int) -> float:
        batches = microbatches(case, number)
        model.zero_grad_buffer()
        optimizer.zero_grad()
        found = run(
            forward_step_func=forward,
            data_iterator=iter(batches),
            model=[model],
            num_microbatches=len(batches),
            seq_length=w.seq_len,
            micro_batch_size=w.micro_batch_size,
            forward_only=False,
        )
        optimizer.step()
        return sum(each["loss"].item() for each in found) / len(batches)

    serve(step)


if __name__ == "__main__":
    build(open_case())
