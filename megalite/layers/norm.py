"""LayerNorm and RMSNorm; with sequence parallelism each tp rank normalises its own rows."""

from __future__ import annotations

from torch import Tensor, nn

from megalite.core import shard
from megalite.core.call import Call
from megalite.core.config import ModelConfig
from megalite.core.mesh import Axis
from megalite.core.params import constant, new_param
from megalite.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm


class Norm(nn.Module):
    """The model's normalisation over a last dimension of `size`.

    `row_sum`: the axes over which each rank sees only some rows, so that gradients stay partial.
    """

    def __init__(self, size: int, cfg: ModelConfig, tp: Axis, *, row_sum: tuple[str, ...]):
        super().__init__()
        self.eps, self.kind = cfg.norm_eps, cfg.norm
        cut = shard.whole(size, grad_sum=row_sum)
        self.weight = new_param(cut, tp.named, init=constant(1.0))
        has_bias = cfg.norm == "layernorm" and cfg.bias
        self.bias = new_param(cut, tp.named, init=constant(0.0)) if has_bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        if self.kind == "rmsnorm":
            return rms_norm(x, self.weight, self.eps)
        return layer_norm(x, self.weight, self.bias, self.eps)

    def add(self, x: Tensor, y: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """x + y, and its norm; in one pass, unless backward is to make the norm again from it."""
        if call.makes_again("norm"):
            total = x + y
            return total, call.part("norm", self, total)
        if self.kind == "rmsnorm":
            return add_rms_norm(x, y, self.weight, self.eps)
        return add_layer_norm(x, y, self.weight, self.bias, self.eps)
