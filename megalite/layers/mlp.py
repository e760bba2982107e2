"""The MLP of a block: up (column), nonlinearity, down (row)."""

from __future__ import annotations

from math import sqrt

from torch import Tensor, nn

from megalite.core.call import Call
from megalite.core.config import ModelConfig
from megalite.core.mesh import Axis
from megalite.core.params import gaussian
from megalite.core.shard import Block
from megalite.layers.linear import ColumnLinear, RowLinear
from megalite.ops.gelu import gelu, gelu_tanh
from megalite.ops.swiglu import swiglu

# s sequence, b micro batch, h hidden, f ffn_hidden_size; s/tp means cut over the tp axis

_ACTIVATIONS = {"gelu": gelu, "gelu-tanh": gelu_tanh, "swiglu": swiglu}


class MLP(nn.Module):
    """[s or s/tp, b, h] -> the same; for swiglu, up holds gate and up as two blocks cut alike."""

    def __init__(self, cfg: ModelConfig, tp: Axis, *, row_sum: tuple[str, ...]):
        super().__init__()
        part = Block(cfg.ffn, ("tp", None))
        blocks = (part, part) if cfg.activation == "swiglu" else (part,)
        std = cfg.init_std
        self.up = ColumnLinear(
            cfg.hidden_size,
            blocks,
            tp,
            bias=cfg.bias,
            init=gaussian(std),
            lora=cfg.lora("up"),
            row_sum=row_sum,
        )
        self.activation = _ACTIVATIONS[cfg.activation]
        out = gaussian(std / sqrt(2 * cfg.num_layers))
        self.down = RowLinear(
            cfg.ffn,
            cfg.hidden_size,
            tp,
            bias=cfg.bias,
            row_sum=row_sum,
            init=out,
            lora=cfg.lora("down"),
        )

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """up, nonlinearity, down: f is cut over tp in between."""
        x = self.up(x, call)  # [s or s/tp, b, h] -> [s, b, f/tp], for swiglu 2f/tp
        x = call.part("activation", self.activation, x)  # [s, b, f/tp]
        return self.down(x, call)
