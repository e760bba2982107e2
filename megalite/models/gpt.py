"""The decoder. GPT-2 and LLaMA are two settings of it; a pipeline stage is a run of its layers.

A stage takes the residual stream of the stage before it (the first takes tokens) and gives the
residual stream of the next; the last gives the summed loss, or logits where the call has no labels.
Of pairs of answers that are not learned from it gives log p(preferred) - log p(other) of each.
One process holds one stage with everything. Parameter names are those of the whole model, at every
layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from megalite.core import rng, shard
from megalite.core.call import Call
from megalite.core.config import ModelConfig
from megalite.core.mesh import Mesh
from megalite.core.params import gaussian, new_param
from megalite.core.unit import RunUnit, Unit, plainly
from megalite.layers.attention import Attention
from megalite.layers.dropout import dropout
from megalite.layers.embedding import Embedding, Positions
from megalite.layers.linear import column_linear
from megalite.layers.loss import cross_entropy, log_ratios, preference_loss
from megalite.layers.mlp import MLP
from megalite.layers.norm import Norm

# s sequence, r rows of the residual stream here (s, or s/tp when cut), b micro batch, h hidden,
# v vocabulary


class Layer(nn.Module):
    """One transformer layer: x + attention(norm(x)), then x + mlp(norm(x)), dropout on both."""

    def __init__(
        self,
        cfg: ModelConfig,
        mesh: Mesh,
        *,
        layer: int,
        seed: int,
        row_sum: tuple[str, ...],
        attention: Callable[..., nn.Module],
    ):
        super().__init__()
        tp = mesh.axis("tp")
        self.attention_norm = Norm(cfg.hidden_size, cfg, tp, row_sum=row_sum)
        self.attention = attention(cfg, mesh, layer=layer, seed=seed, row_sum=row_sum)
        self.mlp_norm = Norm(cfg.hidden_size, cfg, tp, row_sum=row_sum)
        self.mlp = MLP(cfg, tp, row_sum=row_sum)
        self.p = cfg.dropout
        self.keys = [rng.key(seed, "dropout", layer, half) for half in ("attention", "mlp")]

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """[r, b, h] -> [r, b, h]."""
        y = self.attention(call.part("norm", self.attention_norm, x), call)
        x, y = self.mlp_norm.add(x, dropout(y, self.p, self.keys[0], call), call)
        return dropout(self.mlp(y, call), self.p, self.keys[1], call, residual=x)


class GPT(nn.Module):
    """The layers `layers` of the model, with the embedding if `first` and the head if `last`."""

    def __init__(
        self,
        cfg: ModelConfig,
        mesh: Mesh,
        *,
        layers: range,
        first: bool,
        last: bool,
        num_stages: int,
        sequence_parallel: bool,
        seed: int,
        attention: Callable[..., nn.Module] = Attention,
    ):
        super().__init__()
        self.cfg, self.first, self.last = cfg, first, last
        self.tp = tp = mesh.axis("tp")
        # Where the residual stream is cut along s, what acts on its rows sees only some of them.
        row_sum = ("tp",) if sequence_parallel else ()
        self.rows_cut = sequence_parallel and tp.size > 1
        self.context_cut = mesh.axis("cp").size > 1
        tied = cfg.tie_embeddings
        if first or (last and tied):
            stages = (0, num_stages - 1) if tied and num_stages > 1 else None
            self.embedding = Embedding(
                cfg, tp, uses=2 if tied and first and last else 1, tied=stages
            )
        if first and cfg.position == "learned":
            self.position = Positions(cfg, tp, row_sum=row_sum)
        self.layers = nn.ModuleDict(
            {
                str(i): Layer(cfg, mesh, layer=i, seed=seed, row_sum=row_sum, attention=attention)
                for i in layers
            }
        )
        if last:
            self.final_norm = Norm(cfg.hidden_size, cfg, tp, row_sum=row_sum)
            if not tied:
                cut = shard.vocabulary(cfg.vocab_size, cfg.hidden_size)
                self.head = new_param(cut, tp.named, init=gaussian(cfg.init_std))
        self.key = rng.key(seed, "dropout", "embedding")
        self.run_unit: RunUnit = plainly
        self._units: list[Unit] = []

    def units(self) -> list[Unit]:
        """The parts of this stage in the order in which a forward runs them."""
        # Not before the first call: until then a tied table may still be put in place of another.
        if not self._units:
            self._units = self._make_units()
        return self._units

    def _make_units(self) -> list[Unit]:
        units = []
        if self.first:
            entry = [self.embedding.weight]
            if self.cfg.position == "learned":
                entry.append(self.position.weight)
            units.append(Unit("embedding", self._embed, tuple(entry), is_layer=False))
        for number, layer in self.layers.items():
            units.append(Unit(f"layers.{number}", layer, tuple(layer.parameters())))
        if self.last:
            table = self.embedding.weight if self.cfg.tie_embeddings else self.head
            head = (*self.final_norm.parameters(), table)
            units.append(Unit("head", self._head, head, is_layer=False))
        return units

    def forward(self, x: Tensor | None, call: Call) -> Tensor:
        """[r, b, h] (the first takes tokens) -> [r, b, h], the loss sum, or logits [s, b, v/tp]."""
        # A norm's gradient is summed over tp if, and only if, its rows were cut.
        assert not torch.is_grad_enabled() or self.rows_cut == (call.seq_cut is not None)
        # Gradients are summed over cp: of whole sequences they would count cp times.
        assert not torch.is_grad_enabled() or self.context_cut == (call.context is not None)
        for unit in self.units():
            x = self.run_unit(unit, x, call)
        assert x is not None
        return x

    def boundary_shape(self, call: Call) -> tuple[int, ...]:
        """Shape of the residual stream that enters or leaves a stage on this rank."""
        return (call.rows, call.batch, self.cfg.hidden_size)

    def _embed(self, nothing: None, call: Call) -> Tensor:
        x = self.embedding(call)
        if self.cfg.position == "learned":
            x = self.position(x, call)
        return dropout(x, self.cfg.dropout, self.key, call)

    def _head(self, x: Tensor, call: Call) -> Tensor:
        table = self.embedding.weight if self.cfg.tie_embeddings else self.head
        if call.wanted is not None:
            x = x.flatten(0, 1)[call.wanted].unsqueeze(1)  # [w, 1, h]
        x = self.final_norm(x)
        if self.cfg.width_ratio != 1:
            x = x * self.cfg.width_ratio
        logits = column_linear(x, table, None, self.tp, call)  # [s, b, v/tp]
        if self.cfg.logit_soft_cap is not None:
            logits = self.cfg.logit_soft_cap * torch.tanh(logits / self.cfg.logit_soft_cap)
        if call.labels is None:
            return logits
        losses = cross_entropy(
            logits.flatten(0, 1),
            call.labels.flatten(),
            self.cfg.vocab_size,
            self.tp,
            smoothing=self.cfg.label_smoothing if call.training else 0.0,
            z_loss=self.cfg.z_loss if call.training else 0.0,
        )
        if call.preference is None:
            return losses.sum()
        ratios = log_ratios(losses.view_as(call.labels), call)
        return preference_loss(ratios, call) if call.training else ratios
