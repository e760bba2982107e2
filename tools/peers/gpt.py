"""A GPT-2 in plain torch, as a reader would write it: what the peers without a model of their own
train. A pipeline stage is a run of its layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import Case, Workload
from torch import Tensor, nn

# b micro batch, s sequence, h hidden, n heads (of this rank), d head_dim, v vocabulary


class Attention(nn.Module):
    """Causal self-attention. Rows of the fused projection lie head by head (q, k, v of head 0, then
    of head 1), so that a cut of its outputs gives a rank whole heads.
    """

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.head_dim = hidden // heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        fused = self.qkv(x).unflatten(-1, (-1, 3, self.head_dim))  # [b, s, n, 3, d]
        q, k, v = fused.permute(3, 0, 2, 1, 4)  # 3 x [b, n, s, d]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class SeparateAttention(nn.Module):
    """The same with three projections, as torch's tutorial on tensor parallelism has it."""

    def __init__(self, hidden: int, heads: int):
        super().__init__()
        self.head_dim = hidden // heads
        self.q, self.k, self.v = (nn.Linear(hidden, hidden) for _ in range(3))
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [b, n, s, d]
            for project in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, hidden: int, heads: int, attention: type[nn.Module]):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.attention = attention(hidden, heads)
        self.up, self.down = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class GPT(nn.Module):
    """Tokens [b, s] -> logits [b, s, v]; of a stage, the part of that which its layers do."""

    def __init__(
        self, w: Workload, layers: range, *, first: bool, last: bool, attention: type[nn.Module]
    ):
        super().__init__()
        if first:
            self.embedding = nn.Embedding(w.vocab_size, w.hidden_size)
            self.position = nn.Embedding(w.seq_len, w.hidden_size)
        self.layers = nn.ModuleDict(
            {str(i): Block(w.hidden_size, w.num_heads, attention) for i in layers}
        )
        if last:
            self.final_norm = nn.LayerNorm(w.hidden_size)
            self.head = nn.Linear(w.hidden_size, w.vocab_size, bias=False)
        if first and last:
            self.head.weight = self.embedding.weight
        self.first, self.last = first, last

    def forward(self, x: Tensor) -> Tensor:
        if self.first:
            x = self.embedding(x) + self.position.weight[: x.shape[1]]
        for layer in self.layers.values():
            x = layer(x)
        return self.head(self.final_norm(x)) if self.last else x


def whole_gpt(case: Case, attention: type[nn.Module] = Attention) -> GPT:
    """The whole model with the case's weights."""
    layers = range(case.workload.num_layers)
    return stage_gpt(case, layers, first=True, last=True, attention=attention)


def stage_gpt(
    case: Case,
    layers: range,
    *,
    first: bool,
    last: bool,
    attention: type[nn.Module] = Attention,
) -> GPT:
    """These layers of the model with the case's weights."""
    model = GPT(case.workload, layers, first=first, last=last, attention=attention)
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(_weight(name, case))
    return model


def _weight(name: str, case: Case) -> Tensor:
    ours = name.replace(".up.", ".mlp.up.").replace(".down.", ".mlp.down.")
    prefix, part, kind = ("", *ours.rsplit(".", 2))[-3:]
    if part in ("q", "k", "v"):
        return case.weights[f"{prefix}.qkv.{kind}"].chunk(3)["qkv".index(part)]
    value = case.weights["embedding.weight" if name == "head.weight" else ours]
    if ".qkv." in name:  # rows of q, of k, of v -> those of each head together
        parts = value.unflatten(0, (3, case.workload.num_heads, -1))
        value = parts.transpose(0, 1).flatten(0, 2)
    return value


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the tokens of a microbatch."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
