"""What a layer keeps for its backward, and what runs beside it: bytes, term by term.

Each term is a tensor of the forward or backward that autograd or a linear of ours holds, cut as it
is on a rank. Scores that are written out (soft cap, attention dropout), grouped heads that SDPA
repeats, and what zero-bubble schedules hold between I and W are estimates. Korthikanti et al. 2022
(arXiv 2205.05198), section 4, for the method; the sums are those of this code where torch computes.
The kernels keep less: no masks of dropout, of SwiGLU its input alone. Next: memory.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megalite.core.check import PARTS
from megalite.core.config import Config
from megalite.core.params import acc_dtype
from megalite.core.shard import aligned_rows

TOKEN_BYTES = 16
"""Of a call: token and label."""
LOOKUP_BYTES = 9
"""Of a token's lookup, until backward: its row, and whether the row is another rank's."""


@dataclass(frozen=True)
class Part:
    """Bytes of one microbatch on one rank for a part of a layer."""

    inside: float
    """What it keeps besides its input and output."""
    out: float
    """Its output, which the linear after it keeps."""

    @property
    def both(self) -> float:
        return self.inside + self.out


class LayerBytes:
    """One layer and one microbatch of a config."""

    def __init__(self, config: Config, dtype: torch.dtype):
        model, layout = config.model, config.layout
        self.model, self.layout = model, layout
        self.size, self.wide = dtype.itemsize, acc_dtype(dtype).itemsize
        self.rows = model.seq_len // layout.cp * config.train.micro_batch_size
        """Of whole sequences on this context rank, s b."""
        self.cut = layout.sequence_parallel and layout.tp > 1
        self.stream = self.rows * model.hidden_size * self.size / (layout.tp if self.cut else 1)
        """The residual stream."""
        self.full = self.rows * model.hidden_size * self.size
        """The same gathered over tp."""
        self.q = self.rows * model.num_heads // layout.tp * model.head_dim * self.size
        kv_heads = max(model.kv_heads, layout.tp) // layout.tp
        self.kv = self.rows * kv_heads * model.head_dim * self.size
        self.inner = self.rows * model.ffn // layout.tp * self.size
        self.gated = model.activation == "swiglu"
        self.up = self.inner * (2 if self.gated else 1)

    @property
    def norm(self) -> Part:
        """Statistics of each row in at least float32: mean and spread, or the latter alone."""
        statistics = 2 if self.model.norm == "layernorm" else 1
        rows = self.stream / self.model.hidden_size / self.size
        return Part(statistics * rows * self.wide, self.stream)

    @property
    def activation(self) -> Part:
        """SwiGLU multiplies by the gate after its nonlinearity, so backward needs that as well."""
        return Part(self.inner if self.gated else 0, self.inner)

    @property
    def core(self) -> Part:
        """From fused queries, keys and values to attention's output, which its kernel keeps too."""
        model, layout = self.model, self.layout
        turned = model.position == "rope" or model.qk_norm
        inside = self.q + self.kv if turned else 0.0
        if layout.cp > 1 and layout.cp_form == "gather":
            inside += 2 * self.kv * layout.cp
        elif layout.cp > 1 and layout.cp_form == "ulysses":
            inside = self.q  # beside other ranks' rows in the place of mine, their output
        heads = model.num_heads // layout.tp
        inside += self.rows * heads * self.wide  # log-sum-exp of each query's scores
        if layout.cp > 1 and layout.cp_form == "ring":
            return Part(inside, self.q)  # its scores are made block by block, and again in backward
        written_out = model.attention_soft_cap is not None or model.attention_dropout > 0
        if written_out:
            kept = 2 + (model.attention_soft_cap is not None) + (model.attention_dropout > 0)
            inside += kept * self.rows * heads * model.seq_len * self.size
        return Part(inside, self.q)

    @property
    def fixed(self) -> float:
        """What every form but `full` keeps: inputs of both norms and of the parts' linears."""
        masks = 2 * self.stream / self.size if self.model.dropout > 0 else 0.0
        thin = len(self.model.adapted) * self.model.lora_rank / self.model.hidden_size
        return (2 + thin) * self.stream + self.q + 2 * self.kv + self.up + masks

    def kept(self, how: str) -> float:
        """Bytes that a layer keeps from its forward to its backward, by the name of recompute."""
        if how == "full":
            return self.stream
        again, learns = self._again(how), self._learns
        norms = 2 * self.norm.inside + (learns("qkv") + learns("up")) * self.norm.out
        parts = {"norm": norms, "core-attention": self.core.both}
        parts["activation"] = self.activation.inside + learns("down") * self.activation.out
        return self.fixed + sum(size for name, size in parts.items() if name not in again)

    def working(self, how: str) -> float:
        """The most that a layer's backward holds beside what was kept.

        Full recomputation begins with the layer's own forward; its output is not kept. Then the
        MLP's backward is the widest place, and over a ring also attention's, later, with the MLP's
        tensors gone.
        """
        second = self.kept("none") - self.stream if how == "full" else 0.0
        kept = "none" if how == "full" else how
        return second + max(self._mlp(kept), self._ring(kept))

    def _learns(self, linear: str) -> bool:
        """Whether a linear needs its input in backward: a frozen one with no adapter does not."""
        return not self.model.lora_rank or linear in self.model.adapted

    def _again(self, how: str) -> tuple[str, ...]:
        if how != "selective":
            return ()
        return self.layout.recompute_modules or PARTS

    def _mlp(self, how: str) -> float:
        """The gradient that came, the MLP's output run again, and gradients of what is inside."""
        made = self.activation.both if "activation" in self._again(how) else 0.0
        gathered = self.full if self.cut else 0.0
        down = made + gathered + self.inner
        grads = self.inner + self.up  # of output and input of the nonlinearity
        if self.gated:
            grads = 3 * self.inner  # of the product and of its two factors
        return self.stream + max(down, made - self.inner + grads)

    def _ring(self, how: str) -> float:
        """Keys, values and their gradients, each here and on its way; a few blocks of scores."""
        if self.layout.cp == 1 or self.layout.cp_form != "ring":
            return 0.0
        again = self._again(how)
        made = self.core.both if "core-attention" in again else 0.0
        gone = self.stream + self.up
        gone += 0.0 if "norm" in again else self.norm.both
        gone += 0.0 if "activation" in again else self.activation.both
        wide = self.wide / self.size
        moving = 2 * 2 * self.kv + 2 * 2 * self.kv * wide
        block = self.model.seq_len // (2 * self.layout.cp)
        rows = self.rows // 2 * (self.model.num_heads // self.layout.tp)
        scores = 4 * rows * block * self.wide
        return self.stream + self.q + self.q * wide + moving + scores + made - gone

    def head(self) -> float:
        """What the head keeps and the gradient of its input: the norm's input, output and logits.

        The loss turns logits into their gradient in place; a soft cap has two copies more.
        """
        copies = 3 if self.model.logit_soft_cap is not None else 1
        gathered = self.full if self.cut else 0.0
        return self.stream + self.norm.both + self.logits * copies + gathered + self.full

    @property
    def logits(self) -> float:
        """Of the vocabulary here."""
        here = -(-self.model.vocab_size // self.layout.tp)
        return self.rows * aligned_rows(here) * self.size


def stage_activations(
    layer: LayerBytes, *, layers: int, last: bool, split: bool
) -> tuple[float, float]:
    """What a stage of that many layers keeps of a microbatch, and the most it holds beside it.

    A `split` backward keeps the gradient of the logits, too, from I to W.
    """
    how, asked = layer.layout.recompute, layer.layout.recompute_layers
    again = 0 if how == "none" else layers if asked is None else min(asked, layers)
    plain = layers - again
    kept = again * layer.kept(how) + plain * layer.kept("none")
    kept += layer.logits if last and split and not layer.model.lora_rank else 0.0
    moments = [layer.head() if last else 0.0]
    if plain:
        moments.append(layer.working("none"))
    if again:  # the first layers, whose turn comes when the plain ones have given back theirs
        moments.append(layer.working(how) - plain * layer.kept("none"))
    return kept, max(moments)
