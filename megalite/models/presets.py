"""Published model shapes by name (`--model llama3-8b`), and the number of parameters of any shape.

Plain values, no torch: the command line and the planner read them. A preset is a whole ModelConfig;
what it does not name keeps the default there.
"""

from __future__ import annotations

from typing import Any

from megalite.core.config import ModelConfig


def _gpt(layers: int, hidden: int, heads: int, *, seq: int, vocab: int = 50257) -> dict[str, Any]:
    """GPT-2's form: LayerNorm, biases, learned positions, tanh GELU, tied head."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "vocab_size": vocab,
        "seq_len": seq,
        "activation": "gelu-tanh",
    }


def _llama(
    layers: int,
    hidden: int,
    heads: int,
    *,
    ffn: int,
    vocab: int,
    seq: int,
    kv_heads: int | None = None,
    eps: float = 1e-5,
    theta: float = 500000.0,
    tied: bool = False,
) -> dict[str, Any]:
    """LLaMA's form: RMSNorm, no biases, rotary positions, SwiGLU."""
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "ffn_hidden_size": ffn,
        "vocab_size": vocab,
        "seq_len": seq,
        "norm": "rmsnorm",
        "norm_eps": eps,
        "activation": "swiglu",
        "bias": False,
        "position": "rope",
        "rope_theta": theta,
        "tie_embeddings": tied,
    }


PRESETS: dict[str, dict[str, Any]] = {
    # Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", table 2, and the
    # released weights (the paper counts 117M and 1542M).
    "gpt2-124m": _gpt(12, 768, 12, seq=1024),
    "gpt2-1.5b": _gpt(48, 1600, 25, seq=1024),
    # Brown et al. 2020 (arXiv 2005.14165), table 2.1, all layers dense. The table gives the 1.3B
    # model 24 heads of 128, which do not make its width of 2048; 16 do.
    "gpt3-1.3b": _gpt(24, 2048, 16, seq=2048),
    "gpt3-6.7b": _gpt(32, 4096, 32, seq=2048),
    "gpt3-175b": _gpt(96, 12288, 96, seq=2048),
    # Narayanan et al. 2021 (arXiv 2104.04473), table 1, the last row.
    "gpt-1t": _gpt(128, 25600, 160, seq=2048, vocab=51200),
    # Ours: LLaMA's form in a size for laptops.
    "llama-tiny": _llama(4, 128, 4, kv_heads=2, ffn=384, vocab=2048, seq=256, theta=10000.0),
    # Llama 3.2 1B, its config.json; trained to 8192 before its long-context rope scaling.
    "llama-1b": _llama(16, 2048, 32, kv_heads=8, ffn=8192, vocab=128256, seq=8192, tied=True),
    # Touvron et al. 2023 (arXiv 2302.13971), table 2.
    "llama-7b": _llama(32, 4096, 32, ffn=11008, vocab=32000, seq=2048, eps=1e-6, theta=10000.0),
    # Grattafiori et al. 2024 (arXiv 2407.21783), table 3.
    "llama3-8b": _llama(32, 4096, 32, kv_heads=8, ffn=14336, vocab=128256, seq=8192),
    "llama3-70b": _llama(80, 8192, 64, kv_heads=8, ffn=28672, vocab=128256, seq=8192),
}
"""Fields of ModelConfig by preset name."""


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model, a tied table counted once and padding not at all."""
    hidden, bias = model.hidden_size, model.bias
    norm_bias = bias and model.norm == "layernorm"

    def norm(size: int) -> int:
        return size + norm_bias * size

    linears = sum(d_in * d_out + bias * d_out for d_in, d_out in _linears(model).values())
    norms = 2 * norm(hidden) + (2 * norm(model.head_dim) if model.qk_norm else 0)
    positions = model.seq_len * hidden if model.position == "learned" else 0
    tables = model.vocab_size * hidden * (1 if model.tie_embeddings else 2) + positions
    plain = model.num_layers * (linears + norms) + norm(hidden) + tables
    return plain + num_adapter_parameters(model)


def num_adapter_parameters(model: ModelConfig) -> int:
    """Parameters of all adapters, which alone are trained where there are any."""
    sizes = _linears(model)
    return model.num_layers * model.lora_rank * sum(sum(sizes[name]) for name in model.adapted)


def _linears(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the linears of a layer, by name."""
    hidden, up = model.hidden_size, 2 if model.activation == "swiglu" else 1
    return {
        "qkv": (hidden, (model.num_heads + 2 * model.kv_heads) * model.head_dim),
        "out": (hidden, hidden),
        "up": (hidden, up * model.ffn),
        "down": (model.ffn, hidden),
    }
