"""The learning rate as a pure function of how far the run is."""

from __future__ import annotations

from math import cos, pi, sqrt

from megalite.core.config import OptimConfig


def learning_rate(
    cfg: OptimConfig, *, done: float, warmup: float, total: float, step: float = 1.0
) -> float:
    """Rate of the step that ends at `done` of `total`, the first `warmup` linear from 0.

    All in steps, or all in tokens; `step` is the length of one step. cosine and linear reach
    min_lr_ratio x lr with the last step; wsd stays at lr and falls linearly over its last share (Hu
    et al. 2024, arXiv 2404.06395); inverse-square-root falls as sqrt(warmup / done), counted from
    the first step where there is no warmup (Vaswani et al. 2017).
    """
    if done < warmup:
        return cfg.lr * done / warmup
    floor = cfg.lr * cfg.min_lr_ratio
    share = min(1.0, (done - warmup) / (total - warmup)) if total > warmup else 1.0
    if cfg.lr_decay == "cosine":
        return floor + (cfg.lr - floor) * 0.5 * (1 + cos(pi * share))
    if cfg.lr_decay == "linear":
        return floor + (cfg.lr - floor) * (1 - share)
    if cfg.lr_decay == "wsd":
        # A warmup that reaches into the decay leaves it less time, not a jump.
        decay = min(total * cfg.wsd_decay_share, total - warmup)
        left = min(1.0, max(0.0, total - done) / decay) if decay > 0 else 0.0
        return floor + (cfg.lr - floor) * left
    if cfg.lr_decay == "inverse-square-root":
        anchor = max(warmup, step)
        return max(floor, cfg.lr * sqrt(anchor / max(done, anchor)))
    return cfg.lr
