"""Which stage holds which layers, and the stages of one rank.

The cut is balanced by the work of each layer and of the head, so the last stage gets fewer layers;
a user's own `--pp-layers` stands as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import accumulate
from math import sqrt

from torch import Tensor, nn

from megalite.core.config import ModelConfig
from megalite.core.mesh import Mesh
from megalite.core.params import (
    Traits,
    give_traits,
    is_hidden_matrix,
    named_parameters,
    traits_of,
)
from megalite.layers.attention import load_attention
from megalite.layers.linear import is_adapter
from megalite.models.gpt import GPT


def layer_flops(cfg: ModelConfig) -> float:
    """Forward flops of one layer for one token: its matmuls and the causal half of attention."""
    kv = cfg.kv_heads * cfg.head_dim
    attention = 2 * cfg.hidden_size * (2 * cfg.num_heads * cfg.head_dim + 2 * kv)
    mlp = 2 * cfg.hidden_size * cfg.ffn * (3 if cfg.activation == "swiglu" else 2)
    return attention + mlp + 2 * cfg.seq_len * cfg.num_heads * cfg.head_dim


def head_flops(cfg: ModelConfig) -> float:
    """Forward flops of the output head for one token."""
    return 2 * cfg.hidden_size * cfg.vocab_size


def split_layers(cfg: ModelConfig, num_stages: int) -> tuple[int, ...]:
    """Layers of each stage, at least one each, with the slowest stage as fast as can be.

    The head is on the last stage; the embedding's lookup is counted as a tenth of a layer on the
    first. Raises ValueError if there are fewer layers than stages.
    """
    if cfg.num_layers < num_stages:
        raise ValueError(f"{cfg.num_layers} layers cannot fill {num_stages} stages")
    layer = layer_flops(cfg)
    work = [layer] * num_stages
    work[0] += 0.1 * layer
    work[-1] += head_flops(cfg)
    layers = [1] * num_stages
    for _ in range(cfg.num_layers - num_stages):
        lightest = min(range(num_stages), key=lambda stage: (work[stage] + layer, stage))
        layers[lightest] += 1
        work[lightest] += layer
    return tuple(layers)


def stage_ranges(layers: tuple[int, ...]) -> list[range]:
    """Layer numbers of each stage: (3, 1) gives [0..2], [3]."""
    ends = list(accumulate(layers))
    return [range(end - n, end) for n, end in zip(layers, ends, strict=True)]


def mesh_factors(cfg: ModelConfig, tp: int) -> dict[str, int]:
    """The axes that a mesh needs factored: tp by the kv heads, where there are fewer of them."""
    return {"tp": cfg.kv_heads} if cfg.kv_heads < tp else {}


def build_stages(
    cfg: ModelConfig,
    mesh: Mesh,
    *,
    placement: tuple[int, ...],
    layers: tuple[int, ...] | None,
    sequence_parallel: bool,
    seed: int,
    attention: Callable[..., nn.Module] | None = None,
) -> dict[int, GPT]:
    """The stages that live on this rank, by number, uninitialised.

    `attention` (None: the one the config names) makes the attention of a layer. `placement` gives
    each stage's pipeline rank. A tied table whose two stages both live here is
    one Parameter.
    """
    count = len(placement)
    attention = attention or load_attention(cfg.attention)
    ranges = stage_ranges(layers if layers is not None else split_layers(cfg, count))
    assert len(ranges) == count, (ranges, placement)
    mine = {
        stage: GPT(
            cfg,
            mesh,
            layers=ranges[stage],
            first=stage == 0,
            last=stage == count - 1,
            num_stages=count,
            sequence_parallel=sequence_parallel,
            seed=seed,
            attention=attention,
        )
        for stage in range(count)
        if placement[stage] == mesh.coords["pp"]
    }
    for made in mine.values():
        scale_to_width(made, cfg)
        if cfg.lora_rank:
            for name, param in made.named_parameters():
                param.requires_grad_(is_adapter(name))
    if cfg.tie_embeddings and count > 1 and {0, count - 1} <= mine.keys():
        shared = mine[0].embedding.weight
        give_traits(shared, _used_twice(traits_of(shared)))
        mine[count - 1].embedding.weight = shared
    return mine


def scale_to_width(stage: nn.Module, cfg: ModelConfig) -> None:
    """Make weights and learning rates of the matrices in layers those of muP, for this width.

    Yang et al. 2022 (arXiv 2203.03466), table 8, for Adam: spread times sqrt(base width / width),
    rate times base width / width. Tables, head, norms, biases and positions stay as they are. Also
    of it: `ModelConfig.attention_scale`, and logits times base width / width. It takes for granted
    that what is inside a layer grows like hidden_size.
    """
    ratio = cfg.width_ratio
    if ratio == 1:
        return
    for name, param in named_parameters(stage):
        traits = traits_of(param)
        if is_hidden_matrix(name, traits.shard.shape):
            init = partial(_times, traits.init, sqrt(ratio))
            give_traits(param, replace(traits, init=init, lr_mult=traits.lr_mult * ratio))


def _times(init: Callable[[int, Tensor], Tensor], factor: float, key: int, index: Tensor) -> Tensor:
    return init(key, index) * factor


def _used_twice(traits: Traits) -> Traits:
    """Those of a tied table both of whose stages live on one rank: tied to no other copy."""
    return replace(traits, shard=replace(traits.shard, tied=None), uses=2)
