"""The naive twin: the same decoder in plain torch, to check the engine against what is not it.

A GPT is a function of a dict of whole tensors, by the names that ours give them; torch and autograd
do the rest. No class of ours, no cut, no bucket: what is slow and obvious stands here.
"""

from __future__ import annotations

from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from megalite.core.config import ModelConfig, OptimConfig

# b batch, s sequence, n query heads, m kv heads, d head_dim, h hidden, v vocabulary

Weights = dict[str, Tensor]


def loss(
    cfg: ModelConfig,
    weights: Weights,
    tokens: Tensor,
    labels: Tensor,
    documents: Tensor | None = None,
) -> Tensor:
    """Mean of -log p(label) over labels that are not negative; `tokens` and `labels` [b, s].

    `documents` [b, s] has one number for all tokens of a document.
    """
    nll = F.cross_entropy(
        logits(cfg, weights, tokens, documents).flatten(0, 1),
        labels.flatten(),
        ignore_index=-1,
        reduction="sum",
    )
    return nll / (labels >= 0).sum()


def logits(
    cfg: ModelConfig, weights: Weights, tokens: Tensor, documents: Tensor | None = None
) -> Tensor:
    """[b, s] -> [b, s, v]."""
    x = weights["embedding.weight"][tokens]
    documents = torch.zeros_like(tokens) if documents is None else documents
    if cfg.position == "learned":
        x = x + weights["position.weight"][_places(documents)]
    for i in range(cfg.num_layers):
        layer = f"layers.{i}."
        normed = _norm(cfg, weights, layer + "attention_norm", x)
        x = x + _attention(cfg, weights, layer, normed, documents)
        x = x + _mlp(cfg, weights, layer + "mlp.", _norm(cfg, weights, layer + "mlp_norm", x))
    table = weights["embedding.weight" if cfg.tie_embeddings else "head"]
    return _capped(_norm(cfg, weights, "final_norm", x) @ table.T, cfg.logit_soft_cap)


def train(
    cfg: ModelConfig,
    optim: OptimConfig,
    weights: Weights,
    batches: list[tuple[Tensor, ...]],
) -> list[dict[str, float | Weights]]:
    """One step of AdamW for each batch, `weights` updated in place: what each step had.

    A batch has tokens, labels and, if there are several in a sample, documents.
    """
    for weight in weights.values():
        weight.requires_grad_()
    # Matrices decay, norms and biases do not.
    groups = [
        {
            "params": [w for w in weights.values() if w.dim() > 1],
            "weight_decay": optim.weight_decay,
        },
        {"params": [w for w in weights.values() if w.dim() == 1], "weight_decay": 0.0},
    ]
    betas = (optim.beta1, optim.beta2)
    adamw = torch.optim.AdamW(
        groups, lr=optim.lr, betas=betas, eps=optim.eps, fused=False, foreach=False
    )
    steps = []
    for batch in batches:
        adamw.zero_grad()
        mean = loss(cfg, weights, *batch)
        mean.backward()
        grads = {name: w.grad.clone() for name, w in weights.items()}
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), optim.clip_grad)
        adamw.step()
        after = {name: w.detach().clone() for name, w in weights.items()}
        steps.append({"loss": mean.item(), "norm": norm.item(), "grads": grads, "weights": after})
    return steps


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def _norm(cfg: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    weight = weights[f"{name}.weight"]
    if cfg.norm == "rmsnorm":
        return x / (x.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * weight
    centred = x - x.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + cfg.norm_eps).sqrt() * weight
    bias = weights.get(f"{name}.bias")
    return y if bias is None else y + bias


def _capped(x: Tensor, cap: float | None) -> Tensor:
    return x if cap is None else cap * torch.tanh(x / cap)


def _attention(
    cfg: ModelConfig, weights: Weights, layer: str, x: Tensor, documents: Tensor
) -> Tensor:
    b, s, _ = x.shape
    n, m, d = cfg.num_heads, cfg.kv_heads, cfg.head_dim
    fused = _linear(weights, layer + "attention.qkv", x)
    q, k, v = fused.split((n * d, m * d, m * d), dim=-1)
    q, k, v = q.view(b, s, n, d), k.view(b, s, m, d), v.view(b, s, m, d)
    if cfg.qk_norm:
        q = _norm(cfg, weights, layer + "attention.q_norm", q)
        k = _norm(cfg, weights, layer + "attention.k_norm", k)
    if cfg.position == "rope":
        q, k = _rotated(cfg, q, _places(documents)), _rotated(cfg, k, _places(documents))
    heads = []
    for head in range(n):  # query heads share a kv head in runs of n / m
        shared = head // (n // m)
        scores = q[:, :, head] @ k[:, :, shared].transpose(1, 2) / sqrt(d)  # [b, s, s]
        seen = _visible(cfg, documents)
        weight = _capped(scores, cfg.attention_soft_cap).masked_fill(~seen, -torch.inf)
        heads.append(weight.softmax(-1) @ v[:, :, shared])
    return _linear(weights, layer + "attention.out", torch.cat(heads, -1))


def _visible(cfg: ModelConfig, documents: Tensor) -> Tensor:
    s = documents.shape[1]
    window = cfg.sliding_window or s

    def sees(row: list[int], query: int, key: int) -> bool:
        return 0 <= query - key < window and row[query] == row[key]

    samples = documents.tolist()
    return torch.tensor(
        [[[sees(row, i, j) for j in range(s)] for i in range(s)] for row in samples]
    )


def _places(documents: Tensor) -> Tensor:
    """How many tokens of its document come before each token: [b, s]."""
    samples = documents.tolist()
    return torch.tensor([[row[:i].count(name) for i, name in enumerate(row)] for row in samples])


def _rotated(cfg: ModelConfig, x: Tensor, places: Tensor) -> Tensor:
    """`x` [b, s, n, d] as complex numbers, first half real, second imaginary, turned."""
    half = cfg.head_dim // 2
    speed = cfg.rope_theta ** -(torch.arange(half, dtype=torch.float64) / half)
    angles = places.double()[:, :, None] * speed  # [b, s, d/2]
    turn = torch.polar(torch.ones_like(angles), angles)
    turned = torch.complex(x[..., :half], x[..., half:]) * turn[:, :, None]
    return torch.cat((turned.real, turned.imag), -1)


def _mlp(cfg: ModelConfig, weights: Weights, name: str, x: Tensor) -> Tensor:
    up = _linear(weights, name + "up", x)
    if cfg.activation == "swiglu":
        gate, up = up.chunk(2, -1)
        hidden = gate * torch.sigmoid(gate) * up
    elif cfg.activation == "gelu-tanh":
        hidden = 0.5 * up * (1 + torch.tanh(sqrt(2 / torch.pi) * (up + 0.044715 * up**3)))
    else:
        hidden = 0.5 * up * (1 + torch.erf(up / sqrt(2)))
    return _linear(weights, name + "down", hidden)
