"""nanoGPT's model.py, from a checkout, in one process: its model, its optimizer, its step."""

from __future__ import annotations

import sys

import torch
from harness import BETAS, LR, WEIGHT_DECAY, Case, chatter_to_stderr, microbatches, open_case, serve

NAMES = {
    "transformer.wte": "embedding",
    "transformer.wpe": "position",
    "transformer.ln_f": "final_norm",
    "transformer.h.": "layers.",
    "lm_head": "embedding",
    ".ln_1": ".attention_norm",
    ".ln_2": ".mlp_norm",
    ".attn.c_attn": ".attention.qkv",
    ".attn.c_proj": ".attention.out",
    ".mlp.c_fc": ".mlp.up",
    ".mlp.c_proj": ".mlp.down",
}
"""Parts of its parameters' names, and ours."""


def build(case: Case) -> None:
    sys.path.insert(0, case.source)
    from model import GPT, GPTConfig  # its own module of that name

    w = case.workload
    with chatter_to_stderr():
        model = GPT(
            GPTConfig(
                block_size=w.seq_len,
                vocab_size=w.vocab_size,
                n_layer=w.num_layers,
                n_head=w.num_heads,
                n_embd=w.hidden_size,
                dropout=0.0,
                bias=True,
            )
        )
        optimizer = model.configure_optimizers(WEIGHT_DECAY, LR, BETAS, "cpu")
    with torch.no_grad():
        for name, param in model.named_parameters():
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            param.copy_(case.weights[name])

    def step(number: int) -> float:
        total = 0.0
        batches = microbatches(case, number)
        for x, y in batches:
            loss = model(x, y)[1] / len(batches)
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    serve(step)


if __name__ == "__main__":
    build(open_case())
