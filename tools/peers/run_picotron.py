"""picotron's tensor parallelism, from a checkout: its Llama with an untied head, its linears.

It needs three replacements to run without CUDA: two environment variables choose its plain torch
paths, flash_attn is imported whether used or not, and LOCAL_RANK must be there.
"""

from __future__ import annotations

import os
import sys
import types

os.environ.update(FLASH_ATTEN="0", DEVICE="cpu", DTYPE="float32", CONTEXT_PARALLEL="0")

import torch
import torch.distributed as dist
from harness import Case, adamw, microbatches, open_case, serve
from torch import Tensor, nn

UNUSED = {
    "flash_attn.flash_attn_interface": "flash_attn_func",
    "flash_attn.layers.rotary": "apply_rotary_emb",
    "flash_attn.ops.triton.layer_norm": "layer_norm_fn",
}
"""What its model imports of a package for GPUs."""

NAMES = {
    "decoder_layers.": "layers.",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "attention.out_proj": "attention.out",
    "mlp.down_proj": "mlp.down",
    "final_proj.weight": "head",
}


def whole_weight(name: str, case: Case) -> Tensor:
    """The whole tensor of one of its parameters."""
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    prefix, _, part = name.removesuffix(".weight").rpartition(".")
    if part in ("q_proj", "k_proj", "v_proj"):
        fused = case.weights[prefix + ".qkv.weight"]
        return fused.chunk(3)["qkv".index(part[0])]
    if part in ("gate_proj", "up_proj"):
        return case.weights[prefix + ".up.weight"].chunk(2)[part == "up_proj"]
    return case.weights[name]


@torch.no_grad()
def load(model: nn.Module, case: Case) -> None:
    """Fill each parameter with this rank's part, cut along the dimension that is shorter."""
    for name, param in model.named_parameters():
        value = whole_weight(name, case)
        for dim, (mine, all_of_it) in enumerate(zip(param.shape, value.shape, strict=True)):
            value = value.narrow(dim, case.rank * mine if mine < all_of_it else 0, mine)
        param.copy_(value)


def build(case: Case) -> None:
    sys.path.insert(0, case.source)
    for path, function in UNUSED.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            sys.modules.setdefault(name, types.ModuleType(name))
        setattr(sys.modules[path], function, None)
    import picotron.process_group_manager as groups

    dist.init_process_group("gloo")
    groups.setup_process_group_manager(tp_size=case.world, cp_size=1, pp_size=1, dp_size=1)
    from picotron.model import Llama
    from picotron.tensor_parallel.tensor_parallel import apply_tensor_parallel

    w = case.workload
    shape = types.SimpleNamespace(
        hidden_size=w.hidden_size,
        num_attention_heads=w.num_heads,
        num_key_value_heads=w.num_heads,
        num_hidden_layers=w.num_layers,
        vocab_size=w.vocab_size,
        max_position_embeddings=w.seq_len,
        intermediate_size=case.weights["layers.0.mlp.down.weight"].shape[1],
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
    )
    model = apply_tensor_parallel(Llama(shape))
    load(model, case)
    optimizer = adamw(model.parameters(), case)

    def step(number: int) -> float:
        total = 0.0
        batches = microbatches(case, number)
        for x, y in batches:
            logits = model(input_ids=x)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten()) / len(batches)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        return total

    serve(step)


if __name__ == "__main__":
    build(open_case())
