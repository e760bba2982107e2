"""A transformers model with the weights of ours: GPT-2 and LLaMA, by their own classes.

Needs the package `transformers`. Only what these two settings of our model have: learned positions,
LayerNorm, GELU and biases, or rotary positions, RMSNorm, SwiGLU and none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from megalite.core.config import ModelConfig
from megalite.models.gpt import GPT


def twin(ours: GPT) -> nn.Module:
    """The same model in transformers, in evaluation."""
    cfg = ours.cfg
    weights = {name: param.detach() for name, param in ours.named_parameters()}
    vocabulary = cfg.vocab_size  # without the rows that pad it for tp
    make = _gpt2 if cfg.position == "learned" else _llama
    model, theirs = make(cfg, weights)
    theirs = {
        name: t[:vocabulary] if "wte" in name or "embed_tokens" in name or "lm_head" in name else t
        for name, t in theirs.items()
    }
    missing, unexpected = model.load_state_dict(theirs, strict=False)
    assert not unexpected and all("lm_head" in name for name in missing), (missing, unexpected)
    model.tie_weights()
    return model.eval()


def _gpt2(cfg: ModelConfig, w: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    assert cfg.norm == "layernorm" and cfg.activation in ("gelu", "gelu-tanh") and cfg.bias
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=cfg.vocab_size,
            n_positions=cfg.seq_len,
            n_embd=cfg.hidden_size,
            n_layer=cfg.num_layers,
            n_head=cfg.num_heads,
            n_inner=cfg.ffn,
            activation_function="gelu" if cfg.activation == "gelu" else "gelu_new",
            layer_norm_epsilon=cfg.norm_eps,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            eos_token_id=None,
            bos_token_id=None,
        )
    )
    theirs = {
        "transformer.wte.weight": w["embedding.weight"],
        "transformer.wpe.weight": w["position.weight"],
        "transformer.ln_f.weight": w["final_norm.weight"],
        "transformer.ln_f.bias": w["final_norm.bias"],
    }
    for i in range(cfg.num_layers):
        mine, other = f"layers.{i}.", f"transformer.h.{i}."
        for norm, name in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            for kind in ("weight", "bias"):
                theirs[f"{other}{name}.{kind}"] = w[f"{mine}{norm}.{kind}"]
        for linear, name in (
            ("attention.qkv", "attn.c_attn"),
            ("attention.out", "attn.c_proj"),
            ("mlp.up", "mlp.c_fc"),
            ("mlp.down", "mlp.c_proj"),
        ):
            theirs[f"{other}{name}.weight"] = w[f"{mine}{linear}.weight"].t()
            theirs[f"{other}{name}.bias"] = w[f"{mine}{linear}.bias"]
    return model, theirs


def _llama(cfg: ModelConfig, w: dict[str, Tensor]) -> tuple[nn.Module, dict[str, Tensor]]:
    assert cfg.norm == "rmsnorm" and cfg.activation == "swiglu" and not cfg.bias
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=cfg.vocab_size,
            max_position_embeddings=cfg.seq_len,
            hidden_size=cfg.hidden_size,
            intermediate_size=cfg.ffn,
            num_hidden_layers=cfg.num_layers,
            num_attention_heads=cfg.num_heads,
            num_key_value_heads=cfg.kv_heads,
            rms_norm_eps=cfg.norm_eps,
            rope_theta=cfg.rope_theta,
            tie_word_embeddings=cfg.tie_embeddings,
            eos_token_id=None,
            bos_token_id=None,
        )
    )
    theirs = {
        "model.embed_tokens.weight": w["embedding.weight"],
        "model.norm.weight": w["final_norm.weight"],
    }
    if not cfg.tie_embeddings:
        theirs["lm_head.weight"] = w["head"]
    kv = cfg.kv_heads * cfg.head_dim
    for i in range(cfg.num_layers):
        mine, other = f"layers.{i}.", f"model.layers.{i}."
        theirs[other + "input_layernorm.weight"] = w[mine + "attention_norm.weight"]
        theirs[other + "post_attention_layernorm.weight"] = w[mine + "mlp_norm.weight"]
        qkv = w[mine + "attention.qkv.weight"].split((cfg.num_heads * cfg.head_dim, kv, kv))
        for name, part in zip("qkv", qkv, strict=True):
            theirs[f"{other}self_attn.{name}_proj.weight"] = part
        theirs[other + "self_attn.o_proj.weight"] = w[mine + "attention.out.weight"]
        gate, up = w[mine + "mlp.up.weight"].chunk(2)
        theirs[other + "mlp.gate_proj.weight"], theirs[other + "mlp.up_proj.weight"] = gate, up
        theirs[other + "mlp.down_proj.weight"] = w[mine + "mlp.down.weight"]
    return model, theirs


@torch.no_grad()
def greedy(model: nn.Module, prompts: list[list[int]], new: int) -> list[list[int]]:
    """What `generate` of transformers says greedily after prompts of one length."""
    ids = torch.tensor(prompts, device=model.device)
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new,
        min_new_tokens=new, pad_token_id=0,
    )  # fmt: skip
    return made[:, ids.shape[1] :].tolist()
