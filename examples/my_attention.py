"""An attention of your own: one class in a file of yours, nothing of megalite touched.

Show that it is right on every layout, then train with it:

    megalite verify --random 20 --attention examples/my_attention.py:MyAttention
    examples/launch.sh 2 pretrain --tp 2 --attention examples/my_attention.py:MyAttention

This one has a learned temperature for every head, and penalises distance as ALiBi does (Press et
al. 2022, arXiv 2108.12409) in place of position embeddings. It makes its projections of megalite's
linears, which know how to be cut, and one parameter by hand, which shows the one thing that a layer
has to say: how its parameters are cut. That is a Shard: the shape of the whole tensor, and for each
block of rows the mesh axes that cut it. Initial weights, gradient reduction, the gradient norm,
ZeRO and checkpoints follow from it. Were the Shard of `temperature` wrong, verify would name it.
"""

from math import sqrt

import torch
from torch import Tensor, nn

from megalite.core.call import Call
from megalite.core.config import ModelConfig
from megalite.core.mesh import Mesh
from megalite.core.params import constant, gaussian, new_param
from megalite.core.shard import Block, Shard
from megalite.layers.context import gather_keys
from megalite.layers.linear import ColumnLinear, RowLinear
from megalite.ops.softmax import attention_mask

# s rows of a sequence on this rank, t of all ranks, b micro batch, h hidden, n heads on this rank,
# d head_dim


class MyAttention(nn.Module):
    """[s or s/tp, b, h] -> the same. The arguments are those that every attention gets."""

    # It masks by call.starts, and so may run with --reset-attention-mask.
    keeps_documents_apart = True

    def __init__(
        self, cfg: ModelConfig, mesh: Mesh, *, layer: int, seed: int, row_sum: tuple[str, ...]
    ):
        super().__init__()
        tp, heads, size = mesh.axis("tp"), cfg.num_heads, cfg.num_heads * cfg.head_dim
        # q, k and v are three blocks, each cut over tp by itself: a rank gets whole heads of each.
        block = Block(size, ("tp", None))
        self.qkv = ColumnLinear(
            cfg.hidden_size, (block,) * 3, tp, bias=cfg.bias, init=gaussian(cfg.init_std)
        )
        out = gaussian(cfg.init_std / sqrt(2 * cfg.num_layers))
        self.out = RowLinear(size, cfg.hidden_size, tp, bias=cfg.bias, row_sum=row_sum, init=out)
        # One number a head, and each rank has its own heads': [heads] cut over tp. Held whole on
        # every rank its gradient would be partial, and the block would end with `("tp",)`.
        cut = Shard((heads,), (Block(heads, ("tp",)),))
        self.temperature = new_param(cut, tp.named, init=constant(1.0))
        self.num_heads, self.head_dim = heads // tp.size, cfg.head_dim
        mine = torch.arange(self.num_heads) + tp.idx * self.num_heads
        self.slopes = [2.0 ** (-8.0 * (i + 1) / heads) for i in mine.tolist()]

    def forward(self, x: Tensor, call: Call) -> Tensor:
        """Plain PyTorch on local tensors between the two linears."""
        fused = self.qkv(x, call).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = fused.unbind(2)  # [s, b, 3, n, d] -> 3 x [s, b, n, d]
        # Sequences may be cut over cp: keys are those of all ranks, in the order of their ranks.
        k, v, k_at = gather_keys(k, v, call)
        scores = torch.einsum("sbnd,tbnd->bnst", q, k) / sqrt(self.head_dim)
        distance = call.positions[:, None] - k_at  # [s, t]
        penalty = scores.new_tensor(self.slopes)[:, None, None] * distance
        scores = scores * self.temperature[:, None, None] - penalty
        mask = attention_mask(call.positions, k_at, None, call.starts)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        y = torch.einsum("bnst,tbnd->sbnd", weights, v)
        return self.out(y.flatten(2), call)  # [s, b, n d]
