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
    raw = _norm(cfg, weights, "final_norm", x) @ table.T
    if cfg.mup_base_width:
        raw = raw * cfg.mup_base_width / cfg.hidden_size
    return _capped(raw, cfg.logit_soft_cap)


def train(
    cfg: ModelConfig,
    optim: OptimConfig,
    weights: Weights,
    batches: list[tuple[Tensor, ...]],
) -> list[dict[str, float | Weights]]:
    """One step of the optimizer for each batch, `weights` updated in place: what each step had.

    A batch has tokens, labels and, if there are several in a sample, documents.
    """
    for weight in weights.values():
        weight.requires_grad_()
    optimizers = _optimizers(cfg, optim, weights)
    steps = []
    for batch in batches:
        for weight in weights.values():
            weight.grad = None
        mean = loss(cfg, weights, *batch)
        mean.backward()
        grads = {name: w.grad.clone() for name, w in weights.items()}
        norm = torch.nn.utils.clip_grad_norm_(weights.values(), optim.clip_grad)
        for optimizer in optimizers:
            optimizer.step()
        after = {name: w.detach().clone() for name, w in weights.items()}
        steps.append({"loss": mean.item(), "norm": norm.item(), "grads": grads, "weights": after})
    return steps


def _optimizers(cfg: ModelConfig, optim: OptimConfig, weights: Weights) -> list:
    # Matrices decay, norms and biases do not; muP slows what is 2-d in a layer, not its decay.
    ratio = (cfg.mup_base_width or cfg.hidden_size) / cfg.hidden_size
    hidden = [w for n, w in weights.items() if n.startswith("layers.") and w.dim() == 2]
    tables = [w for n, w in weights.items() if not n.startswith("layers.") and w.dim() == 2]
    groups = [
        {
            "params": hidden,
            "lr": optim.lr * ratio,
            "weight_decay": optim.weight_decay / ratio,
        },
        {"params": tables, "lr": optim.lr, "weight_decay": optim.weight_decay},
        {
            "params": [w for w in weights.values() if w.dim() == 1],
            "lr": optim.lr,
            "weight_decay": 0.0,
        },
    ]
    if optim.optimizer == "sgd":
        return [SGD(groups, momentum=optim.momentum)]
    betas = (optim.beta1, optim.beta2)
    plain = {"betas": betas, "eps": optim.eps, "fused": False, "foreach": False}
    if optim.optimizer == "muon":
        return [Muon(cfg, optim, weights), torch.optim.AdamW(groups[1:], **plain)]
    return [torch.optim.AdamW(groups, **plain)]


class SGD:
    """Heavy-ball momentum, with the decay that AdamW has."""

    def __init__(self, groups: list[dict], momentum: float):
        self.groups, self.momentum = groups, momentum
        self.moving = {id(w): torch.zeros_like(w) for g in groups for w in g["params"]}

    @torch.no_grad()
    def step(self) -> None:
        for group in self.groups:
            for weight in group["params"]:
                moving = self.momentum * self.moving[id(weight)] + weight.grad
                self.moving[id(weight)] = moving
                weight *= 1 - group["lr"] * group["weight_decay"]
                weight -= group["lr"] * moving


class Muon:
    """Jordan's Muon with Liu's scale, on each matrix that is fused into a weight of a layer."""

    def __init__(self, cfg: ModelConfig, optim: OptimConfig, weights: Weights):
        self.optim = optim
        q, kv = cfg.num_heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        fused = {"attention.qkv.weight": [q, kv, kv]}
        if cfg.activation == "swiglu":
            fused["mlp.up.weight"] = [cfg.ffn, cfg.ffn]
        self.matrices = []
        for name, weight in weights.items():
            if name.startswith("layers.") and weight.dim() == 2:
                sizes = fused.get(name.split(".", 2)[2], [weight.shape[0]])
                self.matrices.append((weight, sizes, torch.zeros_like(weight)))

    @torch.no_grad()
    def step(self) -> None:
        mu, lr = self.optim.momentum, self.optim.lr
        for weight, sizes, moving in self.matrices:
            moving.copy_(mu * moving + (1 - mu) * weight.grad)
            ahead = (1 - mu) * weight.grad + mu * moving
            start = 0
            for size in sizes:
                rows = slice(start, start + size)
                step = newton_schulz(ahead[rows]) * 0.2 * max(size, weight.shape[1]) ** 0.5
                weight[rows] -= lr * self.optim.weight_decay * weight[rows] + lr * step
                start += size


def newton_schulz(x: Tensor) -> Tensor:
    """Five times x <- 3.4445 x - 4.775 (x x') x + 2.0315 (x x')^2 x, from x of norm 1."""
    x = x / x.square().sum().sqrt()
    for _ in range(5):
        once = x @ x.T @ x
        x = 3.4445 * x - 4.775 * once + 2.0315 * (x @ x.T @ once)
    return x


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
        size = d if cfg.mup_base_width else sqrt(d)
        scores = q[:, :, head] @ k[:, :, shared].transpose(1, 2) / size  # [b, s, s]
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
